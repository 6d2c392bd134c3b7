"""Filters against their plain definitions over any logits, ties included."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from config.generation import Sampling
from dmoe.core.logprobs import logprobs
from dmoe.core.penalties import Penalties
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


@given(LOGITS, st.integers(0, 50), st.sampled_from([0.3, 0.9, 1.0]), st.floats(0, 1), st.sampled_from([0.3, 1.0, 2.0]))
def test_min_p_is_a_threshold_beside_the_likeliest(logits, top_k, top_p, min_p, temperature):
    top = float(logits.max())
    wide, _ = _candidates(logits, top, Sampling(top_k=top_k, top_p=top_p, temperature=temperature))
    ids, found = _candidates(logits, top, Sampling(top_k=top_k, top_p=top_p, temperature=temperature, min_p=min_p))
    before = range(len(logits)) if wide is None else wide.tolist()
    chances = np.exp((logits.astype(np.float64) - top) / temperature)
    kept = list(range(len(logits))) if ids is None else ids.tolist()
    assert kept == [token for token in before if chances[token] >= min_p]
    assert int(logits.argmax()) in kept  # never empty
    assert np.allclose(found, chances[kept])


@given(
    LOGITS,
    st.data(),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.sampled_from([-2.0, 0.0, 0.75]),
    st.sampled_from([-2.0, 0.0, 0.75]),
)
def test_penalties_are_those_of_the_definition(logits, data, repetition, frequency, presence):
    tokens = st.lists(st.integers(0, len(logits) - 1), max_size=30)
    prompt, answer = data.draw(tokens), data.draw(tokens)
    bias = data.draw(st.dictionaries(st.integers(0, len(logits) - 1), st.integers(-100, 100)))
    penalties = Penalties(
        Sampling(
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            logit_bias=tuple(bias.items()),
        ),
        prompt,
    )
    for token in answer:
        penalties.push(token)
    wanted = []
    for token, value in enumerate(logits.tolist()):
        if token in {*prompt, *answer}:
            value = value / repetition if value > 0 else value * repetition
        value -= answer.count(token) * frequency + (token in answer) * presence
        wanted.append(value + bias.get(token, 0))
    before = logits.copy()
    assert np.allclose(penalties.apply(logits), wanted, atol=1e-4)
    assert (logits == before).all()


@given(LOGITS, st.integers(0, 20), st.data())
def test_log_probabilities_are_of_one_distribution(logits, top, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    own, likeliest = logprobs(logits, token, top)
    order = sorted(range(len(logits)), key=lambda each: (-logits[each], each))
    assert [each for each, _ in likeliest] == order[:top]
    assert dict(likeliest).get(token, own) == own
    _, everything = logprobs(logits, token, len(logits))
    assert abs(sum(np.exp(value) for _, value in everything) - 1) < 1e-9
