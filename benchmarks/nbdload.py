"""The client side of nbd.py: as little as possible between a server and the numbers.

A process of its own connects, keeps ``depth`` reads in flight and counts bytes: replies have a known
size, so none is looked at but the first of a burst.  Prints the seconds it took.

    python nbdload.py SOCKET EXPORT BYTES DEPTH COUNT SPAN [random]
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import time

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
BUFFER = 1 << 20


def connect(path: str, export: str) -> socket.socket:
    """Connect and negotiate the oldest way, which all servers know."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    greeting = receive(sock, 18)
    if greeting[:16] != b"NBDMAGICIHAVEOPT":
        sys.exit("this is no NBD server")
    name = export.encode()
    sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
    receive(sock, 10)
    return sock


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly so many bytes."""
    found = b""
    while len(found) < length:
        more = sock.recv(length - len(found))
        if not more:
            sys.exit("the server hung up")
        found += more
    return found


def load(sock: socket.socket, size: int, depth: int, offsets: list[int]) -> float:
    """Read ``size`` bytes at each offset; returns the seconds it took."""
    requests = b"".join(REQUEST.pack(0x25609513, 0, 0, n, o, size) for n, o in enumerate(offsets))
    view = memoryview(requests)
    buffer = memoryview(bytearray(BUFFER))
    reply = REPLY.size + size
    total = len(offsets)
    start = time.perf_counter()
    sock.sendall(view[: depth * REQUEST.size])
    sent = min(depth, total)
    received = done = 0
    aligned = True
    while done < total:
        n = sock.recv_into(buffer)
        if not n:
            sys.exit("the server hung up")
        if aligned:
            magic, error, _ = REPLY.unpack_from(buffer)
            if (magic, error) != (0x67446698, 0):
                sys.exit(f"no good reply: {magic:#x}, {error}")
        received += n
        done, rest = divmod(received, reply)
        aligned = not rest
        if sent < total and done + depth > sent:
            upto = min(done + depth, total)
            sock.sendall(view[sent * REQUEST.size : upto * REQUEST.size])
            sent = upto
    return time.perf_counter() - start


def main() -> None:
    """See the module's docstring."""
    path, export, *numbers = sys.argv[1:7]
    size, depth, count, span = map(int, numbers)
    slots = span // size
    if sys.argv[7:] == ["random"]:
        chance = random.Random(1)
        offsets = [chance.randrange(slots) * size for _ in range(count)]
    else:
        offsets = [n % slots * size for n in range(count)]
    sock = connect(path, export)
    print(load(sock, size, depth, offsets))
    sock.sendall(REQUEST.pack(0x25609513, 0, 2, 0, 0, 0))


if __name__ == "__main__":
    main()
