"""The small scopes in full, and that the explorer notices what it is for; ``make model`` explores everything."""

from contextlib import ExitStack

import pytest

from tests.model.explorer import SCOPES, explore
from tests.model.off import RULES

SCOPE_OF = {scope.name: scope for scope in SCOPES}


@pytest.mark.parametrize("name", ["slot", "channel", "slot-live"])
def test_no_interleaving_breaks_an_invariant(name):
    result = explore(SCOPE_OF[name])
    assert result.complete
    assert result.violation == ""
    assert result.states > 200


@pytest.mark.parametrize(
    ("off", "invariant", "last"),
    [
        ("distinct", "I1", None),
        ("quorum", "I1", "w1 votes for e2"),
        ("votes-durable", "I1", "w0 votes for e2"),
        ("freezes-durable", "I4", "votes for reclaim of 0"),
        ("locks", "I1", "v0 votes for e2"),
        ("counting-lifts", "I6", "handover of the liar"),
    ],
)
def test_a_rule_switched_off_has_a_readable_counterexample(off, invariant, last):
    result = explore(SCOPE_OF[RULES[off].scope], off=off)
    assert result.violation.startswith(invariant)
    assert last is None or last in result.trace[-1]


@pytest.mark.parametrize("off", RULES)
def test_every_rule_can_still_be_switched_off(off):
    with ExitStack() as stack:
        RULES[off].switch_off(stack)


def test_the_limits_hold():
    result = explore(SCOPE_OF["channel-change"], states_max=500)
    assert not result.complete
    assert result.violation == ""
    assert result.states < 1000
