"""Filters against their plain definitions over any logits, ties included."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from config.generation import Sampling
from dmoe.core.sampling import _candidates, choose

LOGITS = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=40).map(lambda x: np.array(x, dtype=np.float32))


@given(LOGITS, st.integers(0, 50), st.sampled_from([0.05, 0.3, 0.9, 0.999, 1.0]), st.sampled_from([0.3, 1.0, 2.0]))
def test_candidates_are_those_of_the_definition(logits, top_k, top_p, temperature):
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[:top_k] if top_k else order
    weights = np.exp((logits[kept].astype(np.float64) - logits.max()) / temperature)
    if top_p < 1:
        reached = int(weights.cumsum().searchsorted(top_p * weights[np.argsort(kept)].sum()))
        kept = kept[: reached + 1]
    ids, found = _candidates(logits, float(logits.max()), Sampling(top_k=top_k, top_p=top_p, temperature=temperature))
    chosen = list(range(len(logits))) if ids is None else ids.tolist()
    assert chosen == sorted(kept)
    assert np.allclose(found, np.exp((logits[chosen].astype(np.float64) - logits.max()) / temperature))


@given(LOGITS, st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 1 << 40), st.data())
def test_any_seed_and_position_draw_an_allowed_token(logits, seed, position, data):
    banned = data.draw(st.sets(st.integers(0, len(logits) - 1), max_size=len(logits) - 1))
    token = choose(logits, Sampling(seed=seed), position, banned)
    assert 0 <= token < len(logits)
    assert token not in banned
