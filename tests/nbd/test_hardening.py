"""What clients, callers and signals must not be able to do to the server: get in without a certificate,
keep others out, leave its socket behind, have it hold on to their files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyerofs_nbd.server import exports, listen, tls
from pyerofs_nbd.server import protocol as p

from pyerofs.sources.local.threaded import ThreadedSource
from tests.fuse.mounting import wait_until
from tests.helpers import signals_at
from tests.nbd.client import DISC, PATIENCE, Client, contexts, go, option, read
from tests.nbd.rig import DATA, SIZE, Rig, Slow, memory
from tests.remote.tls import Authority

COMMAND = [sys.executable, "-m", "pyerofs_nbd"]
SOON = 5.0  # seconds for what takes milliseconds, where the test fails if it never comes
LONG = 3600.0  # seconds: a limit that no test reaches
MOMENT = 0.5  # seconds in which a process that a signal ends has ended


def connected(path: Path) -> Client:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(path))
    return Client(sock)


@pytest.fixture(name="data")
def write_data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture(name="path")
def name_socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


MINDED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def start(
    *words: str | Path, command: Sequence[str] = COMMAND, **how: Any
) -> subprocess.Popen[str]:
    """The command as it starts on a terminal: with no signal ignored, whatever we are."""
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with signals_at(signal.SIG_DFL, *MINDED):
        return subprocess.Popen(
            [*command, *words], stderr=subprocess.PIPE, text=True, **(settings | how)
        )


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Which does not outlive the test."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def uri_of(process: subprocess.Popen[str]) -> str:
    """What it prints once it serves."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"it does not serve: {process.communicate(timeout=PATIENCE)}")
    return line


# --- certificates ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 127.0.0.1.crt and .key of authority.crt; client.crt and .key, which is an
    authority, too; and stranger.crt and .key, which is just that."""
    directory = tmp_path_factory.mktemp("tls")
    Authority(directory).context("127.0.0.1")
    for name in ("client", "stranger"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.crt",
             "-subj", f"/CN={name}", "-days", "30"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    return directory


@pytest.fixture
def guarded(certificates: Path, data: Path, path: Path) -> Iterator[Path]:
    """The socket of a server with --tls-ca, and without --tls-required."""
    words: list[str | Path] = ["--tls-cert", certificates / "127.0.0.1.crt", "--tls-key"]
    words += [certificates / "127.0.0.1.key", "--tls-ca", certificates / "client.crt"]
    with running(start("--socket", path, *words, data)) as process:
        uri_of(process)
        yield path


def upgraded(client: Client, directory: Path, name: str | None) -> Client:
    """TLS with a certificate, or without one."""
    client.greet()
    assert client.ask(option(p.OPT_STARTTLS))[-1].kind == p.REP_ACK
    context = ssl.create_default_context(cafile=str(directory / "authority.crt"))
    if name is not None:
        context.load_cert_chain(directory / f"{name}.crt", directory / f"{name}.key")
    return Client(context.wrap_socket(client.sock, server_hostname="127.0.0.1"))


def test_clients_of_the_authority_get_in(guarded: Path, certificates: Path) -> None:
    with connected(guarded) as plain, upgraded(plain, certificates, "client") as client:
        assert [r.kind for r in client.ask(go())] == [p.REP_INFO, p.REP_ACK]
        assert client.read(0, 100) == DATA[:100]
        client.send(DISC)


@pytest.mark.parametrize("name", [None, "stranger"])
def test_no_others_get_in(guarded: Path, certificates: Path, name: str | None) -> None:
    with (
        connected(guarded) as plain,
        pytest.raises((EOFError, OSError)),
        upgraded(plain, certificates, name) as client,
    ):
        client.ask(go())


@pytest.mark.parametrize(
    "message",
    [
        go(), go(number=p.OPT_INFO), option(p.OPT_LIST), option(p.OPT_STRUCTURED_REPLY),
        contexts("", [p.ALLOCATION]),
    ],
    ids=["go", "info", "list", "structured reply", "set meta context"],
)  # fmt: skip
def test_plain_text_is_refused_where_there_is_an_authority(guarded: Path, message: bytes) -> None:
    with connected(guarded) as client:
        client.greet()
        assert [r.kind for r in client.ask(message)] == [p.REP_ERR_TLS_REQD]


def test_the_old_way_in_is_shut_where_there_is_an_authority(guarded: Path) -> None:
    """EXPORT_NAME has no reply that could refuse."""
    with connected(guarded) as client:
        client.greet()
        client.send(option(p.OPT_EXPORT_NAME))
        assert client.ended()


def test_what_is_said_of_a_server_with_an_authority(certificates: Path, data: Path) -> None:
    """A certificate is needed: not anyone can read it, and clients that go by its URI use TLS."""
    words: list[str | Path] = ["--tls-cert", certificates / "127.0.0.1.crt", "--tls-key"]
    words += [certificates / "127.0.0.1.key", "--tls-ca", certificates / "client.crt"]
    with running(start("--listen", "0.0.0.0:0", *words, data)) as process:
        assert uri_of(process).startswith("nbds:")
        process.terminate()
        assert process.communicate(timeout=PATIENCE)[1] == ""


# --- connections that do nothing ------------------------------------------------------------


@pytest.fixture(name="patient")
def _handshakes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is closed for its handshake's sake."""
    monkeypatch.setattr(listen, "HANDSHAKE_TIMEOUT", LONG, raising=False)
    monkeypatch.setattr(exports, "HANDSHAKE_SECONDS", LONG, raising=False)


@pytest.fixture(name="impatient")
def _handshakes_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HANDSHAKE_TIMEOUT", 0.3, raising=False)


@contextmanager
def gets_in(path: Path) -> Iterator[Client]:
    """A newcomer that is served, now."""
    with connected(path) as client:
        client.sock.settimeout(SOON)
        client.start()
        assert client.read(5, 100) == DATA[5:105]
        client.sock.settimeout(PATIENCE)
        yield client


def reads(client: Client) -> bool:
    """Whether it is still served."""
    try:
        return client.read(7, 10) == DATA[7:17]
    except (EOFError, OSError):
        return False


def answers(client: Client) -> bool:
    """Whether an option is still answered."""
    try:
        return client.ask(option(p.OPT_LIST))[-1].kind == p.REP_ACK
    except (EOFError, ConnectionError):
        return False


@contextmanager
def several(path: Path, count: int) -> Iterator[list[Client]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connected(path)) for _ in range(count)]


@pytest.mark.usefixtures("patient")
class TestCrowds:
    def test_silent_connections_keep_nobody_out(self, rig: Rig, path: Path) -> None:
        rig.listen(listen.unix(str(path)), limit=4)
        with several(path, 5), gets_in(path), gets_in(path):
            pass

    def test_idle_clients_keep_nobody_out(self, rig: Rig, path: Path) -> None:
        rig.listen(listen.unix(str(path)), limit=4)
        with several(path, 4) as clients:
            for client in clients:
                client.start()
            with gets_in(path), gets_in(path):
                pass

    @pytest.mark.parametrize("kind", ["silent", "greeted", "idle"])
    def test_as_many_as_there_may_be(self, rig: Rig, path: Path, kind: str) -> None:
        """With the limit that there is."""
        rig.listen(listen.unix(str(path)))
        count = listen.MAX_CONNECTIONS
        with several(path, count if kind == "idle" else count + 2) as clients:
            for client in clients if kind != "silent" else ():
                client.sock.settimeout(SOON)
                with contextlib.suppress(EOFError, OSError):  # those of them that had to go
                    client.start() if kind == "idle" else client.greet()
            with gets_in(path):
                pass

    def test_the_one_that_is_idle_for_longest_goes(self, rig: Rig, path: Path) -> None:
        rig.listen(listen.unix(str(path)), limit=4)
        with several(path, 4) as clients:
            for client in clients:
                client.start()
            for n in (2, 0, 3, 1):
                assert reads(clients[n])
            with gets_in(path) as first:
                assert clients[2].ended()
                for n in (1, 0, 3):
                    assert reads(clients[n])
                assert reads(first)
                with gets_in(path):
                    assert clients[1].ended()
                    assert all(reads(client) for client in (clients[0], clients[3], first))

    def test_who_waits_for_an_answer_stays(self, path: Path) -> None:
        """However long: the others come and go."""
        slow = Slow()
        with Rig(ThreadedSource(slow), memory()) as rig:
            rig.listen(listen.unix(str(path)), limit=2)
            with connected(path) as waiting, connected(path) as idle:
                waiting.start()
                waiting.send(read(0, 1000))
                assert wait_until(lambda: slow.asked)
                idle.start("e1")
                for _ in range(3):
                    with connected(path) as newcomer:
                        newcomer.sock.settimeout(SOON)
                        newcomer.start("e1")
                        assert reads(newcomer)
                        with connected(path) as another:  # while the newcomer is idle
                            another.sock.settimeout(SOON)
                            another.start("e1")
                            assert reads(another)
                        assert newcomer.ended()
                assert idle.ended()
                slow.go.set()
                assert waiting.reply() == (0, 1)
                assert waiting.receive(1000) == DATA[:1000]

    def test_who_is_slow_to_read_stays(self, path: Path) -> None:
        """A reply that is half sent is in flight."""
        with Rig(memory()) as rig:
            rig.listen(listen.unix(str(path)), limit=2)
            with connected(path) as reading, connected(path) as idle:
                reading.start()
                cookies = set(range(16))
                reading.send(*(read(0, SIZE, n) for n in cookies))
                assert wait_until(lambda: rig.server.statistics.bytes)
                idle.start()
                assert reads(idle)  # the last to have done anything
                with gets_in(path), gets_in(path):
                    assert idle.ended()
                while cookies:
                    error, cookie = reading.reply()
                    cookies.remove(cookie)
                    assert (error, reading.receive(SIZE)) == (0, DATA)

    def test_nobody_goes_where_all_are_at_work(self, path: Path) -> None:
        slow = Slow()
        with Rig(ThreadedSource(slow)) as rig:
            rig.listen(listen.unix(str(path)), limit=2)
            with several(path, 2) as clients, connected(path) as newcomer:
                for client in clients:
                    client.start()
                    client.send(read(0, 1000))
                assert wait_until(lambda: slow.asked == 2)
                newcomer.sock.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    newcomer.receive(1)
                newcomer.sock.settimeout(SOON)
                slow.go.set()
                for client in clients:
                    assert client.reply() == (0, 1)
                    assert client.receive(1000) == DATA[:1000]
                newcomer.start()
                assert reads(newcomer)

    def test_a_crowd_that_goes_on_coming(self, rig: Rig, path: Path) -> None:
        """Clients at work among newcomers that say nothing: each request is answered."""
        rig.listen(listen.unix(str(path)), limit=3)
        with gets_in(path) as working, contextlib.ExitStack() as crowd:
            for _ in range(40):
                crowd.enter_context(connected(path))
                assert reads(working)


@pytest.mark.usefixtures("impatient")
class TestHandshakesThatNeverEnd:
    def test_silent(self, rig: Rig, path: Path) -> None:
        rig.listen(listen.unix(str(path)))
        with connected(path) as client:
            client.sock.settimeout(SOON)
            client.receive(18)
            assert client.ended()

    def test_half_an_option(self, rig: Rig, path: Path) -> None:
        rig.listen(listen.unix(str(path)))
        with connected(path) as client:
            client.greet()
            client.send(go()[:-1])
            client.sock.settimeout(SOON)
            assert client.ended()

    def test_ever_more_options(self, rig: Rig, path: Path) -> None:
        """Each of which is answered."""
        rig.listen(listen.unix(str(path)))
        with connected(path) as client:
            client.greet()
            assert wait_until(lambda: not answers(client), SOON)

    @pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x40\x00"], ids=ascii)
    def test_tls(self, certificates: Path, path: Path, sent: bytes) -> None:
        names = (str(certificates / f"127.0.0.1.{end}") for end in ("crt", "key"))
        with Rig(memory(), tls=tls.server_context(*names)) as rig:
            rig.listen(listen.unix(str(path)))
            with connected(path) as client:
                client.greet()
                assert client.ask(option(p.OPT_STARTTLS))[-1].kind == p.REP_ACK
                client.send(sent)
                client.sock.settimeout(SOON)
                assert client.ended()

    def test_who_has_finished_may_be_idle(self, rig: Rig, path: Path) -> None:
        rig.listen(listen.unix(str(path)))
        with connected(path) as idle, connected(path) as silent:
            idle.start()
            silent.sock.settimeout(SOON)
            silent.receive(18)
            assert silent.ended()
            assert reads(idle)


# --- signals --------------------------------------------------------------------------------

# the statuses with which a signal may end it
ENDINGS = {signal.SIGTERM: {0}, signal.SIGINT: {0, 130}}

# the command, which gets a signal at a given moment: NUMBER MOMENT WORD ...
AT_A_MOMENT = """
import os, signal, socket, sys

from pyerofs_nbd import cli
from pyerofs_nbd.server import listen, modes

number, moment = int(sys.argv[1]), sys.argv[2]
sys.argv[1:3] = []
owner, name = {
    "bound": (socket.socket, "bind"), "listening": (socket.socket, "listen"),
    "made": (listen, "unix"),
}[moment]
real = getattr(owner, name)

def signalled(*arguments):
    found = real(*arguments)
    os.kill(os.getpid(), number)
    return found

setattr(owner, name, signalled)
cli.run()
"""


def assert_ended_well(
    process: subprocess.Popen[str], number: signal.Signals, socket_path: Path
) -> None:
    """As the signal asked, with nothing left and nothing said."""
    said = process.communicate(timeout=PATIENCE)[1]
    assert "Traceback" not in said
    assert process.returncode in ENDINGS[number], said
    assert not os.path.lexists(socket_path)


@pytest.mark.parametrize("moment", ["bound", "listening", "made"])
@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_that_comes_with_the_socket(
    number: signal.Signals, moment: str, data: Path, path: Path
) -> None:
    command = [sys.executable, "-c", AT_A_MOMENT, str(int(number)), moment]
    with running(start("--socket", path, data, command=command)) as process:
        assert_ended_well(process, number, path)


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_as_soon_as_there_is_a_socket(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    for n in range(12):
        path = tmp_path / f"socket-{n}"
        with running(start("--socket", path, data)) as process:
            while not os.path.lexists(path):
                assert process.poll() is None
                time.sleep(0.0005)
            process.send_signal(number)
            assert_ended_well(process, number, path)


def ends(process: subprocess.Popen[str]) -> bool:
    """Whether it ends within a moment."""
    try:
        process.wait(MOMENT)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(
    ignored: signal.Signals, data: Path, path: Path
) -> None:
    """As in the background of a shell script, and under nohup."""
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with signals_at(signal.SIG_IGN, ignored):
        process = subprocess.Popen(
            [*COMMAND, "--socket", path, data], stderr=subprocess.PIPE, text=True, **settings
        )
    with running(process):
        uri_of(process)
        process.send_signal(ignored)
        assert not ends(process)
        with gets_in(path):
            pass
        process.terminate()
        assert_ended_well(process, signal.SIGTERM, path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_was_not_ignored_ends_it(
    number: signal.Signals, data: Path, path: Path
) -> None:
    with running(start("--socket", path, data)) as process:
        uri_of(process)
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE)[1] == ""
        assert process.returncode == 0
        assert not path.exists()


# --- what belongs to the caller -------------------------------------------------------------

# a daemon that opens a file of its own before it reports: OWN ANSWER
DAEMON = """
import os, sys, time

from pyerofs.system.daemon import fork

report = fork("test")
own = open(sys.argv[1], "rb")
report.ready()
with open(sys.argv[2] + ".new", "w") as f:
    f.write(f"{os.getpid()} {len(own.read())} {os.listdir('/proc/self/fd')}")
os.rename(sys.argv[2] + ".new", sys.argv[2])
time.sleep(60)
"""


def test_a_daemon_keeps_no_file_of_its_caller(data: Path, tmp_path: Path) -> None:
    """Nor, with it, the lock that the caller has on it."""
    lock, answer = tmp_path / "lock", tmp_path / "answer"
    theirs = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(theirs, fcntl.LOCK_EX)
    many = [theirs, os.dup(theirs), fcntl.fcntl(theirs, fcntl.F_DUPFD, 500)]
    pid = 0
    try:
        done = subprocess.run(
            [sys.executable, "-c", DAEMON, data, answer],
            capture_output=True, timeout=PATIENCE, check=False, pass_fds=many,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert wait_until(answer.exists)
        number, length, kept = answer.read_text().split(" ", 2)
        pid = int(number)
        assert int(length) == SIZE  # what it has opened itself is still open
        for fd in many:
            os.close(fd)
        many.clear()
        with lock.open() as ours:
            try:
                fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pytest.fail(f"the daemon holds the lock; it has kept descriptors {kept}")
    finally:
        for fd in many:
            os.close(fd)
        if pid:
            os.kill(pid, signal.SIGKILL)


def test_passed_sockets_are_served(data: Path, path: Path) -> None:
    """By the command, as systemd starts it."""
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(path))
        passed.listen()
        shell = 'exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        process = start(data, command=["sh", "-c", shell, "sh", *COMMAND], stdin=passed)
    with running(process):
        with gets_in(path):
            pass
        process.terminate()
        process.wait(PATIENCE)
        assert path.exists()  # it is whose it was


# --- the log --------------------------------------------------------------------------------


def test_the_log_goes_where_it_should(data: Path, path: Path, tmp_path: Path) -> None:
    """A file that became shorter is what the log tells of."""
    log = tmp_path / "log"
    with running(start("--socket", path, "--log-file", log, data)) as process:
        uri_of(process)
        with connected(path) as client:
            client.start()
            os.truncate(data, 100)
            assert client.error(read(200_000, 4096)) == p.EIO
        process.terminate()
        said = process.communicate(timeout=PATIENCE)[1]
    assert str(data) in log.read_text()
    assert said == ""


def test_a_log_that_can_not_be_written(data: Path, path: Path, tmp_path: Path) -> None:
    log = tmp_path / "missing" / "log"
    with running(start("--socket", path, "--log-file", log, data)) as process:
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    assert said == f"pyerofs-nbd: {log}: No such file or directory\n"
    assert not path.exists()
