"""Later each time, forgotten when it worked, and bounded."""

from p2p.core.backoff import Backoff


def test_each_wait_is_longer_until_it_worked():
    backoff = Backoff(10, 35, growth=2, kept_max=8)
    now = 0.0
    for wait_s in (10, 20, 35, 35):
        assert backoff.is_due("a", now)
        backoff.put_off("a", now, 1.0)
        assert not backoff.is_due("a", now + wait_s - 0.1)
        now += wait_s
    backoff.forget("a")
    backoff.put_off("a", now, 0.5)
    assert backoff.is_due("a", now + 5)


def test_the_longest_untouched_are_forgotten():
    backoff = Backoff(10, 35, growth=2, kept_max=3)
    for peer in "abacd":
        backoff.put_off(peer, 0.0, 1.0)
    assert [backoff.is_due(peer, 1.0) for peer in "abcd"] == [False, True, False, False]
