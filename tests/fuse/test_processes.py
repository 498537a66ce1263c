"""A mount of a local image is served by several processes: how many, that all of them do work and give
the same answers, and that they end together."""

from __future__ import annotations

import copy
import errno
import hashlib
import lzma
import mmap
import multiprocessing
import os
import pty
import random
import signal
import stat
import subprocess
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest
import trio

import pyerofs
from pyerofs.format import ondisk
from pyerofs.system.daemon import Foreground
from tests import handmade as hm
from tests.fuse import libc
from tests.fuse.mounting import (
    COMMAND,
    PATIENCE,
    captain,
    daemons,
    foreground,
    is_mounted,
    mounted,
    run,
    unmount,
    wait_until,
)
from tests.manifests import IMAGES, Manifest, entries_below, golden

if TYPE_CHECKING:
    from pyerofs_fuse.processes.turns import Turns

T = TypeVar("T")

PLAIN = IMAGES / "plain.erofs"
MOST = 4  # processes
CPUS = len(os.sched_getaffinity(0))
EXPECTED = min(CPUS, MOST)
LONG = 60.0  # seconds for what takes a few, on a busy machine
GONE = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}  # what an end in the middle may give

several = pytest.mark.skipif(CPUS < 2, reason="one processor, hence one process")
signals = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)


# --- clients --------------------------------------------------------------------------------


@contextmanager
def clients(tasks: Sequence[Callable[[], T]]) -> Iterator[Callable[[], list[T]]]:
    """Functions that run in processes of their own, all at once.

    What it yields waits for what they return, and fails if one raises or takes too long.  Afterwards
    none of them is left."""
    fork = multiprocessing.get_context("fork")
    processes = []
    ends = []
    for task in tasks:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_call, args=[task, theirs], daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
            process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)

    def results() -> list[T]:
        deadline = time.monotonic() + LONG
        return [_result(end, deadline - time.monotonic()) for end in ends]

    try:
        yield results
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(1)
        for end in ends:
            end.close()


def _call(task: Callable[[], T], end: Connection) -> None:
    try:
        end.send((True, task()))
    except BaseException:
        end.send((False, traceback.format_exc()))


def _result(end: Connection, patience: float) -> Any:
    if not end.poll(max(patience, 0)):
        pytest.fail("a client hangs")
    good, found = end.recv()
    if not good:
        pytest.fail(found)
    return found


def at_once(*tasks: Callable[[], T]) -> list[T]:
    """Call functions in processes of their own, all at once."""
    with clients(tasks) as results:
        return results()


@contextmanager
def served(image: Path | Manifest, where: Path, *options: str | Path) -> Iterator[list[int]]:
    """A mount: its processes, the captain first.  Should the test fail, nobody goes on waiting for
    an answer from it."""
    with mounted(image, where, *options):
        device = os.stat(where).st_dev
        first = captain(where)
        pids = [first, *(pid for pid in daemons(where) if pid != first)]
        try:
            yield pids
        except BaseException:
            if any(map(is_left, pids)):  # else the number may be another mount's by now
                abort(device)
            raise


def abort(device: int) -> None:
    """Have the kernel give up a FUSE connection, if we may: processes that are killed while they wait
    for a page hold it open for ever, and that page may be waiting for them."""
    script = """
        mount -t fusectl none /sys/fs/fuse/connections
        echo 1 > /sys/fs/fuse/connections/$0/abort
    """
    words = ["unshare", "-m", "sh", "-c", script, str(os.minor(device))]
    with suppress(OSError):
        subprocess.run(words, capture_output=True, check=False, timeout=PATIENCE)


def is_left(pid: int) -> bool:
    """Whether anything of a process is, even if it is only a thread that can't be killed."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(_state(pid, task) not in "ZX" for task in tasks)


def _state(pid: int, task: str) -> str:
    try:
        return _stat_fields(Path(f"/proc/{pid}/task/{task}/stat"))[0]
    except OSError:
        return "X"


def _stat_fields(path: Path) -> list[str]:
    """The fields of proc(5)'s stat from the third one on, which is the state."""
    return path.read_text().rpartition(")")[2].split()


def ended(pids: Sequence[int], patience: float = PATIENCE) -> bool:
    return wait_until(lambda: not any(map(is_left, pids)), patience)


def cpu_time(pid: int) -> int:
    """In ticks, of user and system."""
    return sum(map(int, _stat_fields(Path(f"/proc/{pid}/stat"))[11:13]))


@contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def forget_pages(fd: int) -> None:
    """Make the next reads arrive at a daemon."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


# --- images ---------------------------------------------------------------------------------


class Large(NamedTuple):
    """An image and what its files contain."""

    image: Path
    contents: dict[str, bytes]


def deflate(content: bytes) -> bytes:
    encoder = zlib.compressobj(1, zlib.DEFLATED, -15)
    return encoder.compress(content) + encoder.flush()


def micro_lzma(content: bytes) -> bytes:
    """Raw LZMA1, whose first byte makes way for the properties."""
    how = {"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": DICTIONARY}
    return b"\xa2" + lzma.compress(content, lzma.FORMAT_RAW, filters=[how])[1:]


DICTIONARY = 1 << 18
PACKERS = {ondisk.ALG_DEFLATE: deflate, ondisk.ALG_LZMA: micro_lzma}
CONFIGS = {
    ondisk.ALG_DEFLATE: ondisk.DEFLATE_CFGS.pack(15),
    ondisk.ALG_LZMA: ondisk.LZMA_CFGS.pack(DICTIONARY, 0),
}


def compressed(path: Path, contents: dict[str, bytes], algorithm: int, piece: int) -> Large:
    """An image with files of pclusters that hold ``piece`` bytes."""
    files, data, at = {}, {}, 1 << 20
    for name, content in contents.items():
        records = []
        for start in range(0, len(content), piece):
            data[at] = PACKERS[algorithm](content[start : start + piece])
            records.append((start, hm.plen(len(data[at]), algorithm), at))
            at += len(data[at])
        files[name.encode()] = hm.extents(len(content), 16, records)
    image = hm.build(
        files,
        incompat=ondisk.INCOMPAT_LZ4_0PADDING | ondisk.INCOMPAT_48BIT,
        configs={algorithm: CONFIGS[algorithm]},
    )
    hm.save(image | data, path)
    with pyerofs.open(path) as opened:
        assert all(opened.read(name) == content for name, content in contents.items())
    return Large(path, contents)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """Many files of many pclusters."""
    contents = {f"file {i}": hm.text(2 << 20, seed=i) for i in range(8)}
    path = tmp_path_factory.mktemp("large") / "large.erofs"
    return compressed(path, contents, ondisk.ALG_DEFLATE, 100_000)


SLOW_PIECE = 1_700_000  # bytes; what is made of them must not be larger than a MiB


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """One file of a few pclusters, each of which takes tens of milliseconds to decode."""
    contents = {"file": hm.noise(4 * SLOW_PIECE).hex().encode()}
    path = tmp_path_factory.mktemp("slow") / "slow.erofs"
    return compressed(path, contents, ondisk.ALG_LZMA, SLOW_PIECE)


SMALL = (100, 3000, 4096, 20_000, 131_072)  # sizes up to the one that is stored when it is opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """Many small files in a directory."""
    content = hm.text(max(SMALL))
    names = [f"{i:04}" for i in range(600)]
    data, entries, at = {100: content}, {}, 200
    for i, name in enumerate(names):
        size = SMALL[i % len(SMALL)]
        data[at + i] = hm.inline(content[:size]) if size < 4000 else hm.plain(size, 100)
        entries[name.encode()] = ((at + i) * 4096 - hm.METADATA) // 32, ondisk.FT_REG_FILE
    image = big_directory(data, entries)
    path = tmp_path_factory.mktemp("small") / "small.erofs"
    hm.save(image, path)
    return Large(path, {name: content[: SMALL[i % len(SMALL)]] for i, name in enumerate(names)})


def big_directory(
    data: dict[int, bytes], entries: dict[bytes, tuple[int, int]], at: int = 10_000
) -> hm.Pieces:
    """An image with the directory ``many``, whose own blocks are from ``at`` on."""
    dots = {b".": (3, ondisk.FT_DIR), b"..": (3, ondisk.FT_DIR)}
    names = hm.directory(dots | entries, 4096)
    files = {b"file": hm.inline(b""), b"many": hm.plain(len(names), at, mode=hm.DIRECTORY)}
    return hm.build(files, data | {at: names})


# --- how many -------------------------------------------------------------------------------


def test_one_for_each_processor(where: Path) -> None:
    with mounted(PLAIN, where):
        pids = daemons(where)
        first = captain(where)
        assert len(pids) == EXPECTED
        others = [pid for pid in pids if pid != first]
        assert [int(_stat_fields(Path(f"/proc/{p}/stat"))[1]) for p in others] == [first] * len(
            others
        )


def test_in_the_foreground_as_well(where: Path) -> None:
    with foreground(PLAIN, where=where) as process:
        assert wait_until(lambda: len(daemons(where)) == EXPECTED)
        assert captain(where) == process.pid
        assert len(os.listdir(where)) > 10


@pytest.mark.parametrize("options", [["-s"], ["-o", "nodev", "-s"], ["--record={tmp}/record"]])
def test_one_if_asked_for(options: list[str], where: Path, tmp_path: Path) -> None:
    with mounted(PLAIN, where, *(option.format(tmp=tmp_path) for option in options)):
        assert len(os.listdir(where)) > 10
        assert len(daemons(where)) == 1
        unmount(where)
        assert wait_until(lambda: not daemons(where))


def test_one_where_there_is_one_processor(where: Path) -> None:
    only = min(os.sched_getaffinity(0))
    with mounted(PLAIN, where, preexec_fn=lambda: os.sched_setaffinity(0, [only])):
        assert len(daemons(where)) == 1
        assert len(os.listdir(where)) > 10


@pytest.mark.parametrize(
    ("words", "processors", "expected"),
    [
        (["image"], 1, 1),
        (["image"], 2, 2),
        (["image"], 3, 3),
        (["image"], 4, 4),
        (["image"], 5, 4),
        (["image"], 256, 4),
        (["image", "--device=other"], 3, 3),
        (["image", "-s"], 4, 1),
        (["image", "--record=file"], 4, 1),
        (["https://example.com/image"], 4, 1),
        (["image", "--device=https://example.com/image"], 4, 1),
        (["oci://example.com/image"], 4, 1),
    ],
    ids=str,
)
def test_how_many_there_would_be(
    words: list[str], processors: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyerofs_fuse.options import parse
    from pyerofs_fuse.serve import Job

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    options = parse([*words, "/mnt"])
    access = options.source.access(lambda _: None)
    assert Job(options, options.spec, access, [], Foreground("test")).processes == expected


# --- they leave nothing open ----------------------------------------------------------------


def open_files(pid: int) -> dict[int, str]:
    """What each descriptor of a process leads to."""
    folder = f"/proc/{pid}/fd"
    found = {}
    for fd in os.listdir(folder):
        with suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"{folder}/{fd}")
    return found


def test_fewer_where_no_more_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyerofs_fuse.processes.crew import Crew

    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", fork)
    open_before = set(os.listdir("/proc/self/fd"))
    crew = Crew(4)
    assert crew.fork()
    assert crew.turns.mine
    crew.end()
    os.close(crew.turns.fd)
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_the_command_returns(where: Path) -> None:
    """As for a script that reads all it says: the others have let go of its pipes, too."""
    ends = {}
    for name in ("stdin", "stdout", "stderr"):
        reader, writer = os.pipe()
        ends[name] = (reader, writer) if name == "stdin" else (writer, reader)
    pipes = {os.readlink(f"/proc/self/fd/{theirs}") for theirs, _ in ends.values()}
    with mounted_by(where, **{name: theirs for name, (theirs, _) in ends.items()}) as pids:
        for theirs, _ in ends.values():
            os.close(theirs)
        for name in ("stdout", "stderr"):
            assert os.read(ends[name][1], 100) == b"", "the end of the pipe"
        for pid in pids:
            files = open_files(pid)
            assert [files[fd] for fd in (0, 1, 2)] == [os.devnull] * 3
            assert not pipes & set(files.values())
    for _, ours in ends.values():
        os.close(ours)


def test_communicating(where: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([COMMAND, PLAIN, where], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.communicate(timeout=PATIENCE) == (b"", b"")
            assert process.returncode == 0
            assert len(daemons(where)) == EXPECTED
        finally:
            process.kill()


def test_on_a_terminal(where: Path) -> None:
    """It lets go of the terminal, and lives on when that is gone."""
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    with mounted_by(where, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as pids:
        for pid in pids:
            files = open_files(pid)
            assert [files[fd] for fd in (0, 1, 2)] == [os.devnull] * 3
            assert name not in files.values()
        os.close(slave)
        os.close(master)
        assert len(entries_below(where)) > 10
        assert sorted(daemons(where)) == sorted(pids)


@contextmanager
def mounted_by(where: Path, **how: int) -> Iterator[list[int]]:
    """A mount by a command that is started in some way: its processes."""
    with subprocess.Popen([COMMAND, PLAIN, where], **how) as process:  # type: ignore[call-overload]
        try:
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    pids = daemons(where)
    assert len(pids) == EXPECTED
    yield pids


def test_what_they_have_open(where: Path) -> None:
    """Nothing but what it takes: the image once, the kernel's queue once."""
    with mounted(PLAIN, where):
        len(entries_below(where))
        for pid in daemons(where):
            files = list(open_files(pid).values())
            assert files.count("/dev/fuse") == 1
            assert files.count(str(PLAIN)) == 1
            assert len(files) < 30


# --- they end together ----------------------------------------------------------------------


def test_unmounting_ends_all(where: Path) -> None:
    with served(PLAIN, where) as pids:
        entries_below(where)
        unmount(where)
        assert ended(pids)


@signals
def test_a_signal_to_the_captain_ends_all(number: signal.Signals, where: Path) -> None:
    with served(PLAIN, where) as pids:
        entries_below(where)
        os.kill(pids[0], number)
        assert ended(pids)
        assert not is_mounted(where)


@pytest.mark.parametrize("options", [[], ["-s"]], ids=str)
def test_without_its_captain_it_is_dead(options: list[str], where: Path) -> None:
    """Whoever looks gets an error at once, whether it looked before or not."""

    calls: list[Callable[[], object]] = [
        lambda: os.listdir(where),
        lambda: os.statvfs(where),
        lambda: (where / "many").stat(),
        lambda: os.listdir(where / "many"),
        lambda: (where / "text").open(),
        lambda: os.getxattr(where / "text", "user.new"),
        lambda: (where / "new").stat(),
    ]

    def look() -> list[int | None]:
        numbers = []
        for call in calls:
            try:
                call()
            except OSError as e:
                numbers.append(e.errno)
        return numbers

    with served(PLAIN, where, *options) as pids:
        (where / "text").read_bytes()
        os.kill(pids[0], signal.SIGKILL)
        assert ended(pids)
        assert at_once(look) == [[errno.ENOTCONN] * len(calls)]


@several
@signals
def test_signals_to_others_are_ignored(number: signal.Signals, where: Path) -> None:
    with served(PLAIN, where) as pids:
        for pid in pids[1:]:
            os.kill(pid, number)
        (names,) = at_once(lambda: sorted(entries_below(where)))
        time.sleep(0.3)
        assert at_once(lambda: sorted(entries_below(where)), lambda: names) == [names] * 2
        assert sorted(daemons(where)) == sorted(pids)
        assert not any(_state(pid, str(pid)) in "ZXT" for pid in pids)


@several
def test_without_another_it_ends(where: Path) -> None:
    for i in range(1, EXPECTED):
        with served(PLAIN, where) as pids:
            entries_below(where)
            os.kill(pids[i], signal.SIGKILL)
            assert ended(pids)
            assert not is_mounted(where)


def read_on(where: Path, contents: dict[str, bytes], how: str, seed: int) -> tuple[int, list[str]]:
    """Read until it fails: the error's number, and what was wrong before."""
    rng = random.Random(seed)
    flags = os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0)
    wrong = []
    try:
        with opened(where) as top:
            while True:
                name, content = rng.choice(list(contents.items()))
                if how == "list":
                    if sorted(os.listdir(top)) != sorted(contents):
                        wrong.append("a listing")
                    if os.stat(name, dir_fd=top).st_size != len(content):
                        wrong.append(f"the size of {name}")
                    continue
                fd = os.open(name, flags, dir_fd=top)
                forget_pages(fd)
                for at in range(0, len(content), 1 << 17):
                    at = rng.randrange(len(content)) if how == "about" else at
                    found = os.pread(fd, 1 << 17, at)  # cut short if it fails half-way
                    if not found or not content.startswith(found, at):
                        wrong.append(f"{name} at {at}")
                os.close(fd)
    except OSError as e:
        return e.errno or 0, wrong


@several
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4])
@pytest.mark.parametrize(
    ("which", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGTERM)],
    ids=["captain killed", "other killed", "captain told"],
)
def test_an_end_while_it_is_busy(
    which: int, number: signal.Signals, delay: float, large: Large, where: Path
) -> None:
    """Its clients get an error, in time, and nothing wrong before that.

    Nothing is pushed: no pcluster stays decoded."""
    hows = ["along", "along", "direct", "direct", "list", "list"]
    tasks = [
        partial(read_on, where, large.contents, how, seed) for seed, how in enumerate(hows * 2)
    ]
    with served(large.image, where, "--cache-size=64K") as pids:
        with clients(tasks) as results:
            time.sleep(delay)
            os.kill(pids[which], number)
            assert ended(pids)
            if (which, number) != (0, signal.SIGKILL):
                assert not is_mounted(where)
            found = results()
        assert {n for n, _ in found} <= GONE
        assert [w for _, wrong in found for w in wrong] == []


@pytest.mark.parametrize(
    ("options", "which", "number"),
    [
        ([], 0, signal.SIGTERM),
        (["-s"], 0, signal.SIGTERM),
        pytest.param([], 1, signal.SIGKILL, marks=several),
        ([], 0, signal.SIGKILL),
        (["-s"], 0, signal.SIGKILL),
    ],
    ids=["captain told", "one told", "other killed", "captain killed", "one killed"],
)
def test_an_end_while_many_read_the_same(
    options: list[str], which: int, number: signal.Signals, slow: Large, where: Path
) -> None:
    """Should a process ever store a page while a READ is under way for it, and nobody be left to
    answer that, then it could not be killed, and all would wait for ever."""
    ((name, content),) = slow.contents.items()

    def read_about(seed: int) -> tuple[int, list[int]]:
        """All go from pcluster to pcluster, to random places in each."""
        rng = random.Random(seed)
        wrong = []
        try:
            with opened(where / name) as fd:
                while True:
                    for start in range(0, len(content), SLOW_PIECE):
                        for _ in range(5):
                            at = start + rng.randrange(SLOW_PIECE - 100)
                            if os.pread(fd, 100, at) != content[at : at + 100]:
                                wrong.append(at)
                    forget_pages(fd)
        except OSError as e:
            return e.errno or 0, wrong

    for turn in range(5):
        with served(slow.image, where, *options) as pids:
            with clients([partial(read_about, 10 * turn + i) for i in range(5)]) as results:
                time.sleep(0.02 + 0.03 * turn)
                os.kill(pids[which], number)
                assert ended(pids), "they wait for each other"
                found = results()
            assert {n for n, _ in found} <= GONE
            assert [w for _, wrong in found for w in wrong] == []
            assert is_mounted(where) == (pids[which] == pids[0] and number == signal.SIGKILL)
            if is_mounted(where):
                unmount(where, "-z")


def test_a_client_that_is_killed_harms_nobody(large: Large, where: Path) -> None:
    hows = ["along", "direct", "about", "list"]
    with served(large.image, where, "--cache-size=2M") as pids:
        for turn in range(5):
            with clients(
                [
                    partial(read_on, where, large.contents, how, seed)
                    for seed, how in enumerate(hows)
                ]
            ):
                time.sleep(0.1 + turn * 0.02)
            found = at_once(*(partial(digests, where, turn, i) for i in range(2)))
            assert found == [{n: digest(c) for n, c in large.contents.items()}] * 2
        assert sorted(daemons(where)) == sorted(pids)


@pytest.mark.parametrize("options", [[], ["-s"]], ids=str)
def test_a_client_that_is_killed_stalls_nobody(
    options: list[str], slow: Large, where: Path
) -> None:
    """Its request may vanish while a process is about to receive it; whoever waits for that process
    should not have to wait until somebody else asks for something."""
    ((name, content),) = slow.contents.items()
    steps = memoryview(mmap.mmap(-1, 8)).cast("Q")

    def read_slowly() -> None:
        with opened(where / name) as fd:
            while True:
                for at in range(0, len(content), SLOW_PIECE):
                    forget_pages(fd)
                    assert os.pread(fd, 100, at) == content[at : at + 100]
                    steps[0] += 1

    def goes_on() -> bool:
        before = steps[0]
        return wait_until(lambda: steps[0] > before + 1)

    def look_for(turn: int) -> None:
        for i in range(1 << 30):
            assert not os.path.exists(f"{where}/{turn} {i}")

    with served(slow.image, where, "--cache-size=1M", *options), clients([read_slowly]):
        assert wait_until(lambda: steps[0])
        for turn in range(30):
            with clients([partial(look_for, turn)]):
                time.sleep(0.05 + turn * 0.001)
            assert goes_on(), turn


def test_clients_that_get_signals(large: Large, where: Path) -> None:
    """Each interrupted request tells a process about it, not always the one that has it."""

    def read_interrupted(seed: int) -> int:
        rng = random.Random(seed)
        caught = 0

        def catch(*_: object) -> None:
            nonlocal caught
            caught += 1

        signal.signal(signal.SIGALRM, catch)
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 7e-4 + seed * 1e-4)
        for _ in range(3):
            assert sorted(os.listdir(where)) == sorted(large.contents)
            for name, content in large.contents.items():
                assert (where / name).stat().st_size == len(content)
                with opened(where / name, os.O_DIRECT if seed % 2 else 0) as fd:
                    forget_pages(fd)
                    for _ in range(10):
                        at = rng.randrange(len(content))
                        assert content.startswith(os.pread(fd, 1 << 16, at), at)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return caught

    with served(large.image, where, "--cache-size=2M") as pids:
        assert all(at_once(*(partial(read_interrupted, seed) for seed in range(4))))
        assert sorted(daemons(where)) == sorted(pids)


# --- whose turn it is -----------------------------------------------------------------------


@pytest.fixture
def eager_trio(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Turns, Turns]]:
    """The trio that pyfuse3 gets, and the turn as two processes have it: it is the first one's, who
    uses that trio."""
    import pyfuse3
    from pyerofs_fuse.processes import eager
    from pyerofs_fuse.processes.turns import Turns

    turns = Turns(2)
    other = copy.copy(turns)
    other.hold()
    monkeypatch.setattr(pyfuse3, "trio", trio)
    eager.enable(turns, lambda: False)
    yield pyfuse3.trio, turns, other  # type: ignore[attr-defined]
    os.close(turns.fd)


def test_a_request_is_for_whose_turn_it_is(eager_trio: tuple[Any, Turns, Turns]) -> None:
    ours, turns, other = eager_trio
    reader, writer = os.pipe()

    async def receive() -> bool:
        with trio.move_on_after(0.2):
            await ours.lowlevel.wait_readable(reader)
            return True
        return False

    os.write(writer, b"request")
    assert trio.run(receive)
    turns.pass_on()
    assert other.take()
    assert not trio.run(receive)
    other.pass_on()
    assert trio.run(receive)
    assert turns.mine
    os.read(reader, 10)
    assert not trio.run(receive)
    os.close(reader)
    os.close(writer)


def test_the_turn_is_passed_on_while_we_wait(eager_trio: tuple[Any, Turns, Turns]) -> None:
    """Whoever then receives nevertheless blocks in ``read``, should the other one be faster."""
    ours, turns, other = eager_trio
    reader, writer = os.pipe()

    async def receive() -> bool:
        done = False

        async def wait() -> None:
            nonlocal done
            await ours.lowlevel.wait_readable(reader)
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.05)
            os.write(writer, b"request")
            turns.pass_on()  # as another request's task does
            assert other.take()
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        return done

    assert not trio.run(receive)
    os.close(reader)
    os.close(writer)


def test_who_received_may_receive_again_at_once(eager_trio: tuple[Any, Turns, Turns]) -> None:
    """No other task comes in between, unless it waits for something else; then another one receives."""
    lock = eager_trio[0].Lock()
    log: list[str] = []

    async def receive(name: str) -> None:
        for _ in range(3):
            async with lock:
                log.append(name)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(receive, "b")
                await trio.sleep(0.01)
                assert log == []
            await receive("a")
            assert log == ["a"] * 3
        assert log == ["a"] * 3 + ["b"] * 3

    trio.run(main)


def test_who_waits_to_receive_may_give_up(eager_trio: tuple[Any, Turns, Turns]) -> None:
    lock = eager_trio[0].Lock()

    async def main() -> None:
        async with lock:
            for _ in range(3):
                with trio.move_on_after(0.01) as scope:
                    async with lock:
                        raise AssertionError("two have it")
                assert scope.cancelled_caught
        with trio.fail_after(PATIENCE):
            async with lock:
                pass

    trio.run(main)


# --- they share the work --------------------------------------------------------------------


@several
def test_all_of_them_work(large: Large, where: Path) -> None:
    def read_all(seed: int) -> None:
        names = list(large.contents)
        random.Random(seed).shuffle(names)
        for _ in range(3):
            for name in names:
                with opened(where / name) as fd:
                    forget_pages(fd)
                    while os.read(fd, 1 << 17):
                        pass

    with served(large.image, where, "--cache-size=2M") as pids:
        before = {pid: cpu_time(pid) for pid in pids}
        at_once(*(partial(read_all, seed) for seed in range(4)))
        used = {pid: cpu_time(pid) - before[pid] for pid in pids}
        assert len(used) == EXPECTED
        assert min(used.values()) > sum(used.values()) / EXPECTED / 10, used


def test_an_image_that_is_deleted(tmp_path: Path, large: Large, where: Path) -> None:
    copy = tmp_path / "copy.erofs"
    copy.write_bytes(large.image.read_bytes())
    want = {name: digest(content) for name, content in large.contents.items()}
    with mounted(copy, where):
        copy.unlink()
        assert at_once(*(partial(digests, where, seed, seed) for seed in range(6))) == [want] * 6


# --- all give the same answers ---------------------------------------------------------------


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digests(where: Path, turn: int, seed: int) -> dict[str, str]:
    """Of all files in a directory, read in some order and in some pieces."""
    rng = random.Random(f"{turn} {seed}")
    names = os.listdir(where)
    rng.shuffle(names)
    found = {}
    for name in names:
        with opened(where / name) as fd:
            forget_pages(fd)
            length = rng.choice([4096, 65_536, 999_999])
            found[name] = digest(b"".join(iter(partial(os.read, fd, length), b"")))
    return found


@pytest.mark.parametrize("name", ["kitchen-sink", "zstd", "frag-lz4", "dedupe-frag-zstd"])
def test_many_readers_of_all_files(name: str, where: Path) -> None:
    want = golden(name)
    sums = {path: e["sha256"] for path, e in want.entries.items() if "sha256" in e}

    def read_all(seed: int) -> dict[str, str]:
        rng = random.Random(seed)
        found = {}
        for turn in range(3):  # first whatever the kernel has, then without
            paths = list(sums)
            rng.shuffle(paths)
            for path in paths:
                with opened(where / path) as fd:
                    if turn:
                        forget_pages(fd)
                    if turn == 2 and (size := os.fstat(fd).st_size):
                        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as mapped:
                            content = mapped[:]
                    else:
                        content = b"".join(iter(partial(os.read, fd, 1 << 15), b""))
                    found[path] = digest(content)
            if found != sums:
                break
        return found

    with served(want, where) as pids:
        for turn in range(2):
            if turn and os.geteuid() == 0:
                libc.remount(where)  # the kernel forgets all it can
            for found in at_once(*(partial(read_all, turn * 10 + i) for i in range(6))):
                assert found == sums
        assert sorted(daemons(where)) == sorted(pids)


def test_reads_and_listings_at_once(where: Path, large: Large) -> None:
    def read_about(seed: int) -> list[tuple[str, int, int]]:
        rng = random.Random(seed)
        wrong = []
        for name, content in large.contents.items():
            with opened(where / name, os.O_DIRECT if seed == 3 else 0) as fd:
                for _ in range(40):
                    at, n = rng.randrange(len(content)), rng.choice([1, 5000, 300_000])
                    if rng.random() < 0.5:
                        forget_pages(fd)
                    if os.pread(fd, n, at) != content[at : at + n]:
                        wrong.append((name, at, n))
        return wrong

    def look_about(seed: int) -> list[tuple[str, int, int]]:
        wrong = []
        for _ in range(100):
            if sorted(os.listdir(where)) != sorted(large.contents):
                wrong.append(("a listing", 0, seed))
            with os.scandir(where) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries}
            if sizes != {name: len(content) for name, content in large.contents.items()}:
                wrong.append(("sizes", 0, seed))
        return wrong

    readers = [partial(read_about, seed) for seed in range(4)]
    with served(large.image, where, "--cache-size=2M"):
        found = at_once(*readers, *(partial(look_about, seed) for seed in range(2)))
        assert [wrong for each in found for wrong in each] == []


# --- what they store with the kernel ---------------------------------------------------------


def read_somehow(path: Path, content: bytes, rng: random.Random, forget: bool) -> None:
    """Open a small file, and get at it in one of several ways."""
    with opened(path) as fd:
        if forget:
            forget_pages(fd)
        how = rng.randrange(4)
        at = rng.randrange(len(content))
        if how == 0:
            assert os.pread(fd, len(content), 0) == content
        elif how == 1:
            assert os.pread(fd, 100, at) == content[at : at + 100]
        elif how == 2:
            with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
                assert mapped[at : at + 100] == content[at : at + 100]
        # or not at all: the file is closed at once


@pytest.mark.parametrize("size", SMALL)
def test_one_small_file_opened_by_many(size: int, small: Large, where: Path) -> None:
    """Storing a file's pages while somebody else's READ is under way must not wait for ever."""
    name, content = next((n, c) for n, c in small.contents.items() if len(c) == size)

    def read_again(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(500):
            read_somehow(where / "many" / name, content, rng, forget=i % 2 == seed % 2)

    with served(small.image, where):
        at_once(*(partial(read_again, seed) for seed in range(4)))


@pytest.mark.parametrize("together", [True, False])
def test_many_small_files_opened_by_many(together: bool, small: Large, where: Path) -> None:
    """As above, but each for the first time: by all at once, or in different orders."""

    def read_all(seed: int) -> None:
        rng = random.Random(seed)
        files = list(small.contents.items())
        if not together:
            rng.shuffle(files)
        for name, content in files:
            read_somehow(where / "many" / name, content, rng, forget=rng.random() < 0.3)

    for turn in range(3):
        with served(small.image, where):
            at_once(*(partial(read_all, 10 * turn + i) for i in range(4)))
            unmount(where)
            assert wait_until(lambda: not daemons(where))


# --- a large directory ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An image with a directory of many files, and their names."""
    names = {b"%d %s" % (i, b"x" * (i % 30)): (2, ondisk.FT_REG_FILE) for i in range(20_000)}
    path = tmp_path_factory.mktemp("crowd") / "crowd.erofs"
    hm.save(big_directory({}, names), path)
    return path, sorted([".", "..", *map(os.fsdecode, names)])


def test_a_large_directory_listed_by_many(crowd: tuple[Path, list[str]], where: Path) -> None:
    image, names = crowd

    def list_names(size: int) -> None:
        for _ in range(2):
            assert sorted(e.name for e in libc.getdents(where / "many", size)) == names

    def seek_about() -> None:
        rng = random.Random(1)
        with libc.DirectoryStream(where / "many") as stream:
            places = [stream.tell()]
            found = []
            for entry in stream:
                found.append(entry.name)
                places.append(stream.tell())
            assert sorted(found) == names
            for _ in range(50):
                at = rng.randrange(len(places))
                stream.seek(places[at])
                some = [entry.name for entry, _ in zip(stream, range(300), strict=False)]
                assert some == found[at : at + 300]
            at = rng.randrange(len(places))
            stream.seek(places[at])
            assert [entry.name for entry in stream] == found[at:]
            stream.rewind()
            assert [entry.name for entry in stream] == found

    def stat_all() -> None:
        with os.scandir(where / "many") as entries:
            found = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}
        assert sorted([".", "..", *found]) == names
        assert all(stat.S_ISREG(mode) for mode in found.values())

    with served(image, where) as pids:
        for _ in range(2):
            at_once(partial(list_names, 32_768), partial(list_names, 700), seek_about, stat_all)
        assert sorted(daemons(where)) == sorted(pids)


def test_nothing_is_left_behind(where: Path) -> None:
    """After many mounts: no process, no mount, and none of them has failed."""
    for _ in range(5):
        done = run(PLAIN, where)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pids = daemons(where)
        unmount(where)
        assert ended(pids)
    assert not is_mounted(where)
