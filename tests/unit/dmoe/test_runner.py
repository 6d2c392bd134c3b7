"""Runners: passes over several sequences, outputs as asked for, prefixes taken over, all or nothing."""

import numpy as np
import pytest

from config.errors import RequestError
from dmoe.models import StoredModels
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions
from tests.unit.dmoe.model_kit import made

IDS = tuple(int(token) for token in np.random.default_rng(7).integers(1, 250, 40))


@pytest.fixture(params=["local", "fused"])
async def runner(request, tmp_path):
    store, _ = await made(tmp_path)
    (model,) = StoredModels(store, None, RuntimeOptions(device="cpu", threads=1), "me").models()
    return await model.runner(request.param)


async def outputs(runner, sequence, tokens, **kwargs):
    (out,) = await runner.forward([Feed(sequence=sequence, tokens=tokens, **kwargs)])
    return out


async def test_a_pass_gives_the_outputs_that_were_asked_for(runner):
    one, two = await runner.open(40), await runner.open(40)
    whole = await outputs(runner, one, IDS, outputs=40)
    first, second = await runner.forward(
        [Feed(sequence=two, tokens=IDS[:7], outputs=0), Feed(sequence=await runner.open(9), tokens=IDS[:3], outputs=2)]
    )
    assert first.shape == (0, whole.shape[1])
    assert second.tobytes() == whole[1:3].tobytes()
    rest = await outputs(runner, two, IDS[7:], outputs=4)
    assert rest.tobytes() == whole[-4:].tobytes()
    assert (one.length, two.length, two.capacity) == (40, 40, 40)


async def test_hidden_rows_are_what_the_head_gets(runner):
    sequence = await runner.open(40)
    hidden = await outputs(runner, sequence, IDS, outputs=40, want="hidden")
    assert hidden.shape == (40, 128)
    assert np.abs((hidden**2).mean(-1) - 1).max() < 0.3  # an RMS norm, weighed by about 1


async def test_a_prefix_taken_over_is_as_if_computed(runner):
    one = await runner.open(40)
    whole = await outputs(runner, one, IDS, outputs=40)
    two = await runner.open(50, like=one, length=13)
    assert two.length == 13
    assert (await outputs(runner, two, IDS[13:14])).tobytes() == whole[13:14].tobytes()
    one.close()
    assert (await outputs(runner, two, IDS[14:], outputs=1)).tobytes() == whole[-1:].tobytes()


async def test_a_pass_that_fails_changes_no_sequence(runner):
    one, two = await runner.open(40), await runner.open(5)
    expected = await outputs(runner, one, IDS[:6])
    one.truncate(5)
    await outputs(runner, two, IDS[:4])
    for tokens in (IDS[:2], (1 << 20,)):
        with pytest.raises(RequestError):
            await runner.forward([Feed(sequence=one, tokens=IDS[9:12]), Feed(sequence=two, tokens=tokens)])
        assert (one.length, two.length) == (5, 4)
    assert (await outputs(runner, one, IDS[5:6])).tobytes() == expected.tobytes()


async def test_what_a_sequence_computed_is_reported(runner):
    one, two = await runner.open(40), await runner.open(40)
    await runner.forward([Feed(sequence=one, tokens=IDS[:6]), Feed(sequence=two, tokens=IDS[:9])])
    rows = [sequence.report().expert_rows["me"] for sequence in (one, two)]
    assert rows[0] * 9 == rows[1] * 6 > 0
