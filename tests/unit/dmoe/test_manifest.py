"""Manifests: one encoding, one id, one signature; whatever is altered is found and named."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from config.errors import IntegrityError
from dmoe.core.manifest import MANIFEST_BYTES_MAX, Manifest, Router
from dmoe.core.routes import map_of
from dmoe.core.variant import Latent, RopeScaling, Variant
from p2p.core.identity import Identity
from tests.unit.dmoe.model_kit import PUBLISHER, tiny


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))[1]


def signed(manifest):
    return replace(manifest, signature="").sign(PUBLISHER)


def test_what_is_written_is_read_back(manifest):
    again = Manifest.parse(manifest.to_json())
    assert again == manifest
    assert again.model_id == manifest.model_id
    assert again.to_json() == manifest.to_json()
    for shard in again.expert_shards():
        for layer in range(shard.layers[0], shard.layers[1] + 1):
            assert again.expert_shard(layer, shard.group) == shard
    assert again.shards[again.shard_index(again.trunk.id)] == again.trunk
    assert again.groups_of(again.trunk) == ()
    content = again.tokenizer.content()
    assert content.size_bytes == again.tokenizer.size_bytes
    assert [len(chunk) for chunk in content.chunks] == [32]


def test_the_id_does_not_depend_on_the_signature(manifest):
    assert replace(manifest, signature="").model_id == manifest.model_id
    assert replace(manifest, name="other").model_id != manifest.model_id


def test_any_altered_field_breaks_the_signature(manifest):
    for change in ({"name": "other"}, {"licence": "mine"}, {"chat_template": "x"}, {"stop_tokens": (1,)}):
        with pytest.raises(IntegrityError, match="the signature of publisher"):
            Manifest.parse(replace(manifest, **change).to_json())


def test_another_publisher_cannot_claim_it(manifest):
    thief = Identity.from_seed(b"t" * 32)
    with pytest.raises(IntegrityError, match="signature"):
        Manifest.parse(replace(manifest, publisher=thief.peer_id).to_json())
    with pytest.raises(IntegrityError, match="signature"):
        Manifest.parse(replace(manifest, signature="").to_json())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: b"", "truncated|malformed"),
        (lambda data: data + b" ", "canonical"),
        (lambda data: json.dumps(json.loads(data)).encode(), "not in canonical encoding"),
        (lambda data: data.replace(b'"name":', b'"mane":', 1), "mane|name|unknown"),
        (lambda data: b'"' + b"x" * MANIFEST_BYTES_MAX + b'"', "exceed the limit"),
        (lambda data: b"\xff" + data, "malformed|invalid|JSON"),
    ],
)
def test_damaged_bytes_are_refused(manifest, damage, fault):
    with pytest.raises(IntegrityError, match=fault):
        Manifest.parse(damage(manifest.to_json()))


def altered_shard(manifest, index, **change):
    shards = list(manifest.shards)
    shards[index] = replace(shards[index], **change)
    return replace(manifest, shards=tuple(shards))


def altered_file(manifest, **change):
    return altered_shard(manifest, 0, files=(replace(manifest.shards[0].files[0], **change),))


@pytest.mark.parametrize(
    ("alter", "fault"),
    [
        (lambda m: replace(m, format="rios-model/2"), "format 'rios-model/2'"),
        (lambda m: replace(m, shards=m.shards[1:]), "a layer lacks a sum group"),
        (lambda m: replace(m, shards=m.parts[:-1]), "exactly one trunk"),
        (lambda m: replace(m, shards=(*m.shards, m.shards[0])), "two shards have one id"),
        (lambda m: replace(m, sum_groups=((0,), (1,), (2,))), "every expert exactly once"),
        (lambda m: replace(m, sum_groups=((1, 0), (2,), (3,))), "not ascending"),
        (lambda m: altered_shard(m, 0, layers=(0, 99)), "holds layers 0..99 of 3"),
        (lambda m: altered_shard(m, 0, experts=(3,)), "wrong experts"),
        (lambda m: altered_shard(m, 0, group=9), "unknown sum group"),
        (lambda m: altered_shard(m, 0, flops_per_row=-1), "counts below 0"),
        (lambda m: altered_file(m, path="../../key"), "not a plain relative path"),
        (lambda m: altered_file(m, path="/etc/passwd"), "not a plain relative path"),
        (lambda m: altered_file(m, path="tokenizer.json"), "two files have one path"),
        (lambda m: altered_file(m, chunks=()), "wrong chunk count"),
        (lambda m: altered_file(m, sha256="00"), "malformed hash"),
        (lambda m: replace(m, stop_tokens=(10**6,)), "outside the vocabulary"),
        (lambda m: replace(m, architecture=replace(m.architecture, head_dim=33)), "head_dim = 33 is odd"),
        (lambda m: replace(m, architecture=replace(m.architecture, vocab=0)), r"architecture\.vocab = 0"),
    ],
)
def test_a_publisher_cannot_sign_nonsense(manifest, alter, fault):
    with pytest.raises(IntegrityError, match=fault):
        Manifest.parse(signed(alter(manifest)).to_json())


def test_an_unknown_shard_is_named(manifest):
    with pytest.raises(IntegrityError, match="no shard is called 'nothing'"):
        manifest.shard_index("nothing")


def test_a_manifest_of_version_0_2_0_still_reads_as_it_is():
    """Stored models keep their bytes and their id, whatever fields came later."""
    data = (Path(__file__).resolve().parents[2] / "vectors" / "manifest-0.2.0.json").read_bytes()
    manifest = Manifest.parse(data)
    assert manifest.to_json() == data
    assert manifest.model_id == "6e00abbcd6e1376d6d6a6af579c91487c1a33a4751c4609cc765f8702ef91065"
    assert manifest.architecture.traits == Variant()
    assert manifest.architecture.sparse_layers == (0, 1, 2)


def varied(manifest, **traits):
    architecture = replace(manifest.architecture, variant=Variant(**traits))
    return signed(replace(manifest, architecture=architecture))


def test_a_variant_travels_and_writes_only_what_differs(manifest):
    rope = RopeScaling(kind="yarn", factor=4.0, original_context=128)
    sent = varied(manifest, qkv_bias=True, windows=(64, 0, 64), rope=rope)
    assert Manifest.parse(sent.to_json()) == sent
    written = json.loads(sent.to_json())["architecture"]["variant"]
    assert written == {
        "qkv_bias": True,
        "windows": [64, 0, 64],
        "rope": {"factor": 4.0, "kind": "yarn", "original_context": 128},
    }
    assert sent.architecture.traits.window(1) == 0


LATENT = Latent(rank=32, rope=16, plain=16, value=16)


@pytest.mark.parametrize(
    ("traits", "fault"),
    [
        ({"windows": (64,)}, "1 windows for 3 layers"),
        ({"dense_layers": (0, 1, 2), "dense_intermediate": 64}, "no layer has experts"),
        ({"dense_layers": (1, 0), "dense_intermediate": 64}, "no ascending layers"),
        ({"dense_layers": (7,), "dense_intermediate": 64}, "no ascending layers"),
        ({"dense_layers": (1,)}, "go together"),
        ({"shared_gate": True}, "shared_gate without"),
        ({"rope": RopeScaling(kind="yarn", factor=4.0)}, "original_context = 0"),
        ({"rope": RopeScaling(kind="linear", factor=0.0)}, "rope.factor = 0.0"),
        ({"latent": LATENT}, "not 32"),
        ({"latent": replace(LATENT, plain=32 - 16 + 16)}, "latent heads are 32 [+] 16"),
        ({"latent": replace(LATENT, rank=33)}, "latent.rank = 33"),
        ({"latent": LATENT, "sinks": True}, "latent attention has no biases|not 32"),
    ],
)
def test_a_variant_that_cannot_be_computed_is_refused(manifest, traits, fault):
    if "latent" in traits:
        manifest = replace(manifest, architecture=replace(manifest.architecture, head_dim=30))
        fault = fault.replace("not 32", "not 30")
    with pytest.raises(IntegrityError, match=fault):
        Manifest.parse(varied(manifest, **traits).to_json())


@pytest.mark.parametrize(
    ("router", "fault"),
    [
        ({"top_k": 5}, "router.top_k = 5"),
        ({"groups": 2}, "router.groups = 2"),
        ({"groups": 3, "groups_used": 1}, "router.groups = 3"),
        ({"groups": 2, "groups_used": 3}, "router.groups_used = 3"),
        ({"scale": 0.0}, "router.scale = 0.0"),
        ({"threshold": 0.5}, "router.threshold is for its own kind"),
        ({"kind": "threshold"}, "router.threshold is for its own kind"),
        ({"kind": "threshold", "threshold": 1.5}, "router.threshold = 1.5"),
        ({"kind": "topk_softmax", "groups": 2, "groups_used": 1}, "topk_softmax has no groups"),
    ],
)
def test_a_router_that_cannot_be_computed_is_refused(router, fault):
    with pytest.raises(IntegrityError, match=fault):
        Router(**({"kind": "softmax_topk", "experts": 4, "top_k": 2} | router)).check()


def test_layers_without_experts_have_no_expert_shards(tmp_path):
    """A shard may span them; nothing else may be missing, and nobody is asked for them."""
    manifest = tiny(tmp_path, experts=6)[1]
    mixed = varied(manifest, dense_layers=(1,), dense_intermediate=64)
    assert Manifest.parse(mixed.to_json()) == mixed
    assert mixed.layers_of(mixed.expert_shards()[0]) == (0, 2)
    with pytest.raises(KeyError):
        mixed.expert_shard(1, 0)
    model = map_of(mixed)
    assert [len(places) for places in model.layers] == [4, 0, 4]
    only_dense = replace(mixed, shards=(*mixed.shards, replace(mixed.shards[0], id="more", layers=(1, 1))))
    with pytest.raises(IntegrityError, match="spans layers without experts"):
        signed(only_dense).check()


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A model with a stage per layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoe.importer.cut.LAYERS_PER_SHARD_MAX", 1)
        return tiny(tmp_path_factory.mktemp("staged"), experts=4)


def test_stages_hold_every_layer_once_over_the_files_that_are_there(staged):
    store, manifest = staged
    assert [stage.layers for stage in manifest.stages] == [(0, 0), (1, 1), (2, 2)]
    assert manifest.stages == tuple(shard for shard in manifest.shards if shard.kind == "stage")
    paths = [file.path for file in manifest.files()]
    assert len(paths) == len(set(paths))
    for stage in manifest.stages:
        assert {file.path for file in stage.files} < set(paths)
        assert store.has_shard(manifest.model_id, stage.id)
        assert manifest.groups_of(stage) == ()
    experts = sum(shard.flops_per_row for shard in manifest.expert_shards())
    work = sum(stage.flops_per_row for stage in manifest.stages)
    arch = manifest.architecture
    projections = 2 * arch.hidden * (arch.qkv_width + arch.heads * arch.head_dim + arch.router.experts)
    # a row chooses 2 of 4 experts
    assert work == arch.layers * projections + experts // 2
    assert sum(stage.params for stage in manifest.stages) < sum(part.params for part in manifest.parts)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda stages: stages[1:], "begins with layer 1"),
        (lambda stages: stages[:-1], "no stage holds layer 2"),
        (lambda stages: [*stages, replace(stages[0], id="again")], "begins with layer 0"),
        (lambda stages: [replace(stages[0], experts=(0, 1)), *stages[1:]], "every expert"),
        (lambda stages: [replace(stages[0], files=stages[0].files[:-1]), *stages[1:]], "other files"),
        (lambda stages: [replace(stages[0], files=stages[0].files[1:]), *stages[1:]], "no file of the trunk"),
        (lambda stages: [replace(stages[0], files=stages[0].files * 2), *stages[1:]], "a file twice"),
        (
            lambda stages: [replace(stages[0], files=(*stages[0].files, stages[1].files[-1])), *stages[1:]],
            "other files",
        ),
    ],
)
def test_stages_that_do_not_fit_the_model_are_named(staged, damage, fault):
    _, manifest = staged
    changed = replace(manifest, shards=(*manifest.parts, *damage(list(manifest.stages))))
    with pytest.raises(IntegrityError, match=fault):
        Manifest.parse(signed(changed).to_json())


def test_a_manifest_without_stages_is_whole(staged):
    _, manifest = staged
    bare = Manifest.parse(signed(replace(manifest, shards=manifest.parts)).to_json())
    assert bare.stages == ()
    assert bare.files() == manifest.files()
