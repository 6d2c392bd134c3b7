"""Scaled ropes turn as those of transformers: ``tests/vectors/rope.json`` holds its frequencies (heads of 64)."""

import json
from pathlib import Path

import numpy as np
import pytest

from dmoe.core.manifest import Architecture, Router
from dmoe.core.rope import frequencies, magnitude, rope_tables
from dmoe.core.variant import RopeScaling, Variant

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "rope.json"
SCALINGS = {
    "linear": (1e4, RopeScaling(kind="linear", factor=4.0)),
    "llama3": (5e5, RopeScaling(kind="llama3", factor=8.0, original_context=8192, slow=1.0, fast=4.0)),
    "yarn": (1e6, RopeScaling(kind="yarn", factor=4.0, original_context=4096, attention_factor=magnitude(4.0))),
    "yarn-oss": (
        150000.0,
        RopeScaling(kind="yarn", factor=32.0, original_context=4096, attention_factor=magnitude(32.0), rounded=False),
    ),
    "yarn-v3": (1e4, RopeScaling(kind="yarn", factor=40.0, original_context=4096)),
}


def architecture(theta, **traits):
    return Architecture(
        family="llama",
        hidden=256,
        layers=1,
        heads=4,
        kv_heads=4,
        head_dim=64,
        vocab=8,
        intermediate=64,
        rope_theta=theta,
        rope_interleaved=False,
        norm_eps=1e-5,
        tie_embeddings=False,
        context=131072,
        router=Router(kind="all", experts=1, top_k=1),
        variant=Variant(**traits),
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_magnitude_are_those_of_transformers(name):
    wanted = json.loads(VECTORS.read_text())[name]
    theta, scaling = SCALINGS[name]
    arch = architecture(theta, rope=scaling)
    arch.check()
    assert np.allclose(frequencies(arch), wanted["inv"], rtol=2e-6, atol=0)
    cos, sin = rope_tables(arch, 9)
    assert cos.shape == sin.shape == (9, 32)
    assert np.allclose(cos[0], wanted["factor"])
    assert np.allclose(sin[8], np.sin(8 * np.array(wanted["inv"])) * wanted["factor"], atol=2e-5)


def test_a_plain_rope_turns_by_powers_of_theta():
    assert np.allclose(frequencies(architecture(1e4))[:2], [1, 1e4 ** (-2 / 64)])
