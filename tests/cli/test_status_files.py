"""What ``pyerofs mounts`` reads was written by others: it follows no link of theirs, waits for nothing,
deletes nothing of theirs and believes no type; and mounts are found however a user came to be."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
import trio
import trio.testing

from pyerofs.system import status
from tests.cli.conftest import ROOT, Run

T = TypeVar("T")

PATIENCE = 20.0  # seconds for what should take none
SOON = 3.0  # seconds for what takes milliseconds, where the test fails if it never comes
IS_ROOT = os.geteuid() == 0
# a user of whom this machine has nothing; without root only ourselves can be had
USER = 1_500_000_000 + os.getpid() if IS_ROOT else os.getuid()
OTHER = USER + 1_000_000

SOURCE: dict[str, Any] = {
    "name": "https://host.test/image", "size": 1 << 20, "cached": 1 << 19, "complete": False,
    "requests": 3, "fetched": 1 << 19, "retries": 0,
}  # fmt: skip
MOUNT: dict[str, Any] = {
    "command": "pyerofs-fuse", "version": "1.0", "mountpoint": "/mnt/user",
    "source": "https://host.test/image", "pid": 4242, "keeper": 4241, "restarts": 1,
    "since": 1_700_000_000, "sources": [SOURCE], "fetching": 1.5,
}  # fmt: skip

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root reads what others have written")

# the command with its directories elsewhere: BASE OWN WORD ...
ELSEWHERE = """
import sys
from pyerofs.system import status
from pyerofs.cli.main import main
status.RUN_USER = sys.argv[1]
status.directory = lambda: sys.argv[2]
sys.exit(main(sys.argv[3:]))
"""


class Machine:
    """A machine's /run/user, and the status files that live processes keep below it."""

    def __init__(self, top: Path, stack: ExitStack) -> None:
        self.top = top
        self.base = top / "user"
        self.own = top / "own"
        self.base.mkdir(mode=0o755)
        self._stack = stack

    def runtime(self, uid: int = USER) -> Path:
        """A user's runtime directory, made if need be."""
        path = self.base / str(uid)
        if not path.exists():
            path.mkdir(mode=0o700)
            os.chown(path, uid, uid if IS_ROOT else -1)
        return path

    def folder(self, uid: int = USER) -> Path:
        """Where a user's status files are, made if need be."""
        return self.directory(self.runtime(uid) / "pyerofs", uid)

    def directory(self, path: Path, uid: int, mode: int = 0o700) -> Path:
        """Any directory of a user, made if need be."""
        if not path.exists():
            path.mkdir()
            path.chmod(mode)
            os.chown(path, uid, uid if IS_ROOT else -1)
        return path

    def dead(self, path: Path, uid: int, content: str = "{}") -> Path:
        """A file that nobody has locked."""
        path.write_text(content)
        path.chmod(0o600)
        os.chown(path, uid, uid if IS_ROOT else -1)
        return path

    def live(self, path: Path, uid: int, content: dict[str, Any] | str | bytes) -> Path:
        """A file that is locked, as by a living process.  Takes the place of one that was."""
        text = json.dumps(content) if isinstance(content, dict) else content
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        path.unlink(missing_ok=True)
        self.dead(path, uid).write_bytes(data.ljust(status.SIZE))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return path


@pytest.fixture(name="machine")
def make_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Nothing of the real machine is looked at, save for the fallback directories of USER."""
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        top.chmod(0o755)
        machine = Machine(top, stack)
        monkeypatch.setattr(status, "RUN_USER", str(machine.base), raising=False)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        if IS_ROOT:
            monkeypatch.setattr(status, "directory", lambda: str(machine.own))
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(machine.runtime()))
        yield machine


def shown(run: Run) -> list[str]:
    """The mount points that both forms of the command show, which are the same."""
    table, document = run("mounts"), run("mounts", "--json")
    assert (table.status, document.status) == (0, 0)
    found = [str(mount.get("mountpoint")) for mount in strict(document.out)]
    assert all(f"{mountpoint}  (pid " in table.text for mountpoint in found)
    return found


def strict(text: bytes) -> Any:
    """A JSON document, as others read it, too: they know no NaN."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def mounts_elsewhere(machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    """``pyerofs mounts`` in a process of its own, which has to end."""
    command: list[str | Path] = [sys.executable, "-c", ELSEWHERE, machine.base, machine.own]
    command += ["mounts", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, check=False
    )


# --- whose files root reads -----------------------------------------------------------------


@needs_root
def test_root_is_shown_the_mounts_of_others(machine: Machine, run: Run) -> None:
    machine.live(machine.folder() / "1.json", USER, MOUNT)
    machine.live(machine.folder(OTHER) / "1.json", OTHER, MOUNT | {"mountpoint": "/mnt/other"})
    assert sorted(shown(run)) == ["/mnt/other", "/mnt/user"]


@needs_root
@pytest.mark.parametrize("owner", [0, USER], ids=["root", "the user"])
@pytest.mark.parametrize("step", ["UID", "pyerofs"])
def test_a_directory_that_is_a_link_is_not_followed(
    machine: Machine, run: Run, step: str, owner: int
) -> None:
    """What it leads to may be any directory, whose every *.json would be deleted."""
    victim = machine.directory(machine.top / "victim", owner)
    target = victim if step == "pyerofs" else machine.directory(victim / "pyerofs", owner)
    precious = machine.dead(target / "precious.json", owner, '{"precious": true}')
    machine.live(target / "live.json", owner, MOUNT)
    link = machine.base / str(USER) if step == "UID" else machine.runtime() / "pyerofs"
    link.symlink_to(victim)
    os.chown(link, USER, USER, follow_symlinks=False)
    assert shown(run) == []
    assert precious.read_text() == '{"precious": true}'
    assert link.is_symlink()


@needs_root
def test_a_directory_that_becomes_a_link_is_not_followed(
    machine: Machine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns it exchanges it just when it has been listed."""
    folder = machine.folder()
    victim = machine.directory(machine.top / "victim", 0)
    precious = machine.dead(victim / "1.json", 0, '{"precious": true}')
    machine.live(victim / "2.json", 0, MOUNT | {"mountpoint": "/mnt/victim"})
    for name in ("1.json", "2.json"):
        machine.dead(folder / name, USER)
    here = folder.stat()

    def exchanging(real: Callable[..., T]) -> Callable[..., T]:
        def call(path: Any = ".") -> T:
            ours = os.path.samestat(here, os.stat(path))
            found = real(path)
            if ours and not folder.is_symlink():
                folder.rename(folder.with_name("aside"))
                folder.symlink_to(victim)
            return found

        return call

    with monkeypatch.context() as patched:
        for name in ("listdir", "scandir"):
            patched.setattr(os, name, exchanging(getattr(os, name)))
        assert "/mnt/victim" not in shown(run)
    assert folder.is_symlink(), "nobody has listed it"
    assert precious.read_text() == '{"precious": true}'


@needs_root
def test_a_file_that_is_a_link_is_not_followed(machine: Machine, run: Run) -> None:
    victim = machine.directory(machine.top / "victim", 0)
    precious = machine.dead(victim / "precious.json", 0, '{"precious": true}')
    target = machine.live(victim / "live.json", 0, MOUNT)
    links = [machine.folder() / name for name in ("1.json", "2.json")]
    for link, path in zip(links, (precious, target), strict=True):
        link.symlink_to(path)
        os.chown(link, USER, USER, follow_symlinks=False)
    assert shown(run) == []
    assert precious.read_text() == '{"precious": true}'
    assert all(link.is_symlink() for link in links)


@needs_root
def test_root_deletes_nothing_of_others(machine: Machine, run: Run) -> None:
    folder = machine.folder()
    for name in ("1.json", "notes.json", "notes.txt"):
        machine.dead(folder / name, USER)
    assert shown(run) == []
    assert sorted(os.listdir(folder)) == ["1.json", "notes.json", "notes.txt"]


@needs_root
@pytest.mark.parametrize("owner", [0, OTHER], ids=["root", "another user"])
def test_a_directory_of_somebody_else_is_not_read(machine: Machine, run: Run, owner: int) -> None:
    folder = machine.folder()
    machine.live(folder / "live.json", USER, MOUNT)
    machine.dead(folder / "dead.json", owner)
    os.chown(folder, owner, owner)
    assert shown(run) == []
    assert sorted(os.listdir(folder)) == ["dead.json", "live.json"]


@needs_root
def test_names_that_are_no_users_are_passed_over(machine: Machine, run: Run) -> None:
    for name in ("lost+found", "²", "-1", "1 2", "9" * 40, "caf\udce9"):
        machine.directory(machine.directory(machine.base / name, 0) / "pyerofs", 0)
    (machine.base / "5").write_text("no directory")
    machine.live(machine.folder() / "1.json", USER, MOUNT)
    assert shown(run) == ["/mnt/user"]


def test_files_of_our_own_dead_are_removed(unpatched: Machine) -> None:
    """And those of the living are not."""
    folder = unpatched.folder()
    dead = unpatched.dead(folder / "1.json", USER)
    live = unpatched.live(folder / "2.json", USER, MOUNT)
    found = call_as_user(live_mounts, {"XDG_RUNTIME_DIR": str(unpatched.runtime())})
    assert found == ["/mnt/user"]
    assert not dead.exists()
    assert live.exists()


# --- what can not be read at once -----------------------------------------------------------


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": a_fifo, "socket": a_socket, "directory": Path.mkdir,
}  # fmt: skip


@needs_root
@pytest.mark.parametrize(
    ("at", "kind"),
    [
        (at, kind)
        for at in ("file", "directory")
        for kind in KINDS
        if at != kind  # a directory in the directory's place is as it should be
    ],
)
def test_nothing_that_lies_there_is_waited_for(machine: Machine, kind: str, at: str) -> None:
    path = machine.folder() / "1.json" if at == "file" else machine.runtime() / "pyerofs"
    KINDS[kind](path)
    os.chown(path, USER, USER)
    machine.live(machine.folder(OTHER) / "1.json", OTHER, MOUNT)
    done = mounts_elsewhere(machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("/mnt/user  (pid 4242")
    assert os.path.lexists(path)


@needs_root
def test_a_lease_is_not_waited_for(machine: Machine) -> None:
    """Who opens a file with one waits for its holder, 45 seconds long, unless told not to."""
    path = machine.live(machine.folder() / "1.json", USER, MOUNT)
    leased = machine.dead(machine.folder() / "2.json", USER)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(leased, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as e:
            pytest.skip(f"no leases here: {e.strerror}")
        done = mounts_elsewhere(machine)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/mnt/user" in done.stdout
    assert path.exists()
    assert leased.exists()


# --- what is written there ------------------------------------------------------------------


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# instead of a value: JSON, as it is written
WRONG = {
    "null": "null", "true": "true", "text": '"text"', "empty text": '""', "lone": r'"\ud800"',
    "undecodable": r'"\udcff"', "list": "[]", "list of lists": "[[], [[]]]", "object": "{}",
    "object of objects": '{"name": {"name": {}}}', "negative": "-5", "zero": "0",
    "fraction": "0.5", "NaN": "NaN", "NaN in a list": "[NaN]", "infinity": "Infinity",
    "minus infinity": "-Infinity", "overflow": "1e999", "large": "1" + "0" * 30,
    "huge": "1" + "0" * 400, "more digits than Python takes": "1" + "0" * 5000,
    "text of digits": '"1' + "0" * 5000 + '"', "nested 300": nested(300), "nested 900": nested(900),
    "nested 5000": nested(5000), "nested 10000, cut off": "[" * 10_000,
}  # fmt: skip
FIELDS = [*MOUNT, *(f"sources.0.{name}" for name in SOURCE), "sources.0", "everything"]


def with_raw(field: str, raw: str) -> str:
    """A status file in which one field has another value."""
    if field == "everything":
        return raw
    mark = "@@"
    first, _, rest = field.partition(".0")
    if not rest:
        changed = MOUNT | {first: [mark] if field == "sources.0" else mark}
    else:
        changed = MOUNT | {first: [SOURCE | {rest.removeprefix("."): mark}]}
    return json.dumps(changed).replace(json.dumps(mark), raw)


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_type_is_no_traceback(machine: Machine, run: Run, field: str) -> None:
    """And hides nobody else's mount."""
    good = MOUNT | {"mountpoint": "/mnt/good"}
    machine.live(machine.folder() / "2.json", USER, good)
    for what, raw in WRONG.items():
        machine.live(machine.folder() / "1.json", USER, with_raw(field, raw))
        table, document = run("mounts"), run("mounts", "--json")
        assert (what, table.status, table.err) == (what, 0, "")
        assert (what, document.status, document.err) == (what, 0, "")
        assert "/mnt/good  (pid 4242" in table.text, what
        assert "/mnt/good" in [m.get("mountpoint") for m in strict(document.out)], what


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"{", b'{"a": "\xff"}', b"[1]" * 9],
    ids=ascii,
)
def test_what_is_no_json_is_passed_over(machine: Machine, run: Run, content: bytes) -> None:
    machine.live(machine.folder() / "1.json", USER, content)
    machine.live(machine.folder() / "2.json", USER, MOUNT)
    assert "/mnt/user" in shown(run)


@pytest.mark.parametrize("name", list(MOUNT))
def test_missing_fields_are_no_traceback(machine: Machine, run: Run, name: str) -> None:
    rest = {key: value for key, value in MOUNT.items() if key != name}
    machine.live(machine.folder() / "1.json", USER, rest)
    for words in ([], ["--json"]):
        done = run("mounts", *words)
        assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize("name", list(SOURCE))
def test_missing_fields_of_a_source_are_no_traceback(machine: Machine, run: Run, name: str) -> None:
    rest = {key: value for key, value in SOURCE.items() if key != name}
    machine.live(machine.folder() / "1.json", USER, MOUNT | {"sources": [rest]})
    for words in ([], ["--json"]):
        done = run("mounts", *words)
        assert (done.status, done.err) == (0, "")


ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b1m\u202e\u2028\x85\nroot's own line"


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("field", FIELDS)
def test_what_others_wrote_is_shown_escaped(
    machine: Machine, run: Run, field: str, words: list[str]
) -> None:
    """Into a pipe, too: whatever reads it may be a pager on a terminal."""
    for raw in (json.dumps(ESCAPES), json.dumps([ESCAPES]), json.dumps({ESCAPES: ESCAPES})):
        machine.live(machine.folder() / "1.json", USER, with_raw(field, raw))
        done = run("mounts", *words)
        assert done.status == 0
        for line in done.out.decode().split("\n"):
            assert line.isprintable(), line
            assert not line.startswith("root's own line")


# --- where a user's mounts are found --------------------------------------------------------


def become_user(environment: dict[str, str]) -> None:
    """Give all privileges up, for good, and be as after su, or as cron is."""
    if IS_ROOT:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    os.environ.pop("XDG_RUNTIME_DIR", None)
    os.environ.update(environment)
    os.umask(0)


def call_as_user(function: Callable[..., T], *arguments: object) -> T:
    """Call something as USER, in a process of its own; its result or exception comes back."""
    fork = multiprocessing.get_context("fork")  # whoever calls needs no access to our Python
    with ProcessPoolExecutor(1, fork) as process:
        return process.submit(function, *arguments).result()


def live_mounts(environment: dict[str, str]) -> list[str]:
    """The mount points that USER is shown."""
    become_user(environment)
    return [str(mount.get("mountpoint")) for mount in status.live()]


def publish_for_ever(environment: dict[str, str], ready: Any) -> None:
    become_user(environment)

    async def publish() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(status.publish, {"mountpoint": "/mnt/published"}, list)
            await trio.testing.wait_all_tasks_blocked()
            ready.set()

    trio.run(publish)


@contextmanager
def published(**environment: str) -> Iterator[Any]:
    """A process of USER that tells of /mnt/published."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=publish_for_ever, args=(environment, ready))
    process.start()
    try:
        assert wait_until(lambda: ready.is_set() or not process.is_alive(), PATIENCE)
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def wait_until(condition: Callable[[], object], patience: float) -> bool:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_found(**environment: str) -> bool:
    """Whether USER is shown /mnt/published, at once or soon."""
    return wait_until(lambda: "/mnt/published" in call_as_user(live_mounts, environment), SOON)


@pytest.fixture(name="unpatched")
def _own_rule(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which ``directory`` is as it is."""
    monkeypatch.undo()
    monkeypatch.setattr(status, "RUN_USER", str(machine.base), raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return machine


@pytest.fixture(name="fallback")
def find_fallback(unpatched: Machine) -> Iterator[Path]:
    """The private directory of a user who has no other."""
    path = Path(tempfile.gettempdir()) / f"pyerofs-{USER}"
    yield path
    if IS_ROOT and path.is_symlink():
        path.unlink()
    elif IS_ROOT and path.is_dir():
        shutil.rmtree(path)
    elif IS_ROOT:
        path.unlink(missing_ok=True)


def test_a_user_without_a_runtime_directory(unpatched: Machine, fallback: Path) -> None:
    """As su, cron and containers make them."""
    with published() as process:
        assert is_found()
        found = fallback.lstat()
        assert (found.st_mode & 0o7777, found.st_uid) == (0o700, USER)
        assert [n for n in os.listdir(fallback) if n.startswith(f"{process.pid}-")]
        assert next(fallback.glob(f"{process.pid}-*")).stat().st_mode & 0o7777 == 0o600


def test_mounts_of_before_a_session(unpatched: Machine, fallback: Path) -> None:
    """Made by cron; looked for after logging in."""
    with published():
        assert is_found(XDG_RUNTIME_DIR=str(unpatched.runtime()))


def test_mounts_of_a_session_are_found_from_outside(unpatched: Machine, fallback: Path) -> None:
    """Made in a session; looked for by cron."""
    with published(XDG_RUNTIME_DIR=str(unpatched.runtime())):
        assert is_found()


def test_mounts_from_outside_while_there_is_a_session(unpatched: Machine, fallback: Path) -> None:
    elsewhere = unpatched.directory(unpatched.top / "elsewhere", USER)
    unpatched.runtime()
    with published():
        assert is_found()
        assert is_found(XDG_RUNTIME_DIR=str(elsewhere))


@needs_root
def test_a_runtime_directory_of_somebody_else(unpatched: Machine, fallback: Path) -> None:
    """Plain su leaves the variable of who called it."""
    theirs = unpatched.runtime(OTHER)
    with published(XDG_RUNTIME_DIR=str(theirs)):
        assert is_found(XDG_RUNTIME_DIR=str(theirs))
        assert is_found()


@needs_root
@pytest.mark.parametrize("kind", ["another's", "another's link", "own link", "open", "file"])
class TestSquatters:
    def plant(self, machine: Machine, fallback: Path, kind: str) -> Path:
        """What lies there already; where files would land."""
        if kind == "another's":
            return machine.directory(fallback, OTHER, 0o777)
        if kind == "open":
            return machine.directory(fallback, USER, 0o777)
        if kind == "file":
            return machine.dead(fallback, USER)
        target = machine.directory(machine.top / "target", USER)
        fallback.symlink_to(target)
        owner = USER if kind == "own link" else OTHER
        os.chown(fallback, owner, owner, follow_symlinks=False)
        return target

    def test_nothing_is_put_there(self, unpatched: Machine, fallback: Path, kind: str) -> None:
        """Nor does a mount fail for that."""
        target = self.plant(unpatched, fallback, kind)
        with published() as process:
            assert process.is_alive()
            if kind == "file":
                assert target.read_text() == "{}"
            elif kind != "open" or target.stat().st_mode & 0o077:
                assert os.listdir(target) == []

    def test_nothing_is_read_there(self, unpatched: Machine, fallback: Path, kind: str) -> None:
        target = self.plant(unpatched, fallback, kind)
        owner = OTHER if kind == "another's" else USER
        if target.is_dir():
            unpatched.live(target / "1.json", owner, MOUNT).chmod(0o644)
        assert "/mnt/user" not in call_as_user(live_mounts, {})


# --- pyerofs cache rm -----------------------------------------------------------------------


def test_removing_without_saying_what_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    done = run("cache", "rm", "--cache-dir", tmp_path / "cache")
    assert (done.status, done.out) == (2, b"")
    assert "--all" in done.err
    assert "Traceback" not in done.err
