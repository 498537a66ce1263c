"""The protocol without a server: bytes in, bytes and values out."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyerofs_nbd.server import protocol as p

from tests.nbd import fuzz_streams
from tests.nbd.client import DISC, contexts, go, option, read, request, string

FLAGS = b"\0\0\0\3"
EXPORTS = [p.ExportInfo("first", 1000, "the first"), p.ExportInfo("zweiter-ü", 1 << 40)]

Replies = list[tuple[int, int, bytes]]


def shaken(*parts: bytes, flags: bytes = FLAGS, **how: Any) -> list[p.Action]:
    """What a handshake answers to a stream, up to its end."""
    shake = p.Handshake(EXPORTS, **how)
    shake.feed(flags + b"".join(parts))
    return list(actions(shake))


def actions(shake: p.Handshake) -> Sequence[p.Action]:
    found: list[p.Action] = []
    while (action := shake.next_action()) is not None:
        found.append(action)
        if not isinstance(action, p.Send):
            break
    return found


def replies(found: Sequence[p.Action]) -> Replies:
    """The option replies that are sent: option, kind, data."""
    parsed = []
    for action in found:
        if isinstance(action, p.Send):
            magic, number, kind, length = struct.unpack_from(">QIII", action.data)
            assert magic == 0x3E889045565A9
            assert len(action.data) == 20 + length
            parsed.append((number, kind, action.data[20:]))
    return parsed


def kinds(*parts: bytes, **how: Any) -> list[int]:
    return [kind for _, kind, _ in replies(shaken(*parts, **how))]


# --- handshake --------------------------------------------------------------------------------


def test_greeting() -> None:
    assert p.Handshake(EXPORTS).greeting() == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("name", ["", "first"])
def test_export_name(name: str) -> None:
    found = shaken(option(p.OPT_EXPORT_NAME, name.encode()))
    flags = p.TRANSMISSION_FLAGS
    assert found == [
        p.Send(struct.pack(">QH", 1000, flags)),
        p.Transmit(0, structured=False, allocation=False, left=b""),
    ]


def test_export_name_with_zeroes() -> None:
    (sent, _) = shaken(option(p.OPT_EXPORT_NAME), flags=b"\0\0\0\1")
    assert isinstance(sent, p.Send)
    assert len(sent.data) == 134
    assert not any(sent.data[10:])


def test_export_name_unknown() -> None:
    assert shaken(option(p.OPT_EXPORT_NAME, b"third")) == [p.Close()]


def test_go() -> None:
    found = shaken(go("zweiter-ü"), read(0, 1))
    assert replies(found) == [
        (p.OPT_GO, p.REP_INFO, struct.pack(">HQH", 0, 1 << 40, p.TRANSMISSION_FLAGS)),
        (p.OPT_GO, p.REP_ACK, b""),
    ]
    assert found[-1] == p.Transmit(1, structured=False, allocation=False, left=read(0, 1))


def test_info_of_every_kind() -> None:
    found = shaken(go("", [3, 2, 1, 0, 3, 99], p.OPT_INFO))
    assert [data for _, kind, data in replies(found) if kind == p.REP_INFO] == [
        struct.pack(">HQH", 0, 1000, p.TRANSMISSION_FLAGS),
        b"\0\1first",
        b"\0\2the first",
        b"\0\3" + struct.pack(">III", 1, 4096, 32 << 20),
    ]
    assert replies(found)[-1][1] == p.REP_ACK
    assert all(isinstance(action, p.Send) for action in found), "INFO ends nothing"


def test_info_leaves_out_what_there_is_not() -> None:
    assert kinds(go("zweiter-ü", [2], p.OPT_INFO)) == [p.REP_INFO, p.REP_ACK]


@pytest.mark.parametrize("name", ["third", b"\xff\xfe", "first\0", "x" * 5000, "FIRST"])
@pytest.mark.parametrize("number", [p.OPT_GO, p.OPT_INFO])
def test_go_unknown(number: int, name: str | bytes) -> None:
    found = shaken(go(name, number=number), option(p.OPT_ABORT))
    assert [kind for _, kind, _ in replies(found)] == [p.REP_ERR_UNKNOWN, p.REP_ACK]
    assert found[-1] == p.Close()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        string("first"),
        string("first") + b"\0",
        string("first") + b"\0\1",
        string("first") + b"\0\1\0",
        string("first") + b"\0\0\0",
        b"\xff\xff\xff\xff" + b"first\0\0",
    ],
)
def test_go_malformed(data: bytes) -> None:
    assert kinds(option(p.OPT_GO, data), go("first", number=p.OPT_INFO)) == [
        p.REP_ERR_INVALID, p.REP_INFO, p.REP_ACK,
    ]  # fmt: skip


def test_list() -> None:
    assert replies(shaken(option(p.OPT_LIST))) == [
        (p.OPT_LIST, p.REP_SERVER, string("first") + b"the first"),
        (p.OPT_LIST, p.REP_SERVER, string("zweiter-ü")),
        (p.OPT_LIST, p.REP_ACK, b""),
    ]
    assert kinds(option(p.OPT_LIST, b"x")) == [p.REP_ERR_INVALID]


def test_structured_replies_bring_df() -> None:
    found = shaken(option(p.OPT_STRUCTURED_REPLY), go())
    (_, info, _) = replies(found)
    assert int.from_bytes(info[2][10:], "big") & p.TRANSMISSION_SEND_DF
    assert found[-1] == p.Transmit(0, structured=True, allocation=False, left=b"")
    assert kinds(option(p.OPT_STRUCTURED_REPLY, b"x")) == [p.REP_ERR_INVALID]


SR = option(p.OPT_STRUCTURED_REPLY)
SET, LIST = p.OPT_SET_META_CONTEXT, p.OPT_LIST_META_CONTEXT
CONTEXT = struct.pack(">I", 1) + b"base:allocation"


@pytest.mark.parametrize(
    ("number", "queries", "found"),
    [
        (LIST, [], True),
        (LIST, ["base:"], True),
        (LIST, ["base:allocation"], True),
        (LIST, ["base:other"], False),
        (LIST, ["qemu:", "x-unknown:y", "no colon"], False),
        (SET, [], False),
        (SET, ["base:"], False),
        (SET, ["base:allocation"], True),
        (SET, ["qemu:dirty-bitmap:x", "base:allocation", "base:allocation"], True),
        (SET, ["base:allocatio"], False),
    ],
)
def test_contexts(number: int, queries: list[str], found: bool) -> None:
    (_, *answer) = replies(shaken(SR, contexts("first", queries, number)))
    shown = struct.pack(">I", number == SET) + b"base:allocation"
    expected = [(number, p.REP_META_CONTEXT, shown)] if found else []
    assert answer == [*expected, (number, p.REP_ACK, b"")]


@pytest.mark.parametrize("number", [SET, LIST])
def test_contexts_that_are_refused(number: int) -> None:
    right = contexts("", ["base:allocation"], number)
    assert kinds(right) == [p.REP_ERR_INVALID], "structured replies come first"
    assert kinds(SR, contexts("third", [], number))[1:] == [p.REP_ERR_UNKNOWN]
    for cut in range(1, 16):
        data = right[16:-cut]
        assert kinds(SR, option(number, data))[1:] == [p.REP_ERR_INVALID]
    assert kinds(SR, option(number, right[16:] + b"x"))[1:] == [p.REP_ERR_INVALID]
    many = string("") + b"\xff\xff\xff\xff"
    assert kinds(SR, option(number, many))[1:] == [p.REP_ERR_INVALID]


@pytest.mark.parametrize(
    ("messages", "allocation"),
    [
        ([contexts("first", [p.ALLOCATION]), go("first")], True),
        ([contexts("", [p.ALLOCATION]), go("first")], True),
        ([contexts("first", [p.ALLOCATION]), go("zweiter-ü")], False),
        ([contexts("first", [p.ALLOCATION]), contexts("first", []), go("first")], False),
        ([contexts("first", [p.ALLOCATION]), option(SET, b"x"), go("first")], False),
        ([contexts("first", [p.ALLOCATION]), contexts("first", [], LIST), go()], True),
        ([contexts("first", [p.ALLOCATION]), option(p.OPT_EXPORT_NAME, b"first")], True),
    ],
)
def test_contexts_hold_for_one_export(messages: list[bytes], allocation: bool) -> None:
    last = shaken(SR, *messages)[-1]
    assert isinstance(last, p.Transmit)
    assert last.allocation is allocation


@pytest.mark.parametrize("number", [0, 4, 11, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"whatever" * 100])
def test_unknown_options(number: int, data: bytes) -> None:
    assert kinds(option(number, data), option(p.OPT_ABORT)) == [p.REP_ERR_UNSUP, p.REP_ACK]


def test_abort() -> None:
    found = shaken(option(p.OPT_ABORT), go())
    assert [kind for _, kind, _ in replies(found)] == [p.REP_ACK]
    assert found[-1] == p.Close()


@pytest.mark.parametrize(
    "stream",
    [
        b"\0\0\0\4",
        b"\xff\xff\xff\xff",
        FLAGS + b"IHAVEOPX" + bytes(8),
        FLAGS + bytes(16),
        b"\0\0\0\0" + option(p.OPT_LIST),
        FLAGS + b"IHAVEOPT" + struct.pack(">II", p.OPT_EXPORT_NAME, p.MAX_OPTION + 1),
    ],
)
def test_what_ends_the_connection(stream: bytes) -> None:
    assert shaken(stream, flags=b"") == [p.Close()]


def test_an_old_client_may_only_choose() -> None:
    assert isinstance(shaken(option(p.OPT_EXPORT_NAME), flags=bytes(4))[-1], p.Transmit)


def test_options_that_are_too_long_are_dropped() -> None:
    long = p.MAX_OPTION + 1
    shake = p.Handshake(EXPORTS)
    shake.feed(FLAGS + b"IHAVEOPT" + struct.pack(">II", p.OPT_LIST, long))
    assert [kind for _, kind, _ in replies(actions(shake))] == [p.REP_ERR_TOO_BIG]
    for _ in range(long):
        shake.feed(b"x")
        assert shake.next_action() is None
        assert len(shake._buffer) == 0
    shake.feed(option(p.OPT_ABORT))
    assert [kind for _, kind, _ in replies(actions(shake))] == [p.REP_ACK]


def test_options_are_counted() -> None:
    found = shaken(option(0) * p.MAX_OPTIONS, go())
    assert len(found) == p.MAX_OPTIONS + 1
    assert found[-1] == p.Close()


def test_replies_come_one_by_one() -> None:
    """However many are asked for at once, they are not piled up."""
    shake = p.Handshake([p.ExportInfo(str(n), n) for n in range(1000)])
    shake.feed(FLAGS + option(p.OPT_LIST) * 1000)
    for _ in range(1001):
        assert isinstance(shake.next_action(), p.Send)
    assert len(shake._buffer) == 16 * 999


def test_any_pieces_will_do() -> None:
    stream = b"".join(
        [FLAGS, SR, option(p.OPT_LIST), contexts("", ["base:"], LIST), go("first", [1, 2, 3])]
    )
    shake = p.Handshake(EXPORTS)
    found: list[p.Action] = []
    for n in range(len(stream)):
        shake.feed(stream[n : n + 1])
        found += actions(shake)
    assert found == shaken(stream, flags=b"")


# --- TLS --------------------------------------------------------------------------------------

TLS = option(p.OPT_STARTTLS)


def test_no_tls() -> None:
    assert kinds(TLS) == [p.REP_ERR_POLICY]


def test_start_tls() -> None:
    shake = p.Handshake(EXPORTS, tls=True)
    shake.feed(FLAGS + SR + contexts("", [p.ALLOCATION]) + TLS)
    found = actions(shake)
    assert found[-1] == p.StartTls()
    assert [kind for _, kind, _ in replies(found)][-1] == p.REP_ACK
    shake.secured()
    shake.feed(TLS + go())
    found = actions(shake)
    assert [kind for _, kind, _ in replies(found)] == [p.REP_ERR_INVALID, p.REP_INFO, p.REP_ACK]
    assert found[-1] == p.Transmit(0, structured=False, allocation=False, left=b""), "all forgotten"


def test_nothing_is_smuggled_into_tls() -> None:
    assert shaken(TLS, go(), tls=True) == [p.Close()]


def test_start_tls_has_no_data() -> None:
    assert kinds(option(p.OPT_STARTTLS, b"x"), tls=True) == [p.REP_ERR_INVALID]


def test_required_tls() -> None:
    how: dict[str, Any] = {"tls": True, "tls_required": True}
    for message in (option(p.OPT_LIST), go(), SR, contexts("", []), option(99)):
        assert kinds(message, **how) == [p.REP_ERR_TLS_REQD]
    assert shaken(option(p.OPT_EXPORT_NAME), **how) == [p.Close()]
    assert kinds(option(p.OPT_ABORT), **how) == [p.REP_ACK]
    shake = p.Handshake(EXPORTS, **how)
    shake.feed(FLAGS + TLS)
    assert actions(shake)[-1] == p.StartTls()
    shake.secured()
    shake.feed(go())
    assert isinstance(actions(shake)[-1], p.Transmit)


# --- requests ---------------------------------------------------------------------------------

REQUESTS = [
    read(0, 4096, 1),
    request(p.CMD_WRITE, 5, 100, cookie=2) + b"p" * 100,
    read(1 << 40, 1, 3),
    request(p.CMD_WRITE, 5, 0, cookie=4),
    request(p.CMD_FLUSH, cookie=5),
    request(p.CMD_WRITE, 5, 29, cookie=6) + read(0, 1, 99) + b"x",
    DISC,
]
COOKIES = [1, 2, 3, 4, 5, 6, 1]


def decoded(pieces: Sequence[bytes]) -> tuple[list[p.Request], p.Decoder]:
    """The requests in a stream that comes in pieces."""
    decoder, found, kept = p.Decoder(), list[p.Request](), b""
    for piece in pieces:
        kept += piece
        some, done = decoder.decode(memoryview(kept))
        found += some
        kept = kept[done:]
        assert decoder.broken or len(kept) < p.REQUEST.size
    return found, decoder


def test_decoding() -> None:
    whole, decoder = decoded([b"".join(REQUESTS)])
    assert [r[3] for r in whole] == COOKIES
    assert decoder.between
    assert whole[0] == (p.REQUEST_MAGIC, 0, p.CMD_READ, 1, 0, 4096)
    assert whole[2] == (p.REQUEST_MAGIC, 0, p.CMD_READ, 3, 1 << 40, 1)


@pytest.mark.parametrize("size", [1, 3, 27, 28, 29, 64])
def test_decoding_in_pieces(size: int) -> None:
    stream = b"".join(REQUESTS)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert decoded(pieces)[0] == decoded([stream])[0]


def test_a_write_comes_out_with_its_payload() -> None:
    found, decoder = decoded([request(p.CMD_WRITE, 0, 0xFFFFFFFF), bytes(1000)])
    assert found == []
    assert not decoder.between


def test_decoding_stops_where_it_is_out_of_step() -> None:
    found, decoder = decoded([read(0, 1, 1), read(0, 1, 2), b"\0" * 28, read(0, 1, 3)])
    assert [r[3] for r in found] == [1, 2]
    assert decoder.broken


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (read(0, 1), 0),
        (read(999, 1), 0),
        (read(0, 1000), 0),
        (read(0, 0), p.EINVAL),
        (read(1000, 1), p.EINVAL),
        (read(999, 2), p.EINVAL),
        (read(2**64 - 1, 1), p.EINVAL),
        (read(2**64 - 1, 2**32 - 1), p.EINVAL),
        (request(p.CMD_READ, 0, 1, flags=p.CMD_FLAG_DF), p.EINVAL),
        (request(p.CMD_READ, 0, 1, flags=1), p.EINVAL),
        (request(p.CMD_WRITE, 0, 1), p.EPERM),
        (request(p.CMD_TRIM, 0, 1), p.EPERM),
        (request(p.CMD_WRITE_ZEROES, 0, 1), p.EPERM),
        (request(p.CMD_FLUSH), 0),
        (request(p.CMD_FLUSH, flags=1), p.EINVAL),
        (request(p.CMD_CACHE, 0, 1000), 0),
        (request(p.CMD_CACHE, 1, 1000), p.EINVAL),
        (request(p.CMD_CACHE, 1, 1, flags=1), p.EINVAL),
        (request(p.CMD_BLOCK_STATUS, 0, 1), p.EINVAL),
        (request(8), p.EINVAL),
        (request(0xFFFF), p.EINVAL),
    ],
)
def test_refusals(message: bytes, error: int) -> None:
    found = p.REQUEST.unpack(message)
    assert p.refusal(found, 1000, structured=False, allocation=False) == error


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (request(p.CMD_READ, 0, 1, flags=p.CMD_FLAG_DF), 0),
        (request(p.CMD_BLOCK_STATUS, 0, 1, flags=p.CMD_FLAG_REQ_ONE), 0),
        (request(p.CMD_BLOCK_STATUS, 0, 2**32 - 1), 0),
        (request(p.CMD_BLOCK_STATUS, 0, 0), p.EINVAL),
        (request(p.CMD_BLOCK_STATUS, 0, 1, flags=p.CMD_FLAG_DF), p.EINVAL),
        (request(p.CMD_BLOCK_STATUS, 1 << 40, 1), p.EINVAL),
        (read(0, p.MAX_READ), 0),
        (read(0, p.MAX_READ + 1), p.EINVAL),
    ],
)
def test_refusals_once_all_is_negotiated(message: bytes, error: int) -> None:
    found = p.REQUEST.unpack(message)
    assert p.refusal(found, 1 << 40, structured=True, allocation=True) == error


# --- anything at all --------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_streams_that_make_no_sense(chance: random.Random) -> None:
    fuzz_streams.check([fuzz_streams.stream(chance)])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=500))
def test_noise(data: bytes) -> None:
    fuzz_streams.check([[data], [FLAGS + data], [FLAGS + SR + go() + data]])
