"""The real layers, cut into stages over three hosts: bit for bit what one process computes with the same cuts."""

import numpy as np
import pytest
import trio

from dmoe import layers
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions, open_files
from dmoe.stages.loading import load_stage
from dmoe.tally import OwnMeter
from tests.unit.dmoe.stages_kit import staged, swarm

OPTIONS = RuntimeOptions(device="cpu", threads=1)
TEXTS = (tuple(range(5, 45)), tuple(range(100, 103)), tuple(range(60, 90)))
FORMS = {
    "dense fp32": {"kind": "F32"},
    "dense int4": {"kind": "Q4_1"},
    "dense int8": {"kind": "F32", "quantisation": "int8"},
    "sparse fp32": {"kind": "F32", "experts": 4},
    "sparse int8": {"kind": "F32", "experts": 4, "quantisation": "int8"},
}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def model(request, tmp_path_factory):
    store, manifest = staged(tmp_path_factory.mktemp("bits"), **request.param)
    ends = layers.Ends(manifest, open_files(manifest, store, [manifest.trunk]), OPTIONS)
    return store, manifest, ends


def loader(model):
    store, manifest, _ = model
    return lambda index: load_stage(manifest, manifest.stages[index], store, OPTIONS)


def reference(model):
    """Every stage in this process."""
    _, manifest, ends = model
    segments = [loader(model)(index).opened for index in range(3)]
    return layers.ModelRunner(manifest, ends, segments, OwnMeter(manifest, "me"), manifest.wire_dtype)


async def lived(runner, kill=None):
    """Three ragged sequences, a refused draft, a fork: everything that came out."""
    out, sequences = [], [await runner.open(150) for _ in TEXTS]
    tokens = list(TEXTS)
    for step in range(5):
        if step == 3 and kill is not None:
            await kill()
        drafts = (7, 9) if step == 2 else ()
        feeds = [
            Feed(sequence=s, tokens=(*t, *drafts), outputs=1 + len(drafts))
            for s, t in zip(sequences, tokens, strict=True)
        ]
        found = await runner.forward(feeds)
        for sequence in sequences:
            sequence.truncate(sequence.length - len(drafts))
        out += [logits[0] for logits in found]
        tokens = [(int(logits[0].argmax()),) for logits in found]
    fork = await runner.open(80, like=sequences[0], length=30)
    hidden, logits = await runner.forward(
        [Feed(sequence=fork, tokens=(1, 2, 3), outputs=2, want="hidden"), Feed(sequence=sequences[1], tokens=(4,))]
    )
    return [*out, *hidden, *logits]


@pytest.mark.parametrize("dies", [None, 0, 1, 2])
async def test_three_hosts_compute_what_one_process_does(model, dies):
    _, manifest, ends = model
    alone = await lived(reference(model))
    async with swarm(manifest, segment=loader(model), ends=ends) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()

        async def kill():
            if dies is not None:
                await net.node(dies)
                net.hub.kill(nodes[dies].peer_id)

        found = await lived(runner, kill)
        assert len(found) == len(alone)
        for here, there in zip(alone, found, strict=True):
            assert np.array_equal(here, there)
        assert nodes[1].host.statistics()["stages"][manifest.model_id]["stage-l01-01"]["batch_rows_max"] > 40


async def test_stages_in_one_process_differ_from_no_stages_only_by_their_roundings(model):
    """The route's own class: near the logits of route ``local``, not equal to them."""
    store, manifest, _ = model
    cut, whole = reference(model), layers.local_runner(manifest, store, OPTIONS)
    out = []
    for runner in (cut, whole):
        (logits,) = await runner.forward([Feed(sequence=await runner.open(64), tokens=TEXTS[0])])
        out.append(logits[0])
    assert not np.array_equal(*out)
    assert np.abs(out[0] - out[1]).max() < 0.5


async def test_a_stage_frees_its_memory_when_it_is_dropped(model):
    _, manifest, ends = model
    async with swarm(manifest, segment=loader(model), ends=ends) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(100)
        await runner.forward([Feed(sequence=sequence, tokens=TEXTS[0])])
        held = nodes[1].host.ram_bytes()
        assert held > manifest.stages[1].ram_bytes
        stage = nodes[1].segments[1]
        await net.node(1)
        await nodes[1].unload(1)
        assert nodes[1].host.ram_bytes() == 0
        with pytest.raises(AssertionError):
            stage.opened  # noqa: B018
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(3,))])
        alone = reference(model)
        other = await alone.open(100)
        await alone.forward([Feed(sequence=other, tokens=TEXTS[0])])
        assert np.array_equal(logits, (await alone.forward([Feed(sequence=other, tokens=(3,))]))[0])
        await trio.lowlevel.checkpoint()
