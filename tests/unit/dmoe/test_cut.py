"""How a model is cut on request: sum groups, files and stages, and what cannot be cut so."""

import pytest

from config.errors import ConfigError
from dmoe.importer.build import Wishes, import_model
from dmoe.importer.cut import Sizes
from dmoe.store import ModelStore
from tests.unit.dmoe.folder_kit import EXPERTS, LAYERS, write_folder
from tests.unit.dmoe.model_kit import PUBLISHER


@pytest.mark.parametrize(
    ("sizes", "spans", "stages"),
    [
        (Sizes(), [(0, 7), (8, 15), (16, 22)], [(0, 7), (8, 15), (16, 22)]),
        (Sizes(layers_per_shard=9), [(0, 8), (9, 17), (18, 22)], [(0, 8), (9, 17), (18, 22)]),
        (Sizes(layers_per_stage=12), [(0, 11), (12, 22)], [(0, 11), (12, 22)]),
        (
            Sizes(layers_per_shard=4, layers_per_stage=12),
            [(0, 3), (4, 7), (8, 11), (12, 15), (16, 19), (20, 22)],
            [(0, 11), (12, 22)],
        ),
        (Sizes(layers_per_stage=23), [(0, 22)], [(0, 22)]),
    ],
)
def test_layers_are_cut_into_files_and_stages_of_whole_files(sizes, spans, stages):
    sizes.check(23, 8)
    assert sizes.spans(23) == spans
    assert sizes.stages(spans) == stages


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (0, ((0, 1), (2, 3), (4,), (5,))),
        (4, ((0, 1, 2, 3), (4, 5))),
        (6, (tuple(range(6)),)),
        (1, ((0,), (1,), (2,), (3,), (4,), (5,))),
    ],
)
def test_experts_per_shard_are_the_sum_groups(size, groups):
    assert Sizes(experts_per_shard=size).groups(6) == groups


@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        (Sizes(experts_per_shard=9), "--experts-per-shard 9 is not within 1..8"),
        (Sizes(layers_per_shard=24), "--layers-per-shard 24 is not within 1..23"),
        (Sizes(layers_per_stage=-1), "--layers-per-stage -1 is not within"),
        (Sizes(layers_per_stage=10, layers_per_shard=4), "10 is no multiple of --layers-per-shard 4"),
    ],
)
def test_what_cannot_be_cut_so_is_refused(sizes, fault):
    with pytest.raises(ConfigError, match=fault):
        sizes.check(23, 8)


def test_a_model_cut_on_request_is_whole_and_computes_the_same(tmp_path):
    source = write_folder(tmp_path / "tiny", "mixtral")
    store = ModelStore(tmp_path / "models")
    usual = import_model(source, store, PUBLISHER, Wishes())
    wishes = Wishes(name="cut", licence="mit", sizes=Sizes(experts_per_shard=1, layers_per_shard=1, layers_per_stage=2))
    cut = import_model(source, store, PUBLISHER, wishes)
    assert (cut.name, cut.licence) == ("cut", "mit")
    assert len(cut.expert_shards()) == LAYERS * EXPERTS
    assert [stage.layers for stage in cut.stages] == [(0, 1), (2, 2)]
    assert cut.golden.tokens == usual.golden.tokens
    assert max(abs(a - b) for a, b in zip(cut.golden.logits, usual.golden.logits, strict=True)) < 1e-2
    params = [sum(shard.params for shard in m.shards if shard.kind != "stage") for m in (cut, usual)]
    assert params[0] == params[1]


def test_wishes_that_do_not_fit_leave_nothing_behind(tmp_path):
    store = ModelStore(tmp_path / "models")
    with pytest.raises(ConfigError, match="this model has 6"):
        import_model(
            write_folder(tmp_path / "tiny", "mixtral"), store, PUBLISHER, Wishes(sizes=Sizes(experts_per_shard=7))
        )
    assert list(store.root.iterdir()) == []
