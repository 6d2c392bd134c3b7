"""The three rules of exactness, and that the numbers are the model's own."""

import numpy as np
import pytest

from config.errors import LocalError, RequestError
from dmoe import golden
from dmoe.core import wire
from dmoe.importer.sources import GgufSource
from dmoe.layers import ALL_EXPERTS, FusedModel, LocalExperts, Routing, Trunk, forward
from dmoe.runtime import ExpertShard, RuntimeOptions
from tests.unit.dmoe.model_kit import load, made, numpy_logits, tiny

FORMS = ("source", "int8", "fp32", "int4")
IDS = [int(token) for token in np.random.default_rng(7).integers(1, 250, 60)]


@pytest.fixture(scope="module", params=FORMS)
def model(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp(request.param), quantisation=request.param)


async def all_routes_agree(new_sequence, run, ids):
    """Rule 1: however the tokens arrive, every position's logits have the same bits."""

    async def feed(sizes, capacity):
        sequence, out, start = new_sequence(capacity), [], 0
        for size in sizes:
            out.append(await run(sequence, ids[start : start + size], all_positions=True))
            start += size
        return np.concatenate(out)

    count, prompt = len(ids), len(ids) // 3
    reference = await feed([count], count)
    one_by_one = await feed([prompt, *[1] * (count - prompt)], count + 9)
    in_fives = await feed([5] * (count // 5) + [count % 5] * bool(count % 5), count)
    for other in (one_by_one, in_fives):
        assert other.tobytes() == reference.tobytes()

    sequence = new_sequence(count)  # the cache of a fault, dropped and rebuilt
    await run(sequence, ids[: prompt + 4])
    sequence.truncate(prompt)
    assert (await run(sequence, ids[prompt : prompt + 1])).tobytes() == reference[prompt].tobytes()
    await run(sequence, ids[prompt + 1 : -1])
    assert (await run(sequence, ids[-1:])).tobytes() == reference[-1].tobytes()
    return reference


async def test_pieces_give_the_same_bits_in_any_chunks_on_any_threads(model):
    store, manifest = model
    results = []
    for threads in (1, 2):
        trunk, experts = load(store, manifest, threads)
        results.append(
            await all_routes_agree(
                trunk.new_sequence, lambda s, i, t=trunk, e=experts, **k: forward(t, s, i, e, **k), IDS
            )
        )
        experts.close()
    assert results[0].tobytes() == results[1].tobytes()


async def test_fused_gives_the_same_bits_in_any_chunks_on_any_threads(model):
    store, manifest = model
    results = []
    for threads in (1, 2):
        fused = FusedModel(manifest, store, RuntimeOptions(device="cpu", threads=threads))
        results.append(await all_routes_agree(fused.new_sequence, fused.forward, IDS))
    assert results[0].tobytes() == results[1].tobytes()


async def test_a_prompt_longer_than_a_chunk_equals_decoding(model):
    store, manifest = model
    trunk, experts = load(store, manifest)
    ids = (IDS * 6)[:300]
    long, short = trunk.new_sequence(400), trunk.new_sequence(301)
    whole = await forward(trunk, long, ids, experts)
    for start in range(0, 300, 100):
        parts = await forward(trunk, short, ids[start : start + 100], experts)
    assert whole.tobytes() == parts.tobytes()
    experts.close()


async def test_local_equals_partials_computed_anywhere_and_rounded(model):
    """Rules 2 and 3: what the local route adds is what any split over shard objects gives."""
    store, manifest = model
    options = RuntimeOptions(device="cpu", threads=1)
    _, local = load(store, manifest)
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
    trunk, local = load(store, manifest)
    got = await forward(trunk, trunk.new_sequence(60), IDS[:20], local, all_positions=True)
    expected = numpy_logits(GgufSource(tmp_path / "tiny.gguf"), manifest, IDS[:20])
    assert np.abs(got - expected).max() < 0.02  # what fp16 on the wire costs; logits are of size 1
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    if not experts:
        fused = FusedModel(manifest, store, RuntimeOptions(device="cpu", threads=2))
        exact = await fused.forward(fused.new_sequence(60), IDS[:20], all_positions=True)
        assert np.abs(exact - expected).max() < 1e-4
    local.close()


@pytest.mark.parametrize("quantisation", FORMS)
async def test_sparse_experts_give_the_same_bits_in_any_chunks(tmp_path, quantisation):
    store, manifest = await made(tmp_path, experts=6, quantisation=quantisation)
    assert [len(group) for group in manifest.sum_groups] == [2, 2, 1, 1]
    trunk, experts = load(store, manifest)
    await all_routes_agree(trunk.new_sequence, lambda s, i, **k: forward(trunk, s, i, experts, **k), IDS)
    experts.close()


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
        FusedModel(manifest, store, RuntimeOptions(device="cpu"))


async def test_a_full_sequence_and_bad_tokens_are_refused(tmp_path):
    store, manifest = await made(tmp_path)
    trunk, experts = load(store, manifest)
    sequence = trunk.new_sequence(4)
    await forward(trunk, sequence, [1, 2, 3], experts)
    with pytest.raises(RequestError, match="5 tokens do not fit the sequence's 4 positions"):
        await forward(trunk, sequence, [1, 2], experts)
    with pytest.raises(RequestError, match="token ids must be"):
        await forward(trunk, sequence, [manifest.architecture.vocab], experts)
    with pytest.raises(RequestError, match="do not fit the model's context of 512"):
        trunk.new_sequence(513)
    assert sequence.length == 3
    experts.close()


async def test_a_call_that_fails_leaves_the_sequence_as_it_was(tmp_path):
    store, manifest = await made(tmp_path)
    trunk, experts = load(store, manifest)

    class FailsInLayer1:
        async def run(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
            if layer == 1:
                raise LocalError("local", "lost")
            return await experts.run(layer, h, routing)

    kept, tried = trunk.new_sequence(10), trunk.new_sequence(10)
    for sequence in (kept, tried):
        await forward(trunk, sequence, IDS[:4], experts)
    with pytest.raises(LocalError):
        await forward(trunk, tried, [9], FailsInLayer1())
    expected = await forward(trunk, kept, [7], experts)
    assert (await forward(trunk, tried, [7], experts)).tobytes() == expected.tobytes()
    experts.close()


async def test_smollm2_answers_and_is_exact(smollm2_store):
    """The real model: every route in any chunks has the same bits, and says what the model says."""
    (manifest,) = smollm2_store.manifests().values()
    options = RuntimeOptions(device="cpu", threads=2)
    fused = FusedModel(manifest, smollm2_store, options)
    trunk, experts = load(smollm2_store, manifest, 2)
    ids = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]  # capital of France?
    one = await all_routes_agree(fused.new_sequence, fused.forward, ids)
    two = await all_routes_agree(trunk.new_sequence, lambda s, i, **k: forward(trunk, s, i, experts, **k), ids)
    assert (one.argmax(-1) == two.argmax(-1)).mean() > 0.9
    answer = []
    sequence = fused.new_sequence(64)
    logits = await fused.forward(sequence, ids)
    while len(answer) < 7:
        answer.append(int(logits.argmax()))
        logits = await fused.forward(sequence, answer[-1:])
    from tokenizers import Tokenizer

    text = Tokenizer.from_str(smollm2_store.read(manifest, manifest.tokenizer).decode()).decode(answer)
    assert "Paris" in text
    experts.close()


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
    assert isinstance(Trunk(manifest, store, options), Trunk)
