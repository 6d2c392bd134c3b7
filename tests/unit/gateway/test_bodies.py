"""How much of the bodies that are still coming one sender may have."""

from itertools import count

from config.errors import BusyError
from gateway.exchange import Bodies


def filled(bodies: Bodies, sender: str) -> int:
    """As much as it gets, piece by piece."""
    for held in count():
        try:
            bodies.take(1, sender)
        except BusyError:
            return held
    raise AssertionError


def test_nobody_has_more_than_is_left_for_others():
    bodies = Bodies(1024)
    assert [filled(bodies, name) for name in "abcd"] == [512, 256, 128, 64]
    bodies.give_back(512, "a")
    assert filled(bodies, "e") == 288
    for size, name in ((256, "b"), (128, "c"), (64, "d"), (288, "e")):
        bodies.give_back(size, name)
    assert filled(bodies, "f") == 512, "all is given back"
