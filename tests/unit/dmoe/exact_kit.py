"""Rule 1 of exactness, for any runner: a sequence's bits do not depend on how its tokens arrive, or beside whom."""

import numpy as np

from dmoe.runner import Feed
from tests.unit.dmoe.model_kit import feed


async def all_ways_agree(runner, ids):
    """Rule 1: however the tokens arrive, and whatever else is in the pass, every position's logits have the same bits.
    Returns them."""

    async def in_chunks(sizes, capacity):
        sequence, out, start = await runner.open(capacity), [], 0
        for size in sizes:
            out.append(await feed(runner, sequence, ids[start : start + size]))
            start += size
        sequence.close()
        return np.concatenate(out)

    count, prompt = len(ids), len(ids) // 3
    reference = await in_chunks([count], count)
    one_by_one = await in_chunks([prompt, *[1] * (count - prompt)], count + 9)
    in_fives = await in_chunks([5] * (count // 5) + [count % 5] * bool(count % 5), count)
    for other in (one_by_one, in_fives):
        assert other.tobytes() == reference.tobytes()
    await rebuilt(runner, ids, reference)
    await beside_each_other(runner, ids, reference)
    return reference


async def rebuilt(runner, ids, reference):
    """The cache of a fault, dropped and rebuilt."""
    prompt = len(ids) // 3
    sequence = await runner.open(len(ids))
    await feed(runner, sequence, ids[: prompt + 4])
    sequence.truncate(prompt)
    assert (await feed(runner, sequence, ids[prompt : prompt + 1])).tobytes() == reference[prompt].tobytes()
    await feed(runner, sequence, ids[prompt + 1 : -1])
    assert (await feed(runner, sequence, ids[-1:])).tobytes() == reference[-1].tobytes()
    sequence.close()


async def beside_each_other(runner, ids, reference):
    """Sequences that start one pass after the other, at different paces, one of them from another's prefix, in slots
    that others have left; each cut of each must be what it is alone."""
    paces = [1, 2, 1, 5, 1, 12]
    left = await runner.open(8)
    running, started = [], 0
    rounds = 0
    while started < len(paces) or running:
        if started < len(paces):
            like = running[0][0] if started == 4 else None
            length = like.length if like else 0
            running.append((await runner.open(len(ids), like=like, length=length), paces[started]))
            started += 1
        if rounds == 2:
            left.close()
        feeds, places = [], []
        for sequence, pace in running:
            start = sequence.length
            tokens = tuple(ids[start : start + pace])
            feeds.append(Feed(sequence=sequence, tokens=tokens, outputs=len(tokens)))
            places.append(slice(start, start + len(tokens)))
        for out, place in zip(await runner.forward(feeds), places, strict=True):
            assert out.tobytes() == reference[place].tobytes()
        for sequence, _ in running:
            if sequence.length == len(ids):
                sequence.close()
        running = [(sequence, pace) for sequence, pace in running if sequence.length < len(ids)]
        rounds += 1
