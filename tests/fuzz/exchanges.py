"""Whole HTTP exchanges that go wrong: what a server can send, and what must come of it.

An *exchange* is all that happens while one image is opened and read: challenges, tokens, manifests,
redirects, ranges of a blob.  A *scene* answers each step of it honestly; *changes* are made to what
it answers: to status lines, headers, bodies, their framing, JSON documents, single bytes.  Whatever
that is, the library gives the data that are really there, or raises an ErofsError with a message
of one printable line; within a few times its timeout, and with little memory.

Case ``n`` of a seed is the same whenever it is made (``case``).  ``perform`` plays one of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeAlias

import pyerofs
from pyerofs.errors import ErofsError
from pyerofs.sources.spec import Access, SourceSpec, VeritySpec
from tests import handmade as hm
from tests.fuzz.run import forget_peak, resident
from tests.remote.oci import Blob, Manifest, basic, index, layer, manifest, platform

MIB = 1 << 20
TIMEOUT = 1.0  # of a read
HANG = 4 * TIMEOUT  # nothing takes longer, whatever a server does
PATIENCE = 2 * HANG  # with what takes longer all the same
MEMORY = 100 * MIB  # that one exchange may take
CACHE_LIMIT = 16 * MIB
GREED = 48 * MIB  # of one body: what the cache may hold, and what fits into the sockets
ENDLESS = 384 * MIB  # how much an endless reply sends if nobody stops it
MESSAGE = 8000  # characters of the longest message that may be of use
BLOCK = 4096
PIECE = 64 << 10

HOST = "127.0.0.1"
USER, PASSWORD, IDENTITY = "ada", "correct-horse", "identity-token-of-ada"
TOKEN = "token-of-the-registry"
TLS_HANDSHAKE = 22
LINGER_NOT = struct.pack("ii", 1, 0)  # closing such a socket resets the connection

log = logging.getLogger("pyerofs")


# --- replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer as it goes over the wire."""

    line: bytes = b"HTTP/1.1 200 OK"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    framing: str = "length"  # or "chunked", or "close": the end of the connection is the end
    before: bytes = b""  # goes ahead of the status line
    edits: tuple[Callable[[bytes], bytes], ...] = ()  # made to all of it
    end: str = "keep"  # the connection; or "close", "reset", "stall", "trickle", "endless", "flood"
    tampered: bool = False  # whether the bytes of the body are not those that are asked for

    def wire(self) -> tuple[bytes, bool]:
        """All bytes; whether the body is tampered with."""
        headers, body = list(self.headers), self.body
        if self.framing == "length" and not self.has(b"content-length"):
            headers.append((b"Content-Length", b"%d" % len(body)))
        elif self.framing == "chunked":
            headers.append((b"Transfer-Encoding", b"chunked"))
            body = chunked(body)
        lines = [self.line, *(name + b": " + value for name, value in headers), b"", b""]
        raw = self.before + b"\r\n".join(lines) + body
        for edit in self.edits:
            raw = edit(raw)
        if not self.edits or self.tampered:
            return raw, self.tampered
        head = re.search(rb"\n\r?\n", raw)
        return raw, bool(self.before) or head is None or raw[head.end() :] != body

    def has(self, name: bytes) -> bool:
        return any(known.lower() == name for known, _ in self.headers)

    def get(self, name: bytes) -> bytes:
        return next((v for known, v in self.headers if known.lower() == name.lower()), b"")


def chunked(body: bytes, size: int = 100_000) -> bytes:
    """As chunks."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# --- changes ----------------------------------------------------------------------------------

Change: TypeAlias = Callable[[Reply], Reply]


def line(value: bytes) -> Change:
    """Another status line."""
    return lambda reply: replace(reply, line=value, tampered=reply.tampered or b" 200" in value)


def status(code: bytes) -> Change:
    """Another status."""
    return line(b"HTTP/1.1 " + code + b" Anything")


def header(name: bytes, value: bytes) -> Change:
    """One header with this value, whatever there was."""

    def change(reply: Reply) -> Reply:
        kept = tuple((n, v) for n, v in reply.headers if n.lower() != name.lower())
        return replace(reply, headers=(*kept, (name, value)))

    return change


def another(name: bytes, value: bytes, *, first: bool = False) -> Change:
    """One more header of this name."""

    def change(reply: Reply) -> Reply:
        known = reply.headers
        if name.lower() == b"content-length" and not reply.has(b"content-length"):
            known = (*known, (name, b"%d" % len(reply.body)))
        more = ((name, value),)
        return replace(reply, headers=more + known if first else known + more)

    return change


def without(name: bytes) -> Change:
    """No header of this name."""

    def change(reply: Reply) -> Reply:
        framing = "close" if name.lower() == b"content-length" else reply.framing
        kept = tuple((n, v) for n, v in reply.headers if n.lower() != name.lower())
        return replace(reply, headers=kept, framing=framing)

    return change


def all_headers(*headers: tuple[bytes, bytes]) -> Change:
    """More headers, before the others."""
    return lambda reply: replace(reply, headers=headers + reply.headers)


def total(value: bytes) -> Change:
    """The right part of something that is as large as this."""

    def change(reply: Reply) -> Reply:
        shown, slash, _ = reply.get(b"Content-Range").rpartition(b"/")
        if not slash:
            return header(b"Content-Length", value)(reply)
        return header(b"Content-Range", shown + b"/" + value)(reply)

    return change


def unavailable(after: bytes) -> Change:
    """Come back later."""
    return lambda reply: replace(status(b"503")(reply), headers=((b"Retry-After", after),))


def body(made: Callable[[bytes], bytes], *, tampered: bool = False) -> Change:
    """Another body.  ``tampered``: its bytes are not at the offsets where they belong."""
    return lambda reply: replace(
        reply, body=made(reply.body), tampered=reply.tampered or tampered
    )  # fmt: skip


def document(text: bytes) -> Change:
    """Another JSON document; what is said of its digest is right."""

    def change(reply: Reply) -> Reply:
        found = replace(reply, body=text)
        if reply.has(b"docker-content-digest"):
            digest = b"sha256:" + hashlib.sha256(text).hexdigest().encode()
            found = header(b"Docker-Content-Digest", digest)(found)
        return found

    return change


def framed(how: str) -> Change:
    return lambda reply: replace(without(b"Content-Length")(reply), framing=how)


def cut(part: float, framing: str | None = None) -> Change:
    """Only part of the body comes; its length is what was said before, unless it is framed anew."""

    def change(reply: Reply) -> Reply:
        kept = reply.body[: int(len(reply.body) * part)]
        if framing is not None:
            return replace(framed(framing)(reply), body=kept)
        length = b"%d" % len(reply.body)
        return replace(header(b"Content-Length", length)(reply), body=kept)

    return change


def raw_body(text: bytes, *headers: tuple[bytes, bytes]) -> Change:
    """A body whose framing is what it is said to be in the headers, and in itself."""

    def change(reply: Reply) -> Reply:
        kept = without(b"Content-Length")(reply)
        return replace(kept, body=text, headers=(*kept.headers, *headers), tampered=True)

    return change


def badly_chunked(made: Callable[[bytes], bytes]) -> Change:
    """Chunks that are none."""
    chunks = (b"Transfer-Encoding", b"chunked")
    return lambda reply: raw_body(made(reply.body), chunks)(reply)


def before(text: bytes) -> Change:
    return lambda reply: replace(reply, before=text + reply.before)


def ending(how: str) -> Change:
    """How it goes on, or ends."""

    def change(reply: Reply) -> Reply:
        if how == "endless":  # it says no length, and whatever range it likes
            reply = framed("close")(reply)
        elif how.startswith("half and "):
            half = cut(0.5, None if reply.framing == "length" else "close")
            return replace(half(reply), end=how.removeprefix("half and "))
        return replace(reply, end=how)

    return change


def edited(edit: Callable[[bytes], bytes]) -> Change:
    """Bytes are changed, wherever they are."""
    return lambda reply: replace(reply, edits=(*reply.edits, edit))


def flip(place: float, reach: int, bits: int) -> Callable[[bytes], bytes]:
    """Bits of one byte among the first ``reach``."""

    def edit(raw: bytes) -> bytes:
        at = int(place * min(reach, len(raw)))
        return raw[:at] + bytes([raw[at] ^ bits]) + raw[at + 1 :] if at < len(raw) else raw

    return edit


def splice(place: float, reach: int, removed: int, text: bytes) -> Callable[[bytes], bytes]:
    """Some bytes go, others come."""

    def edit(raw: bytes) -> bytes:
        at = int(place * min(reach, len(raw)))
        return raw[:at] + text + raw[at + removed :]

    return edit


def flip_body(place: float) -> Change:
    """One bit of the body."""
    return body(lambda data: flip(place, len(data), 1)(data) if data else b"x", tampered=True)


def both(*changes: Change) -> Change:
    """One after another."""

    def change(reply: Reply) -> Reply:
        for each in changes:
            reply = each(reply)
        return reply

    return change


# --- what nobody expects ----------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m"
DEEP = 100_000

NUMBERS = (
    b"", b"0", b"-1", b"-0", b"+5", b"1.5", b"0x10", b"1e9", b"007", b"1_0", b"NaN", b"inf", b"5 5",
    b"1, 2", b"9" * 19, b"9" * 25, b"9" * 5000, *(b"%d" % (1 << n) for n in (31, 40, 63, 64)),
    *(b"%d" % ((1 << n) + 1) for n in (32, 50, 52, 58, 60, 61)), b"%d" % ((1 << 62) - 1),
    b"\xb2", "٣".encode(), "３".encode(), b"\xb9\xb2", "¼".encode(),
)  # fmt: skip
TEXTS = (
    b"", b"x" * 4000, b"x" * 60_000, b"\xe9", b"\xff\xfe", "é".encode(), ESCAPES.encode(),
    b"\x9b31m", b"\x7f", b"\x01\x02", "\u202e\u2028".encode(), b"\xed\xa0\x80", b"%", b"%00%0a",
    b"a,b", b'"', b'""', b'W/""', b"W/", b"*", b"null", b"\\" * 2000, b'"' * 2000, b"," * 5000,
    b"a" * 90_000, b", " * 20_000, b"{}", b"bytes", b"\xc2\x9b2J", b"a\x0bb\x0cc",
)  # fmt: skip
DATES = (
    b"Thu, 01 Jan 1970 00:00:00 GMT", b"Fri, 31 Dec 9999 23:59:59 GMT", b"Mon, 32 Foo 2024 99:99",
    b"Mon, 01 Jan 99999 00:00:00 GMT", b"Mon, 01 Jan 2024 00:00:00 +99999999999999",
    b"Mon, 01 Jan 2024 00:00:00 -9999", b"Mon, 01 Jan 0000 00:00:00 GMT", b"1 Jan 1 1:1 -2359",
    b"Mon, 01 Jan " + b"9" * 5000 + b" 00:00:00 GMT", "Mon, ٠١ Jan 2024 00:00:00 GMT".encode(),
    b"Fri, 31 Dec 9999 23:59:59 -2300", b"Mon, 01 Jan 0001 00:00:00 +2300",
)  # fmt: skip
PLACES = (
    b"", b"?", b"#", b"//", b"http://", b"http:///x", b"http://[bad", b"http://[::1", b"http://]",
    b"http://127.0.0.1:99999/", b"http://127.0.0.1:0/", b"http://127.0.0.1:abc/", b"/%zz", b"/\xff",
    b"http://127.0.0.1:-1/", b"/" + b"a" * 60_000, b"http://" + b"a" * 300 + b"/", b"http://a..b/",
    b"http://.a/", b"file:///etc/passwd", b"ftp://127.0.0.1/", b"javascript:1", b"HTTP://127.0.0.1:1",
    b"http:\\\\127.0.0.1:1", "http://é.invalid/".encode(), b"http://\xe9.invalid/", b"http://xn--a/",
    b"http://xn--\xff/", b"http://0x7f.1:1/", b"http://a:b@127.0.0.1:1/", b"http://127.0.0.1:1/",
    b"../" * 5000, b"http://[fe80::1%25lo]:1/", "http://１２７.0.0.1:1/".encode(), b"http://a b/",
    "http://127.0.0.1:٣/".encode(), b"http://256.256.256.256:1/", b"http://%00/", b"http://%/",
    "http://\u202e/".encode(), b"http://" + ESCAPES.encode() + b"/", b"/" + ESCAPES.encode(),
    b"http://-/", b"http://*/", b"http://" + b"a." * 200 + b"/", b"http://127.0.0.1:1/?" + b"q" * 9000,
    b"http://[v1.x]/", b"http://[::1]x/", b"http://xn--n3h" + b"a" * 80 + b"/", b"https:x", b"http:x",
)  # fmt: skip
COOKIES = (
    b"a=b", b"=", b";", b"a", b"a=b; expires=" + b"9" * 5000, b"a=b; Max-Age=" + b"9" * 5000,
    b"a=b; Max-Age=\xb2", b"a=b; domain=\xff", b"a=b; path=\xe9", b'a="', b"\xff=\xff", b"a=b; port=x",
    b"a=b; expires=Mon, 01 Jan 99999 00:00:00 GMT", b"a=b; Version=" + b"9" * 5000, b"a=b; secure",
    b'a="b; port="1,2,x', b"a=\x1b[2J", b"a=b;" * 5000, b"a=b; expires=Thu, 32-Foo-1 99:99:99 X",
    b"a=b; domain=.0.0.1", b"a=b; Version=1; Max-Age=x", b"a=" + b"c" * 60_000,
)  # fmt: skip
CODINGS = (
    b"chunked", b"Chunked", b"gzip", b"chunked, chunked", b"gzip, chunked", b"identity", b"", b"\xff"
)  # fmt: skip
STATUSES = (
    *(b"%d" % n for n in (*range(100, 104), 199, *range(200, 209), 226, 299, *range(300, 309), 399)),
    *(b"%d" % n for n in (*range(400, 430), 431, 451, 499, *range(500, 512), 599, 600, 700, 999)),
    b"000", b"099", b"20", b"2000", b"abc", b"", b"-20", b"2 0", b"\xb2\xb0\xb0", "２００".encode(),
)  # fmt: skip
LINES = (
    b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/0.9 200 OK",
    b"HTTP/2.0 200 OK", b"HTTP/9.9 206 OK", b"http/1.1 200 OK", b"HTTP/1.1  206 OK", b"ICY 200 OK",
    b"HTTP/1.1 206 " + b"x" * 60_000, b"HTTP/1.1 206 " + ESCAPES.encode(), b"HTTP/1.1 206 \xff\xfe",
    b"HTTP/1.1 206 a\rb", b"HTTP/1.1 206 a\0b", b"\r\n\r\nHTTP/1.1 206 OK", b"\0" * 100, b"x" * 200_000,
    b"SSH-2.0-OpenSSH_9.2", b"\x15\x03\x01\x00\x02\x02\x28", b"PRI * HTTP/2.0", b"HTTP/1.1 503 x",
    b"HTTP/1.0 206 OK", b"HTTP/1.1\t206\tOK", b"HTTP/11 206 OK", b"HTTP/1.1.1 206 OK",
)  # fmt: skip
JUNK_HEADERS = (
    b"no colon", b": no name", b"a b: c", b" folded", b"\tfolded", b"a\xff: b", b"a: b\0c", b"a: b\rc",
    b"a:b\nc:d", b"\x1b[2J: x", b"a" * 70_000 + b": b", b"a: " + b"b" * 120_000, b"\0", b"a:", b":",
    b"Content-Length : 5", b"Content-Length\t: 5", b"Transfer-Encoding : chunked", b"x: y" * 1000,
)  # fmt: skip
CHUNKS = (
    b"-1\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"f" * 20 + b"\r\nx", b"f" * 21 + b"\r\nx", b"g\r\n",
    b"\r\n", b"5\nhello\n0\n\n", b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhelloworld\r\n0\r\n\r\n", b"5\r\nhel",
    b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    b"0\r\nbad trailer\r\n\r\n", b"0\r\n\r\n", b"00000000000\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n",
    b"\xb2\r\nab\r\n0\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\nhello",
)  # fmt: skip
INTERIM = (
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000,
    b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 20,
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 199 x\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 100\r\nETag: \xff\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"\r\n", b"\0",
    b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", b"hello\r\n",
)  # fmt: skip
HELLOS = (
    b"", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x28",
    b"\x16\x03\x03\xff\xff" + b"x" * 1000, b"\x16\x03\x01\x00\x00", b"\0" * 100, b"SSH-2.0-x\r\n",
    b"\x15\x03\x03\x00\x02\x01\x00", b"\xff" * 70_000,
)  # fmt: skip

Json: TypeAlias = Any


class Raw(str):
    """JSON text that no value stands for."""


class Pairs(list[tuple[str, Any]]):
    """An object as its members, some of which may have the same name."""


VALUES: tuple[Json, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, *(1 << n for n in (31, 40, 50, 52, 60, 62, 63, 64)),
    Raw("1e400"), Raw("-1e400"), Raw("1" + "0" * 400), Raw("1" * 5000), Raw("NaN"), Raw("-Infinity"),
    Raw("1E-400"), Raw("01"), Raw("0x10"), Raw("'x'"), Raw(""), Raw("undefined"), Raw('"\\x"'),
    Raw('"\\ud800"'), Raw('"\\udc9b"'), Raw('"\\udfff\\ud800"'), Raw('"\\u0000"'), Raw('"\n"'),
    "", " ", "x", ESCAPES, "\x9b31m", "a\nb\rc", "\u202e\u2028", "é", "x" * 5000, "x" * 200_000,
    "sha256:" + "0" * 64, "sha256:", "sha512:" + "0" * 128, "md5:" + "0" * 32, "SHA256:" + "A" * 64,
    "application/vnd.oci.image.index.v1+json", "application/vnd.erofs.layer.v1",
    "application/vnd.erofs.layer.v1+zstd", [], {}, [[]], [None], {"": ""}, {"a": {"b": ["c"]}}, "linux",
    *(Raw("[" * n + "]" * n) for n in (300, 900, 990, 1500, 5000, 20_000, DEEP)),
    *(Raw('{"a":' * n + "1" + "}" * n) for n in (300, 900, 990, 20_000)), Raw("[" * DEEP),
    Raw("[" + "0," * 50_000 + "0]"), Raw("[" + "{}," * 20_000 + "{}]"),
)  # fmt: skip


def encoded(value: Json) -> str:
    """JSON, with what the json module does not write."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{encoded(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encoded, value)) + "]"
    return json.dumps(value)


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def shown(value: object) -> str:
    """For people, who don't want to read all of it."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}… ({len(text)})"


def places_in(value: Json, path: str = "") -> Iterator[tuple[str, Json, Any]]:
    """(path, container, key) of everything in a JSON value."""
    members: Sequence[tuple[Any, Json]] = ()
    if isinstance(value, dict):
        members = list(value.items())
    elif isinstance(value, list):
        members = list(enumerate(value))
    for key, inner in members:
        name = f"{path}.{key}" if isinstance(key, str) else f"{path}[{key}]"
        yield name.lstrip("."), value, key
        yield from places_in(inner, name)


def changed_json(rng: Random, text: bytes) -> tuple[str, bytes]:
    """A JSON document with something in it that nobody expects; what that is."""
    found = json.loads(text)
    value = rng.choice(VALUES)
    way = rng.random()
    if way < 0.12:
        return f"is {shown(value)}", utf8(encoded(value))
    if way < 0.24:
        return _broken_text(rng, text)
    path, container, key = rng.choice(list(places_in(found)))
    if way < 0.34:
        del container[key]
        return f"no {path}", utf8(encoded(found))
    if way < 0.42:
        container[key] = [container[key]] * rng.choice([2, 30, 12_000])
        return f"{len(container[key])} x {path}", utf8(encoded(found))
    if way < 0.47 and isinstance(container, list):
        container *= rng.choice([2, 30, 12_000])
        return f"{len(container)} items beside {path}", utf8(encoded(found))
    if way < 0.55 and isinstance(container, dict):
        pairs = Pairs(container.items())
        pairs.insert(rng.choice([0, len(pairs)]), (key, value))
        holder = encoded(found).replace(encoded(container), encoded(pairs), 1)
        return f"{path} twice, once {shown(value)}", utf8(holder)
    container[key] = value
    return f"{path} is {shown(value)}", utf8(encoded(found))


def _broken_text(rng: Random, text: bytes) -> tuple[str, bytes]:
    at = rng.randrange(len(text))
    return rng.choice(
        [
            ("is cut", text[:at]),
            ("is empty", b""),
            ("goes on", text + b"\n{}"),
            ("is UTF-16", text.decode().encode("utf-16")),
            ("is UTF-32", text.decode().encode("utf-32")),
            ("has a byte order mark", b"\xef\xbb\xbf" + text),
            ("has bytes that are no text", text[:at] + b"\xff\xfe\xed\xa0\x80" + text[at:]),
            ("has zeros", text[:at] + b"\0" + text[at:]),
            ("has a bit flipped", flip(at / len(text), len(text), 1 << rng.randrange(8))(text)),
            ("is HTML", b"<html>please log in</html>"),
            ("begins with spaces", b" " * 1_000_000 + text),
            ("is 5 MiB", text[:-1] + b',"x":"' + b"y" * (5 << 20) + b'"}'),
        ]
    )


# --- scenes -----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What is opened, and what that takes."""

    registry: bool = False
    ranges: bool = True
    named: bool = True  # whether there are a length and validators
    redirect: bool = False  # the blob is elsewhere
    login: str = ""  # "basic", "token", "identity"
    indexed: bool = False  # the tag leads to an index
    zstd: bool = False  # the layer is compressed
    listed: bool = True  # whether the manifest knows the blob
    verity: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """What is asked for, in order; those with the most to it several times."""
        found: list[str] = []
        if self.registry:
            if self.login:
                found += ["challenge"] * 2
            if self.login in ("token", "identity"):
                found += ["token"] * 3
            found += ["tls", "manifest", "manifest"]
            found += ["image"] if self.indexed else []
            found += ["config"] if self.zstd else []
        found += ["redirect"] * 2 if self.redirect else []
        return (*found, "blob", "blob")

    @property
    def documents(self) -> tuple[str, ...]:
        """JSON that other JSON refers to by its digest."""
        if not self.registry:
            return ()
        return (
            "image",
            *(["config"] * 2 if self.zstd else []),
            *(["index"] if self.indexed else []),
        )

    @property
    def checked(self) -> bool:
        """Whether a wrong byte of the blob must be noticed."""
        return self.zstd or self.verity


KINDS = {
    "ranges": Kind(),
    "whole": Kind(ranges=False),
    "download": Kind(ranges=False, named=False),
    "redirected": Kind(redirect=True),
    "password": Kind(login="basic"),
    "verity": Kind(verity=True),
    "registry": Kind(registry=True),
    "index": Kind(registry=True, indexed=True),
    "basic": Kind(registry=True, login="basic"),
    "token": Kind(registry=True, login="token"),
    "identity": Kind(registry=True, login="identity"),
    "zstd": Kind(registry=True, zstd=True),
    "zstd index": Kind(registry=True, zstd=True, indexed=True, login="token"),
    "redirecting registry": Kind(registry=True, redirect=True),
    "registry without ranges": Kind(registry=True, ranges=False),
    "unlisted": Kind(registry=True, listed=False),
}


@dataclass(frozen=True)
class Truth:
    """An image, and what is in it."""

    image: bytes
    content: bytes  # of /data
    root_hash: str  # of a dm-verity tree that follows the image
    tree: bytes


@cache
def truth(large: bool) -> Truth:
    """With its data in the first segment, or in the second."""
    content = hm.noise(40_000, 7)
    block = (MIB if large else 4 * BLOCK) // BLOCK
    inodes = {b"data": hm.plain(len(content), block), b"note": hm.inline(b"a note\n")}
    pieces = hm.build(inodes, {block: content})
    image = bytearray(-(-hm.end_of(pieces) // BLOCK) * BLOCK)
    for at, data in pieces.items():
        image[at : at + len(data)] = data
    levels: list[bytes] = []
    below = bytes(image)
    while len(below) > BLOCK or not levels:
        hashes = [hashlib.sha256(below[at : at + BLOCK]) for at in range(0, len(below), BLOCK)]
        below = b"".join(h.digest() for h in hashes)
        below += bytes(-len(below) % BLOCK)
        levels.append(below)
    root = hashlib.sha256(below).hexdigest()
    return Truth(bytes(image), content, root, b"".join(reversed(levels)))


@dataclass
class Request:
    """What the client wants."""

    method: str
    path: str
    headers: dict[str, str]

    def range(self, size: int) -> tuple[int, int] | None:
        """(first byte, one past the last)."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if found is None:
            return None
        return int(found[1]), min(int(found[2]) + 1, size)


class Alteration(NamedTuple):
    """A change to a step of an exchange: each time, or so many times."""

    step: str
    what: str
    change: Change
    times: int | None = None
    keep: bool = False  # the connection, whatever was sent over it

    def __str__(self) -> str:
        often = "" if self.times is None else f" ({self.times} x)"
        return f"{self.step}: {self.what}{often}{' (goes on)' if self.keep else ''}"


class Rewriting(NamedTuple):
    """A change to a document before its digest is known to others."""

    document: str
    what: str
    text: bytes

    def __str__(self) -> str:
        return f"{self.document}, by its own digest: {self.what}"


@dataclass(frozen=True)
class Exchange:
    """What is opened, how, and what goes wrong."""

    number: int
    kind: str
    alterations: tuple[Alteration, ...] = ()
    rewriting: Rewriting | None = None
    large: bool = False
    cache: bool = True
    prefetch: str = "none"
    again: bool = False  # whether the same is opened once more from an honest server

    def __str__(self) -> str:
        how = [self.kind, "large" if self.large else "small", f"prefetch {self.prefetch}"]
        how += [] if self.cache else ["no cache"]
        how += ["again"] if self.again else []
        lines = [f"case {self.number}: {', '.join(how)}"]
        lines += [] if self.rewriting is None else [str(self.rewriting)]
        return "\n  ".join([*lines, *map(str, self.alterations)])


@cache
def _published(kind: Kind, large: bool) -> dict[str, Manifest]:
    return published(kind, large)


def published(kind: Kind, large: bool, rewriting: Rewriting | None = None) -> dict[str, Manifest]:
    """What a registry holds: ``top``, and ``image`` where that is another one."""
    data = truth(large).image
    erofs = layer(data)
    if kind.zstd:
        import zstandard

        packed = zstandard.ZstdCompressor().compress(data)
        erofs = layer(packed, "application/vnd.erofs.layer.v1+zstd")
    diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
    made = manifest(erofs, diff_ids=[diff_id])
    config, *_ = made.blobs
    if rewriting is not None and rewriting.document == "config":
        config = Blob(rewriting.text, config.kind)
        found = json.loads(made.blob.data) | {"config": config.descriptor}
        made = Manifest(Blob(json.dumps(found).encode(), made.blob.kind), (config, erofs))
    if not kind.listed:
        found = json.loads(made.blob.data) | {"layers": []}
        made = Manifest(Blob(json.dumps(found).encode(), made.blob.kind), (config, erofs))
    if rewriting is not None and rewriting.document == "image":
        made = Manifest(Blob(rewriting.text, made.blob.kind), made.blobs)
    top = made
    if kind.indexed:
        top = index(made.for_platform(platform("linux/amd64")))
        if rewriting is not None and rewriting.document == "index":
            top = Manifest(Blob(rewriting.text, top.blob.kind), (), top.manifests)
    return {"top": top, "image": made}


class Scene:
    """Answers the requests of one exchange."""

    def __init__(self, exchange: Exchange, authority: str, *, honest: bool = False) -> None:
        self.kind = KINDS[exchange.kind]
        self.exchange = exchange
        self.authority = authority
        self.tampered = False
        self.sent = 0  # bytes, of all replies
        self.most = 0  # bytes of one reply
        self.asked = 0
        truthful = truth(exchange.large)
        self._data = truthful.image + (truthful.tree if self.kind.verity else b"")
        self._altering = () if honest else exchange.alterations
        self._left = [a.times for a in self._altering]
        self.published: dict[str, Manifest] = {}
        if self.kind.registry:
            if honest or exchange.rewriting is None:
                self.published = _published(self.kind, exchange.large)
            else:
                self.published = published(self.kind, exchange.large, exchange.rewriting)
            self._data = self.published["image"].blobs[-1].data
        self.etag = f'"{exchange.number}"'.encode()

    # what the client is told to open ------------------------------------------------------

    @property
    def repository(self) -> str:
        return f"{self.kind.login or 'app'}/x{self.exchange.number}"

    def spec(self) -> SourceSpec:
        """What is opened."""
        verity = username = blob = None
        if self.kind.verity:
            found = truth(self.exchange.large)
            blocks = len(found.image) // BLOCK
            verity = VeritySpec(
                found.root_hash, len(found.image), superblock=False, data_blocks=blocks
            )
        if self.kind.login in ("basic", "token"):
            username = USER
        if not self.kind.listed:
            blob = f"sha256:{hashlib.sha256(self._data).hexdigest()}"
        what = f"http://{self.authority}/{self.exchange.number}/image"
        if self.kind.registry:
            what = f"oci://{self.authority}/{self.repository}:1"
        where = "linux/amd64" if self.kind.registry else None
        return SourceSpec(
            what, verity=verity, username=username, blob=blob, platform=where, insecure=True
        )

    # answers ------------------------------------------------------------------------------

    def hello(self) -> Reply:
        """To somebody who would speak TLS."""
        return self._altered("tls", Reply(end="close"))

    def answer(self, request: Request) -> Reply:
        """To a request."""
        self.asked += 1
        step, reply = self._honest(request)
        return self._altered(step, reply)

    def _altered(self, step: str, reply: Reply) -> Reply:
        honest, keep = reply, False
        for i, alteration in enumerate(self._altering):
            left = self._left[i]
            if alteration.step != step or left == 0:
                continue
            self._left[i] = None if left is None else left - 1
            reply = alteration.change(reply)
            keep = keep or alteration.keep
        if reply is not honest and reply.end == "keep" and not keep:
            return replace(reply, end="close")
        return reply

    def _honest(self, request: Request) -> tuple[str, Reply]:
        path = request.path.partition("?")[0]
        number = self.exchange.number
        if path == f"/{number}/image":
            if self.kind.login and request.headers.get("authorization") != basic(USER, PASSWORD):
                return "challenge", Reply(b"HTTP/1.1 401 Unauthorized")
            return self._blob(request)
        if path == f"/{number}/elsewhere":
            return "blob", self._bytes(request)
        if path == f"/{number}/token":
            return "token", self._token(request)
        route = re.fullmatch(rf"/v2/{self.repository}/(blobs|manifests)/([^/]+)", path)
        if route is None:
            return "lost", Reply(b"HTTP/1.1 404 Not Found")
        if not self._admits(request.headers.get("authorization", "")):
            challenge = f'Bearer realm="http://{self.authority}/{number}/token",service="fuzz"'
            if self.kind.login == "basic":
                challenge = 'Basic realm="fuzz"'
            given = ((b"WWW-Authenticate", challenge.encode()),)
            return "challenge", Reply(b"HTTP/1.1 401 Unauthorized", given, b"{}")
        kind, which = route[1], route[2]
        top, image = self.published["top"], self.published["image"]
        config, blob = image.blobs
        if kind == "manifests" and which in ("1", top.digest):
            return "manifest", _described(top.blob)
        if kind == "manifests" and which == image.digest:
            return "image", _described(image.blob)
        if kind == "blobs" and which == config.digest:
            return "config", Reply(body=config.data)
        if kind == "blobs" and which == blob.digest:
            return self._blob(request)
        return "lost", Reply(b"HTTP/1.1 404 Not Found", (), b"{}")

    def _admits(self, authorization: str) -> bool:
        wanted = {"": authorization, "basic": basic(USER, PASSWORD)}
        return authorization == wanted.get(self.kind.login, f"Bearer {TOKEN}")

    def _token(self, request: Request) -> Reply:
        if self.kind.login == "token" and request.headers.get("authorization") != basic(
            USER, PASSWORD
        ):
            return Reply(b"HTTP/1.1 401 Unauthorized", (), b"{}")
        return Reply(body=TOKEN_DOCUMENT)

    def _blob(self, request: Request) -> tuple[str, Reply]:
        if not self.kind.redirect:
            return "blob", self._bytes(request)
        where = f"http://{self.authority}/{self.exchange.number}/elsewhere"
        return "redirect", Reply(b"HTTP/1.1 307 Away", ((b"Location", where.encode()),))

    def _bytes(self, request: Request) -> Reply:
        data = self._data
        headers: tuple[tuple[bytes, bytes], ...] = ()
        if not self.kind.named:
            return Reply(body=data, framing="chunked")
        if not self.kind.registry:
            headers = (
                (b"ETag", self.etag),
                (b"Last-Modified", b"Mon, 01 Jan 2024 00:00:00 GMT"),
            )
        wanted = request.range(len(data)) if self.kind.ranges else None
        if wanted is None:
            return Reply(headers=headers, body=data)
        start, end = wanted
        if start >= end:
            return Reply(b"HTTP/1.1 416 No", ((b"Content-Range", b"bytes */%d" % len(data)),))
        shown_range = (b"Content-Range", b"bytes %d-%d/%d" % (start, end - 1, len(data)))
        return Reply(b"HTTP/1.1 206 Part", (*headers, shown_range), data[start:end])


TOKEN_DOCUMENT = json.dumps({"token": TOKEN, "expires_in": 300, "issued_at": "today"}).encode()


def _described(blob: Blob) -> Reply:
    headers = (
        (b"Content-Type", blob.kind.encode()),
        (b"Docker-Content-Digest", blob.digest.encode()),
    )
    return Reply(headers=headers, body=blob.data)


# --- cases by number --------------------------------------------------------------------------


def case(seed: int, number: int) -> Exchange:
    """The exchange of that number."""
    rng = Random(f"{seed}:{number}")
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    rewriting = None
    if kind.documents and rng.random() < 0.3:
        which = rng.choice(kind.documents)
        what, text = changed_json(rng, _document(kind, which))
        rewriting = Rewriting(which, what, text)
    count = rng.choices([1, 2, 3], [7, 2, 1])[0] - (rewriting is not None)
    found = Exchange(
        number,
        name,
        tuple(alteration(rng, kind) for _ in range(count)),
        rewriting,
        large=rng.random() < 0.3,
        cache=rng.random() < 0.6,
        prefetch=rng.choices(["none", "metadata", "all"], [6, 3, 1])[0],
    )
    return replace(found, again=found.cache and rng.random() < 0.3)


def _document(kind: Kind, which: str) -> bytes:
    found = _published(kind, False)
    if which == "index":
        return found["top"].blob.data
    return found["image"].blobs[0].data if which == "config" else found["image"].blob.data


def alteration(rng: Random, kind: Kind) -> Alteration:
    """A change to some step."""
    step = rng.choice(kind.steps)
    times = rng.choices([1, 2, None], [6, 1, 3])[0]
    if step == "tls":
        text = rng.choice(HELLOS)
        return Alteration(step, shown(text), raw_hello(text), times)
    makers: list[tuple[float, Callable[[Random, str], tuple[str, Change]]]] = [
        (2, _other_status), (0.7, _other_line), (5, _own_header), (3, _other_header),
        (0.7, _junk_headers), (2, _other_body), (0.7, _interim), (0.35, _ending), (2, _edit),
    ]  # fmt: skip
    if step in ("token", "manifest", "image", "config"):
        makers.append((8, partial(_other_document, kind=kind)))
    weights = [weight for weight, _ in makers]
    what, change = rng.choices(makers, weights)[0][1](rng, step)
    return Alteration(step, what, change, times, rng.random() < 0.1)


def raw_hello(text: bytes) -> Change:
    """Bytes instead of a reply."""
    return lambda reply: replace(reply, edits=(lambda _: text,))


def _other_status(rng: Random, step: str) -> tuple[str, Change]:
    code = rng.choice(STATUSES)
    if rng.random() < 0.3:
        after = rng.choice([*NUMBERS[:9], b"1", b"0", *NUMBERS, *DATES, *TEXTS])
        return f"503, Retry-After {shown(after)}", unavailable(after)
    return f"status {shown(code)}", status(code)


def _other_line(rng: Random, step: str) -> tuple[str, Change]:
    text = rng.choice(LINES)
    return f"status line {shown(text)}", line(text)


def _range(rng: Random) -> bytes:
    number = partial(rng.choice, [*NUMBERS, b"0", b"0", b"1", b"4095", b"*"])
    forms = [
        b"bytes %s-%s/%s" % (number(), number(), number()), b"bytes */%s" % number(),
        b"bytes 0-%s/%s" % (number(), number()), b"BYTES 0-1/2", b"items 0-1/2", b"bytes 0-1",
        b"bytes=0-1/2", b"bytes 0-0/1", b"bytes 0-1048575/*",
    ]  # fmt: skip
    return rng.choice(forms)


def challenge(rng: Random) -> bytes:
    """What WWW-Authenticate may say."""
    realm = rng.choice(PLACES)
    text = rng.choice([*TEXTS, b"x"])
    forms = [
        b'Bearer realm="%s",service="x"' % realm, b'Bearer realm="%s"' % realm,
        b"Bearer realm=" + realm, b"bearer REALM={token}", b"Bearer", b"Bearer " + text, text,
        b'Bearer realm="{token}",service="%s",scope="%s"' % (text, text), b"Basic", b"Basic realm=",
        b'Bearer realm="{token}",scope="' + text, b'Digest realm="x", nonce="' + text + b'"',
        b"Basic " + text, b"Negotiate, Bearer, Basic", b"Bearer ," * 8000, b"Bearer a=" * 9000,
        b"Bearer " + b"a" * rng.choice([1000, 20_000, 90_000]), b"Bearer " + b"a=b," * 15_000,
        b'Bearer realm="' + b"\\" * 60_001, b"Bearer" + b" " * 60_000 + b"x",
        b'Bearer realm="{token}" ' + b'a="b' * 15_000, b"Bearer " + b"a-_" * 25_000 + b"!",
        b"," * 60_000 + b"Basic", b'Basic realm="x", Bearer realm="{token}"',
    ]  # fmt: skip
    return rng.choice(forms)


def _own_header(rng: Random, step: str) -> tuple[str, Change]:
    """A header that means something at this step."""
    if step == "challenge":
        value = challenge(rng)
        return f"challenge {shown(value)}", challenging(value)
    if step == "redirect":
        value = rng.choice([*PLACES, b"{self}"])
        return f"Location {shown(value)}", located(value)
    if step == "blob":
        way = rng.randrange(4)
        number = rng.choice(NUMBERS)
        if way == 0:
            return f"total {shown(number)}", total(number)
        if way == 1:
            value = _range(rng)
            return f"Content-Range {shown(value)}", header(b"Content-Range", value)
        if way == 2:
            return f"length {shown(number)}", header(b"Content-Length", number)
        name, values = rng.choice([(b"ETag", TEXTS), (b"Last-Modified", (*TEXTS, *DATES))])
        value = rng.choice(values)
        return f"{name.decode()} {shown(value)}", header(name, value)
    if rng.random() < 0.5:
        value = rng.choice([*TEXTS, b"sha256:" + b"0" * 64, b"sha512:" + b"0" * 128, b"md5:00"])
        return f"digest {shown(value)}", header(b"Docker-Content-Digest", value)
    place = rng.choice([*PLACES, b"{self}"])
    away = both(status(b"307"), located(place))
    return f"redirected to {shown(place)}", away


def challenging(value: bytes) -> Change:
    """A challenge in which ``{token}`` is the right realm."""

    def change(reply: Reply) -> Reply:
        known = re.search(rb'realm="([^"]*)"', reply.get(b"WWW-Authenticate"))
        realm = known[1] if known else b"/token"
        return header(b"WWW-Authenticate", value.replace(b"{token}", realm))(reply)

    return change


def located(value: bytes) -> Change:
    """A redirect in which ``{self}`` leads here again."""
    return header(b"Location", b"" if value == b"{self}" else value)


def _other_header(rng: Random, step: str) -> tuple[str, Change]:
    """A header that may mean something anywhere."""
    name, values = rng.choice(
        [
            (b"Content-Length", NUMBERS), (b"Content-Encoding", (b"gzip", b"br", b"IDENTITY", *TEXTS)),
            (b"Transfer-Encoding", CODINGS), (b"Set-Cookie", COOKIES), (b"ETag", TEXTS),
            (b"Location", PLACES), (b"Retry-After", NUMBERS), (b"Content-Type", TEXTS),
            (b"Connection", (b"close", b"upgrade", b"keep-alive", b"\xff", b"")), (b"Date", DATES),
            (b"WWW-Authenticate", TEXTS), (b"Upgrade", TEXTS), (b"Keep-Alive", NUMBERS),
            (b"Content-Range", (*NUMBERS, *TEXTS)), (b"Link", TEXTS), (b"Trailer", TEXTS),
            (b"Last-Modified", (*TEXTS, *DATES)), (b"Accept-Ranges", TEXTS), (b"X-Anything", TEXTS),
        ]
    )  # fmt: skip
    value = rng.choice(values)
    text = f"{name.decode()} {shown(value)}"
    way = rng.random()
    if way < 0.6:
        return text, header(name, value)
    if way < 0.75:
        return f"another {text}", another(name, value, first=rng.random() < 0.5)
    if way < 0.9:
        return f"no {name.decode()}", without(name)
    count = rng.choice([2, 100, 3000])
    return f"{count} x {text}", all_headers(*[(name, value[:20])] * count)


def _junk_headers(rng: Random, step: str) -> tuple[str, Change]:
    text = rng.choice(JUNK_HEADERS)
    place = rng.choice([b"\r\n", b"\r\n\r\n"])

    def edit(raw: bytes) -> bytes:
        head, found, rest = raw.partition(place)
        return head + b"\r\n" + text + found + rest

    return f"header line {shown(text)}", edited(edit)


def _other_body(rng: Random, step: str) -> tuple[str, Change]:
    part = rng.random()
    text = rng.choice(CHUNKS)
    junk = rng.randbytes(rng.choice([1, 1000, 100_000]))
    found: list[tuple[str, Change]] = [
        ("body cut", cut(part)),
        ("body cut, no length", cut(part, "close")),
        ("body cut, in chunks", cut(part, "chunked")),
        ("in chunks", framed("chunked")),
        ("no length", framed("close")),
        ("empty", body(lambda _: b"")),
        ("goes on", body(lambda data: data + junk)),
        ("goes on beyond its length", edited(lambda raw: raw + junk)),
        ("another reply follows", edited(lambda raw: raw + raw)),
        ("junk", body(lambda _: junk, tampered=True)),
        ("a bit flipped", flip_body(part)),
        ("begins late", body(lambda data: data[len(data) // 3 :], tampered=True)),
        (f"chunks {shown(text)}", badly_chunked(lambda _: text)),
        ("chunks, the last one cut", badly_chunked(lambda data: chunked(data)[:-9])),
        ("one of the chunks bad", badly_chunked(lambda data: chunked(data[:500], 100) + text)),
        ("tiny chunks", badly_chunked(lambda data: chunked(data[:5000], 1))),
        (f"chunked by {shown(text)} too", both(framed("chunked"), before(text))),
    ]
    return rng.choice(found)


def _interim(rng: Random, step: str) -> tuple[str, Change]:
    text = rng.choice(INTERIM)
    return f"{shown(text)} goes ahead", before(text)


def _ending(rng: Random, step: str) -> tuple[str, Change]:
    how = rng.choices(
        ["reset", "half and reset", "stall", "half and stall", "trickle", "endless", "flood"],
        [3, 3, 1, 1, 1, 0.3, 0.5],
    )[0]
    if how == "endless" and step == "blob":
        claim = rng.choice([b"bytes 0-%d/%d" % (n - 1, n) for n in (1 << 30, 1 << 40, 1 << 61)])
        return f"endless, {claim.decode()}", endless(claim)
    return how, ending(how)


def endless(claim: bytes | None = None) -> Change:
    """A body without end."""
    if claim is None:
        return ending("endless")
    return both(header(b"Content-Range", claim), ending("endless"))


def _edit(rng: Random, step: str) -> tuple[str, Change]:
    reach = rng.choice([12, 40, 200, 400, 2000, 1 << 30])
    place = rng.random()
    where = f"at {place:.4f} of the first {reach}"
    if rng.random() < 0.6:
        bits = rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        return f"bits {bits:#x} {where}", edited(flip(place, reach, bits))
    removed = rng.choice([0, 0, 1, 2, 20])
    text = rng.choice(
        [b"", b"\r\n", b"\n", b"\0", b"\r\n\r\n", b" ", b":", b"\xff", rng.randbytes(5)]
    )
    return f"{removed} bytes become {shown(text)} {where}", edited(
        splice(place, reach, removed, text)
    )


def _other_document(rng: Random, step: str, *, kind: Kind) -> tuple[str, Change]:
    text = TOKEN_DOCUMENT
    if step != "token":
        name = {"manifest": "index" if kind.indexed else "image"}.get(step, step)
        text = _document(kind, name)
    what, made = changed_json(rng, text)
    return f"JSON: {what}", document(made)


# --- the server -------------------------------------------------------------------------------


class Backstage:
    """A thread that serves what is on all stages."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.stages: list[Stage] = []

    def stage(self) -> Stage:
        """One more."""
        stage = Stage(self.loop)
        asyncio.run_coroutine_threadsafe(stage.open(), self.loop).result()
        self.stages.append(stage)
        return stage

    def close(self) -> None:
        """End all."""
        for stage in self.stages:
            stage.clear()
            asyncio.run_coroutine_threadsafe(stage.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Stage:
    """A port where one scene at a time is shown."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.scene: Scene | None = None
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = socket.create_server((HOST, 0), backlog=64)
        self._socket.setblocking(False)
        self.authority = f"{HOST}:{self._socket.getsockname()[1]}"

    async def open(self) -> None:
        self._accepting = self._loop.create_task(self._accept())

    async def close(self) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting, *self._tasks])
        self._socket.close()

    def show(self, scene: Scene) -> None:
        """From now on."""
        self.scene = scene

    def clear(self) -> None:
        """End all connections."""
        self.scene = None
        cleared = threading.Event()

        def clear() -> None:
            for task in self._tasks:
                task.cancel()
            cleared.set()

        self._loop.call_soon_threadsafe(clear)
        cleared.wait(5)

    async def _accept(self) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(self._socket)
            task = self._loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        scene = self.scene
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pending = b""
            while scene is not None:
                while b"\r\n\r\n" not in pending:
                    got = await self._loop.sock_recv(connection, PIECE)
                    if not got:
                        return
                    pending += got
                    if pending[0] == TLS_HANDSHAKE:
                        await self._send(connection, scene, scene.hello())
                        return
                head, _, pending = pending.partition(b"\r\n\r\n")
                request = _parse(head)
                length = int(request.headers.get("content-length", 0))
                while len(pending) < length:
                    pending += await self._loop.sock_recv(connection, PIECE)
                pending = pending[length:]
                if not await self._send(connection, scene, scene.answer(request)):
                    return
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # the client has gone, or the scene is over
        finally:
            connection.close()

    async def _send(self, connection: socket.socket, scene: Scene, reply: Reply) -> bool:
        """Whether the connection can be used again."""
        raw, tampered = reply.wire()
        scene.tampered |= tampered
        send = partial(self._write, connection, scene)
        if reply.end == "trickle":
            head = raw.find(b"\r\n\r\n") + 4
            await send(raw[:head])
            for at in range(head, len(raw), 16):
                await send(raw[at : at + 16])
                await asyncio.sleep(0.1)
            return False
        sent = 0
        if reply.end == "flood":
            flood = b"HTTP/1.1 100 Continue\r\n\r\n" * 2000
            while sent < ENDLESS:
                sent += await send(flood)
            return False
        await send(raw)
        scene.most = max(scene.most, len(raw))
        if reply.end == "endless":
            scene.tampered = True
            filling = bytes(PIECE)
            while sent < ENDLESS:
                sent += await send(filling)
                scene.most = max(scene.most, sent)
        elif reply.end == "stall":
            while await self._loop.sock_recv(connection, PIECE):
                pass
        elif reply.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        return reply.end == "keep"

    async def _write(self, connection: socket.socket, scene: Scene, data: bytes) -> int:
        await self._loop.sock_sendall(connection, data)
        scene.sent += len(data)
        return len(data)


def _parse(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for each in lines:
        name, _, value = each.partition(":")
        headers[name.lower()] = value.strip()
    return Request(method, path, headers)


# --- playing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    """A promise that was broken."""

    key: str  # what those of one cause have in common
    details: str = ""
    sure: bool = True  # False: something else at the same time may have caused it


@dataclass
class Result:
    """What came of an exchange."""

    number: int
    kind: str
    outcome: str = ""
    seconds: float = 0.0
    sent: int = 0
    asked: int = 0
    defects: list[Defect] = field(default_factory=list)


class Noises:
    """Hears what goes wrong where nobody waits for it: logs with tracebacks, threads that die,
    exceptions that can't be raised, messages that are unfit for a terminal."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Defect]] = []  # what was said, and what that is
        self._lock = threading.Lock()

    def note(self, said: str, defect: Defect) -> None:
        with self._lock:
            self.heard.append((said, defect))

    def take(self, authority: str) -> list[Defect]:
        """Those of one stage, and those of nobody, which may be its own."""
        with self._lock:
            found = [(s, d) for s, d in self.heard if authority in s or HOST not in s]
            self.heard = [pair for pair in self.heard if pair not in found]
        return [d if authority in s else replace(d, sure=False) for s, d in found]

    @contextmanager
    def listening(self) -> Iterator[Noises]:
        """For as long as it lasts."""
        handler = _Listener(self)
        level, old = log.level, (threading.excepthook, sys.unraisablehook)
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        threading.excepthook = lambda args: self._raised("thread", args.exc_value)
        sys.unraisablehook = lambda args: self._raised("unraisable", args.exc_value)
        try:
            yield self
        finally:
            threading.excepthook, sys.unraisablehook = old
            log.propagate = True
            log.setLevel(level)
            log.removeHandler(handler)

    def _raised(self, where: str, e: BaseException | None) -> None:
        if isinstance(e, ResourceWarning) and "Async generator 'http" in str(e):
            return  # httpx leaves its own to the collector
        if e is None:
            return
        self.note("", Defect(f"{where}: {key_of(e)}", _trace(e)))


class _Listener(logging.Handler):
    def __init__(self, noises: Noises) -> None:
        super().__init__()
        self._noises = noises

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            e = record.exc_info[1]
            self._noises.note(said, Defect(f"logged: {key_of(e)}", _trace(e)))
        for defect in message_defects(said, "log"):
            self._noises.note(said, defect)


def _trace(e: BaseException) -> str:
    return "".join(traceback.format_exception(e, limit=-8))[-6000:]


def key_of(e: BaseException) -> str:
    """The exception, and who of us raised it."""
    while isinstance(e, BaseExceptionGroup):
        e = e.exceptions[0]
    frames = traceback.extract_tb(e.__traceback__)
    inside = [f for f in frames if f"{os.sep}pyerofs{os.sep}" in f.filename] or frames
    where = f"{Path(inside[-1].filename).name}:{inside[-1].name}" if inside else "nowhere"
    return f"{type(e).__name__} in {where}"


def message_defects(text: str, where: str) -> list[Defect]:
    """What is wrong with a message for people."""
    found = []
    if not text or not text.isprintable():
        shape = re.sub(r"[^ -~].*|\d+", "", text.partition("127.0.0.1")[2].partition(": ")[2])
        found.append(Defect(f"{where}: not printable: …{shape[:50]}", repr(text[:500])))
    if len(text) > MESSAGE:
        found.append(Defect(f"{where}: a message of thousands of characters", text[:300]))
    return found


def address_space(more: int) -> int:
    """A limit that leaves so many bytes."""
    return resident("VmSize") + more


def perform(
    stage: Stage, exchange: Exchange, directory: Path, noises: Noises, *, alone: bool = True
) -> Result:
    """Play an exchange.  ``alone``: nothing else happens in this process, so that time and memory
    are its own."""
    found = Result(exchange.number, exchange.kind)
    scene = Scene(exchange, stage.authority)
    cache_dir = tempfile.mkdtemp(dir=directory)
    if alone:
        forget_peak()
    memory, start = resident("VmHWM"), time.monotonic()
    stage.show(scene)
    try:
        found.outcome = _bounded(scene, exchange, cache_dir, found)
        found.seconds = time.monotonic() - start
        if found.seconds > HANG:
            found.defects.append(
                Defect(f"Hang: {_summary(exchange)}", f"{found.seconds:.1f} s", alone)
            )
        if exchange.again and not scene.tampered and not found.defects:
            stage.show(Scene(exchange, stage.authority, honest=True))
            second = Result(exchange.number, exchange.kind)
            outcome = _bounded(scene, exchange, cache_dir, second)
            found.defects += second.defects
            if outcome != "data" and not second.defects:
                details = f"{found.outcome}, then {outcome}"
                found.defects.append(Defect(f"Honest server refused: {details}", details, alone))
    finally:
        stage.clear()
        shutil.rmtree(cache_dir, ignore_errors=True)
    used = resident("VmHWM") - memory
    if alone and used > MEMORY:
        found.defects.append(Defect(f"Memory: {_summary(exchange)}", f"{used >> 20} MiB"))
    if scene.most > GREED:
        found.defects.append(Defect(f"Greed: {_summary(exchange)}", f"{scene.most >> 20} MiB"))
    found.sent, found.asked = scene.sent, scene.asked
    found.defects += noises.take(stage.authority)
    return found


def _summary(exchange: Exchange) -> str:
    """What goes wrong, roughly."""
    steps = [f"{a.step} {a.what.partition(' ')[0].rstrip(',')}" for a in exchange.alterations]
    return f"{exchange.kind}: {'; '.join(steps)}"


def _bounded(scene: Scene, exchange: Exchange, cache_dir: str, found: Result) -> str:
    """The outcome of an attempt; ``stuck`` where there is none for a long time."""
    outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()

    def attempt() -> None:
        outcomes.put(_attempt(scene, exchange, cache_dir, found))

    threading.Thread(target=attempt, daemon=True).start()
    try:
        return outcomes.get(timeout=PATIENCE)
    except queue.Empty:
        return "stuck"


def _attempt(scene: Scene, exchange: Exchange, cache_dir: str, found: Result) -> str:
    """Open and read.  Returns the outcome; notes defects."""
    access = Access(
        password=PASSWORD, timeout=TIMEOUT, cache=exchange.cache, cache_dir=cache_dir,
        cache_limit=CACHE_LIMIT, prefetch=exchange.prefetch,
    )  # fmt: skip
    want = truth(exchange.large)
    try:
        with pyerofs.open(scene.spec(), access=access) as image:
            names = sorted(image.listdir("/"))
            data = image.read("/data")
    except ErofsError as e:
        found.defects += message_defects(str(e), type(e).__name__)
        if re.search(r": internal error \([A-Z]\w+\)", str(e)):
            found.defects.append(Defect("message: internal error", str(e)))
        return type(e).__name__
    except MemoryError as e:
        found.defects.append(Defect(key_of(e), _trace(e), sure=False))
        return "MemoryError"
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        sure = not type(e).__module__.startswith("trio")  # the loop has ended: why?
        found.defects.append(Defect(key_of(e), _trace(e), sure))
        return type(e).__name__
    if names == ["data", "note"] and data == want.content:
        return "data"
    if scene.tampered and not KINDS[exchange.kind].checked:
        return "other data"
    found.defects.append(Defect(f"Wrong data: {_summary(exchange)}"))
    return "wrong data"


def environment(directory: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """Variables for the client: no certificates to load, no credentials but one for each stage."""
    config = directory / "docker"
    config.mkdir(exist_ok=True)
    entries = {f"{stage.authority}/identity": {"identitytoken": IDENTITY} for stage in stages}
    (config / "config.json").write_text(json.dumps({"auths": entries}))
    home = str(directory)
    return {
        "HOME": home, "XDG_CACHE_HOME": home, "XDG_CONFIG_HOME": home, "XDG_RUNTIME_DIR": home,
        "DOCKER_CONFIG": str(config), "SSL_CERT_FILE": os.devnull, "no_proxy": "*",
        "REGISTRY_AUTH_FILE": "",
    }  # fmt: skip


@contextmanager
def limited(more: int = 3 << 30) -> Iterator[None]:
    """So many more bytes can be had, and then no more."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    limit = address_space(more)
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
