"""Where clients come in."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pyerofs_nbd.server import listen, tls
from pyerofs_nbd.server import protocol as p
from pyerofs_nbd.server.listen import Listener, ListenError

from tests.nbd.client import DISC, PATIENCE, Client, go, option, read
from tests.nbd.rig import DATA, Rig, memory
from tests.remote.tls import Authority

RUNNER = [sys.executable, "-m", "tests.nbd.runner"]


def connected(address: str | tuple[str, int]) -> Client:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.connect(address)
    return Client(sock)


# --- unix sockets ---------------------------------------------------------------------------


def test_a_unix_socket(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    before = os.umask(0)
    try:
        listener = listen.unix(str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rig.listen(listener)
    for _ in range(3):
        with connected(str(path)) as client:
            client.start()
            assert client.read(1, 10) == DATA[1:11]
    rig.__exit__()
    assert not path.exists()


def test_a_dead_servers_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    listener = listen.unix(path)
    connected(path).sock.close()
    listener.close()
    assert not os.path.exists(path)


def test_a_live_servers_socket_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    first = listen.unix(path)
    with pytest.raises(ListenError, match=f"{path}: a server listens there already"):
        listen.unix(path)
    connected(path).sock.close()
    first.close()


def test_anothers_socket_is_left(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    first = listen.unix(path)
    os.unlink(path)
    second = listen.unix(path)
    first.close()
    connected(path).sock.close()
    second.close()
    second.close()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_other_files_are_left(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        listen.unix(str(path))
    assert os.path.lexists(path)


def test_places_where_no_socket_can_be(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="No such file"):
        listen.unix(str(tmp_path / "missing" / "socket"))
    with pytest.raises(ListenError, match="is longer than"):
        listen.unix(str(tmp_path / ("x" * 108)))


# --- TCP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("localhost:1234", ("localhost", 1234)),
        ("localhost", ("localhost", 10809)),
        (":1234", ("localhost", 1234)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:1234", ("::1", 1234)),
        ("[::1]", ("::1", 10809)),
        ("::1", ("::1", 10809)),
    ],
)
def test_addresses(text: str, meant: tuple[str, int]) -> None:
    assert listen.parse_address(text) == meant


@pytest.mark.parametrize("text", ["localhost:", "localhost:x", "localhost:-1", "localhost:65536"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ListenError, match="is not a port"):
        listen.tcp(text)


def test_tcp(rig: Rig) -> None:
    listeners = listen.tcp("localhost:0")
    assert len({listener.sock.getsockname()[1] for listener in listeners}) == 1
    assert listen.warning(listeners, tls_required=False) is None
    rig.listen(*listeners)
    for listener in listeners:
        with Client(socket.create_connection(listener.sock.getsockname()[:2])) as client:
            client.start()
            assert client.read(1, 10) == DATA[1:11]


def test_tcp_in_use() -> None:
    (listener,) = listen.tcp("127.0.0.1:0")
    address = "{}:{}".format(*listener.sock.getsockname())
    with pytest.raises(ListenError, match=f"{address}: Address already in use"):
        listen.tcp(address)
    listener.close()


def test_tcp_elsewhere() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0: "):
        listen.tcp("192.0.2.1:0")
    with pytest.raises(ListenError, match="is not a host name"):
        listen.tcp("a..b:0")


def test_a_warning_for_other_machines() -> None:
    listeners = listen.tcp("0.0.0.0:0")
    text = listen.warning(listeners, tls_required=False)
    assert text is not None
    assert "anyone" in text
    assert listen.warning(listeners, tls_required=True) is None
    listeners[0].close()


@pytest.mark.parametrize(
    ("address", "name", "tls", "uri"),
    [
        (("127.0.0.1", 10809), "", False, "nbd://127.0.0.1/"),
        (("127.0.0.1", 1), "a b/ü", True, "nbds://127.0.0.1:1/a%20b/%C3%BC"),
        (("::1", 10809, 0, 0), "x", False, "nbd://[::1]/x"),
        ("/run/nbd socket", "", False, "nbd+unix:///?socket=/run/nbd%20socket"),
        (b"\0abstract&", "x?", True, "nbds+unix:///x%3F?socket=%00abstract%26"),
    ],
)
def test_uris(address: object, name: str, tls: bool, uri: str) -> None:
    assert listen.uri_of(address, name, tls=tls) == uri


# --- accepting ------------------------------------------------------------------------------


def test_connections_are_limited(rig: Rig, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    rig.listen(listen.unix(path), limit=2)
    first, second, third = (connected(path) for _ in range(3))
    first.start()
    second.start()
    third.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        third.receive(1)
    third.sock.settimeout(PATIENCE)
    first.sock.close()
    third.start()
    assert second.read(0, 10) == third.read(0, 10) == DATA[:10]
    second.sock.close()
    third.sock.close()


class _Short(socket.socket):
    """Has no descriptors for its first clients."""

    left = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE if self.left else errno.ECONNABORTED, "as if")
        return super().accept()


def test_no_descriptors_left(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listen, "PAUSE", 0.01)
    listener = listen.unix(str(tmp_path / "socket"))
    rig.listen(Listener(_Short(fileno=listener.sock.detach())))
    with connected(str(tmp_path / "socket")) as client:
        client.start()
    assert caplog.text.count("can't accept") == 1


# --- passed by others -----------------------------------------------------------------------


def test_nothing_was_passed() -> None:
    assert listen.activated({}) == []
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "OTHER": ""}
    assert listen.activated(environment) == []
    assert environment == {"OTHER": ""}
    with pytest.raises(ListenError, match="not a number"):
        listen.activated({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"})


@pytest.mark.parametrize("kind", ["listening", "connected"])
def test_passed_sockets(kind: str, tmp_path: Path) -> None:
    """As systemd does it, for a service of its own and for one per connection."""
    path = tmp_path / "data"
    path.write_bytes(DATA)
    if kind == "listening":
        passed = socket.socket(socket.AF_UNIX)
        passed.bind(str(tmp_path / "socket"))
        passed.listen()
        client = connected(str(tmp_path / "socket"))
    else:
        passed, ours = socket.socketpair()
        client = Client(ours)
    shell = 'exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    process = subprocess.Popen(["sh", "-c", shell, "sh", *RUNNER, path], stdin=passed.fileno())
    passed.close()
    try:
        client.start()
        assert client.read(0, 1000) == DATA[:1000]
        client.send(DISC)
        if kind == "connected":
            assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        client.sock.close()


def test_standard_input_and_output(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    stream = b"\0\0\0\3" + go() + read(0, 200_000) + DISC
    done = subprocess.run(
        [*RUNNER, path], input=stream, capture_output=True, check=True, timeout=PATIENCE
    )
    assert done.stdout.startswith(b"NBDMAGICIHAVEOPT")
    assert done.stdout.endswith(DATA[:200_000])
    assert done.stderr == b""


def test_standard_input_is_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    ours, theirs = socket.socketpair()
    with subprocess.Popen(
        [*RUNNER, path], stdin=theirs.fileno(), stdout=theirs.fileno()
    ) as process:
        theirs.close()
        with Client(ours) as client:
            client.start()
            assert client.read(0, 200_000) == DATA[:200_000]
        assert process.wait(PATIENCE) == 0


# --- TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 127.0.0.1.crt, 127.0.0.1.key and authority.crt."""
    directory = tmp_path_factory.mktemp("tls")
    Authority(directory).context("127.0.0.1")
    return directory


def tls_rig(directory: Path, *, required: bool) -> Rig:
    context = tls.server_context(str(directory / "127.0.0.1.crt"), str(directory / "127.0.0.1.key"))
    return Rig(memory(), tls=context, tls_required=required)


def upgrade(client: Client, directory: Path) -> Client:
    assert client.ask(option(p.OPT_STARTTLS))[-1].kind == p.REP_ACK
    context = ssl.create_default_context(cafile=str(directory / "authority.crt"))
    return Client(context.wrap_socket(client.sock, server_hostname="127.0.0.1"))


@pytest.mark.parametrize("required", [False, True])
def test_tls(authority: Path, required: bool) -> None:
    with tls_rig(authority, required=required) as rig:
        client = rig.connect()
        client.greet()
        kind = client.ask(option(p.OPT_LIST))[-1].kind
        assert kind == (p.REP_ERR_TLS_REQD if required else p.REP_ACK)
        with upgrade(client, authority) as secure:
            assert [r.kind for r in secure.ask(go())] == [p.REP_INFO, p.REP_ACK]
            for length in (1, 70_000, 300_000):
                assert secure.read(0, length) == DATA[:length]
            secure.send(*(read(n, 1000, n) for n in range(100)))
            for n in range(100):
                assert (secure.reply(), secure.receive(1000)) == ((0, n), DATA[n : n + 1000])
            assert secure.error(read(300_000, 1)) == p.EINVAL
            secure.send(DISC)


def test_a_client_that_does_not_want_the_certificate(authority: Path) -> None:
    with tls_rig(authority, required=False) as rig:
        for junk in (b"this is no TLS at all, whatever it looks like", b""):
            client = rig.connect()
            client.greet()
            assert client.ask(option(p.OPT_STARTTLS))[-1].kind == p.REP_ACK
            client.send(junk)
            client.sock.shutdown(socket.SHUT_WR)
            while not client.ended():
                pass
        assert rig.started().read(0, 10) == DATA[:10]


def test_bad_certificates(authority: Path, tmp_path: Path) -> None:
    certificate, key = str(authority / "127.0.0.1.crt"), str(authority / "127.0.0.1.key")
    other, junk = str(authority / "authority.key"), str(tmp_path / "junk")
    locked = str(tmp_path / "locked")
    Path(junk).write_text("junk")
    subprocess.run(
        ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", key, "-out", locked],
        check=True,
        capture_output=True,
    )
    for files, reason in [
        ((certificate, str(tmp_path / "missing")), "missing: No such file"),
        ((certificate, other), f"{other}: is not the key of {certificate}"),
        ((junk, key), "hold no certificate and key"),
        ((certificate, junk), "hold no certificate and key"),
        ((certificate, locked), f"{locked}: is encrypted"),
        ((certificate, key, junk), f"{junk}: holds no certificate"),
    ]:
        with pytest.raises(tls.TlsError, match=reason) as found:
            tls.server_context(*files)
        assert "\n" not in str(found.value)
