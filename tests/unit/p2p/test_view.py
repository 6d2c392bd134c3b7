"""The view: what is taken, what is refused and counted, who holds which shard, and what stays bounded."""

from random import Random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.core import heartbeat, view
from p2p.core.advert import Advert, ModelOffer, bitmap, sign
from p2p.core.heartbeat import Heartbeat, is_worth_sending, open_heartbeat
from p2p.core.identity import Identity
from p2p.core.view import CHANGE_MS, CHANGES_BURST, View

NOW = 1_700_000_000_000
PEERS = [Identity.from_seed(bytes([n]) * 32) for n in range(1, 9)]
ME = PEERS[0].peer_id
MODELS = ("aa" * 32, "bb" * 32)


def advert(peer: Identity, seq: int = NOW, **fields) -> "view.SignedAdvert":
    return sign(peer, Advert(peer.peer_id, seq, NOW + 60_000, **fields))


def offer(model: str, *shards: int) -> ModelOffer:
    return ModelOffer(model, bitmap(set(shards)), 1, 2, 3)


def nobody() -> tuple[str, ...]:
    return ()


def made(**bounds) -> View:
    it = View(ME, Random(1).randrange, **bounds)
    it.put_own(advert(PEERS[0]), NOW)
    return it


def test_newer_adverts_win_and_what_was_handed_out_stays():
    it = made()
    before = it.adverts()
    assert it.offer(advert(PEERS[1], NOW + 2, load=5), NOW, nobody) == ""
    assert it.offer(advert(PEERS[1], NOW + 1, load=9), NOW, nobody) == "stale"
    assert it.offer(advert(PEERS[1], NOW + 2, load=9), NOW, nobody) == "stale"
    assert it.offer(advert(PEERS[0], NOW + 9), NOW, nobody) == "stale", "nobody but the node itself changes its advert"
    assert set(before) == {ME}
    assert it.adverts()[PEERS[1].peer_id].load == 5
    assert it.adverts() is it.adverts(), "no copy without a change"
    assert it.refused == {"stale": 3}


def test_a_peer_that_left_comes_back_with_news_or_a_link_only():
    it = made()
    old, peer = advert(PEERS[1]), PEERS[1].peer_id
    it.offer(old, NOW, nobody)
    assert it.left(peer)
    assert not it.left(peer)
    assert it.offer(old, NOW, nobody) == "gone"
    it.back(peer)
    assert it.offer(old, NOW, nobody) == ""
    it.left(peer)
    assert it.offer(advert(PEERS[1], NOW + 1), NOW, nobody) == ""
    assert not it.left(ME)


def test_expired_adverts_leave():
    it = made()
    it.offer(advert(PEERS[1]), NOW, nobody)
    assert not it.expire(NOW + 59_000)
    assert it.expire(NOW + 60_000)
    assert set(it.adverts()) == {ME}


def test_an_advert_that_changes_too_often_is_dropped_and_comes_through_later():
    it = made()
    taken = [it.offer(advert(PEERS[1], NOW + n), NOW, nobody) for n in range(CHANGES_BURST + 10)]
    assert taken.count("") == CHANGES_BURST + 1
    assert set(taken) == {"", "churn"}
    assert it.refused["churn"] == 9
    assert it.offer(advert(PEERS[2], NOW), NOW, nobody) == "", "others are not concerned"
    assert it.offer(advert(PEERS[1], NOW + 99), NOW + CHANGE_MS, nobody) == ""
    assert it.offer(advert(PEERS[1], NOW + 100), NOW + CHANGE_MS, nobody) == "churn"


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(
        st.tuples(
            st.integers(1, 7),
            st.sampled_from(["offer", "offer", "left", "remove", "ask"]),
            st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), max_size=6),
        ),
        max_size=40,
    )
)
def test_the_index_says_what_the_adverts_say(steps):
    it = made()
    for number, (peer, step, held) in enumerate(steps):
        identity = PEERS[peer]
        if step == "offer":
            models = {MODELS[m]: [i for n, i in held if n == m] for m, _ in held}
            fields = tuple(offer(model, *shards) for model, shards in models.items())
            it.offer(advert(identity, NOW + number, models=fields), NOW + number * CHANGE_MS, nobody)
        elif step == "left":
            it.left(identity.peer_id)
        elif step == "remove":
            it.remove(identity.peer_id)
        else:
            for m, index in held:
                it.providers(MODELS[m], index)
    for model in MODELS:
        for index in range(21):
            expected = {p for p, a in it.adverts().items() if (o := a.offer(model)) and o.holds(index)}
            assert set(it.providers(model, index)) == expected
            assert set(it.some_providers(model, index, 99)) == expected


def test_what_strangers_claim_costs_no_memory_until_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(view, "ASKED_MAX", 4)
    it = made()
    it.offer(advert(PEERS[1], models=(ModelOffer(MODELS[0], b"\xff" * 8000, 1, 1, 1),)), NOW, nobody)
    assert not it._holders
    assert not it._models
    for index in range(9):
        assert it.providers(MODELS[0], index) == (PEERS[1].peer_id,)
    assert it.providers(MODELS[1], 3) == ()
    assert len(it._holders) == 4
    assert it.providers(MODELS[0], 0) == (PEERS[1].peer_id,), "what was forgotten is looked up again"


def test_heartbeats_change_load_and_prices_of_known_peers_until_the_next_advert():
    it = made()
    peer = PEERS[1]
    beat = Heartbeat(peer.peer_id, NOW + 5, 70, False, (9, 8, 7))
    assert it.beat(beat, NOW) == "unknown"
    it.offer(advert(peer, models=(offer(MODELS[0], 1),)), NOW, nobody)
    assert it.providers(MODELS[0], 1) == (peer.peer_id,)
    assert it.beat(beat, NOW) == ""
    assert it.beat(beat, NOW) == "stale"
    seen = it.adverts()[peer.peer_id]
    assert (seen.load, seen.seq) == (70, NOW)
    assert (seen.models[0].quote, seen.models[0].microcredits_per_tflop) == (9, 8)
    assert it.providers(MODELS[0], 1) == (peer.peer_id,)
    assert it.signed(peer.peer_id).advert.load == 0, "what is passed on is what was signed"
    it.offer(advert(peer, NOW + 6, load=1), NOW, nobody)
    assert it.adverts()[peer.peer_id].load == 1
    assert it.beat(msgspec.structs.replace(beat, seq=NOW + 6), NOW) == "stale"


def test_heartbeats_are_signed_dated_and_open_to_later_versions():
    peer = PEERS[1]
    beat = Heartbeat(peer.peer_id, NOW, 70)
    assert open_heartbeat(heartbeat.sign(peer, beat), now_ms=NOW) == beat
    body = msgspec.msgpack.encode([peer.peer_id, NOW, 70, False, None, "later"])
    signed = msgspec.msgpack.encode([body, peer.sign(heartbeat.TAG, body)])
    assert open_heartbeat(signed, now_ms=NOW) == beat
    kinds = []
    for data, now in (
        (signed[:-1] + b"\x00", NOW),
        (signed, NOW + heartbeat.AGE_MS_MAX + 1),
        (signed, NOW - heartbeat.AGE_MS_MAX - 1),
        (bytes(5000), NOW),
        (b"\x92\xc4", NOW),
    ):
        try:
            open_heartbeat(data, now_ms=now)
        except heartbeat.BadAdvert as error:
            kinds.append(error.kind)
    assert kinds == ["signature", "expired", "future", "too_large", "malformed"]


def test_small_changes_of_the_load_are_not_worth_a_message():
    def told(load: int, **fields) -> Advert:
        return Advert(ME, NOW, NOW, load=load, **fields)

    assert not is_worth_sending(told(0), told(15))
    assert is_worth_sending(told(0), told(16))
    assert not is_worth_sending(told(100), told(149))
    assert is_worth_sending(told(100), told(150))
    assert is_worth_sending(told(20), told(0))
    assert is_worth_sending(told(0), told(0, paused=True))


def stranger(n: int, seq: int = NOW, life_ms: int = 60_000, size: int = 0) -> "view.SignedAdvert":
    """An advert that nobody verified: its bytes count by their number only."""
    return view.SignedAdvert(Advert(f"stranger {n}", seq, seq + life_ms), bytes(300 + size))


def test_a_flood_of_small_adverts_pushes_out_its_own():
    it = made(adverts_max=200)
    for n in range(100):
        assert it.offer(stranger(n), NOW, nobody, "neighbour") == ""
    for n in range(1000, 3000):
        assert it.offer(stranger(n), NOW, nobody, "flooder") == ""
    assert len(it) == 200
    assert sum(f"stranger {n}" in it for n in range(100)) >= 95
    assert it.offer(stranger(100), NOW, nobody, "neighbour") == "", "a full view is shut for nobody"


def test_fat_adverts_go_first_and_one_peer_introduces_half_of_the_bytes_at_most():
    it = made(bytes_max=1 << 20)
    for n in range(100):
        it.offer(stranger(n), NOW, nobody)
    for n in range(1000, 1100):
        assert it.offer(stranger(n, size=60_000), NOW, nobody) == ""
        assert sum(len(signed.data) for _, signed in it.all_signed()) <= (1 << 20) // 2 + 1000
    assert sum(f"stranger {n}" in it for n in range(100)) == 100, "the fat ones went"
    for n in range(2000, 2100):
        it.offer(stranger(n, size=60_000), NOW, nobody, "a")
        it.offer(stranger(n + 100, size=60_000), NOW, nobody, "b")
    assert sum(len(signed.data) for _, signed in it.all_signed()) <= 1 << 20
    assert it.offer(stranger(101), NOW, nobody, "c") == ""


def test_among_small_ones_chance_decides_whatever_their_size():
    it = made(adverts_max=200)
    for n in range(100):
        it.offer(stranger(n, size=500), NOW, nobody)
    for n in range(1000, 1150):
        it.offer(stranger(n), NOW, nobody)
    assert sum(f"stranger {n}" in it for n in range(100)) >= 50


def test_a_known_peer_is_renewed_however_full_it_is_and_linked_peers_stay():
    it = made(bytes_max=10_000)
    linked = [f"stranger {n}" for n in range(15)]
    for n in range(30):
        it.offer(stranger(n), NOW, lambda: linked, "neighbour")
    assert it.offer(stranger(29, NOW + 1, size=4000), NOW, lambda: linked) == ""
    assert sum(len(signed.data) for _, signed in it.all_signed()) <= 10_000
    for n in range(15):
        assert it.offer(stranger(n, NOW + 1, size=2000), NOW, lambda: linked) == ""
    assert set(it.adverts()) == {ME, *linked}
    assert it.offer(stranger(40), NOW, lambda: linked) == "full"


def test_a_strangers_advert_does_not_live_as_long_as_it_says():
    it = made()
    long = {"life_ms": 24 * 3600_000}
    it.offer(stranger(1, **long), NOW, nobody)
    it.offer(stranger(2, **long), NOW, nobody)
    later = NOW + view.STRANGER_MS
    assert not it.expire(later - 1, ["stranger 1"])
    assert it.expire(later, ["stranger 1"])
    assert set(it.adverts()) == {ME, "stranger 1"}
    assert it.offer(stranger(2, **long), later, nobody) == "old", "nor does it come back from those who still have it"
    assert it.offer(stranger(2, later, **long), later, nobody) == ""


def test_what_leaves_leaves_nothing_behind():
    it = made(adverts_max=50)
    for n in range(300):
        it.offer(stranger(n), NOW, nobody, f"peer {n % 7}")
        it.remove(f"stranger {n - 3}")
    for peer in list(it.adverts()):
        it.remove(peer)
    strangers = it._strangers
    assert not strangers._groups
    assert not strangers._places
