"""Prices and charges."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.money import FREE, Prices, Reservation, Settlement

tokens = st.integers(0, 10**6)
prices = st.builds(Prices, st.integers(0, 2**40), st.integers(0, 2**40))


def reserve(price: Prices, prompt: int, most: int) -> Reservation:
    return Reservation(
        id="r",
        instance="i",
        account_id="user:u",
        user_id="u",
        key_id=None,
        request_id="x",
        endpoint="chat.completions",
        model="m",
        prompt_tokens=prompt,
        max_tokens=most,
        prices=price,
    )


def settle(reservation: Reservation, completion: int) -> int:
    settlement = Settlement(
        reservation=reservation,
        prompt_tokens=reservation.prompt_tokens,
        completion_tokens=completion,
        outcome="stop",
    )
    return settlement.microcredits


def test_rounds_down_once_over_the_whole_request() -> None:
    assert Prices(500_000, 500_000).charge(1, 1) == 1
    assert Prices(999_999, 0).charge(1, 100) == 0
    assert Prices(200_000, 800_000).charge(1000, 500) == 600


@given(prices, tokens, tokens, tokens)
def test_a_reservation_covers_what_is_settled(price: Prices, prompt: int, most: int, used: int) -> None:
    reservation = reserve(price, prompt, most)
    assert 0 <= settle(reservation, min(used, most)) <= reservation.microcredits
    # Even if an engine counts more than it may.
    assert settle(reservation, used) <= reservation.microcredits


@given(prices, tokens)
def test_nothing_produced_costs_nothing(price: Prices, prompt: int) -> None:
    assert settle(reserve(price, prompt, 100), 0) == 0


@given(tokens, tokens)
def test_free(prompt: int, completion: int) -> None:
    assert FREE.charge(prompt, completion) == 0
