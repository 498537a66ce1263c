"""Netlink messages as bytes."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyerofs_nbd.devices import netlink as nl


def message(kind: int, payload: bytes, *, flags: int = 0, sequence: int = 1) -> bytes:
    data = struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload
    return data + bytes(-len(data) % 4)


def refusal(code: int, *, flags: int = 0, rest: bytes = b"") -> nl.Message:
    payload = struct.pack("=i", -code) + struct.pack("=IHHII", 36, 25, 5, 1, 0) + rest
    (found,) = nl.messages(message(nl.NLMSG_ERROR, payload, flags=flags))
    return found


def test_connect() -> None:
    """The bytes that Linux 6.1 and 6.12 have accepted."""
    body = nl.connect(
        430080, [7], block_size=512, dead_timeout=3600, identifier="/run/x", index=None
    )
    assert nl.attributes(body) == [
        (nl.SIZE_BYTES, struct.pack("=Q", 430080)),
        (nl.BLOCK_SIZE, struct.pack("=Q", 512)),
        (nl.TIMEOUT, bytes(8)),
        (nl.SERVER_FLAGS, struct.pack("=Q", 3)),
        (nl.DEAD_TIMEOUT, struct.pack("=Q", 3600)),
        (nl.IDENTIFIER, b"/run/x\0"),
        (nl.SOCKETS, bytes.fromhex("0c00018008000100 07000000")),
    ]
    assert len(body) % 4 == 0
    head = nl.request(25, nl.CONNECT, body, 9)[:20]
    assert struct.unpack("=IHHIIBBH", head) == (20 + len(body), 25, 5, 9, 0, 1, 1, 0)


def test_connect_to_a_chosen_device_without_an_identifier() -> None:
    body = nl.connect(512, [3], block_size=512, dead_timeout=0, identifier=None, index=5)
    kinds = dict(nl.attributes(body))
    assert nl.number(kinds[nl.INDEX]) == 5
    assert nl.IDENTIFIER not in kinds


def test_reconfigure_has_only_what_is_to_change() -> None:
    assert [k for k, _ in nl.attributes(nl.reconfigure(3, client_flags=2))] == [
        nl.INDEX, nl.CLIENT_FLAGS,
    ]  # fmt: skip
    assert [k for k, _ in nl.attributes(nl.reconfigure(3, identifier="x", fds=[1], size=9))] == [
        nl.INDEX, nl.SIZE_BYTES, nl.IDENTIFIER, nl.SOCKETS,
    ]  # fmt: skip


def test_an_identifier_need_not_be_utf8() -> None:
    found = nl.attributes(nl.text(nl.IDENTIFIER, "/\udcff x"))
    assert found == [(nl.IDENTIFIER, b"/\xff x\0")]
    assert nl.string(found[0][1]) == "/\udcff x"


def test_several_messages_in_one_datagram() -> None:
    data = message(30, b"abcd") + message(nl.NLMSG_DONE, b"xyz!", sequence=2)
    assert [(m.kind, m.payload, m.sequence) for m in nl.messages(data)] == [
        (30, b"abcd", 1), (nl.NLMSG_DONE, b"xyz!", 2),
    ]  # fmt: skip


def test_an_acknowledgement_is_no_error() -> None:
    nl.check(refusal(0))
    nl.check(nl.Message(30, 0, 1, b""))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EBUSY, errno.EINVAL])
def test_a_refusal(code: int) -> None:
    with pytest.raises(nl.NetlinkError) as caught:
        nl.check(refusal(code))
    assert caught.value.errno == code


@pytest.mark.parametrize("capped", [True, False])
def test_the_kernels_own_words(capped: bool) -> None:
    said = nl.attribute(nl.NLMSGERR_ATTR_MSG, b"no such thing\0")
    flags = nl.NLM_F_ACK_TLVS | (nl.NLM_F_CAPPED if capped else 0)
    echo = b"" if capped else bytes(20)
    with pytest.raises(nl.NetlinkError, match="no such thing"):
        nl.check(refusal(errno.EINVAL, flags=flags, rest=echo + said))


def test_a_refusal_that_is_cut_off() -> None:
    with pytest.raises(nl.NetlinkError):
        nl.check(nl.Message(nl.NLMSG_ERROR, 0, 1, b"\xff"))


def test_the_family() -> None:
    group = nl.attribute(nl.GROUP_NAME, b"nbd_mc_group\0") + nl.u32(nl.GROUP_ID, 9)
    body = (
        nl.attribute(nl.CTRL_FAMILY_NAME, b"nbd\0")
        + nl.attribute(nl.CTRL_FAMILY_ID, struct.pack("=H", 27))
        + nl.u32(nl.CTRL_MAXATTR, 10)
        + nl.nested(nl.CTRL_MCAST_GROUPS, nl.nested(1, group))
    )
    assert nl.family(body) == nl.Family(27, 10, {"nbd_mc_group": 9})


def test_who_is_dead() -> None:
    assert nl.index_of(nl.u32(nl.INDEX, 4)) == 4
    assert nl.index_of(b"") is None


def test_status() -> None:
    def device(index: int, up: bool) -> bytes:
        flag = nl.attribute(nl.DEVICE_CONNECTED, bytes([up]))
        return nl.nested(nl.DEVICE_ITEM, nl.u32(nl.DEVICE_INDEX, index), flag)

    body = nl.nested(nl.DEVICE_LIST, device(0, True), device(7, False))
    assert nl.connected(body) == {0: True, 7: False}
    assert nl.connected(b"") == {}


@given(st.binary(max_size=200))
def test_nonsense_is_refused_and_nothing_else(data: bytes) -> None:
    def check(data: bytes) -> None:
        for message in nl.messages(data):
            nl.check(message)

    for decode in (check, nl.family, nl.connected):
        try:
            decode(data)
        except nl.NetlinkError:
            pass


@given(st.lists(st.tuples(st.integers(1, 100), st.binary(max_size=40))))
def test_attributes_survive(parts: list[tuple[int, bytes]]) -> None:
    assert nl.attributes(b"".join(nl.attribute(k, v) for k, v in parts)) == parts
