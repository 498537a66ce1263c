"""What a registry sends is a claim until the whole blob was found to have its digest.

A hostile registry serves wrong bytes under the digest of an honest image.  Nobody but its own users
ever meets them, and a command that has read everything does not say that all is well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio

import pyerofs
import pyerofs.aio
from pyerofs.errors import ErofsError, SourceError
from pyerofs.sources.cache.blobstore import BlobStore
from pyerofs.sources.cache.store import Claimed
from pyerofs.system.private import PrivateDirectory
from tests.fuse.mounting import COMMAND as FUSE
from tests.fuse.mounting import assert_refused, cleaned, run, wait_until
from tests.handmade import noise
from tests.manifests import golden
from tests.remote import oci
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import HANG, ROOT, SEGMENT, access, big, command, spec
from tests.remote.server import Content, Fault, Request, Response, Server, Site
from tests.remote.tls import Authority

BIG = big()
TRAILED = BIG.image + noise(3 << 20, seed=3)  # behind the image there is what no file needs
FAR = 68  # MiB: more than is kept in memory where there is no cache
AT = SEGMENT + (2 << 20) + 12345  # a byte of /big

can_mount = pytest.mark.skipif(
    importlib.util.find_spec("pyfuse3") is None
    or not FUSE.exists()
    or shutil.which("fusermount3") is None
    or not os.access("/dev/fuse", os.R_OK | os.W_OK),
    reason="can't mount here",
)
Done = subprocess.CompletedProcess[str]


# --- what is served ---------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    """The same with one bit wrong."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def misspelt(data: bytes) -> bytes:
    """The same with another content of /small, which lies in the first segment."""
    assert data.count(b"small\n") == 1
    return data.replace(b"small\n", b"wrong\n")


def pretending(right: bytes, served: bytes | None = None) -> Pretend:
    """A registry with an image ``app:1``; it may serve other bytes under the blob's digest."""
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.image(right))
    if served is not None:
        registry.blobs[oci.digest_of(right)] = served
    return registry


def serving(right: bytes, served: bytes | None = None) -> Server:
    """The same on a port."""
    return serve(pretending(right, served))


def image_in(server: Server) -> str:
    return f"oci://{server.authority}/app:1"


def flipping(at: int) -> Fault:
    """One certain byte is wrong, in whatever range it comes."""

    def fault(request: Request, site: Site) -> Response:
        response = site(request)
        assert request.range is not None
        body = bytearray(response.body)
        body[at - request.range[0]] ^= 1
        return replace(response, body=bytes(body))

    return fault


def with_byte(at: int) -> Callable[[Request], bool]:
    """Whether a certain byte is asked for."""

    def asked(request: Request) -> bool:
        if request.range is None or "/blobs/" not in request.path:
            return False
        first, end = request.range
        return first <= at and (end is None or at < end)

    return asked


# --- what comes of it -------------------------------------------------------------------------


@pytest.fixture(name="out")
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def tar(what: object, out: Path, *words: object) -> tuple[Done, bytes]:
    """Write the whole tree; the command's end, and the archive."""
    path = out / "found.tar"
    path.unlink(missing_ok=True)
    done = command("tar", "--insecure", what, "-o", path, *words)
    assert "Traceback" not in done.stderr
    return done, path.read_bytes() if path.exists() else b""


def read(what: str, path: str = "/small", **fields: Any) -> bytes:
    """A file's content, in this process.  Raises ErofsError."""
    seconds = fields.pop("timeout", 20.0)
    with pyerofs.open(spec(what, **fields), access=access(timeout=seconds)) as image:
        return image.read(path)


def assert_right(found: tuple[Done, bytes], want: bytes) -> None:
    done, archive = found
    assert (done.returncode, done.stderr) == (0, "")
    assert archive == want


def assert_digest(done: Done) -> None:
    """It failed, and said in one line that the blob is not what its digest says."""
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "sockets left out" not in line]
    assert len(lines) == 1, done.stderr
    assert "digest" in lines[0]
    assert "Traceback" not in done.stderr


def assert_not_wrong(found: tuple[Done, bytes], want: bytes) -> None:
    """It may have failed, in one line; but it is never wrong and content."""
    done, archive = found
    if done.returncode:
        assert_digest(done)
    else:
        assert archive == want


@pytest.fixture(name="right", scope="module")
def right_archive(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], bytes]:
    """What ``tar`` makes of an image that lies in a file."""
    directory = tmp_path_factory.mktemp("right")
    known: dict[str, bytes] = {}

    def right(data: bytes) -> bytes:
        name = sha256(data).hexdigest()
        if name not in known:
            image, archive = directory / name, directory / f"{name}.tar"
            image.write_bytes(data)
            assert command("tar", image, "-o", archive).returncode == 0
            known[name] = archive.read_bytes()
        return known[name]

    return right


Right = Callable[[bytes], bytes]


# --- one poisons the other --------------------------------------------------------------------

FIRST = [["ls"], ["cat", "small", "big"], ["tar"], ["check"]]


class TestPoison:
    @pytest.mark.parametrize("words", FIRST, ids=" ".join)
    def test_of_one_registry_is_not_met_in_another(
        self, out: Path, right: Right, words: list[str]
    ) -> None:
        wrong = flipped(misspelt(BIG.image), AT)
        with serving(BIG.image, wrong) as hostile, serving(BIG.image) as honest:
            verb, *rest = words
            command(verb, "--insecure", image_in(hostile), *rest)
            assert_right(tar(image_in(honest), out), right(BIG.image))

    def test_of_one_repository_is_not_met_in_another_of_the_same_registry(
        self, out: Path, right: Right
    ) -> None:
        honest = pretending(BIG.image)
        hostile = Pretend()
        oci.publish(hostile, "evil", "1", oci.image(BIG.image))
        hostile.blobs[oci.digest_of(BIG.image)] = misspelt(BIG.image)

        def both(request: Request) -> Response:
            return (hostile if "/v2/evil/" in request.path else honest)(request)

        with Server(both) as server:
            evil = f"oci://{server.authority}/evil:1"
            assert command("ls", "--insecure", evil).returncode == 0
            assert_right(tar(image_in(server), out), right(BIG.image))

    def test_of_one_user_s_registry_is_not_met_by_readers_in_the_middle(self) -> None:
        """Both are open at the same time, in one process."""
        wrong = flipped(misspelt(BIG.image), AT)
        with (
            serving(BIG.image, wrong) as hostile,
            serving(BIG.image) as honest,
            pyerofs.open(spec(image_in(hostile)), access=access()) as theirs,
            pyerofs.open(spec(image_in(honest)), access=access()) as ours,
        ):
            for offset in range(0, len(BIG.content), SEGMENT):
                with suppress(SourceError):  # it may have been found out
                    theirs.read("/big", offset, 100)
                assert ours.read("/big", offset, SEGMENT) == BIG.content[offset:][:SEGMENT]
            assert ours.read("/small") == b"small\n"

    def test_does_not_reach_those_who_have_the_blob_already(self, out: Path, right: Right) -> None:
        """What was verified is shared: the hostile registry is not even asked for the blob."""
        with serving(BIG.image) as honest:
            assert_right(tar(image_in(honest), out), right(BIG.image))
        with serving(BIG.image, flipped(misspelt(BIG.image), AT)) as hostile:
            assert_right(tar(image_in(hostile), out), right(BIG.image))
            assert hostile.of("/blobs/") == []

    def test_does_not_mix_with_what_is_there_in_part(self, out: Path, right: Right) -> None:
        with (
            serving(BIG.image) as honest,
            serving(BIG.image, flipped(BIG.image, AT)) as hostile,
        ):
            assert command("cat", "--insecure", image_in(honest), "small").stdout == "small\n"
            assert_digest(tar(image_in(hostile), out)[0])
            assert_right(tar(image_in(honest), out), right(BIG.image))
            assert_right(tar(image_in(hostile), out), right(BIG.image))  # the verified copy

    def test_is_not_believed_the_next_time(self, out: Path) -> None:
        with serving(BIG.image, flipped(BIG.image, AT)) as hostile:
            for _ in range(3):
                assert_digest(tar(image_in(hostile), out)[0])

    def test_of_what_the_registry_itself_mends(self, out: Path, right: Right) -> None:
        """The same registry serves right bytes later: nobody has to empty the cache."""
        registry = pretending(BIG.image, flipped(BIG.image, AT))
        with serve(registry) as server:
            assert_digest(tar(image_in(server), out)[0])
            registry.blobs[oci.digest_of(BIG.image)] = BIG.image
            assert_right(tar(image_in(server), out), right(BIG.image))


class TestSizes:
    """A manifest says what size a blob of an honest digest has; anybody can write a manifest."""

    @pytest.mark.parametrize(
        ("size", "before"),
        [
            (1, False),
            (4096, False),
            (len(BIG.image) - 1, True),
            (len(BIG.image) + 1, False),
            (1 << 33, False),
        ],
    )
    @pytest.mark.parametrize("place", ["evil:1", "app:lie"])
    def test_that_are_wrong_shut_nobody_out(self, size: int, before: bool, place: str) -> None:
        """Whether the lie is in another repository or, under another tag, in the same one."""
        registry = pretending(BIG.image)
        lie = oci.manifest(oci.layer(BIG.image, size=size))
        name, _, tag = place.partition(":")
        oci.publish(registry, name, tag, lie)
        with serve(registry) as server:
            if before:
                assert read(image_in(server)) == b"small\n"
            with suppress(ErofsError):
                read(f"oci://{server.authority}/{place}", "/big")
            for _ in range(2):
                assert read(image_in(server), "/big") == BIG.content
                assert read(image_in(server)) == b"small\n"


# --- a whole pass -----------------------------------------------------------------------------

WHOLE = ["tar", "extract", "check"]
KEPT = [
    (verb, *words)
    for verb in WHOLE
    for words in ([], ["--no-cache"], ["--cache-limit=4M"])
    if verb == "tar" or not words
]
WRONG = {"file": (BIG.image, AT), "tail": (TRAILED, len(BIG.image) + (1 << 20) + 5)}


def whole(verb: str, what: str, out: Path, *words: str) -> Done:
    """Run a command that goes through the whole image."""
    rest: dict[str, list[object]] = {
        "tar": ["-o", out / "found.tar"], "extract": ["-q", "-C", out], "check": ["-q"],
    }  # fmt: skip
    return command(verb, "--insecure", what, *rest[verb], *words)


class TestWhole:
    @pytest.mark.parametrize("words", KEPT, ids=" ".join)
    @pytest.mark.parametrize("where", WRONG)
    def test_is_an_error_where_a_byte_is_wrong(
        self, out: Path, words: tuple[str, ...], where: str
    ) -> None:
        data, at = WRONG[where]
        verb, *rest = words
        with serving(data, flipped(data, at)) as hostile:
            assert_digest(whole(verb, image_in(hostile), out, *rest))

    @pytest.mark.parametrize("words", KEPT, ids=" ".join)
    def test_is_none_where_all_are_right(self, out: Path, words: tuple[str, ...]) -> None:
        verb, *rest = words
        with serving(TRAILED) as server:
            done = whole(verb, image_in(server), out, *rest)
            assert (done.returncode, done.stderr) == (0, "")
            if not rest:  # everything once
                assert sum(r.sent for r in server.of("/blobs/")) <= len(TRAILED) + SEGMENT

    @pytest.mark.parametrize("device", [0, 1])
    def test_of_an_image_with_a_device(self, out: Path, device: int) -> None:
        want = golden("blobdev")
        paths = (want.image, *want.devices)
        registry = Pretend()
        for i, path in enumerate(paths):
            data = path.read_bytes()
            oci.publish(registry, "app", f"d{i}", oci.image(data))
            if i == device:
                registry.blobs[oci.digest_of(data)] = data[:-1] + bytes([data[-1] ^ 1])
        with serve(registry) as server:
            images = [f"oci://{server.authority}/app:d{i}" for i in range(len(paths))]
            devices = [f"--device={name}" for name in images[1:]]
            assert_digest(tar(images[0], out, f"--offset={want.offset}", *devices)[0])

    def test_of_more_than_memory_holds(self, out: Path, right: Right) -> None:
        far = big(FAR)
        registry = pretending(far.image)
        with serve(registry) as server:
            assert_right(tar(image_in(server), out, "--no-cache"), right(far.image))
            registry.blobs[oci.digest_of(far.image)] = flipped(far.image, len(far.image) - 5)
            assert_digest(tar(image_in(server), out, "--no-cache")[0])


# how often the byte is right before it is wrong, and how often that is
FACES: dict[str, tuple[int, int | None, list[str]]] = {
    "wrong at first": (0, 1, []),
    "right for --verify": (1, None, ["--verify"]),
}


class TestTwoFaces:
    """Who asks twice for the same byte may get two answers: what is verified must be what is used."""

    @pytest.mark.parametrize("face", FACES)
    def test_of_what_the_cache_does_not_keep(self, out: Path, right: Right, face: str) -> None:
        skip, times, words = FACES[face]
        with serving(BIG.image) as server:
            server.inject(flipping(AT), when=with_byte(AT), skip=skip, times=times)
            found = tar(image_in(server), out, "--cache-limit=2M", *words)
            assert_not_wrong(found, right(BIG.image))

    @pytest.mark.parametrize("face", FACES)
    def test_of_what_memory_does_not_keep(self, out: Path, right: Right, face: str) -> None:
        skip, times, words = FACES[face]
        far = big(FAR)
        with serving(far.image) as server:
            server.inject(flipping(AT), when=with_byte(AT), skip=skip, times=times)
            found = tar(image_in(server), out, "--no-cache", *words)
            assert_not_wrong(found, right(far.image))


# --- verified on request ----------------------------------------------------------------------

VERBS = [
    ["info"], ["ls"], ["tree"], ["stat", "small"], ["cat", "small"], ["extract", "small"],
    ["tar"], ["check"], ["dump"],
]  # fmt: skip


class TestVerify:
    @pytest.mark.parametrize("words", VERBS, ids=" ".join)
    def test_uses_no_byte_of_a_wrong_blob(self, out: Path, words: list[str]) -> None:
        data, at = WRONG["tail"]
        with serving(data, flipped(data, at)) as hostile:
            verb, *rest = words
            there = ["-C", str(out)] if verb == "extract" else []
            done = command(verb, "--verify", "--insecure", image_in(hostile), *rest, *there)
            assert_digest(done)
            assert done.stdout == ""
            assert list(out.iterdir()) == []

    @pytest.mark.parametrize("words", [(), ("--no-cache",)], ids=str)
    def test_of_one_file_fetches_the_rest_too(self, words: tuple[str, ...]) -> None:
        data, at = WRONG["tail"]
        registry = pretending(data)
        with serve(registry) as server:
            given = ["cat", "--verify", "--insecure", image_in(server), "small", *words]
            done = command(*given)
            assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")
            sent = sum(r.sent for r in server.of("/blobs/"))
            assert len(data) <= sent <= len(data) + SEGMENT
            registry.blobs[oci.digest_of(data)] = flipped(data, at)
            server.forget()
            done = command(*given)
            if words:
                assert_digest(done)
                assert done.stdout == ""
            else:  # it is known to be right, from before
                assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")
                assert server.of("/blobs/") == []

    def test_of_what_was_claimed_before(self) -> None:
        """Bytes that were read unverified are verified, too."""
        registry = pretending(BIG.image, misspelt(BIG.image))
        with serve(registry) as server:
            assert command("cat", "--insecure", image_in(server), "small").returncode == 0
            registry.blobs[oci.digest_of(BIG.image)] = BIG.image
            done = command("cat", "--verify", "--insecure", image_in(server), "small")
            if done.returncode:
                assert_digest(done)
                assert done.stdout == ""
            else:
                assert done.stdout == "small\n"

    def test_is_refused_for_a_url(self) -> None:
        with Server(Content(BIG.image)) as server:
            done = command("ls", "--verify", server.url)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert "--verify" in done.stderr
        assert server.authority in done.stderr

    def test_means_nothing_for_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "image"
        path.write_bytes(BIG.image)
        done = command("ls", "--verify", path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == command("ls", path).stdout

    @can_mount
    def test_of_a_mount(self, tmp_path: Path) -> None:
        data, at = WRONG["tail"]
        registry = pretending(data, flipped(data, at))
        with serve(registry) as server, cleaned(tmp_path / "mnt") as where:
            words: list[str | Path] = ["--verify", "--insecure", image_in(server), where]
            done = run(*words)
            assert_refused(done, where)
            assert "digest" in done.stderr
            registry.blobs[oci.digest_of(data)] = data
            done = run(*words)
            assert (done.returncode, done.stderr) == (0, "")
            assert (where / "small").read_bytes() == b"small\n"

    def test_of_an_export(self) -> None:
        data, at = WRONG["tail"]
        with serving(data, flipped(data, at)) as hostile:
            given = ["--stdio", "--verify", "--insecure", image_in(hostile)]
            done = subprocess.run(
                [sys.executable, "-m", "pyerofs_nbd", *given],
                capture_output=True, text=True, timeout=HANG, check=False, cwd=ROOT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        assert_digest(done)
        assert done.stdout == ""


# --- who the peer was -------------------------------------------------------------------------


@dataclass(frozen=True)
class Authorities:
    """Who signs certificates for 127.0.0.1."""

    impostor: Authority
    honest: Authority


@pytest.fixture(name="authorities", scope="module")
def make_authorities(tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    return Authorities(*(Authority(tmp_path_factory.mktemp(n)) for n in ("impostor", "honest")))


# how the impostor was met, and the honest server afterwards
WAYS = {
    "--insecure, then --cacert": ("--insecure", "--cacert"),
    "--insecure, then the system's": ("--insecure", "system"),
    "one --cacert, then another": ("--cacert", "--cacert"),
    "a file that changes": ("file", "file"),
}


class Trust:
    """Reads /small, trusting somebody in some way."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = directory / "trusted.crt"
        self._monkeypatch = monkeypatch

    def read(self, way: str, authority: Authority, what: str, **fields: Any) -> bytes:
        """Raises SourceError."""
        if way == "--insecure":
            return read(what, **fields)
        fields["insecure"] = False
        if way == "system":
            self._monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
            self._monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
            return read(what, **fields)
        certificate = authority.certificate
        if way == "file":
            certificate = Path(shutil.copy(certificate, self._file))
        return read(what, cacert=str(certificate), **fields)


@pytest.fixture(name="trust")
def truster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trust:
    return Trust(tmp_path, monkeypatch)


def site_of(kind: str, right: bytes, served: bytes | None = None) -> Site:
    """A registry, or a page: with whatever content, the version looks the same."""
    return pretending(right, served) if kind == "registry" else Content(served or right)


@contextmanager
def secure(site: Site, authority: Authority, port: int = 0) -> Iterator[Server]:
    with Server(site, tls=authority.context("127.0.0.1"), port=port) as server:
        yield server


def named(kind: str, server: Server) -> str:
    return image_in(server) if kind == "registry" else f"{server.url}/image"


@pytest.mark.parametrize("kind", ["url", "registry"])
class TestPeers:
    @pytest.mark.parametrize("way", WAYS)
    def test_bytes_of_an_impostor_are_not_met_by_who_checks(
        self, trust: Trust, authorities: Authorities, kind: str, way: str
    ) -> None:
        """The same address, path, version and size; only the certificate tells them apart."""
        before, after = WAYS[way]
        with secure(site_of(kind, TRAILED, misspelt(TRAILED)), authorities.impostor) as server:
            port, what = server.port, named(kind, server)
            assert trust.read(before, authorities.impostor, what) == b"wrong\n"
            trust.read(before, authorities.impostor, what, path="/big")
        with secure(site_of(kind, TRAILED), authorities.honest, port):
            assert trust.read(after, authorities.honest, what) == b"small\n"

    @pytest.mark.parametrize("way", WAYS)
    def test_answers_of_an_impostor_are_not_taken_where_nobody_answers(
        self, trust: Trust, authorities: Authorities, kind: str, way: str
    ) -> None:
        """What the impostor had is in order in itself, and complete: but it is not what was meant."""
        before, after = WAYS[way]
        with secure(site_of(kind, misspelt(BIG.image)), authorities.impostor) as server:
            what = named(kind, server)
            trust.read(before, authorities.impostor, what, path="/big")
            assert trust.read(before, authorities.impostor, what) == b"wrong\n"
        with pytest.raises(SourceError):
            trust.read(after, authorities.honest, what, timeout=3.0)

    @pytest.mark.parametrize("way", ["--insecure", "--cacert", "system"])
    def test_answers_and_bytes_of_the_same_peer_are_used_again(
        self,
        trust: Trust,
        authorities: Authorities,
        kind: str,
        way: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with secure(site_of(kind, TRAILED), authorities.honest) as server:
            what = named(kind, server)
            trust.read(way, authorities.honest, what, path="/big")
        assert not caplog.records
        assert trust.read(way, authorities.honest, what, timeout=3.0) == b"small\n"
        assert caplog.records  # nobody could be asked

    def test_where_a_certificate_lies_does_not_matter(
        self, tmp_path: Path, authorities: Authorities, kind: str
    ) -> None:
        copy = tmp_path / "copy.crt"
        shutil.copy(authorities.honest.certificate, copy)
        with secure(site_of(kind, TRAILED), authorities.honest) as server:
            what = named(kind, server)
            known: dict[str, Any] = {"insecure": False, "path": "/big"}
            assert read(what, cacert=str(authorities.honest.certificate), **known) == BIG.content
            server.forget()
            assert read(what, cacert=str(copy), **known) == BIG.content
            assert server.sent < len(BIG.image) / 2  # a URL's beginning comes with the news


# --- what older versions left -----------------------------------------------------------------

OLD_HEADER = struct.Struct("<8sIIQI")  # magic, version, segment size, blob size, state
OLD_MARK = struct.Struct("<II")
OLD_PRESENT = 0x50524553
OLD_FILLING, OLD_COMPLETE = 0, 1


def old_blob(directory: Path, key: str, data: bytes, state: int) -> None:
    """A whole blob as versions before this one kept it."""
    for name in ("blobs", "documents", "answers"):
        (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    base = directory / "blobs" / key.replace(":", "-")
    base.with_suffix(".data").write_bytes(data)
    header = OLD_HEADER.pack(b"PYEROFSM", 1, SEGMENT, len(data), state)
    about = json.dumps({"key": key, "name": "an image", "since": 1_790_000_000}).encode()
    marks = [
        OLD_MARK.pack(OLD_PRESENT, zlib.crc32(data[at : at + SEGMENT]))
        for at in range(0, len(data), SEGMENT)
    ]
    base.with_suffix(".map").write_bytes((header + about).ljust(4096) + b"".join(marks))


def old_answer(directory: Path, question: str, answer: dict[str, Any]) -> None:
    """What a reference or a URL led to."""
    path = directory / "answers" / f"{sha256(question.encode()).hexdigest()}.json"
    path.write_text(json.dumps(answer))


def old_directory() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "pyerofs"


class TestOldCaches:
    @pytest.mark.parametrize("state", [OLD_FILLING, OLD_COMPLETE], ids=["filling", "complete"])
    def test_of_a_registry_are_not_believed(self, out: Path, right: Right, state: int) -> None:
        old_blob(old_directory(), oci.digest_of(BIG.image), misspelt(BIG.image), state)
        with serving(BIG.image) as server:
            done = command("cat", "--insecure", image_in(server), "small")
            assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")
            assert_right(tar(image_in(server), out), right(BIG.image))

    def test_of_a_url_are_not_believed_by_who_checks_certificates(
        self, authorities: Authorities
    ) -> None:
        with secure(Content(BIG.image), authorities.honest) as server:
            url = f"{server.url}/image"
            text = "\n".join((url, '"first"', "", str(len(BIG.image))))
            key = f"url:{sha256(text.encode()).hexdigest()}"
            old_blob(old_directory(), key, misspelt(BIG.image), OLD_FILLING)
            done = command("cat", url, "small", "--cacert", authorities.honest.certificate)
            assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")

    def test_answer_nobody_who_checks_certificates(self, authorities: Authorities) -> None:
        """They don't tell who gave the answers."""
        other = misspelt(BIG.image)
        made = oci.image(other)
        with secure(pretending(BIG.image), authorities.honest) as server:
            what, place = image_in(server), f"{server.authority}/app:1"
        old_blob(old_directory(), oci.digest_of(other), other, OLD_COMPLETE)
        document = old_directory() / "documents" / made.digest.replace(":", "-")
        document.write_bytes(made.blob.data)
        old_answer(old_directory(), place, {"digest": made.digest})
        words = ["--timeout", "3", "--cacert", authorities.honest.certificate]
        done = command("cat", what, "small", *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1

    def test_can_be_listed_and_removed(self) -> None:
        directory = old_directory()
        old_blob(directory, oci.digest_of(BIG.image), BIG.image, OLD_COMPLETE)
        done = command("cache", "ls")
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
        done = command("cache", "rm", "--all")
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)
        left = [p for p in directory.rglob("*") if p.suffix in (".data", ".map")]
        assert left == []


# --- what is said of it -----------------------------------------------------------------------


def statuses(what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an image says of its source at first, and when all has been read and looked at."""

    async def main() -> tuple[dict[str, Any], dict[str, Any]]:
        async with pyerofs.aio.open(spec(what), access=access()) as image:
            (first,) = image.status()
            for offset in range(0, len(BIG.content), SEGMENT):
                await image.read("/big", offset, SEGMENT)
            for _ in range(200):
                (last,) = image.status()
                if last.get("verified", False) or not what.startswith("oci:"):
                    break
                await trio.sleep(0.02)
            return first, last

    return trio.run(main)


class TestStatus:
    def test_of_a_blob_that_is_read_whole(self) -> None:
        with serving(BIG.image) as server:
            first, last = statuses(image_in(server))
        assert first["verified"] is False
        assert last["verified"] is True
        with serving(BIG.image) as server:  # and elsewhere it is known from then on
            first, _ = statuses(image_in(server))
        assert first["verified"] is True

    def test_of_a_page_is_never_verified(self) -> None:
        with Server(Content(BIG.image)) as server:
            found = statuses(server.url)
        assert [status.get("verified", False) for status in found] == [False, False]

    @can_mount
    def test_of_a_mount(self, tmp_path: Path) -> None:
        with serving(BIG.image) as server, cleaned(tmp_path / "mnt") as where:
            done = run("--insecure", "--prefetch=none", image_in(server), where)
            assert (done.returncode, done.stderr) == (0, "")

            def verified() -> object:
                found = json.loads(command("mounts", "--json").stdout)
                (mine,) = [m for m in found if m["mountpoint"] == str(where)]
                (source,) = mine["sources"]
                return source["verified"]

            assert verified() is False
            assert (where / "big").read_bytes() == BIG.content
            assert wait_until(verified)


def test_a_verified_blob_that_loses_a_segment_is_not_verified_any_more(tmp_path: Path) -> None:
    """The process that has verified it fetches the segment again, from a server that claims it."""
    folder = PrivateDirectory.open(str(tmp_path / "private"), create=True)
    right = noise(2 * SEGMENT, seed=5)
    digest = f"sha256:{sha256(right).hexdigest()}"
    claimed = Claimed(folder.copy(), "blob", len(right), {}, vouched=True)
    store = BlobStore("blob", len(right), digest, claimed=lambda: claimed)
    for number in range(2):
        store.put(number, right[number * SEGMENT : (number + 1) * SEGMENT])
    assert store.settle()
    found = [store.verified]
    with (tmp_path / "private" / "blob.data").open("r+b") as f:
        f.write(b"damaged")
    claimed.forget(0)  # as a read does that finds the damage
    found.append(store.verified)
    store.put(0, bytes(SEGMENT))  # another segment than the one that was verified
    assert store.read(0, 4) == bytes(4)
    found.append(store.verified)
    assert found == [True, False, False]
    store.close()
    folder.close()
