"""The messages between processes that look after devices."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyerofs_nbd.lifecycle import control
from pyerofs_nbd.lifecycle.messages import (
    Attached,
    Devices,
    Failed,
    Live,
    Message,
    Offer,
    Ready,
    Serving,
    Status,
    StatusAsked,
    Taken,
    TakeoverAsked,
    Unknown,
    parse,
)

numbers = st.integers(-1, 1 << 50)
paths = st.none() | st.text()
messages = st.one_of(
    st.builds(Ready, st.lists(st.builds(Offer, paths, numbers)), st.lists(numbers)),
    st.builds(Attached, st.lists(numbers)),
    st.builds(Live, st.booleans()),
    st.builds(Failed, st.text()),
    st.builds(Devices, st.lists(st.tuples(numbers, paths))),
    st.builds(Status, numbers, numbers, numbers, numbers, st.none() | numbers, st.none()),
    st.sampled_from([Serving(), StatusAsked(), TakeoverAsked(), Taken(), Unknown()]),
)


@given(messages)
def test_what_is_sent_is_received(message: Message) -> None:
    assert parse(json.loads(json.dumps(message.packet()))) == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
keys = ["ready", "attached", "serving", "live", "error", "ask", "devices", "taken", "pid"]


@given(json_values | st.dictionaries(st.sampled_from(keys), json_values))
def test_anything_else_is_a_message_or_unknown(packet: object) -> None:
    json.dumps(parse(packet).packet())


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        ({"ready": [{"path": "/r", "size": 5}], "attached": [-1]}, Ready([Offer("/r", 5)], [-1])),
        ({"attached": [3, 4]}, Attached([3, 4])),
        ({"serving": True}, Serving()),
        ({"live": True, "stay": True}, Live(stay=True)),
        ({"error": "no"}, Failed("no")),
        ({"ask": "status"}, StatusAsked()),
        ({"ask": "takeover"}, TakeoverAsked()),
        ({"devices": [[3, "/r"]]}, Devices([(3, "/r")])),
        ({"taken": True}, Taken()),
    ],
)
def test_the_form_that_other_versions_know(packet: dict[str, object], message: Message) -> None:
    assert message.packet() == packet
    assert parse(packet) == message


@pytest.mark.parametrize("data", [b"{", b"[]", b"1", b"\xff", b"[" * 50_000])
def test_packets_that_are_no_messages(data: bytes) -> None:
    assert control.decode(data, []) == (Unknown(), [])


def test_the_end() -> None:
    assert control.decode(b"", []) == (None, [])
