"""What a server may cost us, whatever it claims or sends: no more memory, disk or time than was agreed.

The servers here claim sizes that nobody has, send without end, or send so slowly that it comes to the
same.  Commands run with little memory and with a limit on the files they write, so that nothing
worse happens where they fall for it.
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.remote import faults, oci
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import ROOT, SEGMENT, big
from tests.remote.server import Content, Fault, Request, Response, Server, Site, anything

BIG = big()
HUGE = [2**44 + 1, 2**50, 2**52, 2**60, 10**18]
ENDS = 30  # seconds in which any command here ends
ADDRESSES = 1 << 30  # bytes that a command may map
MEMORY = 200 << 20  # bytes that it may really use
FILE = 64 << 20  # bytes of the largest file that it may write
ETAGS = {"ETag": {"ETag": '"a"'}, "no ETag": {}}
SLACK = 16 << 20  # bytes that are under way: in the buffers of sockets and the like


# --- commands with limits ---------------------------------------------------------------------


@dataclass
class Ended:
    """How a command has ended."""

    status: int | None  # None: it had to be killed
    out: bytes
    err: str
    memory: int = 0  # bytes
    stored: int = 0  # bytes that its cache has had on disk at most


# between us and the command: what a process was before it became another counts with it
_MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "pyerofs", *sys.argv[2:]])
_, status, used = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as f:
    f.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss}")
"""


def limited(directory: Path, *words: object, file: int = FILE, watch: bool = False) -> Ended:
    """Run ``pyerofs WORD …`` with all that it keeps in a directory.  ``watch`` what it stores."""
    found, out, err = (directory / f"measured.{end}" for end in ("txt", "out", "err"))
    cache = directory / "cache"
    (directory / "tmp").mkdir(exist_ok=True)
    private = {
        "PATH": os.environ["PATH"], "HOME": str(directory), "TMPDIR": str(directory / "tmp"),
        "XDG_CACHE_HOME": str(cache), "MALLOC_ARENA_MAX": "2",
    }  # fmt: skip
    command = [sys.executable, "-c", _MEASURE, found, *words]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            cwd=ROOT, env=private, start_new_session=True,
            preexec_fn=functools.partial(_limit, file),
        )  # fmt: skip
        stored, end = 0, time.monotonic() + ENDS
        while process.poll() is None and time.monotonic() < end:
            if watch:
                stored = max(stored, _stored(directory, process.pid))
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status, memory = map(int, found.read_text().split()) if found.exists() else (None, 0)
    message = err.read_bytes()[-20_000:].decode("utf-8", "surrogateescape")
    return Ended(status, out.read_bytes(), message, memory << 10, stored)


def _limit(file: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))


def _stored(directory: Path, session: int) -> int:
    """What is in the cache and what is open without a name, in bytes on disk."""
    found: dict[tuple[int, int], int] = {}
    places = [*(directory / "cache").rglob("*"), *(directory / "tmp").iterdir()]
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getsid(int(process.name)) == session:
                places += [
                    fd
                    for fd in (process / "fd").iterdir()
                    if str(directory) in os.readlink(fd) and "measured" not in os.readlink(fd)
                ]
        except OSError:
            pass
    for place in places:
        try:
            status = place.stat()
        except OSError:
            continue
        found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def assert_refused(done: Ended, *words: str) -> None:
    """It has ended by itself, with one line, and has taken little memory."""
    assert done.status is not None, f"it does not end; {done.err[-500:]}"
    assert "Traceback" not in done.err, done.err[-1500:]
    assert (done.status, done.out) == (1, b"")
    assert done.err.count("\n") == 1, done.err
    assert done.memory < MEMORY, f"{done.memory >> 20} MiB"
    for word in words:
        assert word in done.err


# --- servers without end ----------------------------------------------------------------------


@dataclass
class Stream(Response):
    """A body that is made while it is sent.  ``pause`` before each piece, in seconds."""

    pieces: Iterator[bytes] = field(default_factory=lambda: iter(()))
    chunked: bool = False
    pause: float = 0.0


class Streaming(Server):
    """A server that has Streams, too."""

    def _send(self, connection: socket.socket, request: Request, response: Response) -> bool:
        if not isinstance(response, Stream):
            return super()._send(connection, request, response)
        request.status = response.status
        headers = response.headers | {"Connection": "close"}
        if response.chunked:
            headers["Transfer-Encoding"] = "chunked"
        lines = [f"HTTP/1.1 {response.status} As asked"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        for piece in response.pieces:
            if self._stopping.wait(response.pause):
                break
            request.sent += len(piece)
            framed = b"%x\r\n%b\r\n" % (len(piece), piece) if response.chunked else piece
            connection.sendall(framed)
        return False


def endless(data: bytes = b"", piece: int = 256 << 10) -> Iterator[bytes]:
    """Some bytes, and then zeros for ever."""
    for at in range(0, len(data), piece):
        yield data[at : at + piece]
    zeros = bytes(piece)
    while True:
        yield zeros


def drop(data: bytes) -> Iterator[bytes]:
    """One byte at a time, for ever."""
    for byte in data:
        yield bytes([byte])
    while True:
        yield b"\0"


def streaming(
    status: int, headers: Mapping[str, str], pieces: Callable[[], Iterator[bytes]], **how: Any
) -> Site:
    """A site with that stream."""

    def site(request: Request) -> Response:
        return Stream(status, dict(headers), pieces=pieces(), **how)

    return site


def instead(site: Site) -> Fault:
    """Another site's answer."""

    def fault(request: Request, _: Site) -> Response:
        return site(request)

    return fault


def pretending(**fields: Any) -> Pretend:
    """A registry with ``app:1``; ``fields`` are more of its layer's descriptor."""
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.manifest(oci.layer(BIG.image, **fields)))
    return registry


def image_in(server: Server) -> str:
    return f"oci://{server.authority}/app:1"


def is_blob(request: Request) -> bool:
    return "/blobs/" in request.path


# --- sizes that are claimed -------------------------------------------------------------------


def claiming(size: int, cut: int | None = None) -> Site:
    """The first bytes of an image that is said to have that size."""

    def site(request: Request) -> Response:
        first, end = request.range or (0, None)
        body = BIG.image[first : end or len(BIG.image)][: len(BIG.image) - 1]
        headers = {"ETag": '"a"', "Content-Range": f"bytes {first}-{first + len(body) - 1}/{size}"}
        return Response(206, headers, body)

    return site


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "kept"), [*((size, "cache") for size in HUGE), (2**50, "memory")]
    )
    def test_in_content_range(self, tmp_path: Path, size: int, kept: str) -> None:
        words = ["--no-cache"] if kept == "memory" else []
        with Server(claiming(size)) as server:
            assert_refused(limited(tmp_path, "ls", server.url, *words, file=1 << 62))

    @pytest.mark.parametrize(
        ("size", "etag"),
        [*((size, "ETag") for size in HUGE), (2**44 + 1, "no ETag"), (2**60, "no ETag")],
    )
    def test_in_content_length(self, tmp_path: Path, size: int, etag: str) -> None:
        headers = ETAGS[etag] | {"Content-Length": str(size)}
        with Streaming(streaming(200, headers, lambda: endless(BIG.image))) as server:
            assert_refused(limited(tmp_path, "ls", server.url))
            assert server.sent < SLACK

    @pytest.mark.parametrize("size", HUGE)
    def test_in_a_manifest(self, tmp_path: Path, size: int) -> None:
        with serve(pretending(size=size)) as server:
            done = limited(tmp_path, "ls", "--insecure", image_in(server), file=1 << 62)
            assert_refused(done)

    @pytest.mark.parametrize("size", [2**50])
    def test_in_a_manifest_that_the_blob_s_server_confirms(self, tmp_path: Path, size: int) -> None:
        registry = pretending(size=size)
        with serve(registry) as server:
            server.inject(instead(claiming(size)), when=is_blob)
            done = limited(tmp_path, "ls", "--insecure", image_in(server), file=1 << 62)
            assert_refused(done)

    @pytest.mark.parametrize("size", [2**50])
    def test_in_the_answer_for_a_blob_without_one(self, tmp_path: Path, size: int) -> None:
        """A blob that the manifest does not list: its size is whatever the registry says."""
        with serve(pretending()) as server:
            server.inject(instead(claiming(size)), when=is_blob)
            words = ["--blob", "sha256:" + "1" * 64]
            done = limited(tmp_path, "ls", "--insecure", image_in(server), *words, file=1 << 62)
            assert_refused(done)

    @pytest.mark.parametrize("size", [2**50, 10**18])
    def test_of_a_packed_layer(self, tmp_path: Path, size: int) -> None:
        packed = oci.layer(zstandard.compress(BIG.image[:SEGMENT]), oci.EROFS_ZSTD, size=size)
        registry = Pretend()
        oci.publish(registry, "app", "1", oci.manifest(packed))
        with serve(registry) as server:
            assert_refused(limited(tmp_path, "ls", "--insecure", image_in(server)))

    def test_that_change_are_refused(self, tmp_path: Path) -> None:
        """The first answer is modest."""
        with Server(Content(BIG.image)) as server:
            server.inject(instead(claiming(2**50)), skip=1)
            done = limited(tmp_path, "cat", server.url, "small", "big")
            assert done.status == 1
            assert "Traceback" not in done.err
            assert done.err.count("\n") == 1


# --- more than was asked for ------------------------------------------------------------------


def too_much(first: int, last: int, total: int, **how: Any) -> Site:
    """A 206 with that range, whose body has no end."""
    headers = {"ETag": '"first"', "Content-Range": f"bytes {first}-{last}/{total}"}
    return streaming(206, headers, lambda: endless(BIG.image[first:]), **how)


LAST = len(BIG.image) - 1
# what a 206 says that was asked for the first segment
GREEDY = {
    "all of it": (0, LAST, LAST + 1),
    "one byte more": (0, SEGMENT, LAST + 1),
    "one byte more, and whole": (0, SEGMENT, SEGMENT + 1),
    "a terabyte": (0, (1 << 40) - 1, 1 << 40),
    "what was asked for": (0, SEGMENT - 1, LAST + 1),
}


class TestMoreThanAsked:
    @pytest.mark.parametrize("how", GREEDY)
    @pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
    def test_at_first(self, tmp_path: Path, how: str, chunked: bool) -> None:
        with Streaming(too_much(*GREEDY[how], chunked=chunked)) as server:
            assert_refused(limited(tmp_path, "ls", server.url))
            assert server.sent < SLACK

    def test_at_first_and_in_order_otherwise(self, tmp_path: Path) -> None:
        """It has a length and an end; but nobody asked for it."""

        def site(request: Request) -> Response:
            return Content(BIG.image)(replace(request, headers={"range": "bytes=0-"}))

        with Server(site) as server:
            assert_refused(limited(tmp_path, "ls", server.url))

    @pytest.mark.parametrize("last", [LAST, (1 << 40) - 1])
    def test_later(self, tmp_path: Path, last: int) -> None:
        with Streaming(Content(BIG.image)) as server:
            server.inject(instead(too_much(SEGMENT, last, last + 1)), skip=1)
            done = limited(tmp_path, "check", "-q", server.url, "--timeout", "5")
            assert "Traceback" not in done.err
            assert done.status == 1
            assert done.memory < MEMORY
            assert server.sent < 2 * SLACK

    @pytest.mark.parametrize("words", [[], ["--blob", "sha256:" + "1" * 64]], ids=["size", "none"])
    def test_from_a_registry(self, tmp_path: Path, words: list[str]) -> None:
        with Streaming(pretending()) as server:
            server.inject(instead(too_much(0, (1 << 40) - 1, 1 << 40)), when=is_blob)
            assert_refused(limited(tmp_path, "ls", "--insecure", image_in(server), *words))
            assert server.sent < SLACK

    @pytest.mark.parametrize(
        ("what", "status"),
        [("/manifests/", 200), ("/manifests/", 503), ("/token", 200), ("/token", 404),
         ("/v2/", 200)],
    )  # fmt: skip
    def test_of_documents(self, tmp_path: Path, what: str, status: int) -> None:
        registry = pretending()
        registry.scheme = "Bearer"
        site = streaming(status, {"Content-Type": "application/json"}, lambda: endless(b"[" * 999))
        with Streaming(registry) as server:
            registry.realm = f"{server.url}/token"
            server.inject(instead(site), when=lambda r: r.path.endswith(what) or what in r.path)
            words = ["ls", "--insecure", image_in(server), "--timeout", "3"]
            assert_refused(limited(tmp_path, *words))
            assert server.sent < 3 * SLACK


# --- disk -------------------------------------------------------------------------------------

KEPT = {"cache": [], "no cache": ["--no-cache"]}


class TestDisk:
    @pytest.mark.parametrize(
        ("etag", "kept", "chunked"),
        [
            ("ETag", "cache", True),
            ("ETag", "no cache", True),
            ("no ETag", "cache", True),
            ("no ETag", "cache", False),
            ("no ETag", "no cache", False),
        ],
    )
    def test_of_what_never_ends(self, tmp_path: Path, etag: str, kept: str, chunked: bool) -> None:
        """A server that can't do ranges sends for ever."""
        site = streaming(200, ETAGS[etag], lambda: endless(BIG.image), chunked=chunked)
        with Streaming(site) as server:
            words = ["ls", server.url, "--cache-limit", "10M", *KEPT[kept]]
            done = limited(tmp_path, *words, watch=True)
            assert_refused(done, "--cache-limit")
            assert done.stored < (10 << 20) + SLACK
            assert server.sent < (10 << 20) + SLACK

    @pytest.mark.parametrize("etag", ETAGS)
    @pytest.mark.parametrize("kept", KEPT)
    def test_of_what_claims_to_be_large(self, tmp_path: Path, etag: str, kept: str) -> None:
        headers = ETAGS[etag] | {"Content-Length": str(1 << 40)}
        with Streaming(streaming(200, headers, lambda: endless(BIG.image))) as server:
            words = ["ls", server.url, "--cache-limit", "10M", *KEPT[kept]]
            assert_refused(limited(tmp_path, *words), "--cache-limit")
            assert server.sent < (10 << 20) + SLACK

    def test_of_what_is_just_too_large(self, tmp_path: Path) -> None:
        with Server(Content(BIG.image, etag=None, ranges=False)) as server:
            assert_refused(
                limited(tmp_path, "ls", server.url, "--cache-limit", "4M"), "--cache-limit"
            )
            done = limited(tmp_path, "ls", server.url, "--cache-limit", "8M")
            assert (done.status, done.out, done.err) == (0, b"big\nsmall\n", "")

    @pytest.mark.parametrize("kind", ["url", "registry"])
    def test_of_a_large_blob(self, tmp_path: Path, kind: str) -> None:
        """Read to its end, without the cache ever holding more than it may."""
        large = big(100)
        registry = Pretend()
        oci.publish(registry, "app", "1", oci.image(large.image))
        with serve(registry) if kind == "registry" else Server(Content(large.image)) as server:
            what = image_in(server) if kind == "registry" else server.url
            words = ["cat", "--insecure", what, "big", "small", "--cache-limit=10M"]
            done = limited(tmp_path, *words, file=1 << 40, watch=True)
        assert (done.status, done.err) == (0, "")
        assert done.out == large.content + b"small\n"
        assert done.stored < (10 << 20) + (8 << 20)
        left = sum(p.stat().st_blocks * 512 for p in (tmp_path / "cache").rglob("*"))
        assert left <= 11 << 20

    def test_of_several_blobs(self, tmp_path: Path) -> None:
        """What was used last stays, what was there before goes; together it is never more."""
        registry = Pretend()
        for seed in (1, 2, 3):
            oci.publish(registry, "app", str(seed), oci.image(big(6, seed).image))
        with serve(registry) as server:
            for seed in (1, 2, 3, 1):
                what = f"oci://{server.authority}/app:{seed}"
                words = ["cat", "--insecure", what, "big", "--cache-limit=10M"]
                done = limited(tmp_path, *words, watch=True)
                assert (done.status, done.out, done.err) == (0, big(6, seed).content, "")
                assert done.stored < (10 << 20) + (8 << 20)


@contextmanager
def full_disk(where: Path, how: str) -> Iterator[Path]:
    """A file system without any room, or without room for any more files."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can make small disks")
    where.mkdir()
    size = "size=1m" if how == "bytes" else "nr_inodes=2"
    words = ["mount", "-t", "tmpfs", "-o", f"{size},mode=0700", "tmpfs", str(where)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        with (where / "filler").open("wb", buffering=0) as f:
            while how == "bytes":
                try:
                    f.write(bytes(4096))
                except OSError:
                    break
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


class TestFullDisk:
    @pytest.mark.parametrize("how", ["bytes", "files"])
    @pytest.mark.parametrize("kind", ["url", "registry", "zstd", "no ranges"])
    def test_is_no_reason_not_to_read(self, tmp_path: Path, how: str, kind: str) -> None:
        """It was full before we came."""
        registry = Pretend()
        oci.publish(registry, "app", "1", oci.image(BIG.image))
        packed = oci.layer(zstandard.compress(BIG.image), oci.EROFS_ZSTD)
        made = oci.manifest(packed, diff_ids=[oci.digest_of(BIG.image)])
        oci.publish(registry, "zstd", "1", made)
        page = Content(BIG.image)
        if kind == "no ranges":
            page.ranges, page.etag = False, None

        def site(request: Request) -> Response:
            return (registry if request.path.startswith("/v2/") else page)(request)

        with full_disk(tmp_path / "disk", how) as disk, Server(site) as server:
            what = server.url + "/image"
            if kind in ("registry", "zstd"):
                name = "app" if kind == "registry" else "zstd"
                what = f"oci://{server.authority}/{name}:1"
            words = ["cat", what, "small", "big", "--insecure", "--cache-dir", disk / "cache"]
            done = limited(tmp_path, *words)
        assert "Traceback" not in done.err
        assert (done.status, done.out) == (0, b"small\n" + BIG.content), done.err
        assert 1 <= done.err.count("\n") <= 2, done.err  # warnings


# --- time -------------------------------------------------------------------------------------

SECONDS = 3  # what --timeout says
LENGTH = {"Content-Length": str(len(BIG.image))}


@dataclass(frozen=True)
class Slow:
    """A server that takes its time: what it does instead of answering, to which requests."""

    site: Site
    when: Callable[[Request], bool] = anything
    skip: int = 0
    kind: str = "url"
    verb: tuple[str, ...] = ("cat", "small", "big")


def dripping(status: int, headers: Mapping[str, str], **how: Any) -> Site:
    """A byte each half second."""
    return streaming(status, headers, lambda: drop(BIG.image), pause=0.5, **how)


def slow_headers(line: str) -> Site:
    """A head that never ends: sent as if it were a body."""

    def site(request: Request) -> Response:
        return Stream(200, {"X-Begin": line}, pieces=drop(b""), pause=0.5)

    return site


def stalled(after: int, **headers: str) -> Site:
    """The body begins, and then nothing comes any more."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    nothing = itertools.repeat(b"")
    return streaming(200, shown, lambda: itertools.chain([BIG.image[:after]], nothing), pause=0.5)


def breaking(after: int) -> Site:
    """The connection breaks off again and again, a while after it began."""
    pieces = [BIG.image[:after]] * 3
    return streaming(200, LENGTH, lambda: iter(pieces), pause=0.5)


def silent(request: Request) -> Response:
    return Response(delay=2.0 * ENDS)


def part(request: Request) -> Response:
    """A range, a byte each half second."""
    response = Content(BIG.image)(request)
    return Stream(response.status, response.headers | {"Content-Length": str(len(response.body))},
                  pieces=drop(bytes(response.body)), pause=0.5)  # fmt: skip


ETAG = {"ETag": '"a"'}
SLOW = {
    "no answer": Slow(silent),
    "no answer later": Slow(silent, skip=1),
    "no answer of a registry": Slow(silent, kind="registry"),
    "no manifest": Slow(silent, when=lambda r: "/manifests/" in r.path, kind="registry"),
    "no blob": Slow(silent, when=is_blob, kind="registry"),
    "no token": Slow(silent, when=lambda r: r.path == "/token", kind="login"),
    "no TLS": Slow(silent, kind="tls"),
    "200 by drops": Slow(dripping(200, LENGTH)),
    "200 by drops, with an ETag": Slow(dripping(200, LENGTH | ETAG)),
    "200 by drops, chunked": Slow(dripping(200, {}, chunked=True)),
    "200 by drops, chunked, with an ETag": Slow(dripping(200, ETAG, chunked=True)),
    "200 by drops without a length": Slow(dripping(200, {})),
    "200 by drops later": Slow(dripping(200, LENGTH | {"ETag": '"first"'}), skip=1),
    "206 by drops": Slow(part),
    "206 by drops later": Slow(part, skip=1),
    "a manifest by drops": Slow(
        dripping(200, {}), when=lambda r: "/manifests/" in r.path, kind="registry"
    ),
    "a token by drops": Slow(dripping(200, {}), when=lambda r: r.path == "/token", kind="login"),
    "a blob by drops": Slow(part, when=is_blob, kind="registry"),
    "a blob by drops, and whole": Slow(dripping(200, LENGTH), when=is_blob, kind="registry"),
    "a packed blob by drops": Slow(dripping(200, {}), when=is_blob, kind="zstd"),
    "stalled": Slow(stalled(3 << 20, Content_Length=LENGTH["Content-Length"])),
    "stalled, with an ETag": Slow(
        stalled(3 << 20, ETag='"a"', Content_Length=LENGTH["Content-Length"])
    ),
    "stalled without a length": Slow(stalled(3 << 20)),
    "breaking off": Slow(breaking(100)),
    "breaking off, and no more": Slow(breaking(SEGMENT)),
    "503": Slow(lambda _: Response(503)),
    "503 for a while": Slow(lambda _: Response(503, {"Retry-After": "2"})),
    "503 for an hour": Slow(lambda _: Response(503, {"Retry-After": "3600"})),
    "redirected to silence": Slow(silent, when=lambda r: r.path == "/there", kind="redirected"),
}
HEADS = {
    "a head by drops": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "a status line by drops": b"HTTP/1.1 200 ",
    "half a head": b"HTTP/1.1 206 Partial Content\r\nETag: ",
}


class Telling:
    """Says something to whoever connects, and then a byte each half second, or nothing."""

    def __init__(self, head: bytes, drops: bool) -> None:
        self._head, self._drops = head, drops
        self._over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with socket.socket() as s:  # wakes it up
            s.connect(self._socket.getsockname())
        self._socket.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._tell, args=(connection,), daemon=True).start()

    def _tell(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(self._head)
                while not self._over.wait(0.5):
                    if self._drops:
                        connection.sendall(b"x")
            except OSError:
                pass


def _serving(slow: Slow, stack: ExitStack) -> str:
    """Start the server; what to open."""
    registry = pretending()
    page = Content(BIG.image)
    if slow.kind == "login":
        registry.scheme = "Bearer"
    if slow.kind == "zstd":
        packed = oci.layer(zstandard.compress(BIG.image), oci.EROFS_ZSTD)
        oci.publish(registry, "app", "1", oci.manifest(packed))

    def site(request: Request) -> Response:
        if request.path.startswith("/v2/") or request.path == "/token":
            return registry(request)
        if slow.kind == "redirected" and request.path != "/there":
            return Response(307, {"Location": "/there"})
        return page(request)

    server = stack.enter_context(Streaming(site))
    registry.realm = f"{server.url}/token"
    server.inject(instead(slow.site), when=slow.when, skip=slow.skip)
    if slow.kind == "tls":
        return f"https://{stack.enter_context(_Mute()).authority}/image"
    return f"{server.url}/image" if slow.kind in ("url", "redirected") else image_in(server)


class _Mute:
    """Accepts connections and says nothing, not even in TLS."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.authority = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> _Mute:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture(name="outcomes", scope="module")
def run_all(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """What came of each of them.  They wait most of the time, so they do that together."""
    with ExitStack() as stack, ThreadPoolExecutor(len(SLOW) + len(HEADS)) as pool:
        urls = {name: _serving(slow, stack) for name, slow in SLOW.items()}
        for name, head in HEADS.items():
            urls[name] = stack.enter_context(Telling(head, drops=not name.startswith("half"))).url
        running = {}
        for i, (name, url) in enumerate(urls.items()):
            directory = tmp_path_factory.mktemp(f"slow-{i}")
            words = ["cat", url, "small", "big", "--insecure", "--timeout", SECONDS]
            running[name] = pool.submit(limited, directory, *words)
        return {name: future.result() for name, future in running.items()}


class TestTime:
    @pytest.mark.parametrize("name", [*SLOW, *HEADS])
    def test_is_bounded(self, outcomes: dict[str, Ended], name: str) -> None:
        done = outcomes[name]
        assert done.status is not None, f"it does not end; {done.err[-500:]}"
        assert "Traceback" not in done.err, done.err[-1500:]
        assert done.status == 1
        assert 1 <= done.err.count("\n") <= 2, done.err  # what failed, and what that was part of
        assert done.memory < MEMORY

    def test_does_not_run_out_while_something_comes(self, tmp_path: Path) -> None:
        """A download may take longer than one read."""
        with Server(Content(BIG.image, etag=None, ranges=False)) as server:
            server.inject(faults.trickle(3 << 20), when=anything, skip=1)
            words = ["cat", server.url, "small", "--timeout", "1"]
            done = limited(tmp_path, *words)
        assert (done.status, done.out, done.err) == (0, b"small\n", "")
