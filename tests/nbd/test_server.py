"""The server and clients that behave, or don't, over socket pairs."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from pathlib import Path

import pytest
import trio
from pyerofs_nbd.server import batch, exports, holes
from pyerofs_nbd.server import protocol as p
from pyerofs_nbd.server.exports import ALL_BYTES, Export, Server
from pyerofs_nbd.server.pagecache import PageCache

from pyerofs.sources import FileSource, MemorySource
from pyerofs.sources.base import Buffer
from pyerofs.sources.local.threaded import ThreadedSource
from tests.nbd.client import DISC, PATIENCE, Client, go, option, read, request
from tests.nbd.rig import DATA, SIZE, Rig, Slow, memory

MIB = 1 << 20


def wait_for(what: object, sign: str = "") -> None:
    """Wait until ``what()`` is true."""
    end = time.monotonic() + PATIENCE
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, sign
        time.sleep(0.005)


# --- it works -------------------------------------------------------------------------------

RANGES = [
    (0, 1), (0, 4096), (SIZE - 1, 1), (12345, 6789), (0, batch.SMALL), (1, batch.SMALL + 1), (0, SIZE),
    (SIZE - 70_000, 70_000),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["rig", "file_rig"])
@pytest.mark.parametrize("structured", [False, True])
def test_reading(kind: str, structured: bool, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(kind)
    client = rig.started(structured=structured)
    for n, (offset, length) in enumerate(RANGES):
        client.send(read(offset, length, n))
        if structured:
            chunk = client.chunk()
            assert chunk[:3] == (p.REPLY_FLAG_DONE, p.REPLY_OFFSET_DATA, n)
            assert chunk.data[:8] == struct.pack(">Q", offset)
            assert chunk.data[8:] == DATA[offset : offset + length]
        else:
            assert client.reply() == (0, n)
            assert client.receive(length) == DATA[offset : offset + length]
    found = rig.server.statistics
    assert (found.connections, found.requests) == (1, len(RANGES))
    assert (found.bytes, found.errors) == (sum(length for _, length in RANGES), 0)


@pytest.mark.parametrize("kind", ["rig", "file_rig"])
def test_many_requests_at_once(kind: str, request: pytest.FixtureRequest) -> None:
    """A burst of all sizes, in pieces that end anywhere; replies to what is at hand keep their
    order."""
    client = request.getfixturevalue(kind).started()
    wanted = [((n * 7919) % (SIZE - 40_000), n % 40 * 1000 + 1) for n in range(500)]
    stream = b"".join(read(*one, n) for n, one in enumerate(wanted))
    sent, received = 0, 0
    while received < len(wanted):
        while sent < len(stream) and sent < (received + 60) * 28:
            client.send(stream[sent : sent + 97])
            sent += 97
        error, cookie = client.reply()
        offset, length = wanted[cookie]
        assert (error, client.receive(length)) == (0, DATA[offset : offset + length])
        received += 1


def test_requests_that_come_with_the_handshake(rig: Rig) -> None:
    client = rig.connect()
    client.send(b"\0\0\0\3", go(), *(read(n, 10, n) for n in range(100)), DISC)
    client.receive(18)
    assert [r.kind for r in client.replies()] == [p.REP_INFO, p.REP_ACK]
    for n in range(100):
        assert (client.reply(), client.receive(10)) == ((0, n), DATA[n : n + 10])
    assert client.ended()


def test_several_exports() -> None:
    with Rig(Export("one", memory(b"1" * 10)), Export("two", memory(b"2" * 20), "second")) as rig:
        assert rig.started("").read(0, 10) == b"1" * 10
        assert rig.started("one").read(0, 10) == b"1" * 10
        assert rig.started("two").read(10, 10) == b"2" * 10


def test_harmless_commands() -> None:
    source = Slow()
    with Rig(ThreadedSource(source)) as rig:
        client = rig.started()
        assert client.error(request(p.CMD_FLUSH)) == 0
        assert client.error(request(p.CMD_CACHE, 5, 1000)) == 0
        assert source.hints == [(5, 1000)]


def test_disconnecting_has_no_reply(rig: Rig) -> None:
    client = rig.started()
    client.send(read(0, 10), DISC, read(0, 10))
    assert client.reply() == (0, 1)
    client.receive(10)
    assert client.ended()


def test_an_empty_export() -> None:
    with Rig(memory(b"")) as rig:
        client = rig.connect()
        assert client.start() == 0
        assert client.error(read(0, 1)) == p.EINVAL


def test_exports_need_names() -> None:
    with pytest.raises(ValueError, match="names"):
        Server([Export("a", memory()), Export("a", memory())])
    with pytest.raises(ValueError, match="names"):
        Server([])


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rig", "file_rig"])
@pytest.mark.parametrize(
    ("message", "error"),
    [
        (read(SIZE, 1), p.EINVAL),
        (read(SIZE - 1, 2), p.EINVAL),
        (read(0, 0), p.EINVAL),
        (read(0, SIZE + 1), p.EINVAL),
        (read(2**64 - 1, 4096), p.EINVAL),
        (request(p.CMD_READ, 0, 1, flags=1), p.EINVAL),
        (request(p.CMD_WRITE, 0, 5) + b"12345", p.EPERM),
        (request(p.CMD_WRITE, 0, 300_000) + b"\x25\x60\x95\x13" * 75_000, p.EPERM),
        (request(p.CMD_WRITE, 0, 0), p.EPERM),
        (request(p.CMD_TRIM, 0, 5), p.EPERM),
        (request(p.CMD_WRITE_ZEROES, 0, 5), p.EPERM),
        (request(p.CMD_CACHE, SIZE, 1), p.EINVAL),
        (request(p.CMD_BLOCK_STATUS, 0, 1), p.EINVAL),
        (request(77), p.EINVAL),
    ],
)
def test_refused_requests(
    kind: str, message: bytes, error: int, request: pytest.FixtureRequest
) -> None:
    rig: Rig = request.getfixturevalue(kind)
    client = rig.started()
    assert client.error(message) == error
    assert client.read(7, 10) == DATA[7:17], "the stream is in step"
    assert rig.server.statistics.errors == 1


def test_errors_in_structured_replies(rig: Rig) -> None:
    client = rig.started(structured=True, allocation=True)
    for message in (read(SIZE, 1, 9), request(p.CMD_BLOCK_STATUS, SIZE, 1, cookie=9)):
        client.send(message)
        chunk = client.chunk()
        assert chunk[:3] == (p.REPLY_FLAG_DONE, p.REPLY_ERROR, 9)
        assert chunk.data[:4] == struct.pack(">I", p.EINVAL)
    assert client.error(request(p.CMD_TRIM, 0, 1)) == p.EPERM


@pytest.mark.parametrize("structured", [False, True])
def test_a_source_that_fails(structured: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = Slow()
    source.broken = True
    source.go.set()
    with caplog.at_level(logging.INFO), Rig(ThreadedSource(source)) as rig:
        client = rig.started(structured=structured)
        client.send(*(read(n, 4096, n) for n in range(50)))
        for _ in range(50):
            if structured:
                chunk = client.chunk()
                assert (chunk.kind, chunk.data[:4]) == (p.REPLY_ERROR, b"\0\0\0\5")
                assert b"out of order" in chunk.data
            else:
                assert client.reply()[0] == p.EIO
        source.broken = False
        client.send(read(5, 10, 99))
        if not structured:
            assert client.reply() == (0, 99)
        assert rig.server.statistics.failures == 50
    lines = [r.getMessage() for r in caplog.records if r.name == "pyerofs-nbd"]
    assert "slow: read at" in lines[0]
    assert len(lines) < 10, "not a line each"


def test_a_source_with_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    class Short(MemorySource):
        def peek(self, offset: int, length: int) -> Buffer | None:
            return None

        def read_at(self, offset: int, length: int) -> Buffer:
            if offset:
                raise ZeroDivisionError
            return b"x"

    with Rig(ThreadedSource(Short(DATA))) as rig:
        client = rig.started()
        assert client.error(read(0, 10)) == p.EIO
        assert client.error(read(1, 10)) == p.EIO
    assert "slow" not in caplog.text


# --- waiting --------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_a_slow_miss_never_delays_hits(structured: bool) -> None:
    source = Slow(border=4096)
    with Rig(ThreadedSource(source)) as rig:
        client, other = rig.started(structured=structured), rig.started()
        client.send(read(0, 4096, 1), *(read(4096, 100, n) for n in range(2, 200)))
        for n in range(2, 200):
            if structured:
                chunk = client.chunk()
                assert (chunk.cookie, chunk.data[8:]) == (n, DATA[4096:4196])
            else:
                assert (client.reply(), client.receive(100)) == ((0, n), DATA[4096:4196])
        assert other.read(5000, 10) == DATA[5000:5010]
        source.go.set()
        if structured:
            assert client.chunk().data[8:] == DATA[:4096]
        else:
            assert (client.reply(), client.receive(4096)) == ((0, 1), DATA[:4096])


def test_misses_run_side_by_side() -> None:
    source = Slow()
    with Rig(ThreadedSource(source)) as rig:
        client = rig.started()
        client.send(*(read(n * 10, 10, n) for n in range(8)))
        wait_for(lambda: source.asked == 8)
        source.go.set()
        found = {}
        for _ in range(8):
            _, cookie = client.reply()
            found[cookie] = client.receive(10)
        assert found == {n: DATA[n * 10 : n * 10 + 10] for n in range(8)}


def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "MAX_REQUESTS", 4)
    source = Slow(border=4096)
    with Rig(ThreadedSource(source)) as rig:
        client = rig.started()
        client.send(*(read(0, 10, n) for n in range(20)))
        wait_for(lambda: source.asked == 4)
        assert rig.started().read(5000, 10) == DATA[5000:5010], "others are served"
        assert source.asked == 4
        source.go.set()
        assert sorted((client.reply()[1], client.receive(10))[0] for _ in range(20)) == [*range(20)]
        wait_for(lambda: rig.server.budget.free == ALL_BYTES)


def test_bytes_in_flight_are_bounded() -> None:
    """Of a client that asks for much, and of one that reads nothing of it."""
    source = Slow(bytes(32 * MIB), 32 * MIB)
    with Rig(ThreadedSource(source)) as rig:
        client = rig.started()
        client.send(*(read(0, 32 * MIB, n) for n in range(50)))
        wait_for(lambda: source.asked == 2)
        source.go.set()
        other = rig.started()
        other.send(read(0, 10))
        assert other.reply() == (0, 1)
        wait_for(lambda: rig.server.budget.free == ALL_BYTES - 64 * MIB)
        assert source.asked == 3
        client.sock.close()
        wait_for(lambda: rig.server.budget.free == ALL_BYTES)


def test_who_reads_nothing_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "ALL_BYTES", 4 * MIB)
    monkeypatch.setattr(exports, "STALLED", 0.1)
    source = Slow(bytes(4 * MIB), 4 * MIB)
    source.go.set()
    with Rig(ThreadedSource(source)) as rig:
        greedy, modest = rig.started(), rig.started()
        greedy.send(read(0, 4 * MIB))
        wait_for(lambda: rig.server.budget.free == 0)
        assert modest.read(0, 1000) == bytes(1000)
        with pytest.raises((EOFError, ConnectionError)):
            greedy.receive(16 + 4 * MIB)


def test_a_client_that_reads_nothing_delays_nobody(file_rig: Rig) -> None:
    stuck = file_rig.started()
    stuck.send(*(read(0, 100_000, n) for n in range(200)))
    client = file_rig.started()
    for n in range(100):
        assert client.read(n, 1000) == DATA[n : n + 1000]
    for n in range(200):
        assert (stuck.reply(), stuck.receive(100_000)) == ((0, n), DATA[:100_000])


def test_a_small_socket_buffer(file_rig: Rig) -> None:
    """Everything is sent in little pieces."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    file_rig.begin(file_rig.server.serve_client, theirs)
    with Client(ours) as client:
        client.start()
        client.send(*(read(n, 30_000, n) for n in range(20)), read(0, SIZE, 20))
        for n in range(20):
            assert (client.reply(), client.receive(30_000)) == ((0, n), DATA[n : n + 30_000])
        assert (client.reply(), client.receive(SIZE)) == ((0, 20), DATA)


# --- files ----------------------------------------------------------------------------------


def test_cold_files(file_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page cache does not hold is read by a thread."""
    monkeypatch.setattr(PageCache, "holds", lambda *_: False)
    monkeypatch.setattr(batch.Batch, "read", lambda self, requests, start, *_: start)
    monkeypatch.setattr(FileSource, "peek", lambda *_: None)
    file_rig.exports[0].source.peek = lambda *_: None  # type: ignore[method-assign]
    client = file_rig.started()
    for offset, length in RANGES:
        assert client.read(offset, length) == DATA[offset : offset + length]


def test_stacked_file_systems(file_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel counts no pages although they are there, counting is given up."""
    monkeypatch.setattr(PageCache, "holds", lambda self, *_: self.doubted.append(1) is not None)
    monkeypatch.setattr(PageCache, "doubted", [], raising=False)
    monkeypatch.setattr(PageCache, "mistrust", lambda self: self.doubted.append(2))
    assert file_rig.started().read(0, 100_000) == DATA[:100_000]
    assert PageCache.doubted == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("counting", [True, False])
def test_what_the_page_cache_holds(counting: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(256 << 10))
    with open(path, "rb") as f:
        cache = PageCache()
        if not counting:
            cache.mistrust()
        f.read()
        assert cache.holds(f.fileno(), 0, 256 << 10)
        assert cache.holds(f.fileno(), 5, 70_000)
        assert not cache.holds(f.fileno(), 200 << 10, 128 << 10), "beyond its end"
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cache.holds(f.fileno(), 128 << 10, 64 << 10):
            pytest.skip("this file system keeps its pages")
        os.pread(f.fileno(), 1, 0)
        os.posix_fadvise(f.fileno(), 128 << 10, 0, os.POSIX_FADV_DONTNEED)
        assert not cache.holds(f.fileno(), 0, 256 << 10), "its end is missing"


@pytest.mark.parametrize("length", [1000, 100_000])
def test_a_file_that_shrinks(length: int, tmp_path: Path) -> None:
    """Its readers get an error, never zeroes, and nobody else notices."""
    path = tmp_path / "data"
    path.write_bytes(DATA)
    with Rig(ThreadedSource(FileSource(path))) as rig:
        client = rig.started()
        assert client.read(200_000, 10) == DATA[200_000:200_010]
        os.truncate(path, 150_000)
        assert client.error(read(149_500, length)) == p.EIO
        assert rig.started().read(0, 1000) == DATA[:1000]


def test_files_in_memory() -> None:
    """tmpfs knows no RWF_NOWAIT."""
    fd = os.memfd_create("data")
    os.write(fd, DATA)
    with Rig(ThreadedSource(FileSource(fd))) as rig:
        client = rig.started()
        for offset, length in RANGES * 2:
            assert client.read(offset, length) == DATA[offset : offset + length]


# --- holes ----------------------------------------------------------------------------------

BLOCK = 1 << 16


def sparse(path: Path) -> Path:
    """A file: data, hole, data, hole, of one BLOCK each."""
    with path.open("wb") as f:
        f.write(b"x" * BLOCK)
        f.seek(2 * BLOCK)
        f.write(b"x" * BLOCK)
        f.truncate(4 * BLOCK)
    if os.stat(path).st_blocks * 512 > 2 * BLOCK + 8192:
        pytest.skip("no holes in files here")
    return path


def status(client: Client, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
    client.send(request(p.CMD_BLOCK_STATUS, offset, length, cookie=3, flags=flags))
    chunk = client.chunk()
    assert chunk[:3] == (p.REPLY_FLAG_DONE, p.REPLY_BLOCK_STATUS, 3)
    assert chunk.data[:4] == struct.pack(">I", p.ALLOCATION_ID)
    return list(struct.iter_unpack(">II", chunk.data[4:]))


def test_holes(tmp_path: Path) -> None:
    with Rig(ThreadedSource(FileSource(sparse(tmp_path / "sparse")))) as rig:
        client = rig.started(structured=True, allocation=True)
        assert status(client, 0, 4 * BLOCK) == [(BLOCK, 0), (BLOCK, 3), (BLOCK, 0), (BLOCK, 3)]
        assert status(client, 0, 4 * BLOCK, p.CMD_FLAG_REQ_ONE) == [(BLOCK, 0)]
        assert status(client, BLOCK + 5, 7, p.CMD_FLAG_REQ_ONE) == [(7, 3)]
        assert status(client, BLOCK - 5, 10) == [(5, 0), (5, 3)]
        assert status(client, 4 * BLOCK - 1, 1) == [(1, 3)]


def test_no_holes_are_known(rig: Rig) -> None:
    client = rig.started(structured=True, allocation=True)
    assert status(client, 0, SIZE) == [(SIZE, 0)]


def test_holes_are_counted(tmp_path: Path) -> None:
    with sparse(tmp_path / "sparse").open("rb") as f:
        assert holes.extents(f.fileno(), 0, 4 * BLOCK, limit=3) == [
            (BLOCK, 0), (BLOCK, 3), (BLOCK, 0),
        ]  # fmt: skip


def test_what_was_cut_off_is_no_hole(tmp_path: Path) -> None:
    path = sparse(tmp_path / "sparse")
    with path.open("rb") as f:
        os.truncate(path, BLOCK + BLOCK // 2)
        found = holes.extents(f.fileno(), 0, 4 * BLOCK)
        assert found == [(BLOCK, 0), (BLOCK // 2, 3), (2 * BLOCK + BLOCK // 2, 0)]


def test_holes_need_a_context(rig: Rig) -> None:
    client = rig.started(structured=True)
    client.send(request(p.CMD_BLOCK_STATUS, 0, 10))
    assert client.chunk().kind == p.REPLY_ERROR


# --- clients that go away -------------------------------------------------------------------


def test_hanging_up_anywhere(file_rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    stream = b"\0\0\0\3" + option(p.OPT_LIST) + go() + read(0, 100_000) + read(0, 5000) + DISC
    for end in range(0, len(stream) + 1, 3):
        client = file_rig.connect()
        client.send(stream[:end])
        client.sock.close()
    assert file_rig.started().read(0, 10) == DATA[:10]
    assert [r for r in caplog.records if r.name == "pyerofs-nbd"] == []


def test_hanging_up_while_replies_are_sent(file_rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for length in (5000, 20_000, 200_000):
        client = file_rig.started()
        client.send(*(read(0, length, n) for n in range(300)))
        client.receive(1000)
        client.sock.close()
    assert file_rig.started().read(0, 10) == DATA[:10]
    assert [r for r in caplog.records if r.name == "pyerofs-nbd"] == []


def test_hanging_up_while_a_read_is_in_flight() -> None:
    source = Slow()
    with Rig(ThreadedSource(source)) as rig:
        client = rig.started()
        client.send(read(0, 4096))
        wait_for(lambda: source.asked)
        client.sock.close()
        wait_for(lambda: rig.server.budget.free == ALL_BYTES)
        source.go.set()


def test_bad_magic_ends_the_connection(rig: Rig) -> None:
    client = rig.started()
    client.send(read(0, 10, 1), bytes(28), read(0, 10, 2))
    assert (client.reply(), client.receive(10)) == ((0, 1), DATA[:10])
    assert client.ended()


def test_idle_handshakes_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "HANDSHAKE_SECONDS", 0.1)
    for sent in (b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT"):
        client = rig.connect()
        client.send(sent)
        assert client.receive(18)
        assert client.ended()


def test_a_handshake_that_never_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activity does not prolong it."""
    monkeypatch.setattr(exports, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(p, "MAX_OPTIONS", 1 << 40)
    client = rig.connect()
    client.greet()
    asked = 0
    try:
        while True:
            client.ask(option(p.OPT_LIST))
            asked += 1
    except (EOFError, ConnectionError):
        assert asked


# --- stopping -------------------------------------------------------------------------------


def test_draining() -> None:
    source = Slow(border=4096)
    with Rig(ThreadedSource(source)) as rig:
        client, idle = rig.started(), rig.started()
        client.send(read(0, 100, 1))
        wait_for(lambda: source.asked)
        drained = rig.begin(rig.server.drain, PATIENCE)
        wait_for(lambda: rig.server.stopping)
        assert client.error(read(5000, 10, 2)) == p.ESHUTDOWN
        assert idle.error(read(5000, 10, 3)) == p.ESHUTDOWN
        assert rig.connect().ended()
        assert not drained.done.is_set()
        source.go.set()
        assert (client.reply(), client.receive(100)) == ((0, 1), DATA[:100])
        drained.wait()
        assert client.ended()
        assert idle.ended()


def test_draining_does_not_wait_for_ever() -> None:
    source = Slow()
    with Rig(ThreadedSource(source)) as rig:
        client, shaking = rig.started(), rig.connect()
        client.send(read(0, 100))
        wait_for(lambda: source.asked)
        rig.call(rig.server.drain, 0.05)
        assert client.ended()
        shaking.receive(18)
        assert shaking.ended()
        source.go.set()


# --- the kernel's side ----------------------------------------------------------------------


def transmitting(rig: Rig) -> tuple[Client, socket.socket]:
    ours, theirs = socket.socketpair()
    client = Client(ours)
    rig._clients.append(client)
    return client, theirs


def test_transmission_alone(file_rig: Rig) -> None:
    client, theirs = transmitting(file_rig)
    ended = file_rig.begin(file_rig.server.serve_transmission, theirs, file_rig.exports[0])
    assert client.read(5, 100_000) == DATA[5:100_005]
    assert client.error(request(p.CMD_WRITE, 0, 3) + b"abc") == p.EPERM
    client.send(DISC)
    assert ended.wait() is True
    assert theirs.fileno() >= 0
    theirs.close()


def test_a_peer_that_vanishes(rig: Rig) -> None:
    client, theirs = transmitting(rig)
    ended = rig.begin(rig.server.serve_transmission, theirs, rig.exports[0])
    client.send(read(0, 10)[:5])
    client.sock.close()
    assert ended.wait() is False
    theirs.close()


def test_handing_over_a_connection() -> None:
    """Nothing that was asked is lost, nothing is answered twice, and another server goes on."""
    source = Slow(border=4096)
    with Rig(ThreadedSource(source)) as rig:
        client, theirs = transmitting(rig)
        ended = rig.begin(rig.server.serve_transmission, theirs, rig.exports[0])
        client.send(read(0, 100, 1), read(5000, 10, 2), read(6000, 10, 3)[:11])
        assert (client.reply(), client.receive(10)) == ((0, 2), DATA[5000:5010])
        wait_for(lambda: source.asked)
        trio.from_thread.run_sync(rig.server.release, trio_token=rig._token)
        assert not ended.done.wait(0.05), "in the middle of a request"
        client.send(read(6000, 10, 3)[11:])
        assert (client.reply(), client.receive(10)) == ((0, 3), DATA[6000:6010])
        assert not ended.done.wait(0.05), "one is in flight"
        source.go.set()
        assert (client.reply(), client.receive(100)) == ((0, 1), DATA[:100])
        assert ended.wait() is False
        client.send(read(7000, 10, 4))
        with Rig(memory()) as other:
            again = other.begin(other.server.serve_transmission, theirs, other.exports[0])
            assert (client.reply(), client.receive(10)) == ((0, 4), DATA[7000:7010])
            client.send(DISC)
            assert again.wait() is True
        theirs.close()
