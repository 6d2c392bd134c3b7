"""The verdict on a stage: honest machines stay far from guilt, whatever the inputs; what is wrong does not."""

from functools import partial

import numpy as np
import pytest
import trio

from dmoe.core import wire
from dmoe.core.manifest import Router
from dmoe.judging import stage_layer
from dmoe.runtime import merged, open_files
from dmoe.stages.loading import load_stage
from dmoe.stages.retrace import choose, retrace
from tests.unit.dmoe.model_kit import tiny
from tests.unit.dmoe.stage_trust_kit import nudged, options, rewritten, rows_of, through
from tests.unit.dmoe.test_import_folder import imported

HONEST_MAX = 0.5
"""Of the bound: nobody comes nearer to guilt than that."""
KINDS = {
    "fp32": {"kind": "F32"},
    "int8": {"kind": "F32", "quantisation": "int8"},
    "int4 with offsets": {"kind": "Q4_1"},
    "sparse fp32": {"kind": "F32", "experts": 4},
    "sparse int8": {"kind": "F32", "experts": 4, "quantisation": "int8"},
}


@pytest.fixture(scope="module", params=KINDS)
def found(request, tmp_path_factory):
    store, manifest = tiny(tmp_path_factory.mktemp("verdict"), **KINDS[request.param])
    return request.param, store, manifest


def judge(store, manifest, rows, answer, seed=0):
    stage = manifest.stages[0]
    tensors = merged(open_files(manifest, store, [stage]))
    load = partial(stage_layer, manifest, tensors)
    made = retrace(manifest, stage.layers, load, rows, np.random.default_rng(seed))
    return made.ratios(wire.rounded(answer, manifest.wire_dtype), manifest.wire_dtype)


def loaded(store, manifest, threads=1):
    return load_stage(manifest, manifest.stages[0], store, options(threads))


def hard_inputs(width):
    """Rows that somebody chose: alike, huge, tiny, one number alone, between two codes, cancelling each other."""
    random = np.random.default_rng(5)
    one = random.standard_normal(width)
    tied = (random.integers(-126, 126, (8, width)) + 0.5) / 64
    tied[:, ::16] = 127 / 64
    spike = np.zeros((8, width))
    spike[:, 3] = 20_000.0
    return {
        "alike": np.tile(one, (12, 1)),
        "huge": random.standard_normal((12, width)) * 5_000,
        "tiny": random.standard_normal((12, width)) * 1e-6,
        "zero": np.zeros((6, width)),
        "spike": spike + random.standard_normal((8, width)),
        "tied": tied,
        "opposite": np.stack([one if row % 2 else -one for row in range(12)]),
        "beyond fp16": random.standard_normal((6, width)) * 1e6,
    }


async def test_no_honest_answer_is_near_to_guilt(found):
    _, store, manifest = found
    random = np.random.default_rng(11)
    worst = 0.0
    for threads in (1, 2):
        segment = loaded(store, manifest, threads)
        for scale in (0.05, 1.0, 20.0):
            rows = rows_of(manifest, 20, seed=int(scale * 100), scale=scale)
            cuts = sorted(random.choice(range(1, 20), 5, replace=False).tolist())
            pieces = np.diff([0, *cuts, 20]).tolist()
            answer = await through(segment, rows, pieces)
            worst = max(worst, float(judge(store, manifest, rows, answer, threads).max()))
        segment.close()
    assert worst < HONEST_MAX


async def test_nobody_is_framed_by_inputs_that_were_chosen(found):
    _, store, manifest = found
    segment = loaded(store, manifest)
    for name, given in hard_inputs(manifest.architecture.hidden).items():
        rows = wire.rounded(given.astype(np.float32), manifest.wire_dtype)
        assert judge(store, manifest, rows, await through(segment, rows)).max() < HONEST_MAX, name


async def test_what_is_far_off_is_guilty(found):
    kind, store, manifest = found
    rows, segment = rows_of(manifest, 16, seed=4), loaded(store, manifest)
    true = await through(segment, rows)
    assert judge(store, manifest, rows, np.zeros_like(true)).max() > 1
    assert judge(store, manifest, rows, rows).max() > 1, "what came in, given on as it is"
    if kind == "sparse int8":
        return
    lies = {"fp32": ("fp16", "int8", "int4"), "sparse fp32": ("int8", "int4"), "int8": ("int4",)}.get(kind, ())
    for lie in lies:
        cheap = await trio.to_thread.run_sync(rewritten, store, manifest, manifest.stages[0], lie)
        assert judge(store, manifest, rows, await through(cheap, rows)).max() > 1, lie
    if kind.endswith("fp32"):
        from random import Random

        for seed in range(5):
            assert judge(store, manifest, rows, nudged(true, Random(seed))).max() > 1, "1 % on one number"


async def test_what_somebody_else_was_given_proves_nothing(found):
    """Not even rows of another sequence make an honest answer out of a wrong one, or the other way round."""
    _, store, manifest = found
    rows = rows_of(manifest, 8, seed=1)
    broken = rows.copy()
    broken[3, 5] = np.inf
    ratios = judge(store, manifest, broken, np.zeros_like(rows))
    assert not ratios[3:].any(), "nobody is judged by what is no number, nor behind it"


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
async def test_every_family_is_computed_as_its_graph_does_it(tmp_path, family):
    store, manifest = await imported(tmp_path, family, "fp32")
    rows = rows_of(manifest, 30, seed=2)
    answer = await through(loaded(store, manifest), rows, [12, 1, 17])
    assert judge(store, manifest, rows, answer).max() < HONEST_MAX
    wrong = answer.copy()
    wrong[-1] *= np.float32(1.02)
    assert judge(store, manifest, rows, wrong).max() > 1


def test_choices_on_the_edge_are_made_both_ways():
    router = Router(kind="softmax_topk", experts=4, top_k=2, normalise=True)
    scores = np.tile(np.array([[3.0, 1.0, 1.0 + 1e-9, -2.0], [3.0, 1.0, 0.2, -2.0]]), (8, 1, 1))
    judged = np.ones(2, np.bool_)
    for turn in range(3):
        chosen, weights = choose(router, scores, None, judged, turn)
        first = [frozenset(row) for row in chosen[:, 0].tolist()]
        assert first[0] == {0, 2}
        assert set(first[1:]) == {frozenset((0, 1)), frozenset((0, 2))}
        assert {frozenset(row) for row in chosen[:, 1].tolist()} == {frozenset((0, 1))}
        assert np.allclose(weights.sum(axis=2), 1)
    grouped = Router(kind="sigmoid_topk", experts=4, top_k=1, groups=2, groups_used=1)
    scores = np.tile(np.array([[2.0, 1.0, -1.0, -2.0], [1.0, 0.0, 1.0, 1e-12], [2.0, 1.0, -1.0, -2.0]]), (8, 1, 1))
    judged = np.ones(3, np.bool_)
    choose(grouped, scores, None, judged)
    assert judged.tolist() == [True, False, False], "which group is used is undecided: nothing behind it is judged"
