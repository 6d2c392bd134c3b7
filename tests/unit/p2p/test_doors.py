"""The doors of a node: visits, bans, evictions and what the operator sees of them. Sockets are not needed here."""

import json
import logging

import pytest
import trio

from config.errors import RequestError
from p2p import doors as doors_module
from p2p.core.doors import SHAKES_BURST, SHAKES_PER_SECOND, Limits
from p2p.core.identity import Identity
from p2p.core.standing import ADDRESS_SHARE, BAN_AT, FAULTS
from p2p.doors import Doors, Visit
from p2p.refusals import FLOOD_BURST
from p2p.rpc import UNKNOWN_TIMES

HOME = "203.0.113.7"
TENURE_MS = 3600_000


def peer(n: int) -> str:
    return Identity.from_seed(n.to_bytes(32, "big")).peer_id


@pytest.fixture
async def doors():
    return Doors(Limits(), peers_max=8)


def come(doors: Doors, n: int, host: str = HOME) -> Visit | None:
    """A peer connects and proves who it is; None if it was sent away."""
    visit = doors.enter(host)
    if visit is None:
        return None
    ended: list[Visit] = []
    visit.on_hang_up(lambda: ended.append(visit))
    if not visit.known(peer(n)):
        visit.leave()
        return None
    return visit


def ban(doors: Doors, n: int) -> None:
    while not doors.banned(peer(n)):
        doors.blame(peer(n), "protocol")


async def test_a_banned_peer_is_hung_up_on_and_stays_out(doors):
    heard: list[str] = []
    doors.on_ban(heard.append)
    visit, again = come(doors, 1), come(doors, 1)
    ban(doors, 1)
    assert visit.hung_up
    assert again.hung_up
    assert heard == [peer(1)]
    assert doors.limiter.open == 0
    assert come(doors, 1) is None
    assert doors.dialled(peer(1), HOME) is None
    assert come(doors, 2) is not None, "its neighbour may come"
    assert doors.statistics()["refused"] == {"ban": 2}


async def test_bans_and_acquaintance_survive_a_restart(tmp_path):
    file = tmp_path / "bans.json"
    first = Doors(Limits(), peers_max=8, file=file)
    ban(first, 1)
    first.ban("203.0.113.0/24", 5)
    first.standing.linked(peer(2), TENURE_MS, 0)
    await first.save()
    second = Doors(Limits(), peers_max=8, file=file)
    assert second.banned(peer(1))
    assert {row.subject for row in second.bans()} == {peer(1), "203.0.113.0/24"}
    assert second.enter(HOME) is None
    assert second.peer(peer(2))["linked_s"] == TENURE_MS // 1000
    assert second.unban("203.0.113.99/24")
    assert second.enter(HOME) is not None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"bans": {"a": 1}, "tenures": {}}', '{"bans": 3, "tenures": 4}'])
async def test_a_damaged_file_of_bans_is_said_and_ignored(tmp_path, caplog, damage):
    file = tmp_path / "bans.json"
    file.write_text(damage)
    assert not Doors(Limits(), peers_max=8, file=file).bans()
    assert "cannot be read" in caplog.text


async def test_many_bad_identities_bring_their_address_into_disgrace_but_do_not_shut_its_neighbours_out(
    doors, autojump_clock
):
    neighbour = come(doors, 99)
    bad = 0
    while not any(row.subject == HOME for row in doors.bans()):
        assert come(doors, bad) is not None
        ban(doors, bad)
        bad += 1
    assert 1 / ADDRESS_SHARE <= bad <= 1 / ADDRESS_SHARE + 1
    assert not neighbour.hung_up, "who is in stays in"
    visits = [doors.enter(HOME) for _ in range(20)]
    assert sum(visit is not None for visit in visits) <= 4, "a trickle of handshakes is spent on that address"
    for visit in visits:
        if visit is not None:
            visit.leave()
    assert come(doors, 51, "198.51.100.1") is not None
    await trio.sleep(10)
    assert come(doors, 98) is not None, "another neighbour comes in through the trickle"


async def test_an_operator_shuts_an_address_out_and_hangs_up_on_who_is_there(doors):
    visit, undecided = come(doors, 1), doors.enter(HOME)
    other = come(doors, 2, "198.51.100.1")
    row = doors.ban(HOME, 10)
    assert row.by_operator
    assert 595 < row.left_s <= 600
    assert visit.hung_up
    assert undecided.hung_up
    assert not other.hung_up
    assert doors.enter(HOME) is None
    assert doors.unban(HOME)
    assert doors.enter(HOME) is not None
    with pytest.raises(RequestError, match="neither a peer nor an address"):
        doors.ban("somebody", 1)
    for near in ("127.0.0.1", "::1", "127.0.0.0/24"):
        with pytest.raises(RequestError, match="this very machine"):
            doors.ban(near, 1)


async def test_fresh_identities_of_one_subnet_do_not_use_up_the_places(doors):
    friends = [come(doors, n, f"198.51.{n}.1") for n in range(3)]
    crowd = [come(doors, 100 + n, f"203.0.113.{n}") for n in range(30)]
    assert not any(visit.hung_up for visit in friends)
    assert 1 <= sum(visit is not None and not visit.hung_up for visit in crowd) <= 3
    late = come(doors, 200, "192.0.2.1")
    assert late is not None, "somebody from elsewhere still finds a place"
    assert not any(visit.hung_up for visit in friends)
    assert doors.dialled(peer(300), "192.0.2.9") is not None, "and the node can still dial"
    assert doors.statistics()["refused"]["peers"] > 20


async def test_pinned_peers_and_dialled_ones_are_never_evicted(doors):
    doors.pin(peer(1))
    pinned = come(doors, 1)
    dialled = doors.dialled(peer(2), HOME)
    for n in range(3, 30):
        come(doors, n, f"198.51.{n}.1")
    assert not pinned.hung_up
    assert not dialled.hung_up


async def test_a_peer_that_goes_on_above_its_limits_floods_and_is_banned():
    doors = Doors(Limits(calls_max=1), peers_max=8)
    come(doors, 1)
    meter = doors.meter(peer(1))
    assert meter.start_call() == ""
    refusals = 0
    while not doors.banned(peer(1)):
        assert "calls_per_peer" in meter.start_call()
        refusals += 1
        assert refusals < 50 * FLOOD_BURST
    assert refusals > 3 * FLOOD_BURST, "a burst is no flood"
    assert doors.statistics()["faults"]["flood"] >= BAN_AT // FAULTS["flood"].weight
    meter.end_call()


async def test_the_log_names_a_limit_once_in_a_while(doors, caplog):
    caplog.set_level(logging.WARNING)
    for n in range(200):
        come(doors, n)
    assert caplog.text.count("limit connections_per_minute_per_address") <= 1
    assert caplog.text.count("limit peers") == 1
    assert len(caplog.records) <= 3


async def test_a_silent_handshake_makes_room(monkeypatch):
    monkeypatch.setattr("p2p.core.doors.GRACE_S", 0.0)
    doors = Doors(Limits(undecided_per_address_max=2), peers_max=8)
    closed: list[int] = []
    visits = []
    for n in range(3):
        visits.append(doors.enter(HOME))
        visits[n].on_hang_up(lambda n=n: closed.append(n))
    assert closed == [0]
    assert not visits[0].known(peer(1)), "who was hung up on does not come in late"
    assert visits[2].known(peer(2))
    for visit in visits:
        visit.leave()
        visit.leave()
    assert (doors.limiter.open, doors.limiter.undecided) == (0, 0)


async def test_time_together_is_counted(doors, autojump_clock):
    visit = come(doors, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(doors.run)
        await trio.sleep(3 * doors_module.TENURE_SECONDS)
        nursery.cancel_scope.cancel()
    await trio.sleep(30)
    visit.leave()
    assert doors.peer(peer(1))["linked_s"] == pytest.approx(210, abs=6)


async def test_what_the_operator_sees_is_json(doors):
    come(doors, 1)
    doors.blame(peer(1), "slow")
    ban(doors, 2)
    shown = [doors.peer(peer(1)), doors.peer(peer(2)), doors.statistics()]
    json.dumps(shown)
    assert shown[0]["score"] == 100 - FAULTS["slow"].weight
    assert shown[0]["fault"] == "slow"
    assert shown[1]["ban"]["reason"] == "protocol"


async def test_who_is_refused_for_itself_is_told_to_the_sieve_and_what_all_share_is_nobodys_fault(monkeypatch):
    doors = Doors(Limits(undecided_per_address_max=3, connections_per_second=5), peers_max=8)
    told: list[str] = []
    monkeypatch.setattr(doors.sieve, "refuse", told.append)
    for _ in range(5):
        doors.enter(HOME)
    assert told == [HOME, HOME]
    for n in range(20):
        doors.enter(f"198.51.{n}.1")
    assert doors.statistics()["refused"]["connections_per_second"] > 5
    assert told == [HOME, HOME]
    doors.ban("198.51.100.9", 10)
    assert doors.enter("198.51.100.9") is None
    assert told == [HOME, HOME, "198.51.100.9"]


async def test_a_handshake_above_the_pace_waits(autojump_clock):
    doors = Doors(Limits(), peers_max=8)
    visit = doors.enter(HOME)
    assert visit is not None
    began = trio.current_time()
    await visit.turn(SHAKES_BURST)
    assert trio.current_time() == began
    await visit.turn(SHAKES_PER_SECOND)
    assert trio.current_time() - began == pytest.approx(1.0)


async def test_who_is_cancelled_before_its_turn_gives_it_back_and_a_line_too_long_is_hung_up(autojump_clock):
    doors = Doors(Limits(), peers_max=8)
    first, second, third = (doors.enter(HOME) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert await first.turn(SHAKES_BURST)
    with trio.move_on_after(0.5):
        await second.turn(2 * SHAKES_PER_SECOND)
    began = trio.current_time()
    assert await third.turn(1)
    assert trio.current_time() == pytest.approx(began)
    assert not await third.turn(SHAKES_BURST + 4 * SHAKES_PER_SECOND)
    assert third.hung_up
    assert doors.statistics()["refused"]["handshakes_per_address"] == 1


@pytest.mark.parametrize("known_by", ["pin", "dial"])
async def test_where_a_pinned_peer_was_seen_nobody_is_shunned_or_waits(monkeypatch, autojump_clock, known_by):
    doors = Doors(Limits(undecided_per_address_max=1), peers_max=8)
    told: list[str] = []
    monkeypatch.setattr(doors.sieve, "refuse", told.append)
    doors.pin(peer(1))
    if known_by == "dial":
        seen = doors.dialled(peer(1), HOME)
    else:
        seen = doors.enter(HOME)
        assert seen is not None
        assert seen.known(peer(1))
    assert seen is not None
    seen.leave()
    visit = doors.enter(HOME)
    assert visit is not None
    assert doors.enter(HOME) is None
    assert told == []
    began = trio.current_time()
    assert await visit.turn(100 * SHAKES_BURST)
    assert trio.current_time() == began
    doors.ban(HOME, 10)
    assert doors.enter(HOME) is None
    assert told == [HOME], "the operator's word counts more"


async def test_calls_of_unknown_methods_make_a_flood_sooner(doors):
    come(doors, 1)
    meter, calls = doors.meter(peer(1)), 0
    while not meter.over("calls_of_unknown_methods", UNKNOWN_TIMES):
        calls += 1
    assert calls * UNKNOWN_TIMES <= 1.2 * FLOOD_BURST
    assert doors.faults["flood"] == 1


async def test_only_the_operator_bans_what_it_trusts(tmp_path, caplog):
    doors = Doors(Limits(), peers_max=8, file=tmp_path / "bans.json")
    ban(doors, 2)
    await doors.save()
    doors = Doors(Limits(), peers_max=8, file=tmp_path / "bans.json")
    for n in (1, 2):
        doors.pin(peer(n))
    assert not doors.banned(peer(2)), "an earlier run did not trust it yet"
    visit = come(doors, 1)
    for _ in range(30):
        doors.blame(peer(1), "bad_chunk", "a bad disk")
    assert not doors.banned(peer(1))
    assert not visit.hung_up
    assert doors.bans() == [], "nor is its address in disgrace"
    assert "would be banned: bad_chunk a bad disk" in caplog.text
    assert doors.peer(peer(1))["score"] < 100
    doors.ban(peer(1), 10)
    assert doors.banned(peer(1))
    doors.pin(peer(1))
    assert doors.banned(peer(1))


async def test_a_ban_made_while_the_file_is_written_is_written_next(tmp_path, monkeypatch):
    doors = Doors(Limits(), peers_max=8, file=tmp_path / "bans.json")
    save = doors_module.banfile.save

    def save_slowly(*arguments) -> bool:
        trio.from_thread.run_sync(doors.ban, "198.51.100.2", 5)
        return save(*arguments)

    monkeypatch.setattr(doors_module.banfile, "save", save_slowly)
    doors.ban("198.51.100.1", 5)
    await doors.save()
    assert doors._dirty
    monkeypatch.setattr(doors_module.banfile, "save", lambda *arguments: False)
    await doors.save()
    assert doors._dirty, "it could not be written"
    monkeypatch.setattr(doors_module.banfile, "save", save)
    await doors.save()
    assert not doors._dirty
    assert {row.subject for row in Doors(Limits(), peers_max=8, file=tmp_path / "bans.json").bans()} == {
        "198.51.100.1",
        "198.51.100.2",
    }
