"""How many connections are served, and which idle one makes room."""

import random

from gateway.places import Places

FLOODER, HONEST = "203.0.113.7", "203.0.113.8"


class Guest:
    ousted = False

    def oust(self) -> None:
        self.ousted = True


def made(count_max: int = 10, share_max: int = 8, kept_count: int = 0) -> Places:
    return Places(count_max, share_max=share_max, kept_count=kept_count)


def entered(places: Places, address: str, count: int) -> list[Guest]:
    guests = [Guest() for _ in range(count)]
    assert not any(places.enter(guest, address) for guest in guests)
    return guests


def test_the_address_with_the_most_gives_up_the_one_that_waited_longest():
    places = made()
    honest = entered(places, HONEST, 3)
    flood = entered(places, FLOODER, 7)
    places.work(flood[0])
    places.rest(flood[0])
    entered(places, "203.0.113.9", 1)
    assert [guest.ousted for guest in flood] == [False, True, *[False] * 5]
    assert not any(guest.ousted for guest in honest)


def test_what_is_under_way_stays():
    places = made()
    flood = entered(places, FLOODER, 8)
    for guest in flood:
        places.work(guest)
    honest = entered(places, HONEST, 2)
    newcomer = Guest()
    assert not places.enter(newcomer, HONEST)
    assert [guest.ousted for guest in honest] == [True, False]
    for guest in (newcomer, honest[1]):
        places.work(guest)
    assert places.enter(Guest(), "203.0.113.9") == "full"
    assert not any(guest.ousted for guest in flood)
    places.leave(flood[0])
    assert not places.enter(Guest(), "203.0.113.9")


def test_an_address_that_has_its_share_makes_room_itself():
    places = made(count_max=100)
    flood = entered(places, FLOODER, 8)
    assert not places.enter(Guest(), FLOODER)
    assert flood[0].ousted
    more = entered(places, FLOODER, 7)
    assert all(guest.ousted for guest in flood)
    assert not any(guest.ousted for guest in more)


def test_an_address_whose_share_is_busy_is_refused():
    places = made(count_max=100)
    for guest in entered(places, FLOODER, 8):
        places.work(guest)
    assert places.enter(Guest(), FLOODER) == "share"
    assert not places.enter(Guest(), HONEST)


def test_this_machine_has_places_of_its_own_and_makes_room_last():
    places = made(kept_count=2)
    flood = entered(places, FLOODER, 8)
    for guest in flood[1:]:
        places.work(guest)
    ours = [Guest(), Guest()]
    assert not any(places.enter(guest, "", own=True) for guest in ours)
    entered(places, HONEST, 1)
    assert flood[0].ousted
    assert not any(guest.ousted for guest in ours)


def test_proxies_have_no_share_and_always_find_a_place():
    places = made()
    guests = entered(places, "", 25)
    assert [guest.ousted for guest in guests] == [True] * 15 + [False] * 10


def test_ranks_are_right_and_nothing_is_remembered_of_who_is_gone():
    chance, places = random.Random(7), made(count_max=40, share_max=15)
    guests: list[Guest] = []
    for _ in range(5000):
        what = chance.randrange(4)
        if what == 0 or not guests:
            guests.append(Guest())
            places.enter(guests[-1], f"203.0.113.{chance.randrange(6)}" if chance.randrange(5) else "")
        else:
            guest = chance.choice(guests)
            (places.work, places.rest, places.leave)[what - 1](guest)
        held = {guest for table in places._idle.values() for guest in table}
        assert held <= set(places._address_of)
        ranks = {address: len(table) for address, table in places._idle.items() if address}
        assert {address: rank for rank, table in places._ranks.items() for address in table} == ranks
        assert places._rank_max == max(ranks.values(), default=0)
        assert sum(places._counts.values()) == len(places._address_of) <= 40
    for guest in guests:
        places.leave(guest)
    assert not any((places._address_of, places._counts, places._idle, places._ranks, places._rank_max))
