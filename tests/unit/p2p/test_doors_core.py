"""Limits, scores, bans and evictions as pure rules, under floods of addresses and identities."""

import tracemalloc
from random import Random

import pytest

from p2p.core import standing as standing_module
from p2p.core.buckets import Bucket
from p2p.core.doors import GRACE_S, SHAKE_WAIT_S_MAX, SHAKES_BURST, SHAKES_PER_SECOND, Doors, Entry, Limits, Refusal
from p2p.core.places import place_of, subject_of
from p2p.core.slots import Seat, choose_victim
from p2p.core.standing import BAN_MS, BAN_MS_MAX, FAULTS, GROWTH, HALF_LIFE_MS, Ban, Standing

HOUR_MS = 3600_000


def entered(doors: Doors, host: str, now: float, peer: str = "") -> Entry:
    entry = doors.enter(host, now)
    assert isinstance(entry, Entry), entry
    if peer:
        assert doors.known(entry, peer, now) is None
    return entry


def refused(outcome: object) -> str:
    assert isinstance(outcome, Refusal), outcome
    assert outcome.text
    return outcome.limit


def test_a_bucket_allows_its_rate_and_burst_and_no_more():
    bucket, taken, now = Bucket(10, 5), 0, 0.0
    for step in range(1000):
        now = step / 100
        taken += bucket.take(1, now)
    assert 5 + 10 * now - 1 <= taken <= 5 + 10 * now
    assert not bucket.take(1, now - 100), "a clock that steps back frees nothing"
    assert bucket.idle(now + 1)
    paced, allowed_at = Bucket(1000, 100), 0.0
    for _ in range(100):
        allowed_at = allowed_at + paced.spend(100, allowed_at)
    assert allowed_at == pytest.approx(9.9)


@pytest.mark.parametrize(
    ("host", "address", "subnet"),
    [
        ("203.0.113.7", "203.0.113.7", "203.0.113.0/24"),
        ("::ffff:203.0.113.7", "203.0.113.7", "203.0.113.0/24"),
        ("2001:db8:1:2ff:3::1", "2001:db8:1:2ff::/64", "2001:db8:1:200::/56"),
        ("fe80::1%eth0", "fe80::/64", "fe80::/56"),
        ("no address", "no address", "no address"),
    ],
)
def test_places(host, address, subnet):
    assert place_of(host)[:2] == (address, subnet)


def test_an_operator_names_places():
    assert subject_of("203.0.113.7") == "203.0.113.7"
    assert subject_of("203.0.113.9/24") == "203.0.113.0/24"
    assert subject_of("2001:db8::5") == "2001:db8::/64"
    assert subject_of("2001:db8::5/56") == "2001:db8::/56"
    assert subject_of("203.0.113.0/16") is None
    assert subject_of("12D3KooW") is None


def test_limits_by_address_and_subnet_leave_the_others_their_places():
    doors = Doors(Limits(connections_per_address_max=4, connections_per_subnet_max=10, connections_per_minute=10_000))
    for n in range(4):
        entered(doors, "203.0.113.1", 0.0, f"id-{n}")
    assert refused(doors.enter("203.0.113.1", 0.0)) == "connections_per_address"
    for n in range(6):
        entered(doors, f"203.0.113.{n + 2}", 0.0, f"other-{n}")
    assert refused(doors.enter("203.0.113.99", 0.0)) == "connections_per_subnet"
    entered(doors, "198.51.100.1", 0.0, "elsewhere")


def test_connections_per_minute_by_address():
    doors, let_in, now = Doors(Limits(connections_per_minute=60)), 0, 0.0
    for step in range(6000):
        now = step / 50
        outcome = doors.enter("203.0.113.1", now)
        if isinstance(outcome, Entry):
            let_in += 1
            doors.leave(outcome)
        else:
            assert refused(outcome) == "connections_per_minute_per_address"
    assert let_in == pytest.approx(30 + 120, abs=3)
    assert doors.undecided == 0


def test_who_is_refused_for_himself_uses_up_nothing_that_all_share():
    doors = Doors(Limits(connections_per_second=10, undecided_per_address_max=4))
    for _ in range(1000):
        doors.enter("203.0.113.1", 0.0)
    entered(doors, "198.51.100.1", 0.0, "elsewhere")
    hosts = [f"198.51.{n}.1" for n in range(100)]
    outcomes = [doors.enter(host, 0.0) for host in hosts]
    assert 14 <= sum(isinstance(outcome, Entry) for outcome in outcomes) <= 15
    assert refused(outcomes[-1]) == "connections_per_second"


def test_handshakes_of_one_address_begin_at_a_pace_and_wait_for_their_turn():
    doors = Doors(Limits(undecided_per_address_max=100, connections_per_minute=10_000))
    waits = [doors.begin(entered(doors, "203.0.113.7", 0.0), 4, 0.0) for _ in range(20)]
    at_once = int(SHAKES_BURST) // 4
    line = int(SHAKE_WAIT_S_MAX * SHAKES_PER_SECOND) // 4 - 1
    assert waits[:at_once] == [0.0] * at_once
    assert waits[at_once : at_once + line] == pytest.approx([4 * (n + 1) / SHAKES_PER_SECOND for n in range(line)])
    assert {refused(each) for each in waits[at_once + line + 1 :]} == {"handshakes_per_address"}
    assert doors.begin(entered(doors, "203.0.113.8", 0.0), 4, 0.0) == 0.0, "its neighbour does not wait for it"
    assert doors.begin(entered(doors, "127.0.0.1", 0.0), 1000, 0.0) == 0.0, "nor does this machine"
    assert doors.begin(entered(doors, "203.0.113.7", 10.0), 4, 10.0) == 0.0


def test_who_waits_for_its_turn_is_not_ousted_for_that():
    doors = Doors(Limits(undecided_per_address_max=2))
    doors.begin(entered(doors, "203.0.113.7", 0.0), SHAKES_BURST + 2 * SHAKES_PER_SECOND, 0.0)
    silent = entered(doors, "203.0.113.7", 0.5)
    assert refused(doors.enter("203.0.113.7", 1.0)) == "undecided_per_address"
    assert entered(doors, "203.0.113.7", 0.5 + GRACE_S).ousted is silent, (
        "it said nothing; the elder waits because it must"
    )


def test_nobody_waits_for_one_that_left_before_its_turn():
    doors = Doors(Limits())
    first = entered(doors, "203.0.113.7", 0.0)
    assert doors.begin(first, SHAKES_BURST + SHAKES_PER_SECOND, 0.0) == pytest.approx(1.0)
    doors.give_back(first, SHAKES_BURST + SHAKES_PER_SECOND, 0.0)
    assert doors.begin(entered(doors, "203.0.113.7", 0.0), SHAKES_BURST, 0.0) == pytest.approx(0.0)


def test_loopback_is_exempt_only_while_the_setting_says_so():
    for exempt in (True, False):
        doors = Doors(Limits(loopback_exempt=exempt, connections_per_address_max=3))
        outcomes = []
        for n in range(10):
            entry = doors.enter("127.0.0.1", 0.0)
            outcomes.append(isinstance(entry, Entry))
            if isinstance(entry, Entry):
                doors.known(entry, f"peer-{n}", 0.0)
        assert sum(outcomes) == (10 if exempt else 3)


def test_a_slow_handshake_makes_room_for_the_next_one_once_it_had_its_time():
    doors = Doors(Limits(undecided_per_address_max=2))
    slow = [entered(doors, "203.0.113.1", 0.0) for _ in range(2)]
    assert refused(doors.enter("203.0.113.1", GRACE_S / 2)) == "undecided_per_address"
    honest = entered(doors, "203.0.113.1", GRACE_S)
    assert honest.ousted is slow[0]
    assert doors.undecided == 2
    doors.leave(slow[0])
    assert doors.known(honest, "honest", GRACE_S) is None


def test_what_one_peer_may_do_is_not_multiplied_by_identities():
    doors = Doors(Limits(streams_max=5, streams_per_second=1000, calls_max=3, connections_per_address_max=100))
    entries = [entered(doors, "203.0.113.1", 0.0, f"id-{n}") for n in range(10)]
    opened = [doors.open_stream(entry, 0.0) for entry in entries for _ in range(10)]
    assert opened.count(None) == 5 * 4
    assert {refusal.limit for refusal in opened if refusal} == {"streams_per_peer", "streams_per_address"}
    started = [doors.start_call(entry) for entry in entries for _ in range(5)]
    assert started.count(None) == 3 * 4
    assert {refusal.limit for refusal in started if refusal} == {"calls_per_peer", "calls_per_address"}
    other = entered(doors, "198.51.100.1", 0.0, "honest")
    assert doors.open_stream(other, 0.0) is None
    assert doors.start_call(other) is None
    for entry in entries[:4]:
        for _ in range(3):
            doors.end_call(entry)
    assert doors.start_call(entries[0]) is None


def test_rates_of_calls_and_bytes_are_paced_and_named():
    doors = Doors(Limits(calls_per_second=100, bytes_per_second=1000))
    entry = entered(doors, "203.0.113.1", 0.0, "id")
    assert doors.spend(entry, 100, 500, 0.0) == (0.0, "")
    wait_s, limit = doors.spend(entry, 50, 0, 0.0)
    assert (wait_s, limit) == (pytest.approx(0.5), "calls_per_second_per_peer")
    assert doors.spend(entry, 0, 5000, 1.0)[1] == "bytes_per_second_per_peer"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_counted_up_is_counted_down(seed):
    random = Random(seed)
    limits = Limits(connections_max=40, undecided_max=10, connections_per_minute=100_000, connections_per_second=10_000)
    doors, now = Doors(limits), 0.0
    here: list[Entry] = []
    for _ in range(20_000):
        now += random.random() / 50
        step = random.random()
        if step < 0.5:
            outcome = doors.enter(f"10.0.{random.randrange(3)}.{random.randrange(5)}", now)
            if isinstance(outcome, Entry):
                here.append(outcome)
        elif step < 0.55:
            here.append(doors.dialled(f"id-{random.randrange(20)}", "10.0.0.1", now))
        elif here:
            entry = random.choice(here)
            if not entry.left and entry.peer is None and step < 0.75:
                doors.known(entry, f"id-{random.randrange(20)}", now)
            else:
                here.remove(entry)
                doors.leave(entry)
                doors.leave(entry)
        assert doors.undecided <= limits.undecided_max
    for entry in here:
        doors.leave(entry)
    assert (doors.open, doors.undecided) == (0, 0)
    assert all(party.idle(now + 1000) for table in doors._tables.values() for party in table.values())


def test_endless_addresses_and_identities_take_bounded_memory():
    doors, random = Doors(Limits(connections_per_second=1 << 30)), Random(1)
    standing = Standing()

    def flood(count: int, at: float) -> None:
        for n in range(count):
            host = f"2001:db8:{random.getrandbits(16):x}:{random.getrandbits(16):x}::1"
            outcome = doors.enter(host, at + n / 1000)
            if isinstance(outcome, Entry):
                if n % 100 == 0:
                    doors.known(outcome, f"id-{at}-{n}", at)
                doors.leave(outcome)
            standing.blame(f"id-{at}-{n}", "bad_advert", int(at))

    place_of.cache_clear()
    flood(9_000, 0.0)
    tracemalloc.start()
    flood(4_000, 100.0)
    before = tracemalloc.get_traced_memory()[0]
    flood(8_000, 200.0)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1 << 20
    assert doors.size() < 15_000


# -- standing


def test_scores_heal_and_soft_faults_never_ban():
    standing = Standing()
    for _ in range(1000):
        assert standing.blame("slow one", "deadline", 0) is None
        assert standing.blame("slow one", "slow", 0) is None
    low = standing.score("slow one", 0)
    assert 30 <= low <= 45
    assert standing.score("slow one", HALF_LIFE_MS) == pytest.approx(100 - (100 - low) / 2, abs=1)
    assert standing.score("slow one", 20 * HALF_LIFE_MS) == 100


def test_bans_expire_and_grow():
    standing, now, spans = Standing(), 0, []
    for _ in range(7):
        ban = None
        while ban is None:
            ban = standing.blame("bad", "protocol", now)
        spans.append(ban.until_ms - now)
        assert standing.banned("bad", now + spans[-1] - 1)
        assert not standing.banned("bad", now + spans[-1])
        now += spans[-1]
    assert spans[:3] == [BAN_MS, BAN_MS * GROWTH, BAN_MS * GROWTH**2]
    assert spans[-1] == BAN_MS_MAX


def test_one_proof_of_cheating_bans_and_the_operator_bans_and_unbans():
    standing = Standing()
    assert standing.blame("cheat", "cheat", 0)
    standing.ban("friend", 1000, "operator", 0)
    assert standing.banned("friend", 999).by_operator
    assert standing.unban("friend")
    assert not standing.banned("friend", 999)
    assert standing.score("friend", 999) == 100


def test_a_ban_of_an_earlier_run_cannot_outlast_the_longest_one():
    standing = Standing()
    standing.restore({"a": Ban(1 << 60, "x", 3), "b": Ban(1 << 60, "x", 0, True)}, {"old": HOUR_MS}, 0)
    assert not standing.banned("a", BAN_MS_MAX)
    assert standing.banned("b", BAN_MS_MAX)
    assert standing.tenure_ms("old") == HOUR_MS


def test_tables_of_subjects_are_bounded_and_keep_whom_they_know_best():
    standing = Standing(table_max=100, bans_max=10)
    standing.linked("friend", 24 * HOUR_MS, 0)
    standing.blame("worst", "protocol", 0)
    for n in range(1000):
        standing.blame(f"id-{n}", "deadline", 0)
    assert len(standing._records) <= 100
    assert standing.tenure_ms("friend") == 24 * HOUR_MS
    assert standing.score("worst", 0) == 50
    standing.ban("by hand", HOUR_MS, "operator", 0)
    for n in range(100):
        standing.blame(f"id-{n}", "cheat", n)
    assert len(standing.bans) <= 10
    assert "by hand" in standing.bans


def test_every_fault_has_a_weight_and_no_single_honest_mishap_bans():
    assert all(fault.weight > 0 for fault in FAULTS.values())
    assert all(fault.weight < standing_module.BAN_AT for name, fault in FAULTS.items() if name != "cheat")


# -- slots


def seat(name: str, subnet: str, worth: float = 100.0, since: float = 0.0, *, keeps: bool = False) -> Seat:
    return Seat(name, subnet, worth, since, keeps)


def test_a_crowd_from_one_subnet_gives_way_to_a_newcomer_from_elsewhere():
    crowd = [seat(f"crowd-{n}", "10.0.0.0/24", 100, n) for n in range(10)]
    old = [seat(f"old-{n}", f"10.1.{n}.0/24", 200, -n) for n in range(5)]
    victim = choose_victim(crowd + old, seat("new", "10.9.9.0/24"))
    assert victim is crowd[-1], "the newest of the crowd"
    assert choose_victim(crowd + old, seat("one more", "10.0.0.0/24")) is None
    assert choose_victim(old, seat("new", "10.9.9.0/24")) is None, "fresh identities do not displace old friends"


def test_the_lowest_score_goes_and_what_this_node_dialled_stays():
    seats = [seat("good", "", 150), seat("bad", "", 40), seat("dialled", "", 0, keeps=True)]
    assert choose_victim(seats, seat("new", "")).peer_id == "bad"
    assert choose_victim(seats[2:], seat("new", "")) is None
    assert choose_victim(seats[:1], seat("seed", "", keeps=True)).peer_id == "good"
