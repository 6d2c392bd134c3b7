"""The next token is what the parameters say, reproducibly; answers stop where they are told to."""

import numpy as np
import pytest

from config.errors import IntegrityError, RequestError
from config.generation import Sampling
from dmoe.core.sampling import StopMatcher, check, choose, uniform


def logits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def drawn(values, count, **parameters):
    sampling = Sampling(**{"seed": 7, **parameters})
    return [choose(values, sampling, position) for position in range(count)]


def test_greedy_takes_the_largest_and_the_lower_id_among_equals():
    assert choose(logits(1, 5, 5, 2), Sampling(temperature=0), 0) == 1


def test_banned_tokens_are_never_chosen_and_the_logits_stay_as_they_were():
    values = logits(1, 5, 4, 2)
    assert choose(values, Sampling(temperature=0), 0, banned=(1,)) == 2
    assert values[1] == 5
    assert 1 not in drawn_banned(values)


def drawn_banned(values):
    return {choose(values, Sampling(seed=1), position, banned=(1,)) for position in range(200)}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [0.25 / 0.34375, 0.0625 / 0.34375, 0.015625 / 0.34375, 0.015625 / 0.34375]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.3}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.9}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
    ],
)
def test_frequencies_match_the_distribution(parameters, expected):
    """Chi-squared with 3 degrees of freedom stays under 30 (probability 1.4e-6 to fail), the seed being fixed."""
    count = 2000
    seen = np.bincount(drawn(np.log(logits(4, 2, 1, 1)), count, **parameters), minlength=4)
    wanted = np.array(expected) * count
    assert (seen[wanted == 0] == 0).all()
    assert float(((seen - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 0].sum()) < 30


def test_a_draw_is_a_function_of_seed_and_position():
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    forwards = drawn(values, 50)
    backwards = [choose(values, Sampling(seed=7), position) for position in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != drawn(values, 50, seed=8)
    assert len(set(forwards)) > 25


def test_the_generator_is_the_published_one():
    """Known values: a change here changes everybody's reproducible answers."""
    assert [uniform(seed, position) for seed, position in ((0, 0), (42, 0), (42, 1), (-1, 3))] == pytest.approx(
        KNOWN_UNIFORMS, abs=0
    )


KNOWN_UNIFORMS = [0.33189188798813374, 0.21650990280290272, 0.8628076464096026, 0.1253768167774043]


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 0.9999999])
def test_nucleus_of_a_large_vocabulary_equals_the_sorted_definition(top_p):
    values = np.random.default_rng(1).normal(size=20_000).astype(np.float32) * 2
    chances = np.exp(values.astype(np.float64) - values.max())
    order = np.argsort(-chances, kind="stable")
    reached = int(chances[order].cumsum().searchsorted(top_p * chances.sum())) + 1
    assert set(drawn(values, 30, top_p=top_p)) <= set(order[:reached].tolist())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_an_error(bad, temperature):
    with pytest.raises(IntegrityError, match="position 3"):
        choose(logits(1, bad, 2), Sampling(temperature=temperature, seed=1), 3)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", 1 << 64),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop", ("x" * 2000,)),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", -1),
    ],
)
def test_impossible_values_are_refused_by_name(parameter, value):
    with pytest.raises(RequestError, match=f"^{parameter} must be") as caught:
        check(Sampling(**{parameter: value}))
    assert caught.value.code == "invalid_request"


def test_more_minimum_than_maximum_is_refused():
    with pytest.raises(RequestError, match="min_tokens must be at most max_tokens"):
        check(Sampling(min_tokens=5, max_tokens=4))


def test_usual_values_pass():
    check(Sampling())
    check(Sampling(temperature=0, top_k=40, top_p=0.9, seed=-5, stop=("\n",), max_tokens=1, min_tokens=1))


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        ((), ["a", "b"], ["a", "b", ""], False),
        (("END",), ["one E", "N", "D two"], ["one ", "", "", ""], True),
        (("END",), ["one E", "Nough"], ["one ", "ENough", ""], False),
        (("END",), ["one EN"], ["one ", "EN"], False),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (("xyz", "y"), ["wxy"], ["wx", ""], True),
        (("\n\n", "User:"), ["hi\n", "U", "se", "r: x"], ["hi", "\n", "", "", ""], True),
        (("END",), ["END", "more"], ["", "", ""], True),
    ],
)
def test_stop_strings_are_found_across_pieces_and_never_shown(stops, pieces, shown, stopped):
    matcher = StopMatcher(stops)
    assert [*(matcher.push(piece) for piece in pieces), matcher.finish()] == shown
    assert matcher.stopped is stopped
