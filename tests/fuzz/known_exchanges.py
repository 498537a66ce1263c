"""The smallest exchanges for what once went wrong, and for what is like it.

``KNOWN`` has them by name.  ``WAITING`` are those of them that may well take a whole timeout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.fuzz import exchanges as ex
from tests.fuzz.exchanges import Alteration, Change, Exchange, Raw, Rewriting, both

KNOWN: dict[str, Exchange] = {}
WAITING: list[str] = []

NESTED = "[" * 100_000
PLACES = {
    "bracket": b"http://[bad",
    "port in other digits": "http://127.0.0.1:٣/".encode(),
    "port below zero": b"http://127.0.0.1:-1/",
    "port too high": b"http://127.0.0.1:99999/",
    "long label": b"http://" + b"a" * 300 + b"/",
    "empty label": b"http://a..b/",
    "punycode": b"http://xn--a/",
    "scheme without host": b"http://",
    "escapes": b"http://127.0.0.1:1/" + ex.ESCAPES.encode(),
    "bytes": b"http://\xff\xfe/",
    "bad escape": b"http://%00/",
    "very long": b"/" + b"a" * 60_000,
}
TIMES = {
    "5,000 digits": b"1" * 5000,
    "superscript": b"\xb2",
    "other digits": "٣".encode(),
    "time zone": b"Mon, 01 Jan 2024 00:00:00 +99999999999999",
    "year": b"Mon, 01 Jan 99999 00:00:00 GMT",
    "first day": b"Mon, 01 Jan 0001 00:00:00 +2300",
    "last day": b"Fri, 31 Dec 9999 23:59:59 -2300",
    "a day": b"86400",
    "never": b"9" * 25,
}
SIZES = {f"2^{n}": (1 << n) + 1 for n in (40, 50, 52, 58, 60, 61)}
STRINGS: Mapping[str, Any] = {
    "escapes": ex.ESCAPES,
    "C1": "\x9b31m",
    "lines": "a\nb\rc",
    "override": "\u202e",
    "lone surrogate": Raw('"\\ud800"'),
    "surrogate of a byte": Raw('"\\udc9b"'),
    "long": "x" * 200_000,
    "zero": "\0",
}
HEADERS = {
    "escapes": ex.ESCAPES.encode(),
    "C1": b"\x9b31m",
    "C1 in UTF-8": b"\xc2\x9b31m",
    "override": "\u202e".encode(),
    "DEL": b"\x7f",
    "long": b"x" * 60_000,
}


def add(
    name: str,
    kind: str,
    step: str,
    change: Change,
    *,
    waits: bool = False,
    rewriting: Rewriting | None = None,
    **how: Any,
) -> None:
    """A change that is made each time."""
    assert name not in KNOWN
    alterations = () if rewriting is not None else (Alteration(step, name, change),)
    KNOWN[name] = Exchange(len(KNOWN), kind, alterations, rewriting, **how)
    if waits:
        WAITING.append(name)


def utf8(value: Any) -> bytes:
    return ex.encoded(value).encode("utf-8", "surrogatepass")


def token(**members: Any) -> Change:
    """A token with something else beside it."""
    return ex.document(utf8({"token": ex.TOKEN} | members))


def realm(text: bytes) -> Change:
    return ex.challenging(b'Bearer realm="' + text + b'",service="x"')


def to(place: bytes) -> Change:
    """A redirect."""
    return both(ex.status(b"307"), ex.located(place))


def layer(**members: Any) -> Change:
    """A manifest whose layer has other members."""
    found = json.loads(ex.published(ex.KINDS["registry"], False)["image"].blob.data)
    found["layers"][0] |= members
    return ex.document(utf8(found))


def platform(value: Any) -> Change:
    """An index of two images for a platform that nobody means."""
    found = json.loads(ex.published(ex.KINDS["index"], False)["top"].blob.data)
    entry = found["manifests"][0] | {"platform": {"os": value, "architecture": "vax"}}
    return ex.document(utf8(found | {"manifests": [entry, entry]}))


# --- honest servers, and wrong bits that are noticed ------------------------------------------

for _kind in ex.KINDS:
    for _large in (False, True):
        _name = f"honest, {_kind}, {'large' if _large else 'small'}"
        add(_name, _kind, "nothing", both(), large=_large, again=True)
        add(f"{_name}, no cache", _kind, "nothing", both(), large=_large, cache=False)
for _kind in ("zstd", "verity"):
    for _part in (0.0, 0.3, 0.5, 0.9):
        add(f"one bit at {_part}, {_kind}", _kind, "blob", ex.flip_body(_part))

# --- tokens, and where they are ---------------------------------------------------------------

for _name, _text in {
    "nested": NESTED.encode(),
    "nested, whole": (NESTED + "]" * 100_000).encode(),
    "nested objects": b'{"a":' * 100_000,
    "a list": b"[]",
    "not UTF-8": b"\xff",
}.items():
    add(f"token document: {_name}", "token", "token", ex.document(_text))
for _name, _value in {
    "10^400": Raw("1" + "0" * 400),
    "-10^400": Raw("-1" + "0" * 400),
    "1e400": Raw("1e400"),
    "NaN": Raw("NaN"),
    "5,000 digits": Raw("1" * 5000),
    "a string": "soon",
    "a list": [],
    "true": True,
    "10^-400": Raw("1e-400"),
}.items():
    add(f"expires_in: {_name}", "token", "token", token(expires_in=_value))
for _name, _value in {**STRINGS, "a number": 5, "nested": Raw(NESTED)}.items():
    add(f"token: {_name}", "token", "token", token(token=_value))
for _name, _value in {
    "one word": b"Bearer " + b"a" * 30_000,
    "many words": b"Bearer " + b"a=b," * 15_000,
    "words without a value": b"Bearer " + b"a-_" * 10_000 + b"!",
    "unclosed quote": b'Bearer realm="' + b"\\" * 30_001,
    "many quotes": b'Bearer realm="{token}" ' + b'a="b' * 10_000,
    "commas": b"," * 60_000 + b"Bearer",
    "many schemes": b"Bearer ," * 8000,
    "spaces": b"Bearer" + b" " * 60_000 + b"x",
}.items():
    add(f"challenge: {_name}", "token", "challenge", ex.challenging(_value))

# --- places and times -------------------------------------------------------------------------

for _name, _place in PLACES.items():
    for _what, _kind, _step, _change in (
        ("realm", "token", "challenge", realm(_place)),
        ("Location of a token", "token", "token", to(_place)),
        ("Location of a manifest", "registry", "manifest", to(_place)),
        ("Location of a blob", "redirecting registry", "redirect", ex.located(_place)),
        ("Location of a URL", "redirected", "redirect", ex.located(_place)),
    ):
        add(f"{_what}: {_name}", _kind, _step, _change, waits=True)
for _name, _text in TIMES.items():
    for _kind in ("ranges", "download", "registry", "zstd"):
        add(f"Retry-After, {_kind}: {_name}", _kind, "blob", ex.unavailable(_text), waits=True)

# --- versions and sizes -----------------------------------------------------------------------

for _name, _text in {
    "latin-1": b'"\xe9"',
    "UTF-8": '"é"'.encode(),
    "escapes": b'"' + ex.ESCAPES.encode() + b'"',
    "long": b'"' + b"x" * 60_000 + b'"',
    "no quotes": b"x y",
}.items():
    _change = ex.header(b"ETag", _text)
    add(f"ETag: {_name}", "ranges", "blob", _change, large=True)
    add(f"ETag, no cache: {_name}", "ranges", "blob", _change, large=True, cache=False)
    add(f"ETag, no ranges: {_name}", "whole", "blob", _change)
for _name, _size in SIZES.items():
    for _kind in ("ranges", "whole", "unlisted"):
        _change = ex.total(b"%d" % _size)
        add(f"size in a header, {_kind}: {_name}", _kind, "blob", _change)
        add(f"size in a header, {_kind}, no cache: {_name}", _kind, "blob", _change, cache=False)
    for _kind in ("registry", "registry without ranges"):
        _change = layer(size=_size)
        add(f"size in a manifest, {_kind}: {_name}", _kind, "manifest", _change)
        add(f"the same for a while, {_kind}: {_name}", _kind, "manifest", _change, again=True)
for _size in (4096, 8192, 1 << 20):
    _change = layer(size=_size)
    add(f"size for a while: {_size}", "registry", "manifest", _change, again=True)

# --- without end ------------------------------------------------------------------------------

for _name, _text in {
    "2^30": b"bytes 0-1073741823/1073741824",
    "2^61": b"bytes 0-2305843009213693951/2305843009213693952",
    "32 MiB": b"bytes 0-33554431/33554432",
}.items():
    for _kind in ("ranges", "unlisted", "registry"):
        add(f"endless 206, {_kind}: {_name}", _kind, "blob", ex.endless(_text))
for _kind in ("whole", "download", "registry without ranges", "zstd"):
    add(f"endless 200, {_kind}", _kind, "blob", ex.endless())
    add(f"endless 200, {_kind}, no cache", _kind, "blob", ex.endless(), cache=False)
for _step in ("manifest", "token", "challenge", "blob"):
    add(f"endless {_step}", "token", _step, ex.endless())
    for _name, _how in {
        "interim replies without end": "flood", "a byte now and then": "trickle", "silence": "stall",
    }.items():  # fmt: skip
        add(f"{_name}: {_step}", "token", _step, ex.ending(_how), waits=True)
for _kind in (
    "ranges", "whole", "download", "registry without ranges", "unlisted", "zstd", "verity",
):  # fmt: skip
    for _name, _change in {
        "a byte now and then": ex.ending("trickle"),
        "a chunk now and then": both(ex.framed("chunked"), ex.ending("trickle")),
        "half of it, then nothing": ex.ending("half and stall"),
        "half of it, again and again": ex.ending("half and reset"),
        "503 again and again": ex.status(b"503"),
        "too short, again and again": ex.cut(0.9),
    }.items():
        add(f"{_name}, {_kind}", _kind, "blob", _change, waits=True)

# --- what is shown ----------------------------------------------------------------------------

_found = json.loads(ex.published(ex.KINDS["registry"], False)["image"].blob.data)
del _found["layers"]
for _name, _value in STRINGS.items():
    add(f"type of a layer: {_name}", "registry", "manifest", layer(mediaType=_value))
    add(f"digest: {_name}", "registry", "manifest", layer(digest=_value))
    add(f"size: {_name}", "registry", "manifest", layer(size=_value))
    add(f"platform: {_name}", "index", "manifest", platform(_value))
    _change = ex.document(utf8(_found | {"mediaType": _value}))
    add(f"type of a document: {_name}", "registry", "manifest", _change)
for _name, _text in HEADERS.items():
    for _header in ("Content-Encoding", "Content-Range", "ETag", "Content-Length"):
        _change = ex.header(_header.encode(), _text)
        add(f"{_header} of bytes: {_name}", "ranges", "blob", _change, waits=True)
    _change = ex.header(b"Docker-Content-Digest", _text)
    add(f"digest of a document: {_name}", "registry", "manifest", _change)
    add(f"reason: {_name}", "ranges", "blob", ex.line(b"HTTP/1.1 206 " + _text))
    add(f"no status line: {_name}", "ranges", "blob", ex.line(_text), waits=True)
    add(f"realm of bytes: {_name}", "token", "challenge", realm(b"ftp://" + _text))

# --- documents --------------------------------------------------------------------------------

for _name, _json in {
    "nested": NESTED,
    "nested roots": '{"rootfs":' * 20_000,
    "digits": '{"rootfs":{"diff_ids":[' + "1" * 5000 + "]}}",
    "surrogate": '{"rootfs":{"diff_ids":["\\ud800"]}}',
    "escapes": json.dumps({"rootfs": {"diff_ids": [ex.ESCAPES]}}),
    "long": json.dumps({"rootfs": {"diff_ids": ["x" * 100_000]}}),
}.items():
    _rewriting = Rewriting("config", _name, _json.encode())
    add(f"configuration: {_name}", "zstd", "config", both(), rewriting=_rewriting)
for _depth in (300, 900, 990, 5000, 100_000):
    _nested = Raw("[" * _depth + "]" * _depth)
    add(f"type of a layer: {_depth} lists", "registry", "manifest", layer(mediaType=_nested))
    _change = layer(annotations={"a": _nested})
    add(f"annotations: {_depth} lists", "registry", "manifest", _change)
