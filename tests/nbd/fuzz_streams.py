"""Streams of clients that make no sense: random ones, and good ones that were damaged.

    python -m tests.nbd.fuzz_streams --count 100000

The whole server takes part, only the socket is replaced.  What counts as a finding: an exception that
the server did not expect, a connection that does not end although the client has hung up, replies that
are no NBD, requests that stay accounted for, and memory that grows.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import struct
import time
from collections.abc import Iterable, Sequence
from math import inf

import trio
from pyerofs_nbd.server import protocol as p
from pyerofs_nbd.server.exports import ALL_BYTES, Export, Server

from pyerofs.errors import SourceError
from pyerofs.sources import MemorySource
from pyerofs.sources.base import Buffer
from tests.nbd.client import contexts, go, option, request, string

SIZE = 1 << 20
SECONDS = 30  # until one stream counts as hanging
OPTIONS = (*range(12), 99, 0xFFFFFFFF)
NAMES = ("", "slow", "broken", "none", "ü", "x" * 300)
QUERIES = ("base:allocation", "base:", "base:x", "qemu:", "", ":", "y" * 2000)
LENGTHS = (0, 1, 511, 512, 4096, 32 << 10, (32 << 10) + 1, 1 << 20, (1 << 20) + 1, 33 << 20)

Stream = Sequence[bytes]  # as the server receives it, piece by piece


# --- making them ------------------------------------------------------------------------------


def stream(chance: random.Random) -> Stream:
    """A stream: messages that are mostly right, some damage, cut into pieces."""
    parts = [chance.choice([b"\0\0\0\3"] * 8 + [b"\0\0\0\1", b"\0\0\0\0", b"\xff\0\0\3"])]
    parts += [_option(chance) for _ in range(chance.randrange(6))]
    if chance.random() < 0.8:
        parts.append(chance.choice([go(chance.choice(NAMES[:3])), option(1)]))
        parts += [_request(chance) for _ in range(chance.randrange(12))]
    if chance.random() < 0.5:
        _damage(parts, chance)
    whole = b"".join(parts)
    if chance.random() < 0.3:
        return [whole]
    cuts = sorted(chance.randrange(len(whole) + 1) for _ in range(chance.randrange(1, 8)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) if b > a]


def _option(chance: random.Random) -> bytes:
    name = chance.choice(NAMES)
    match chance.randrange(6):
        case 0:
            return go(name, [chance.randrange(6) for _ in range(chance.randrange(4))])
        case 1:
            return go(name, [chance.randrange(6)], number=p.OPT_INFO)
        case 2:
            queries = [chance.choice(QUERIES) for _ in range(chance.randrange(4))]
            return contexts(name, queries, chance.choice([9, 10]))
        case 3:
            return option(p.OPT_STRUCTURED_REPLY)
        case 4:
            return option(chance.choice(OPTIONS), string(name)[: chance.randrange(20)])
        case _:
            return option(
                chance.choice(OPTIONS), chance.randbytes(chance.choice([0, 1, 40, 70000]))
            )


def _request(chance: random.Random) -> bytes:
    kind = chance.choice([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 0xFFFF])
    length = chance.choice(LENGTHS)
    offset = chance.choice([0, 1, SIZE - 1, SIZE, 2**63, 2**64 - 1, chance.randrange(SIZE)])
    flags = chance.choice([0, 0, 0, 1, 2, 4, 8, 16, 0xFFFF])
    head = request(kind, offset, length, cookie=chance.getrandbits(64), flags=flags)
    return head + bytes(min(length, 5000)) if kind == p.CMD_WRITE else head


def _damage(parts: list[bytes], chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 4)):
        n = chance.randrange(len(parts))
        part = bytearray(parts[n] or b"\0")
        at = chance.randrange(len(part))
        match chance.randrange(6):
            case 0:
                part[at] ^= 1 << chance.randrange(8)
            case 1:
                part[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del part[at : at + chance.randrange(1, 30)]
            case 3:
                part[at:at] = chance.randbytes(chance.randrange(1, 30))
            case 4:
                part *= chance.randrange(2, 40)
            case _:
                part[at:] = parts[chance.randrange(len(parts))]
        parts[n] = bytes(part)


# --- serving them -----------------------------------------------------------------------------


class _Channel:
    """A client that sends a stream and hangs up; keeps the beginning of what it is sent."""

    sends_files = False

    def __init__(self, pieces: Stream) -> None:
        self.stalled = inf
        self.sent = bytearray()
        self.closed = False
        self._pieces = [memoryview(piece) for piece in reversed(pieces) if piece]

    def look_out(self) -> None:
        pass

    async def receive(self, into: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        if not self._pieces:
            return 0
        piece = self._pieces.pop()
        taken = min(len(piece), len(into))
        into[:taken] = piece[:taken]
        if taken < len(piece):
            self._pieces.append(piece[taken:])
        return taken

    async def send(self, parts: Sequence[Buffer], *, more: bool = False) -> None:
        for part in parts:
            self.sent += part[: 1 << 16]  # (data is zeroes: enough of it to see what follows)

    async def send_file(self, fd: int, offset: int, length: int) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True


class _Source(MemorySource):
    """An AsyncSource in memory, at hand or not, whole or broken."""

    blocking = None
    backing = None
    quick = True

    def __init__(self, name: str) -> None:
        super().__init__(bytes(SIZE), name=name)
        self._slow = name != "quick"
        self._broken = name == "broken"

    def peek(self, offset: int, length: int) -> Buffer | None:
        return None if self._slow else super().peek(offset, length)

    def will_need(self, offset: int, length: int) -> None:
        assert 0 <= offset < offset + length <= SIZE

    async def read_at(self, offset: int, length: int) -> Buffer:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        if self._broken:
            raise SourceError("broken: as always")
        return super().read_at(offset, length)

    async def aclose(self) -> None:
        pass


class _Complaints(logging.Handler):
    """Keeps what the server did not expect."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))


def check(streams: Iterable[Stream]) -> int:
    """Serve streams, one after the other; returns how many requests they held.  Raises AssertionError
    at a finding."""
    log, complaints = logging.getLogger("pyerofs-nbd"), _Complaints()
    log.addHandler(complaints)
    before, log.propagate = log.propagate, False
    try:
        return trio.run(_serve, streams, complaints)
    finally:
        log.removeHandler(complaints)
        log.propagate = before


async def _serve(streams: Iterable[Stream], complaints: _Complaints) -> int:
    names = {"": "quick", "slow": "slow", "broken": "broken"}
    server = Server([Export(name, _Source(kind)) for name, kind in names.items()])  # type: ignore[arg-type]
    for pieces in streams:
        channel = _Channel(pieces)
        with trio.move_on_after(SECONDS) as limit:
            await server.serve_channel(channel)
        assert not limit.cancelled_caught, f"hangs: {_shown(pieces)}"
        assert not complaints.found, f"{complaints.found[0]}: {_shown(pieces)}"
        assert channel.closed, f"not closed: {_shown(pieces)}"
        assert server.budget.free == ALL_BYTES, f"budget: {_shown(pieces)}"
        problem = _problem(bytes(channel.sent))
        assert problem is None, f"{problem}: {_shown(pieces)}"
    return server.statistics.requests


def _shown(pieces: Stream) -> str:
    return repr([piece if len(piece) < 300 else piece[:300] + b"..." for piece in pieces])


def _problem(sent: bytes) -> str | None:
    """What is wrong with what a server has sent, as far as it can be told without the requests."""
    if not sent.startswith(b"NBDMAGICIHAVEOPT\0\3"):
        return "no greeting"
    at = 18
    while at < len(sent) and sent.startswith(struct.pack(">Q", p.OPTION_REPLY_MAGIC), at):
        at += 20 + int.from_bytes(sent[at + 16 : at + 20], "big")
    if at > len(sent):
        return "an option's reply is cut off"
    if at == len(sent):
        return None
    if sent[at : at + 4] not in (b"\x67\x44\x66\x98", b"\x66\x8e\x33\xef"):
        at += 10  # the answer to EXPORT_NAME
        if not any(sent[at : at + 124]):
            at += 124
    magics = (b"\x67\x44\x66\x98", b"\x66\x8e\x33\xef")
    if at < len(sent) and sent[at : at + 4] not in magics:
        return f"no reply at {at}: {sent[at : at + 20].hex()}"
    return None


# --- many of them -----------------------------------------------------------------------------


def main() -> None:
    """Serve as many as asked for; tell of the first finding by its traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start, chance = time.monotonic(), random.Random(options.seed)
    first = requests = 0
    for done in range(0, options.count, 1000):
        requests += check(stream(chance) for _ in range(min(1000, options.count - done)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        first = first or peak
        if done % 10_000 == 0:
            print(f"{done + 1000}: peak memory {peak} MiB", flush=True)
    seconds = time.monotonic() - start
    print(f"{options.count} streams, {requests} requests in {seconds:.0f} s; nothing found")
    print(f"peak memory {peak} MiB ({first} MiB after the first thousand)")


if __name__ == "__main__":
    main()
