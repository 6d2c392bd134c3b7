"""Who was seen to offer a shard, and when last."""

from dmoe.sightings import KNOWN_MAX, LEFT_MAX, Sightings, answered_ago


def told(seen: Sightings, shards: tuple[int, ...], now: float) -> str:
    return seen.gone("m", shards, now, lambda peer: "never answered")


def test_nobody_is_seen_after_it_left():
    seen = Sightings()
    seen.present(["a", "b"], 0.0)
    seen.saw("m", 1, ["a"], 10.0)
    seen.present(["b"], 20.0)
    seen.saw("m", 1, ["a"], 90.0)  # what was offered until the last look, found out late
    assert told(seen, (1,), 100.0) == "last seen 80 s ago; replicas: a (last seen 80 s ago, never answered)"
    seen.present(["a", "b"], 95.0)
    seen.saw("m", 1, ["a"], 99.5)
    assert told(seen, (1,), 100.0) == "last seen 0 s ago; replicas: a (seen now, never answered)"


def test_several_shards_are_told_in_one_with_the_latest_first():
    seen = Sightings()
    seen.saw("m", 1, ["a", "b"], 10.0)
    seen.saw("m", 2, ["b"], 30.0)
    seen.saw("other", 2, ["c"], 40.0)
    assert told(seen, (1, 2), 50.0) == (
        "last seen 20 s ago; replicas: b (last seen 20 s ago, never answered), a (last seen 40 s ago, never answered)"
    )
    assert told(seen, (3,), 50.0) == "it was never seen"


def test_the_memory_is_bounded():
    seen = Sightings()
    for number in range(3 * KNOWN_MAX):
        seen.saw("m", 1, [f"p{number}"], float(number))
    assert told(seen, (1,), 100.0).count("never answered") == KNOWN_MAX
    assert "p23 " in told(seen, (1,), 100.0)
    assert "p0 " not in told(seen, (1,), 100.0)
    for number in range(LEFT_MAX + 10):
        seen.present([f"p{number}"], float(number))
    assert len(seen._left) == LEFT_MAX


def test_when_a_peer_last_answered():
    assert answered_ago(None, 5) == "never answered"
    assert answered_ago(2_000_000, 14_000_000) == "last answered 12 s ago"
