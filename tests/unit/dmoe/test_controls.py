"""Penalties, biases, min-p and log probabilities give the numbers of their definitions, worked out by hand here."""

import math

import numpy as np
import pytest

from config.errors import RequestError
from config.generation import Sampling
from dmoe.core.logprobs import LOGPROB_MIN, logprobs
from dmoe.core.penalties import Penalties, penalties_of
from dmoe.core.sampling import check, choice_seed, choose


def logits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def moved(values, answer=(), prompt=(), **parameters):
    penalties = Penalties(Sampling(**parameters), prompt)
    for token in answer:
        penalties.push(token)
    return penalties.apply(values).tolist()


def test_frequency_counts_and_presence_does_not():
    values = logits(1, 2, 3, 4)
    assert moved(values, answer=(1, 1, 3), frequency_penalty=0.5) == [1, 1, 3, 3.5]
    assert moved(values, answer=(1, 1, 3), presence_penalty=0.5) == [1, 1.5, 3, 3.5]
    assert moved(values, answer=(1, 1, 3), frequency_penalty=-0.5, presence_penalty=2) == [1, 1, 3, 2.5]
    assert values.tolist() == [1, 2, 3, 4]


def test_the_prompt_counts_for_repetition_only():
    values = logits(1, -1, 3, -4)
    assert moved(values, prompt=(0, 1, 1), answer=(3,), repetition_penalty=2) == [0.5, -2, 3, -8]
    assert moved(values, prompt=(0, 1), answer=(3,), repetition_penalty=0.5) == [2, -0.5, 3, -2]
    assert moved(values, prompt=(0, 1, 2, 3), frequency_penalty=2, presence_penalty=2) == [1, -1, 3, -4]


def test_bias_comes_last():
    both = moved(logits(4, 2), answer=(0,), repetition_penalty=2, presence_penalty=0.5, logit_bias=((0, 10),))
    assert both == [4 / 2 - 0.5 + 10, 2]
    assert moved(logits(4, 2), logit_bias=((0, -100), (1, 1.5))) == [-96, 3.5]


def test_without_controls_there_are_no_penalties():
    assert penalties_of(Sampling(temperature=0.5, top_k=3, min_p=0.1, logprobs=5, seed=1), (1, 2)) is None
    for asked in ({"repetition_penalty": 1.1}, {"frequency_penalty": -1}, {"logit_bias": ((0, 0),)}):
        assert penalties_of(Sampling(**asked), (1, 2)) is not None


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"min_p": 0.2}, [0.5, 0.25, 0.125, 0.125]),
        ({"min_p": 0.26}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 1}, [1, 0, 0, 0]),
        ({"min_p": 0.2, "temperature": 0.5}, [16 / 20, 4 / 20, 0, 0]),
        ({"min_p": 0.2, "top_k": 3}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"min_p": 0.3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(parameters, expected):
    """Chi-squared with 3 degrees of freedom stays under 30 (probability 1.4e-6 to fail), the seed being fixed."""
    values, sampling = np.log(logits(4, 2, 1, 1)), Sampling(seed=7, **parameters)
    seen = np.bincount([choose(values, sampling, position) for position in range(2000)], minlength=4)
    wanted = np.array(expected) * 2000
    assert (seen[wanted == 0] == 0).all()
    assert float(((seen - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 0].sum()) < 30


def test_log_probabilities_are_those_of_the_softmax():
    own, top = logprobs(np.log(logits(1, 4, 2, 1)), 0, 3)
    assert own == pytest.approx(math.log(1 / 8))
    assert [token for token, _ in top] == [1, 2, 0]  # 0 and 3 are equal: the lower id
    assert [value for _, value in top] == pytest.approx([math.log(x) for x in (4 / 8, 2 / 8, 1 / 8)])


def test_log_probabilities_of_extreme_logits():
    assert logprobs(logits(10_000, -10_000), 0, 0) == (0.0, [])
    own, top = logprobs(logits(0, -np.inf), 1, 20)
    assert own == LOGPROB_MIN
    assert top == [(0, 0.0), (1, LOGPROB_MIN)]


def test_choices_have_seeds_of_their_own_and_the_first_the_requests():
    """Known values: a change here changes everybody's reproducible answers."""
    seeds = [choice_seed(42, choice) for choice in range(8)]
    assert seeds[0] == 42
    assert seeds[1:3] == KNOWN_SEEDS
    assert len({*seeds, *(choice_seed(43, choice) for choice in range(8))}) == 16
    for seed in seeds:
        check(Sampling(seed=seed))
    check(Sampling(seed=choice_seed(-1, 7)))


KNOWN_SEEDS = [5729635766052892485, 2080831864539253349]


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
        ("logit_bias", ((-1, 0),)),
        ("logit_bias", ((1, 101),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((1, 2), (1, 3))),
        ("logit_bias", tuple((token, 1) for token in range(1025))),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
    ],
)
def test_impossible_values_are_refused_by_name(parameter, value):
    with pytest.raises(RequestError, match=f"^{parameter} must be") as caught:
        check(Sampling(**{parameter: value}))
    assert caught.value.code == "invalid_request"
