"""The three rules of exactness, and that the numbers are the model's own."""

import numpy as np
import pytest

from config.errors import LocalError, RequestError
from dmoe import golden
from dmoe.core import wire
from dmoe.importer.sources import GgufSource
from dmoe.layers import ALL_EXPERTS, Ends, LocalExperts, ModelRunner, fused_runner, local_experts, local_runner
from dmoe.runner import Feed
from dmoe.runtime import ExpertShard, RuntimeOptions, open_files
from dmoe.segment import Pieces, PieceSegment
from dmoe.tally import OwnMeter
from tests.unit.dmoe.exact_kit import all_ways_agree
from tests.unit.dmoe.model_kit import feed, load, made, numpy_logits, tiny

FORMS = ("source", "int8", "fp32", "int4")
IDS = [int(token) for token in np.random.default_rng(7).integers(1, 250, 60)]


@pytest.fixture(scope="module", params=FORMS)
def model(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp(request.param), quantisation=request.param)


@pytest.mark.parametrize("make", [local_runner, fused_runner])
async def test_the_same_bits_in_any_chunks_in_any_company_on_any_threads(model, make):
    store, manifest = model
    results = []
    for threads in (1, 2):
        runner = make(manifest, store, RuntimeOptions(device="cpu", threads=threads))
        results.append(await all_ways_agree(runner, IDS))
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("make", [local_runner, fused_runner])
async def test_a_prompt_longer_than_a_chunk_equals_decoding(model, make):
    store, manifest = model
    runner = make(manifest, store, RuntimeOptions(device="cpu", threads=1))
    ids = (IDS * 6)[:300]
    short, long, beside = await runner.open(301), await runner.open(400), await runner.open(30)
    for start in range(0, 300, 100):
        parts = await feed(runner, short, ids[start : start + 100])
    expected = await feed(runner, await runner.open(30), ids[:20])
    whole, other = await runner.forward(
        [
            Feed(sequence=long, tokens=tuple(ids), outputs=100),
            Feed(sequence=beside, tokens=tuple(ids[:20]), outputs=20),
        ]
    )
    assert whole.tobytes() == parts.tobytes()
    assert other.tobytes() == expected.tobytes()


async def test_sequences_that_move_beside_each_other_keep_their_bits(model):
    store, manifest = model
    runner = fused_runner(manifest, store, RuntimeOptions(device="cpu", threads=1))
    reference = await feed(runner, await runner.open(60), IDS)
    sequences = [await runner.open(60) for _ in range(16)]
    for sequence in sequences:
        await feed(runner, sequence, IDS[:20])
    far = [sequences[0], sequences[15], sequences[8]]
    for pair in (far, sequences):
        starts = [sequence.length for sequence in pair]
        outs = await runner.forward([Feed(sequence=each, tokens=(IDS[each.length],)) for each in pair])
        for start, out in zip(starts, outs, strict=True):
            assert out.tobytes() == reference[start : start + 1].tobytes()


async def test_local_equals_partials_computed_anywhere_and_rounded(model):
    """Rules 2 and 3: what the local route adds is what any split over shard objects gives."""
    store, manifest = model
    options = RuntimeOptions(device="cpu", threads=1)
    local = local_experts(manifest, store, options)
    h = np.random.default_rng(3).standard_normal((7, manifest.architecture.hidden)).astype(np.float32)
    for layer in range(manifest.architecture.layers):
        expected = await local.run(layer, h, ALL_EXPERTS)
        seen = wire.decode(*wire.encode(h))
        parts = []
        for group in range(len(manifest.sum_groups)):
            elsewhere = ExpertShard(manifest, manifest.expert_shard(layer, group), store, options)
            rows = [elsewhere.partial(layer, seen[row : row + 1]) for row in range(len(h))]  # unbatched
            parts.append(wire.decode(*wire.encode(np.concatenate(rows))))
            elsewhere.close()
        assert wire.total(parts, h.shape).tobytes() == expected.tobytes()
    local.close()


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("experts", [0, 6])
async def test_logits_are_the_models_own(tmp_path, kind, experts):
    store, manifest = await made(tmp_path, kind=kind, experts=experts, tied=False, quantisation="fp32")
    runner = load(store, manifest)
    got = await feed(runner, await runner.open(60), IDS[:20])
    expected = numpy_logits(GgufSource(tmp_path / "tiny.gguf"), manifest, IDS[:20])
    assert np.abs(got - expected).max() < 0.02  # what fp16 on the wire costs; logits are of size 1
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    if not experts:
        fused = fused_runner(manifest, store, RuntimeOptions(device="cpu", threads=2))
        exact = await feed(fused, await fused.open(60), IDS[:20])
        assert np.abs(exact - expected).max() < 1e-4


@pytest.mark.parametrize("quantisation", FORMS)
async def test_sparse_experts_give_the_same_bits_in_any_chunks(tmp_path, quantisation):
    store, manifest = await made(tmp_path, experts=6, quantisation=quantisation)
    assert [len(group) for group in manifest.sum_groups] == [2, 2, 1, 1]
    await all_ways_agree(load(store, manifest), IDS)


def test_a_row_that_chose_nobody_of_the_group_gets_zero(tmp_path):
    store, manifest = tiny(tmp_path, experts=6)
    shard = ExpertShard(manifest, manifest.expert_shard(0, 0), store, RuntimeOptions(device="cpu"))
    h = np.ones((2, manifest.architecture.hidden), np.float32)
    experts = np.array([[4, 5], [1, 4]], np.int32)
    partial = shard.partial(0, h, experts, np.full((2, 2), 0.5, np.float32))
    assert not partial[0].any()
    assert partial[1].any()
    shard.close()


def test_a_sparse_model_has_no_fused_graph(tmp_path):
    store, manifest = tiny(tmp_path, experts=6)
    with pytest.raises(LocalError, match="only dense models have a fused graph"):
        fused_runner(manifest, store, RuntimeOptions(device="cpu"))


async def test_a_full_sequence_and_bad_tokens_are_refused(tmp_path):
    store, manifest = await made(tmp_path)
    runner = load(store, manifest)
    sequence = await runner.open(4)
    await feed(runner, sequence, [1, 2, 3])
    with pytest.raises(RequestError, match="5 tokens do not fit the sequence's 4 positions"):
        await feed(runner, sequence, [1, 2])
    with pytest.raises(RequestError, match="token ids must be"):
        await feed(runner, sequence, [manifest.architecture.vocab])
    with pytest.raises(RequestError, match="do not fit the model's context of 512"):
        await runner.open(513)
    assert sequence.length == 3


async def test_a_pass_that_fails_leaves_its_sequences_as_they_were(tmp_path):
    store, manifest = await made(tmp_path)
    options = RuntimeOptions(device="cpu", threads=1)
    experts = local_experts(manifest, store, options)
    broken = []

    class SometimesFails:
        async def run(self, layer, h, routing):
            if broken and layer == 1:
                raise LocalError("local", "lost")
            return await experts.run(layer, h, routing)

    files = open_files(manifest, store, [manifest.trunk])
    segment = PieceSegment(manifest, Pieces(manifest, files, options), SometimesFails())
    runner = ModelRunner(manifest, Ends(manifest, files, options), [segment], OwnMeter(manifest, "me"))
    expected = await feed(runner, await runner.open(10), [*IDS[:4], 7])
    one, two = await runner.open(10), await runner.open(10)
    await feed(runner, one, IDS[:4])
    broken.append(True)
    with pytest.raises(LocalError):
        await runner.forward([Feed(sequence=one, tokens=(9, 9)), Feed(sequence=two, tokens=(3,))])
    assert (one.length, two.length) == (4, 0)
    broken.clear()
    assert (await feed(runner, one, [7])).tobytes() == expected[-1].tobytes()
    assert (await feed(runner, two, [*IDS[:4], 7])).tobytes() == expected.tobytes()
    experts.close()


async def test_smollm2_answers_and_is_exact(smollm2_store):
    """The real model: every route in any chunks has the same bits, and says what the model says."""
    (manifest,) = smollm2_store.manifests().values()
    options = RuntimeOptions(device="cpu", threads=2)
    fused, local = fused_runner(manifest, smollm2_store, options), load(smollm2_store, manifest, 2)
    ids = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]  # capital of France?
    one = await all_ways_agree(fused, ids)
    two = await all_ways_agree(local, ids)
    assert (one.argmax(-1) == two.argmax(-1)).mean() > 0.9
    answer = []
    sequence = await fused.open(64)
    logits = await feed(fused, sequence, ids)
    while len(answer) < 7:
        answer.append(int(logits[-1].argmax()))
        logits = await feed(fused, sequence, answer[-1:])
    from tokenizers import Tokenizer

    text = Tokenizer.from_str(smollm2_store.read(manifest, manifest.tokenizer).decode()).decode(answer)
    assert "Paris" in text


async def test_golden_logits_hold_here(smollm2_store):
    (manifest,) = smollm2_store.manifests().values()
    difference = await golden.verify(manifest, smollm2_store, RuntimeOptions(device="cpu"))
    assert difference <= manifest.golden.tolerance


def test_every_form_of_local_experts_needs_all_shards(tmp_path):
    store, manifest = tiny(tmp_path)
    options = RuntimeOptions(device="cpu")
    some = [ExpertShard(manifest, manifest.expert_shards()[0], store, options)]
    with pytest.raises(LocalError, match="lacks shard"):
        LocalExperts(manifest, some)
