"""The RPC machine under arbitrary splits, hostile bytes and random conversations."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import IntegrityError
from p2p.core import frames
from p2p.core.frames import HEAD, STREAM_CREDIT, Machine

LIMIT = 1 << 16

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(st.text(max_size=8), values, max_size=4)
buffers = st.lists(st.binary(max_size=300), max_size=4)


def machine() -> Machine:
    return Machine(frame_bytes_max=LIMIT)


def join(chunks: frames.Chunks) -> bytes:
    return b"".join(chunks)


def verdict(target: Machine, data: bytes) -> str:
    """The error code that the bytes earn, empty if none. Anything but the protocol's errors fails the test."""
    try:
        target.feed(data)
    except IntegrityError as error:
        code = error.code
    else:
        code = ""
    assert code in ("", "protocol", "too_large")
    return code


def feed_split(target: Machine, data: bytes, cuts: list[int]) -> list[frames.Event]:
    events: list[frames.Event] = []
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(edges):
        events += target.feed(data[start:end])
    return events


@given(st.lists(st.tuples(headers, buffers), min_size=1, max_size=4), st.lists(st.integers(0, 3000), max_size=20))
def test_any_split_gives_the_same_calls(calls, cuts):
    caller, callee = machine(), machine()
    data = b"".join(join(caller.request("m", header, parts, 1000)[1]) for header, parts in calls)
    events = feed_split(callee, data, cuts)
    got = [(event.header, [bytes(part) for part in event.buffers]) for event in events]
    assert got == [(header, parts) for header, parts in calls]
    assert [event.call_id for event in events] == list(range(1, len(calls) + 1))


@given(st.binary(max_size=400))
def test_noise_only_raises_the_protocol_error(data):
    target = machine()
    if verdict(target, data):
        assert verdict(target, b"") == "protocol"


@settings(max_examples=300)
@given(
    st.integers(0, 12),
    st.integers(0, 300),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 40),
    st.integers(0, 400),
    st.binary(max_size=400),
)
def test_plausible_heads_only_raise_the_protocol_error(kind, length, name, count, number, header, call, body):
    target = machine()
    target.request("m", {}, (), 1000)
    verdict(target, HEAD.pack(length, kind, name, count, call, number, header) + body)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6), headers, buffers)
def test_flipped_bytes_only_raise_the_protocol_error(flips, header, parts):
    caller, callee = machine(), machine()
    data = bytearray(join(caller.request("method", header, parts, 1000)[1]) * 2)
    for at, value in flips:
        data[at % len(data)] = value
    verdict(callee, bytes(data))


ACTIONS = st.sampled_from(["request", "respond", "item", "end", "fail", "cancel", "grant", "ping"])


@settings(max_examples=200)
@given(st.lists(st.tuples(ACTIONS, st.integers(0, 7), st.booleans()), max_size=60), st.lists(st.integers(0, 999)))
def test_two_joined_machines_agree(script, cuts):
    """Whatever two honest sides do, and however late their bytes arrive, neither sees the protocol broken."""
    caller, callee = machine(), machine()
    to_callee, to_caller = bytearray(), bytearray()
    open_calls: list[int] = []
    taken: list[int] = []
    streamed: set[int] = set()
    answered: list[int] = []

    def deliver() -> None:
        for event in feed_split(callee, bytes(to_callee), cuts):
            if isinstance(event, frames.Request):
                taken.append(event.call_id)
            elif isinstance(event, frames.Cancelled):
                taken.remove(event.call_id)
            elif isinstance(event, frames.Ping):
                to_caller.extend(join(callee.pong(event.number)))
        to_callee.clear()
        for event in feed_split(caller, bytes(to_caller), cuts):
            if isinstance(event, frames.Response | frames.End | frames.Failed):
                answered.append(event.call_id)
                open_calls.remove(event.call_id)
        to_caller.clear()

    for action, number, arrives in script:
        if action == "request":
            call_id, chunks = caller.request("m", {"n": number}, [b"x" * number], 1000)
            open_calls.append(call_id)
            to_callee += join(chunks)
        elif action == "ping":
            to_callee += join(caller.ping(number))
        elif action in ("cancel", "grant") and open_calls:
            call_id = open_calls[number % len(open_calls)]
            if action == "cancel":
                open_calls.remove(call_id)
            to_callee += join(caller.cancel(call_id) if action == "cancel" else caller.grant(call_id))
        elif action in ("respond", "item", "end", "fail") and taken:
            call_id = taken[number % len(taken)]
            if action == "item" and callee.credit(call_id):
                streamed.add(call_id)
                to_caller += join(callee.item(call_id, {}, [b"i"]))
            elif action != "item" and (action != "respond" or call_id not in streamed):
                taken.remove(call_id)
                ends = {"respond": lambda c: callee.respond(c, {}, ()), "end": lambda c: callee.end(c, {})}
                to_caller += join(ends.get(action, lambda c: callee.fail(c, {"code": "busy"}))(call_id))
        if arrives:
            deliver()
    deliver()
    deliver()
    assert caller.open_made == len(open_calls)
    assert callee.open_taken == len(taken)
    assert len(answered) == len(set(answered))


def test_a_frame_over_the_limit_is_refused_before_its_body():
    target = machine()
    with pytest.raises(IntegrityError) as error:
        target.feed(HEAD.pack(LIMIT + 1, frames.REQUEST, 1, 0, 1, 1000, 1))
    assert error.value.code == "too_large"


def test_items_beyond_their_credit_break_the_protocol():
    caller, callee, liar = machine(), machine(), machine()
    call_id, chunks = caller.request("m", {}, (), 1000)
    callee.feed(join(chunks))
    liar.feed(join(chunks))
    items = b"".join(join(callee.item(call_id, {}, ())) for _ in range(STREAM_CREDIT))
    assert callee.credit(call_id) == 0
    assert len(caller.feed(items)) == STREAM_CREDIT
    with pytest.raises(IntegrityError):
        caller.feed(join(liar.item(call_id, {}, ())))


def test_answers_to_cancelled_calls_are_ignored_and_unknown_ones_are_not():
    caller, callee = machine(), machine()
    call_id, chunks = caller.request("m", {}, (), 1000)
    callee.feed(join(chunks))
    answer = join(callee.respond(call_id, {}, ()))
    caller.cancel(call_id)
    assert caller.feed(answer) == []
    with pytest.raises(IntegrityError):
        machine().feed(answer)


def test_credit_granted_before_the_first_item_does_no_harm():
    caller, callee = machine(), machine()
    call_id, chunks = caller.request("m", {}, (), 1000)
    callee.feed(join(chunks) + join(caller.grant(call_id)))
    assert callee.credit(call_id) == STREAM_CREDIT + 1
    assert len(caller.feed(join(callee.respond(call_id, {}, ())))) == 1
