"""What a stage signs for: the same digests whatever the pieces, others for other rows; forks go their own way."""

import numpy as np
import pytest
import trio

from config.errors import RiosError
from dmoe.core import history, wire
from dmoe.core.history import History, digest
from dmoe.core.stagecalls import OpenCall, Part, open_header, run_header, show_header
from tests.unit.dmoe.stages_kit import staged, swarm

RANDOM = np.random.default_rng(3)
X, Y = (wire.rounded(RANDOM.standard_normal((12, 8)).astype(np.float32)) for _ in range(2))


def fed(pieces, x=X, y=Y):
    made, at = History(8, "fp16"), 0
    for size in pieces:
        added = made.append(at, x[at : at + size], y[at : at + size])
        at += size
    return made, added


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5]])
def test_digests_know_rows_and_order_not_pieces(pieces):
    _, added = fed(pieces)
    said = added.said(1)
    assert (said.came, said.went) == (digest(X), digest(Y))
    assert said.before == digest(Y[:-1])
    assert digest(X[::-1]) != digest(X)
    assert digest(X[:-1]) != digest(X)


def test_runs_that_nobody_asks_about_do_not_pile_up(monkeypatch):
    """Their callers have gone: the digests are the same as if they had not."""
    monkeypatch.setattr("dmoe.core.history.WAITING_BYTES_MAX", 2000)
    made = History(8, "fp16")
    for _ in range(100):
        made.append(0, X, Y)
        assert len(made._waiting) <= 2
    assert made.append(len(X), X, Y).said(0).came == digest(np.concatenate([X, X]))


def test_what_is_taken_back_is_forgotten():
    made, _ = fed([12])
    made.append(5, X[:3], Y[:3])  # three guesses, two of them refused
    last = made.append(6, X[6:], Y[6:])
    rows = np.concatenate([X[:5], X[:1], X[6:]])
    assert last.said(0).came == digest(rows)
    shape, buffer = made.sent(0, 12)
    assert np.array_equal(wire.decode(shape, buffer), np.concatenate([Y[:5], Y[:1], Y[6:]]))


def test_a_fork_goes_its_own_way():
    made, _ = fed([12])
    fork = made.fork(7)
    assert fork.append(7, X[:2], Y[:2]).said(1).came == digest(np.concatenate([X[:7], X[:2]]))
    assert made.append(12, X[:1], Y[:1]).said(1).came == digest(np.concatenate([X, X[:1]]))


def test_rows_are_told_apart_by_value_whatever_dtype_they_travelled_in():
    large = X.copy()
    large[3] *= 1e5  # as bf16
    large = wire.rounded(large)
    made = History(8, "fp16")
    said = made.append(0, X, large).said(12)
    assert said.went == digest(large)
    shape, buffer = made.sent(2, 3)
    assert np.array_equal(wire.decode(shape, buffer), large[2:5])
    assert "bf16" in shape
    assert "bf16" not in made.sent(4, 3)[0]
    one, two = np.full((1, 2), 1 / 3, np.float32), np.full((1, 2), np.float16(1 / 3), np.float32)
    assert digest(one) != digest(two)
    assert history.digest(X[:0]) == history.START


def test_what_happened_first_is_settled_first_whoever_asks():
    made = History(8, "fp16")
    first, second = made.append(0, X[:4], Y[:4]), made.append(2, X[4:], Y[4:])
    assert second.said(1).came == digest(np.concatenate([X[:2], X[4:]]))
    assert first.said(1).came == digest(X[:4])


async def test_only_the_owner_is_shown_rows_and_a_fork_behind_a_shortened_cache_is_refused(tmp_path):
    _, manifest = await trio.to_thread.run_sync(lambda: staged(tmp_path))
    async with swarm(manifest) as net:
        node, owner, other = await net.node(0), net.hub.add(), net.hub.add()
        width, layers = manifest.architecture.hidden, manifest.stages[0].layers
        x = wire.rounded(RANDOM.standard_normal((6, width)).astype(np.float32))

        async def opened(**like):
            asked = OpenCall(manifest.model_id, layers, 20, 0, b"", **like)
            return (await owner.call(node.peer_id, "stage.open", open_header(asked), deadline_ms=2000)).header["ticket"]

        async def run(ticket, position, rows, number):
            shape, buffer = wire.encode(rows)
            header = run_header(number, [Part(ticket, position, len(rows), len(rows))], (), shape, reply=True)
            return await owner.call(node.peer_id, "stage.run", header, (buffer,), deadline_ms=2000)

        ticket = await opened()
        reply = await run(ticket, 0, x, 1)
        sent = wire.decode(reply.header, reply.buffers[0])
        shown = await owner.call(node.peer_id, "stage.show", show_header(ticket, 1, 4), deadline_ms=2000)
        assert np.array_equal(wire.decode(shown.header, shown.buffers[0]), sent[1:5])
        for who, first, rows, why in ((other, 0, 2, "no such ticket"), (owner, 3, 4, "6 positions are known")):
            with pytest.raises(RiosError, match=why):
                await who.call(node.peer_id, "stage.show", show_header(ticket, first, rows), deadline_ms=2000)
        fork = await opened(like=ticket, length=4)
        await run(ticket, 2, x[:1], 2)
        with pytest.raises(RiosError, match="a cache that holds 3"):
            await opened(like=ticket, length=4)
        forked = await run(fork, 4, x[:1], 3)
        step = forked.header["trail"][0]
        assert step[3][:32] == digest(np.concatenate([x[:4], x[:1]]))
