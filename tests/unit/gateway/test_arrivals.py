"""How many requests that are still coming an address may have, and which makes room for another."""

import pytest

from gateway.arrivals import ARRIVING_MAX, GRACE_SECONDS, STEADY_BYTES_PER_SECOND, Arrivals

HOME = "203.0.113.7"


class Guest:
    ousted = False

    def oust(self) -> None:
        self.ousted = True


def full(arrivals: Arrivals, now: float = 0.0) -> list[Guest]:
    guests = [Guest() for _ in range(ARRIVING_MAX)]
    assert all(arrivals.enter(HOME, guest, now) for guest in guests)
    return guests


def test_an_address_has_so_many_and_others_have_theirs():
    arrivals = Arrivals()
    guests = full(arrivals)
    assert not arrivals.enter(HOME, Guest(), 0.0)
    assert arrivals.enter("203.0.113.8", Guest(), 0.0)
    arrivals.leave(HOME, guests[0])
    arrivals.leave(HOME, guests[0])
    assert arrivals.enter(HOME, Guest(), 0.0)


def test_the_idlest_makes_room_after_its_grace():
    arrivals = Arrivals()
    guests = full(arrivals)
    arrivals.brought(HOME, guests[0], STEADY_BYTES_PER_SECOND, 1.0)
    for n in range(20):
        arrivals.brought(HOME, guests[1], 1, 0.05 * n)  # drips
    later = GRACE_SECONDS + 0.5
    others = [Guest() for _ in range(ARRIVING_MAX)]
    assert sum(arrivals.enter(HOME, guest, later) for guest in others) == ARRIVING_MAX - 1
    assert not guests[0].ousted, "it brings what it has at a good pace"
    assert all(guest.ousted for guest in guests[1:])


@pytest.mark.parametrize(("size", "every"), [(1000, 1.0), (100, 0.1), (1460, 1.46), (3000, 2.9)])
def test_a_steady_upload_of_a_kilobyte_a_second_is_never_cut(size, every):
    arrivals, phone, now = Arrivals(), Guest(), 0.0
    assert arrivals.enter(HOME, phone, now)
    arrivals.brought(HOME, phone, size, now)
    drips = [Guest() for _ in range(ARRIVING_MAX - 1)]
    assert all(arrivals.enter(HOME, drip, now + 0.001 * n) for n, drip in enumerate(drips))
    for _ in range(100):
        before, now = now, now + every
        for n in range(int(every / 0.05)):
            arrivals.enter(HOME, Guest(), before + 0.05 * (n + 1))
        arrivals.brought(HOME, phone, size, now)
    assert not phone.ousted


def test_who_was_served_before_is_not_refused():
    arrivals = Arrivals()
    full(arrivals)
    assert arrivals.enter(HOME, Guest(), 0.0, known=True)


def test_nothing_is_remembered_of_who_is_gone():
    arrivals = Arrivals()
    for guest in full(arrivals):
        arrivals.leave(HOME, guest)
    assert not arrivals._by_address
