"""A deployment's state follows from the one before and its replicas."""

import pytest

from config.swarm import ShardHealth, next_state


def shards(*healthy: int, wanted: int = 2, problem: str = "") -> list[ShardHealth]:
    return [
        ShardHealth(id=f"s{n}", kind="expert", wanted=wanted, there=count, healthy=count, problem=problem)
        for n, count in enumerate(healthy)
    ]


@pytest.mark.parametrize(
    ("before", "healthy", "after"),
    [
        (None, (0, 0), "pending"),
        ("pending", (1, 0), "placing"),
        ("placing", (1, 1), "placing"),
        ("placing", (2, 2), "ready"),
        ("ready", (2, 1), "degraded"),
        ("ready", (2, 0), "failed"),
        ("degraded", (0, 0), "failed"),
        ("failed", (1, 1), "degraded"),
        ("degraded", (2, 3), "ready"),
    ],
)
def test_growing_and_dying_are_told_apart(before, healthy, after) -> None:
    state, reason = next_state(before, shards(*healthy), known=True, error="")
    assert state == after
    assert bool(reason) == (after != "ready")


def test_reasons_name_what_is_missing() -> None:
    assert next_state("ready", shards(2, 0, problem="the disk is full"), known=True, error="")[1] == (
        "nobody serves 1 of 2 shards (the first is s1): the disk is full"
    )
    assert next_state(None, [], known=False, error="") == ("pending", "its manifest is on the way")
    assert next_state(None, [], known=False, error="not allowed") == ("failed", "not allowed")


def test_a_trunk_alone_serves_nothing() -> None:
    trunk = ShardHealth(id="trunk", kind="trunk", wanted=1, there=1, healthy=1, problem="")
    assert next_state(None, [trunk, *shards(0)], known=True, error="")[0] == "pending"
