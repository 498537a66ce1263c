"""Caches that somebody else can change, and caches that somebody has changed: nothing outside is
touched, nothing waits for ever, and what is spoiled heals by itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pyerofs.errors import SourceError
from tests.remote import faults, oci
from tests.remote.pretend import Pretend
from tests.remote.reading import SEGMENT, access, big, command, in_threads, opened
from tests.remote.server import Content, Request, Response, Server, anything

BIG = big(2)
SOMEBODY = 4242  # a uid that is not ours
ENDS = 20  # seconds in which any command here ends; they take less than one
OURS = (".data", ".map")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
Done = subprocess.CompletedProcess[str]


@pytest.fixture(name="server", scope="module")
def registry_and_page() -> Iterator[Server]:
    """An image ``app:1``, and the same at /image."""
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.image(BIG.image))
    page = Content(BIG.image)

    def both(request: Request) -> Response:
        return (page if request.path == "/image" else registry)(request)

    with Server(both) as server:
        yield server


def sources(server: Server) -> list[str]:
    return [f"oci://{server.authority}/app:1", f"{server.url}/image"]


@dataclass(frozen=True)
class Filled:
    """A cache that has all of both, and which of its files came with which."""

    directory: Path
    of: dict[str, list[str]]


@pytest.fixture(name="filled", scope="module")
def fill_cache(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    top = tmp_path_factory.mktemp("filled")
    directory = top / "kept"
    found: dict[str, list[str]] = {}
    private = {"HOME": str(top), "XDG_CACHE_HOME": str(top), "PATH": os.environ["PATH"]}
    for what in sources(server):
        words = ["cat", what, "small", "big", "--insecure", "--cache-dir", directory]
        done = command(*words, env=private)
        assert (done.returncode, done.stderr) == (0, "")
        known = {name for names in found.values() for name in names}
        names = [str(path.relative_to(directory)) for path in files(directory)]
        found[what] = [name for name in names if name not in known]
    assert {path.suffix for path in files(directory)} >= set(OURS)
    return Filled(directory, found)


@pytest.fixture(name="directory")
def cache_directory(tmp_path: Path, filled: Filled) -> Path:
    """The cache of a test."""
    copied: Path = shutil.copytree(filled.directory, tmp_path / "kept")
    return copied


@pytest.fixture(name="fresh")
def no_cache_yet(tmp_path: Path) -> Path:
    return tmp_path / "fresh"


def run(directory: Path, verb: str, *words: object) -> Done:
    """A command with that cache.  Fails where it does not end, or ends in a traceback."""
    try:
        done = command(verb, *words, "--cache-dir", directory, timeout=ENDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"pyerofs {verb} {words[0]} did not end")
    assert "Traceback" not in done.stderr, done.stderr
    return done


def cat(directory: Path, what: str) -> Done:
    return run(directory, "cat", what, "small", "--insecure")


def assert_right(done: Done) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")


def assert_not_wrong(done: Done) -> None:
    """It may have failed."""
    assert (done.returncode, done.stdout) in ((0, "small\n"), (1, ""))
    assert done.stderr.count("\n") <= 1


def files(directory: Path) -> list[Path]:
    """All files in the cache, the caches' names being nobody's business."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())


def folders(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_dir() and not p.is_symlink())


def kind_of(path: Path) -> str:
    return path.suffix if path.suffix in OURS else "other"


def snapshot(top: Path) -> dict[str, tuple[int, int, int, str]]:
    """Everything there is: mode, owner, time of change, content."""
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        content = ""
        if stat.S_ISREG(status.st_mode):
            content = sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        name = str(path.relative_to(top))
        found[name] = (status.st_mode, status.st_uid, status.st_mtime_ns, content)
    return found


def read_right(server: Server, directory: Path) -> None:
    """In this process: all is well, whatever the cache looks like."""
    for what in sources(server):
        with opened(what, access(cache_dir=str(directory))) as image:
            assert image.read("/small") == b"small\n"
            assert image.read("/big", SEGMENT, 5000) == BIG.content[SEGMENT:][:5000]
        settle(directory)


def settle(directory: Path) -> None:
    """Images are closed in the background: wait until nothing in a directory is open any more."""
    for _ in range(1000):
        if not any(_in(directory, fd) for fd in Path("/proc/self/fd").iterdir()):
            return
        time.sleep(0.005)
    pytest.fail("the cache is still in use")


def _in(directory: Path, fd: Path) -> bool:
    try:
        return os.readlink(fd).startswith(str(directory))
    except OSError:
        return False


# --- somebody else's directory ----------------------------------------------------------------

ACTIONS = [["ls"], ["rm", "--all"], ["prune"], ["verify"]]


def belonging_to_another(directory: Path) -> None:
    os.chown(directory, SOMEBODY, SOMEBODY)


def with_mode(mode: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        directory.chmod(mode)

    return change


def through_a_link_of_another(directory: Path) -> None:
    target = directory.with_name("target")
    directory.rename(target)
    directory.symlink_to(target)
    os.chown(directory, SOMEBODY, SOMEBODY, follow_symlinks=False)


def inside(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same with what is in the directory."""

    def change_all(directory: Path) -> None:
        for path in folders(directory):
            change(path)

    return change_all


STRANGE = {
    "belongs to another": belonging_to_another,
    "group may write": with_mode(0o770),
    "all may write": with_mode(0o707),
    "link of another": through_a_link_of_another,
    "parts belong to another": inside(belonging_to_another),
    "all may write to its parts": inside(with_mode(0o777)),
}


@as_root
@pytest.mark.parametrize("how", STRANGE)
class TestDirectoriesOfOthers:
    def test_are_refused_by_all_commands(self, directory: Path, server: Server, how: str) -> None:
        """In one line, and with nothing written."""
        STRANGE[how](directory)
        before = snapshot(directory.parent)
        for words in [["ls", sources(server)[0], "--insecure"], *(["cache", *w] for w in ACTIONS)]:
            done = run(directory, *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.count("\n") == 1, done.stderr
            assert snapshot(directory.parent) == before

    def test_are_not_used_where_nobody_chose_one(
        self, directory: Path, server: Server, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """The default directory: whether it is refused or done without, nothing gets there."""
        base = directory.with_name("base")
        base.mkdir()
        shutil.move(directory, base / "pyerofs")
        monkeypatch.setenv("XDG_CACHE_HOME", str(base))
        STRANGE[how](base / "pyerofs")
        before = snapshot(base)
        done = command("cat", sources(server)[1], "small", "--insecure", timeout=ENDS)
        assert done.stderr.count("\n") == 1
        assert (done.returncode, done.stdout) in ((0, "small\n"), (1, ""))
        assert snapshot(base) == before


def test_a_link_of_our_own_is_no_danger(fresh: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    fresh.symlink_to(tmp_path / "disk")
    read_right(server, fresh)
    assert {path.suffix for path in files(tmp_path / "disk")} >= set(OURS)
    assert run(fresh, "cache", "rm", "--all").returncode == 0
    assert not [p for p in files(tmp_path / "disk") if p.suffix in OURS]


def test_new_directories_are_private(fresh: Path, server: Server) -> None:
    """Whatever the umask lets through."""
    before = os.umask(0)
    try:
        read_right(server, fresh / "deep")
    finally:
        os.umask(before)
    for path in [fresh / "deep", *folders(fresh / "deep"), *files(fresh / "deep")]:
        assert path.stat().st_mode & 0o077 == 0


# --- planted links ----------------------------------------------------------------------------

PRECIOUS = b"precious\n" * 50


class TestPlantedLinks:
    @pytest.mark.parametrize("kind", [*OURS, "other"])
    @pytest.mark.parametrize("target", ["file", "nothing"])
    def test_in_the_place_of_files_are_not_followed(
        self, directory: Path, server: Server, tmp_path: Path, kind: str, target: str
    ) -> None:
        precious = tmp_path / "precious"
        if target == "file":
            precious.write_bytes(PRECIOUS)
        for path in files(directory):
            if kind_of(path) == kind:
                path.unlink()
                path.symlink_to(precious)
        for what in sources(server):
            assert_not_wrong(cat(directory, what))
        run(directory, "cache", "verify")
        run(directory, "cache", "rm", "--all")
        assert precious.exists() == (target == "file")
        if target == "file":
            assert precious.read_bytes() == PRECIOUS

    @pytest.mark.parametrize("words", [["rm", "--all"], ["prune", "--cache-limit=0"]], ids=str)
    def test_in_the_place_of_directories_are_not_followed(
        self, directory: Path, server: Server, tmp_path: Path, words: list[str]
    ) -> None:
        """They lead to directories that look exactly like parts of a cache."""
        victims = tmp_path / "victims"
        victims.mkdir()
        for i, path in enumerate(folders(directory)):
            if path.exists():
                path.rename(victims / str(i))
                path.symlink_to(victims / str(i))
        before = snapshot(victims)
        run(directory, "cache", *words)
        for what in sources(server):
            assert_not_wrong(cat(directory, what))
        assert snapshot(victims) == before

    @as_root
    def test_are_as_bad_as_files_of_others(self, directory: Path, server: Server) -> None:
        """Whose owner, who has them open, changes them after they were looked at."""
        with ExitStack() as stack:
            theirs = []
            for path in files(directory):
                os.chown(path, SOMEBODY, SOMEBODY)
                if path.suffix == ".data":
                    theirs.append(stack.enter_context(path.open("r+b")))
            for what in sources(server):
                with suppress(SourceError), opened(what, access(cache_dir=str(directory))) as image:
                    assert image.read("/big") == BIG.content
                    for f in theirs:
                        f.seek(0)
                        f.write(os.urandom(len(BIG.image)))
                        f.flush()
                    assert image.read("/big") == BIG.content
                    assert image.read("/small") == b"small\n"


class TestRemoving:
    @pytest.mark.parametrize("words", [["rm", "--all"], ["prune", "--cache-limit=0"]], ids=str)
    def test_takes_what_is_ours_and_leaves_what_is_not(
        self, directory: Path, words: list[str]
    ) -> None:
        foreign = []
        for folder in [directory, *folders(directory)]:
            names = ["notes.txt", "a.data", "a.map", "thesis.json", ".hidden", "sha256-12.data"]
            names += ["sha256-" + "0" * 63 + ".map.orig", "x" * 64, "0" * 63 + ".json"]
            for name in names:
                (folder / name).write_bytes(PRECIOUS)
                foreign.append(folder / name)
            (folder / "mine").mkdir()
            (folder / "mine" / "precious").write_bytes(PRECIOUS)
            foreign.append(folder / "mine" / "precious")
        done = run(directory, "cache", *words)
        assert done.stderr.count("\n") <= 1
        assert [path for path in foreign if not path.exists()] == []
        assert all(path.read_bytes() == PRECIOUS for path in foreign)
        left = [p for p in files(directory) if p.suffix in OURS and p not in foreign]
        assert left == []

    def test_never_removes_directories(self, directory: Path) -> None:
        """Not even those that have the name of a file of ours."""
        made = []
        for path in files(directory):
            path.unlink()
            path.mkdir()
            (path / "precious").write_bytes(PRECIOUS)
            made.append(path / "precious")
        for words in ACTIONS:
            run(directory, "cache", *words)
        assert all(path.read_bytes() == PRECIOUS for path in made)


# --- what is no file --------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("s")
        os.rename("s", path.name)
    finally:
        os.chdir(here)


class TestWhatIsNoFile:
    @pytest.mark.parametrize(
        ("kind", "make"),
        [*((kind, make) for kind in (*OURS, "other") for make in (fifo, Path.mkdir)),
         (".map", bound_socket)],
    )  # fmt: skip
    def test_in_the_place_of_a_file_keeps_nobody_waiting(
        self, directory: Path, server: Server, make: Callable[[Path], None], kind: str
    ) -> None:
        for path in files(directory):
            if kind_of(path) == kind:
                path.unlink()
                make(path)
        run(directory, "cache", "ls")
        for what in sources(server):
            assert_not_wrong(cat(directory, what))
        run(directory, "cache", "verify")
        run(directory, "cache", "rm", "--all")

    def test_beside_our_files_keeps_nobody_waiting(self, directory: Path, server: Server) -> None:
        zeros = "0" * 64
        for folder in [directory, *folders(directory)]:
            for name in ("a.map", f"sha256-{zeros}.map", f"sha256-{zeros}", f"{zeros}.json"):
                fifo(folder / name)
        for words in (["ls"], ["verify"], ["prune"]):
            done = run(directory, "cache", *words)
            assert done.returncode == 0, done.stderr
        for what in sources(server):
            assert_right(cat(directory, what))
        run(directory, "cache", "rm", "--all")

    def test_in_the_place_of_the_directory_is_refused(self, fresh: Path, server: Server) -> None:
        fifo(fresh)
        for words in [["cache", "ls"], ["ls", sources(server)[0], "--insecure"]]:
            done = run(fresh, *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.count("\n") == 1


# --- documents that are not what they were ----------------------------------------------------

NESTED = b"[" * 60_000
NONSENSE = [
    b"", b"[]", b"null", b"{}", b"\xff\xfe", NESTED, b'{"a":' * 10_000, b'"\\ud800"',
    b"1" * 5000, b'{"digest": ' + NESTED,
]  # fmt: skip
VALUES: list[Any] = [
    None, [], {}, -1, 0, 2**60, 2**70, 1e300, "", "\0", "\ud800", "\u00e9", "sha256:",
    "sha256:\0", "sha256:\ud800", "sha256:" + "../" * 30, "sha256:" + "f" * 64, '"a"\r\nX: y',
]  # fmt: skip
LANES = 8  # caches that are tried at the same time


class TestDocuments:
    def test_that_are_deeply_nested_are_no_traceback(self, directory: Path, server: Server) -> None:
        for what in sources(server):
            for path in files(directory):
                if kind_of(path) == "other":
                    path.write_bytes(NESTED)
            assert_right(cat(directory, what))

    @pytest.mark.parametrize("reachable", [True, False], ids=["reachable", "out of reach"])
    def test_that_hold_nonsense_are_not_believed(
        self, filled: Filled, tmp_path: Path, server: Server, reachable: bool, caplog: Any
    ) -> None:
        """Whatever they hold: data that is right, or a SourceError where nobody can be asked."""
        caplog.set_level("CRITICAL")
        tries = [
            (what, name, content)
            for what, names in filled.of.items()
            for name in names
            if kind_of(Path(name)) == "other"
            for content in _variants((filled.directory / name).read_bytes())
        ]
        assert len(tries) > 2 * len(NONSENSE)
        lanes = [shutil.copytree(filled.directory, tmp_path / str(n)) for n in range(LANES)]
        if not reachable:
            server.inject(faults.hanging_up, when=anything)

        def lane(number: int) -> list[str]:
            wrong = []
            for what, name, content in tries[number::LANES]:
                path = lanes[number] / name
                before = path.read_bytes()
                path.write_bytes(content)
                said = _tried(what, lanes[number], reachable)
                if said is not None:
                    wrong.append(f"{content[:60]!r}: {said}")
                path.write_bytes(before)
            return wrong

        try:
            found = in_threads([partial(lane, n) for n in range(LANES)])
        finally:
            server.heal()
        assert found == [[]] * LANES

    def test_that_are_nested_in_maps_are_no_traceback(
        self, directory: Path, server: Server
    ) -> None:
        """A map says in JSON what it is of."""
        for path in files(directory):
            content = path.read_bytes()
            if path.suffix == ".map" and (at := content.find(b"{")) >= 0:
                end = content.find(b"}", at) + 1
                room = max(end, min(4096, len(content))) - at
                path.write_bytes(content[:at] + b"[" * room + content[at + room :])
        assert run(directory, "cache", "ls").returncode == 0
        for what in sources(server):
            assert_right(cat(directory, what))
        run(directory, "cache", "verify")
        assert run(directory, "cache", "rm", "--all").returncode == 0


def _variants(text: bytes) -> Iterator[bytes]:
    """What may be there instead; of small JSON objects the same with other values, one by one."""
    yield from NONSENSE
    try:
        found = json.loads(text)
    except ValueError:
        return
    if isinstance(found, dict) and len(text) < 300:
        for key in found:
            for value in VALUES:
                yield json.dumps(found | {key: value}).encode()


def _tried(what: str, directory: Path, reachable: bool) -> str | None:
    """What is wrong with what comes of it."""
    try:
        seconds = 5.0 if reachable else 0.3
        with opened(what, access(cache_dir=str(directory), timeout=seconds)) as image:
            found = image.read("/small")
    except SourceError as e:
        return str(e) if reachable else None
    except Exception as e:
        return repr(e)
    return None if found == b"small\n" else repr(found)


# --- damage that heals ------------------------------------------------------------------------


class TestMaps:
    """Whatever is wrong with the beginning of a map, the next reader does not even notice."""

    @pytest.mark.parametrize("whole", [False, True], ids=["in part", "whole"])
    @pytest.mark.parametrize("places", [range(32), range(32, 64)], ids=["0..31", "32..63"])
    def test_heal_where_a_bit_is_flipped(
        self, directory: Path, fresh: Path, server: Server, whole: bool, places: range
    ) -> None:
        if not whole:
            read_right(server, fresh)
            directory = fresh
        for at in places:
            for path in maps(directory):
                content = bytearray(path.read_bytes())
                content[at] ^= 1 << (at * 5 + whole) % 8
                path.write_bytes(content)
            read_right(server, directory)

    @pytest.mark.parametrize("how", ["zeros", "ones", "cut", "empty", "gone", "grown"])
    def test_heal_where_more_is_wrong(self, directory: Path, server: Server, how: str) -> None:
        ends = (4, 8, 16, 24, 28, 64, 4096, 4100)
        for end in ends[:1] if how in ("empty", "gone") else ends:
            for path in maps(directory):
                content = path.read_bytes()
                if how == "gone":
                    path.unlink()
                    continue
                path.write_bytes({
                    "zeros": bytes(end) + content[end:], "ones": b"\xff" * end + content[end:],
                    "cut": content[:end], "empty": b"", "grown": content + b"\xff" * end,
                }[how])  # fmt: skip
            read_right(server, directory)

    @pytest.mark.parametrize("at", [8, 12, 16, 23, 24])
    def test_heal_without_asking_the_user_for_anything(
        self, directory: Path, server: Server, at: int
    ) -> None:
        for path in maps(directory):
            content = bytearray(path.read_bytes())
            content[at] ^= 0x10
            path.write_bytes(content)
        for what in sources(server):
            assert_right(cat(directory, what))

    def test_of_one_blob_do_for_no_other(self, directory: Path, server: Server) -> None:
        """Files that change places."""
        first, *_, last = maps(directory)
        between = first.with_name("between")
        first.rename(between)
        last.rename(first)
        between.rename(last)
        read_right(server, directory)

    def test_do_not_hide_that_data_are_of_another_size(
        self, directory: Path, server: Server
    ) -> None:
        """A terabyte of nothing is no reason to fail, either."""
        for size in (0, 1, SEGMENT, len(BIG.image) + 1, 1 << 40):
            for path in files(directory):
                if path.suffix == ".data":
                    os.truncate(path, size)
            read_right(server, directory)
            assert run(directory, "cache", "ls").returncode == 0


def maps(directory: Path) -> list[Path]:
    return [path for path in files(directory) if path.suffix == ".map"]


def test_a_cache_that_is_removed_by_hand_meanwhile(directory: Path, server: Server) -> None:
    """Whoever has an image open goes on reading, and the next one begins anew."""
    for what in sources(server):
        with opened(what, access(cache_dir=str(directory))) as image:
            shutil.rmtree(directory)
            assert image.read("/small") == b"small\n"
            assert image.read("/big", 0, 10) == BIG.content[:10]
        with opened(what, access(cache_dir=str(directory))) as image:
            assert image.read("/small") == b"small\n"
