"""The arithmetic of quorums, tried out in full for small committees."""

from itertools import combinations

import pytest

from ledger.core import quorums


@pytest.mark.parametrize("f", [0, 1, 2, 5, 16])
def test_two_quorums_share_an_honest_witness_and_the_honest_alone_make_one(f):
    n, quorum = 3 * f + 1, quorums.quorum_of(f)
    assert quorums.is_exact(n, f)
    assert 2 * quorum - n > f
    assert n - f >= quorum
    assert not any(quorums.is_exact(other, f) for other in (n - 1, n + 1, 0))
    assert not quorums.is_exact(3 * 17 + 1, 17)
    assert not quorums.is_exact(-2, -1)


def every_case(f: int):
    """Who lies, who made a certificate (or a set of freezes), whose handovers have come: every choice."""
    everybody = range(3 * f + 1)
    for liars in combinations(everybody, f):
        for certificate in combinations(everybody, 2 * f + 1):
            for received in range(2 * f + 1, 3 * f + 2):
                for handovers in combinations(everybody, received):
                    yield set(liars), set(certificate), set(handovers)


@pytest.mark.parametrize("f", [1, 2])
def test_what_a_quorum_decided_survives_whatever_liars_omit_and_one_more_would_lose_it(f):
    lost = 0
    for liars, certificate, handovers in every_case(f):
        reports = len((handovers & certificate) - liars)
        assert quorums.survives(reports, len(handovers), f)
        lost += reports < len(handovers) - 2 * f + 1
    assert lost > 0, "the threshold cannot be higher"


@pytest.mark.parametrize("f", [1, 2, 5])
def test_what_liars_made_up_is_dropped_once_everybody_honest_has_handed_over(f):
    for inventors in range(f + 1):
        assert not quorums.survives(inventors, 2 * f + 1 + inventors, f)


@pytest.mark.parametrize("f", [0, 1, 2, 5])
def test_a_report_that_does_not_survive_never_comes_back(f):
    for received in range(2 * f + 1, 3 * f + 1):
        for reports in range(received + 1):
            if not quorums.survives(reports, received, f):
                assert not quorums.survives(reports + 1, received + 1, f)
