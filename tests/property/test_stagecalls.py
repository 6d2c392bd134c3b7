"""The calls of stages: what is built is read back, and nothing else is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import RiosError
from dmoe.core import stagecalls, wire
from dmoe.core.history import Said
from dmoe.core.stagecalls import Failure, Hop, OpenCall, Part, Step

MODEL = "ab" * 32
tokens = st.binary(min_size=16, max_size=16)
counts = st.integers(0, 1 << 20)


@st.composite
def runs(draw):
    tickets = draw(st.lists(tokens, min_size=1, max_size=5, unique=True))
    parts = []
    for ticket in tickets:
        rows = draw(st.integers(1, 4))
        parts.append(Part(ticket, draw(counts), rows, draw(st.integers(0, rows))))
    count = draw(st.integers(0, 3)) * len(parts)
    new = tokens.filter(lambda ticket: ticket not in tickets)
    behind = draw(st.lists(new, min_size=count, max_size=count, unique=True))  # a ticket stands in a run once
    hops = [Hop(f"peer{n}", tuple(batch)) for n, batch in enumerate(zip(*[iter(behind)] * len(parts), strict=True))]
    return parts, hops, draw(st.booleans()) and not hops


@given(runs(), st.integers(0, 1 << 40))
def test_a_run_is_read_back(run, number):
    parts, hops, reply = run
    x = np.arange(4 * sum(p.rows for p in parts), dtype=np.float32).reshape(-1, 4)
    shape, buffer = wire.encode(x)
    asked = stagecalls.parse_run(stagecalls.run_header(number, parts, hops, shape, reply=reply), (buffer,))
    assert (list(asked.parts), list(asked.hops), asked.reply, asked.number) == (parts, hops, reply, number)
    assert np.array_equal(asked.rows, x)
    kept = np.concatenate([asked.rows[each] for each in stagecalls.kept_rows(parts)])
    assert len(kept) == sum(part.outputs for part in parts)


@given(runs(), st.data())
def test_a_run_with_one_field_changed_is_refused_or_consistent(run, data):
    parts, hops, reply = run
    shape, buffer = wire.encode(np.ones((sum(p.rows for p in parts), 4), np.float32))
    header = stagecalls.run_header(1, parts, hops, shape, reply=reply)
    name = data.draw(st.sampled_from(sorted(header)))
    junk = st.one_of(st.none(), st.integers(-2, 3), st.binary(max_size=3), st.lists(st.integers(0, 3), max_size=3))
    header[name] = data.draw(st.one_of(junk, st.lists(junk, max_size=4)))
    try:
        asked = stagecalls.parse_run(header, (buffer,))
    except RiosError:
        return
    assert sum(part.rows for part in asked.parts) == len(asked.rows)


@given(tokens, counts, st.booleans())
def test_an_opening_is_read_back(ticket, length, fork):
    asked = OpenCall(MODEL, (3, 7), 100, 5, b"c" * 32, ticket if fork else b"", length if fork else 0)
    assert stagecalls.parse_open(stagecalls.open_header(asked)) == asked


@pytest.mark.parametrize(
    "change", [{"capacity": 0}, {"layers": [1]}, {"model": "x"}, {"like": b"short"}, {"channel": 3}]
)
def test_an_opening_that_is_wrong_is_named(change):
    header = stagecalls.open_header(OpenCall(MODEL, (0, 1), 10, 0, b""))
    with pytest.raises(RiosError, match=next(iter(change)).replace("like", "ticket")):
        stagecalls.parse_open(header | change)


@given(st.integers(0, 3), st.integers(0, 3))
def test_an_answer_is_read_back(steps, hop):
    said = (Said(b"c" * 32, b"b" * 32, b"w" * 32), Said(bytes(32), bytes(32), b"x" * 32))
    trail = [Step(n, 1, "x86_64-cpu", said) for n in range(steps + 1)]
    failure = Failure(hop, "busy", "later", "", 7)
    assert stagecalls.parse_answer(stagecalls.answer_header(trail, failure), 3, 2) == (trail, failure)
    assert stagecalls.parse_answer(stagecalls.answer_header(trail, None), 3, 2) == (trail, None)
    with pytest.raises(RiosError, match="malformed"):
        stagecalls.parse_answer(stagecalls.answer_header(trail, Failure(2, "busy", "")), 1 if steps < 2 else 0, 2)
    with pytest.raises(RiosError, match="what came and went"):
        stagecalls.parse_answer(stagecalls.answer_header(trail, None), 3, 1)


def test_a_leaf_speaks_of_layers_places_and_rows():
    part, came, went = Part(b"t" * 16, 5, 2, 1), b"c" * 32, b"w" * 32
    base = stagecalls.leaf(MODEL, (0, 9), part, "x86_64-cpu", came, went)
    others = [
        stagecalls.leaf("cd" * 32, (0, 9), part, "x86_64-cpu", came, went),
        stagecalls.leaf(MODEL, (0, 8), part, "x86_64-cpu", came, went),
        stagecalls.leaf(MODEL, (0, 9), Part(b"t" * 16, 6, 2, 1), "x86_64-cpu", came, went),
        stagecalls.leaf(MODEL, (0, 9), part, "x86_64-cuda", came, went),
        stagecalls.leaf(MODEL, (0, 9), part, "x86_64-cpu", b"s" * 32, went),
        stagecalls.leaf(MODEL, (0, 9), part, "x86_64-cpu", came, b"b" * 32),
    ]
    assert len({base, *others}) == 7
    # a ticket is a secret between two peers: another one for the same work makes no other leaf
    assert stagecalls.leaf(MODEL, (0, 9), Part(b"u" * 16, 5, 2, 1), "x86_64-cpu", came, went) == base
    assert stagecalls.kflop(1500, part) == 3
