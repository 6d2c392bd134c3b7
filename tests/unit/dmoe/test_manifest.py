"""Manifests: one encoding, one id, one signature; whatever is altered is found and named."""

import json

import pytest
from msgspec.structs import replace

from config.errors import IntegrityError
from dmoe.core.manifest import MANIFEST_BYTES_MAX, Manifest
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
        (lambda m: replace(m, shards=m.shards[:-1]), "exactly one trunk"),
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
