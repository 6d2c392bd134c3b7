"""Who can be dialled: the judgement, dial-backs over real sockets, a relay's books and its splice."""

import contextlib
import socket as plain_socket
from collections.abc import Awaitable, Callable
from os import urandom

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.envelope import seal_record
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from multiaddr import Multiaddr

from config.errors import BusyError, IntegrityError, RemoteError
from config.vocabulary import PeerId
from p2p.addressbook import AddressBook
from p2p.core import reach
from p2p.core.doors import Limits as DoorLimits
from p2p.core.identity import Identity
from p2p.core.reach import PRIVATE, PUBLIC, UNKNOWN, State, Verdict, advertised, settle
from p2p.core.relay import ASKS_BURST, PER_PEER_MAX, RESERVATION_S, TOKEN_BYTES, TOKEN_S, Books, Limits
from p2p.doors import Doors
from p2p.face import Call, Reply
from p2p.front import PROBE, SPLICE, Front, preamble
from p2p.reach import Place, Reach
from p2p.splice import Splicer, enter

A, B, C, D = (Identity.from_seed(name.encode() * 32).peer_id for name in "abcd")
WIDE, SITE = "203.0.113.9", "192.168.1.7"
HERE = f"/ip4/{WIDE}/tcp/4701"
INSIDE = f"/ip4/{SITE}/tcp/4701"


def yes(peer: PeerId, host: str = WIDE, address: str = HERE) -> Verdict:
    return Verdict(peer, host, (address,))


def no(peer: PeerId, host: str = WIDE) -> Verdict:
    return Verdict(peer, host, ())


# --- judgement


def test_the_first_round_settles_and_a_settled_state_takes_two_rounds_to_change():
    state = settle(State(), [])
    assert state.reach == UNKNOWN
    state = settle(state, [yes(A), no(B)])
    assert (state.reach, state.addresses, state.observed, state.asked) == (PUBLIC, (HERE,), WIDE, 2)
    doubting = settle(state, [no(A), no(B), yes(C)])
    assert (doubting.reach, doubting.addresses, doubting.doubts) == (PUBLIC, (HERE,), 1)
    assert reach.next_round_s(doubting) < reach.next_round_s(state)
    assert settle(doubting, [yes(A)]) == State(PUBLIC, (HERE,), WIDE, 1, 0)
    gone = settle(doubting, [no(A), no(B)])
    assert (gone.reach, gone.addresses) == (PRIVATE, ())


def test_one_liar_cannot_give_this_node_somebody_else_s_address():
    victim = "/ip4/198.51.100.7/tcp/4701"
    lie = Verdict(A, "198.51.100.7", (victim,))
    assert settle(State(), [lie, yes(B), yes(C)]).addresses == (HERE,)
    assert settle(State(), [lie, no(B), no(C)]) == State(PRIVATE, (), WIDE, 3)
    # this node's own interface needs no majority
    assert settle(State(), [yes(A, "198.51.100.7", victim), yes(B), yes(C)], [victim]).addresses == (victim, HERE)


def test_peers_on_the_same_site_count_only_where_nobody_else_was_asked():
    near = yes(A, SITE, INSIDE)
    assert settle(State(), [near]).reach == PUBLIC
    mixed = settle(State(), [near, near, no(B)], [INSIDE])
    assert (mixed.reach, mixed.addresses) == (PRIVATE, (INSIDE,))  # neighbours may still dial it there
    assert advertised(mixed, (INSIDE,), ()) == (INSIDE,)


def test_what_is_advertised_leads_somewhere():
    circuit = f"{HERE}/p2p/R/p2p-circuit/p2p/me"
    assert advertised(State(), (INSIDE,), ()) == (INSIDE,)
    assert advertised(State(PRIVATE), (INSIDE,), ()) == ()
    assert advertised(State(PRIVATE), (INSIDE,), (circuit,)) == (circuit,)
    assert advertised(State(PUBLIC, (HERE,)), (INSIDE, HERE), ()) == (HERE,)
    other = "/ip4/10.0.0.9/tcp/4701"
    assert advertised(State(PUBLIC, (INSIDE,)), (INSIDE, other), ()) == (INSIDE, other)


def test_candidates_and_what_a_helper_dials():
    tried = reach.candidates([f"{INSIDE}/p2p/x"], [WIDE], 4701, 5000)
    assert tried == (INSIDE, f"/ip4/{WIDE}/tcp/5000", HERE)
    hostile = [
        "/ip4/198.51.100.1/tcp/25",
        f"/dns4/{WIDE}/tcp/1",
        f"{HERE}/p2p/12D3KooWEkzZRggNaCZw3jRFaqkiyufhHMhUvQ89UhenNLdqKkZx/p2p-circuit",
        7,
        "x" * 10_000,
    ]
    assert reach.allowed([*tried, *hostile], WIDE) == (f"/ip4/{WIDE}/tcp/5000", HERE)
    assert reach.allowed(hostile, WIDE) == ()
    assert reach.allowed([HERE] * 50, WIDE) == (HERE,)
    assert reach.allowed(tried, "") == ()
    assert reach.allowed(["/ip6/2001:0db8::1/tcp/9"], "2001:db8::1") == ("/ip6/2001:0db8::1/tcp/9",)


def test_who_says_that_he_cannot_be_dialled_is_dialled_next_door_only():
    circuit = f"{HERE}/p2p/12D3KooWEkzZRggNaCZw3jRFaqkiyufhHMhUvQ89UhenNLdqKkZx/p2p-circuit"

    def dialled(word: str, *networks: str) -> tuple[str, ...]:
        return reach.worth_dialling((INSIDE, circuit, HERE), word, lambda: networks)

    assert dialled(UNKNOWN) == dialled(PUBLIC) == (INSIDE, HERE)
    assert dialled(PRIVATE) == dialled(reach.RELAYED, "10.0.0.7/255.0.0.0") == ()
    assert dialled(reach.RELAYED, "192.168.1.99/255.255.255.0", "nonsense") == (INSIDE,)


def test_every_state_is_explained_with_what_to_do():
    def told(state: State, relays=(), loopback=False) -> tuple[str, str, str]:
        return reach.explain(state, relays=relays, port=4701, host=SITE, loopback=loopback)

    assert told(State(PUBLIC, (HERE,)))[::2] == (PUBLIC, "")
    assert told(State(PUBLIC), loopback=True)[0] == "local"
    assert told(State())[0] == "unknown"
    word, why, fix = told(State(PRIVATE, (), WIDE, 3))
    assert word == PRIVATE
    assert "3 peers" in why
    assert WIDE in why
    assert f"forward TCP port 4701 to {SITE}" in fix
    assert "UPnP" in fix
    assert told(State(PRIVATE, (), WIDE, 1), relays=("r",))[0] == reach.RELAYED


# --- dial-backs


def doors() -> Doors:
    return Doors(DoorLimits(), peers_max=16)


async def listen(nursery: trio.Nursery, front: Front) -> tuple[str, int]:
    """A front on a loopback port."""
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()

    async def one(socket: trio.socket.SocketType) -> None:
        with socket:
            await front.receive(socket, trio.lowlevel.checkpoint)

    async def run() -> None:
        with listener:
            while True:
                socket, _ = await listener.accept()
                nursery.start_soon(one, socket)

    nursery.start_soon(run)
    host, port = listener.getsockname()
    return host, port


class Joined:
    """Two ends of a fake network: calls of one reach the handlers of the other."""

    def __init__(self, own: PeerId, host: str) -> None:
        self.own, self.host = own, host
        self.others: dict[PeerId, Joined] = {}
        self.handlers: dict[str, Callable[[Call], Awaitable[Reply]]] = {}

    def peers(self):
        return list(self.others)

    def host_of(self, peer_id):
        return self.host if peer_id in self.others else ""

    async def call(self, peer_id, method, header, buffers=(), *, deadline_ms):
        call = Call(self.own, method, dict(header), (), trio.current_time() + deadline_ms / 1000)
        return await self.others[peer_id].handlers[method](call)


@pytest.fixture
async def couple(nursery):
    """Two :class:`Reach` on loopback that ask each other; the places say that they are no loopback swarm."""
    ends, found = [], []
    for own in (A, B):
        net = Joined(own, "127.0.0.1")
        front = Front(doors())
        host, port = await listen(nursery, front)
        here = [reach.multiaddr(host, port), "/ip4/127.0.0.1/tcp/1"]
        changes: list[str] = []
        place = Place(lambda here=here: tuple(here), port, (), False, False)
        asker = Reach(own, net, place, lambda c=changes: c.append("x"))
        front.accept(PROBE, asker.on_probe)
        net.handlers = {"reach.observed": asker.serve_observed, "reach.probe": asker.serve_probe}
        ends.append(net)
        found.append((asker, changes, here))
    ends[0].others, ends[1].others = {B: ends[1]}, {A: ends[0]}
    return found


async def until(ready: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not ready():  # noqa: ASYNC110 - what is waited for is in another task
            await trio.sleep(0.02)


async def test_a_peer_dials_back_and_only_what_leads_here_counts(couple, nursery, monkeypatch):
    monkeypatch.setattr("p2p.reach.LOOK_S", 0.05)
    (asker, changes, here), (_, _, there) = couple
    nursery.start_soon(asker.run)
    asker.link_up()
    await until(lambda: bool(changes))
    assert (asker.state.reach, asker.state.addresses) == (PUBLIC, (here[0],))
    # moved to where its addresses lead to somebody else: one round is enough to see that
    asker._net.others[B].host = "127.0.0.2"
    asker._net.host = "127.0.0.2"
    here[:] = there
    asker._place = Place(lambda: tuple(here), 1, (), False, False)
    await until(lambda: asker.state.reach == PRIVATE)
    assert asker.state.addresses == ()


async def test_an_address_that_leads_to_another_node_or_a_lying_helper_prove_nothing(couple):
    (asker, _, (address, _)), (helper, _, (other, _)) = couple
    secret = urandom(16)
    call = Call(A, "reach.probe", {"addresses": [other, address], "secret": secret}, (), trio.current_time() + 5)
    assert (await helper.serve_probe(call)).header == {"reached": []}  # neither knows this secret

    async def lie(call: Call) -> Reply:
        return Reply({"reached": call.header["addresses"]})

    asker._net.others[B].handlers["reach.probe"] = lie
    verdicts = await asker._ask_some()
    assert [verdict.reached for verdict in verdicts] == [()]


async def test_dial_backs_are_bounded_and_bad_questions_refused(couple):
    _, (helper, _, _) = couple
    good = {"addresses": [], "secret": bytes(16)}
    for bad in ({}, {**good, "secret": b"x"}, {**good, "addresses": "/ip4"}):
        with pytest.raises(IntegrityError):
            await helper.serve_probe(Call(A, "reach.probe", bad, (), 0))

    async def many() -> None:
        for _ in range(10):
            await helper.serve_probe(Call(A, "reach.probe", good, (), 0))

    with pytest.raises(BusyError, match="limit: dial-backs per host"):
        await many()


# --- a relay's books

SMALL = Limits(2, 3, 1 << 30, 1 << 20, 60)


def tokens(number: int) -> dict[bytes, PeerId]:
    return {bytes([number]) * TOKEN_BYTES: D, bytes([number, 255]) * (TOKEN_BYTES // 2): A}


def test_reservations_and_circuits_have_limits_with_names():
    books = Books(SMALL)
    assert books.reserve(A, 0) == RESERVATION_S
    books.reserve(B, 0)
    books.reserve(A, 5)
    with pytest.raises(BusyError, match="relay_reservations_max"):
        books.reserve(C, 5)
    with pytest.raises(RemoteError) as stranger:
        books.ask(D, C, 5)
    assert stranger.value.code == "not_found"
    for number in range(3):
        books.ask(D, A, 5)
        books.open(tokens(number), D, A, 5)
    with pytest.raises(BusyError, match="relay_circuits_max"):
        books.ask(D, B, 5)
    books.ask(D, B, 6 + TOKEN_S)  # tokens that nobody brought make room
    books.release(A)
    books.reserve(C, 6)
    assert not books.reserved(C, 7 + RESERVATION_S)
    assert books.statistics()["refused"] == {"relay_reservations_max": 1, "relay_circuits_max": 1}


def test_one_caller_has_not_all_circuits_and_asks_only_so_often():
    books = Books(Limits(2, 1000, 1 << 30, 1 << 20, 60))
    books.reserve(A, 0)
    for number in range(PER_PEER_MAX):
        books.ask(D, A, number)
        circuit = books.open(tokens(number), D, A, number)
        for token, peer in tokens(number).items():
            assert books.arrive(token, number) == (circuit, peer)
            assert books.arrive(token, number) is None  # a token serves once
    with pytest.raises(BusyError, match="circuits per peer"):
        books.ask(D, A, 20)
    books.ask(B, A, 20)
    books.close(circuit)
    books.ask(D, A, 21)
    for _ in range(int(ASKS_BURST)):
        books.ask(C, A, 21)
    with pytest.raises(BusyError, match="asks per second"):
        books.ask(C, A, 21)


# --- the splice


@pytest.fixture
async def splicer(nursery):
    """A relay's front; ``open`` makes a circuit."""
    books = Books(SMALL)
    books.reserve(A, trio.current_time())
    front = Front(doors())
    front.accept(SPLICE, Splicer(books).serve)
    host, port = await listen(nursery, front)
    return books, host, port


async def ends_of(nursery, splicer):
    books, host, port = splicer
    both_tokens = {urandom(TOKEN_BYTES): D, urandom(TOKEN_BYTES): A}
    books.open(both_tokens, D, A, trio.current_time())
    ends: list[trio.socket.SocketType] = []

    async def come(token: bytes) -> None:
        ends.append(await enter(host, port, token, B))

    async with trio.open_nursery() as both:
        for token in both_tokens:
            both.start_soon(come, token)
    return ends


async def test_two_ends_with_one_token_are_joined_both_ways(nursery, splicer):
    books = splicer[0]
    one, other = await ends_of(nursery, splicer)
    data = urandom(300_000)

    async def say(socket: trio.socket.SocketType) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[await socket.send(rest) :]

    async def hear(socket: trio.socket.SocketType) -> None:
        got = b""
        while len(got) < len(data):
            got += await socket.recv(1 << 16)
        assert got == data

    with trio.fail_after(10):
        async with trio.open_nursery() as both:
            for task, socket in ((say, one), (hear, other), (say, other), (hear, one)):
                both.start_soon(task, socket)
        assert books.passed_bytes == 2 * len(data)
        one.close()
        assert await other.recv(1) == b""
        while books.circuits:  # noqa: ASYNC110 - it ends in the relay's task
            await trio.sleep(0.01)
    other.close()


async def test_a_circuit_ends_at_its_limits(nursery, splicer):
    books = splicer[0]
    one, other = await ends_of(nursery, splicer)
    with one, other, trio.fail_after(10):
        passed = 0
        with contextlib.suppress(OSError):
            while passed <= SMALL.relay_circuit_bytes_max:
                await one.send(bytes(64 << 10))
                got = await other.recv(1 << 20)
                if not got:
                    break
                passed += len(got)
        assert passed <= SMALL.relay_circuit_bytes_max
    assert books.refused == {"relay_circuit_bytes_max": 1}


async def test_tokens_that_open_nothing_are_hung_up_on(splicer):
    books, host, port = splicer
    with pytest.raises(RemoteError), trio.fail_after(5):
        await enter(host, port, urandom(TOKEN_BYTES), B)
    with trio.socket.socket() as half, trio.fail_after(5):
        await half.connect((host, port))
        await half.send(preamble(SPLICE) + b"short")
        half.shutdown(plain_socket.SHUT_WR)
        assert await half.recv(1) == b""
    assert books.statistics()["circuits"] == 0


# --- where peers are dialled


def test_what_the_library_hears_does_not_replace_what_adverts_say():
    store = PeerStore()
    book = AddressBook(store, connected=lambda peer: False)
    ours, other, nowhere = (Multiaddr(f"/ip4/{host}/tcp/4701") for host in (WIDE, "198.51.100.1", "0.0.0.0"))
    hidden, stranger, known = (create_new_key_pair(bytes([n]) * 32) for n in (1, 2, 3))

    def addresses(pair) -> list[Multiaddr]:
        try:
            return store.addrs(ID.from_pubkey(pair.public_key))
        except PeerStoreError:
            return []

    book.learn(ID.from_pubkey(hidden.public_key), [])
    book.learn(ID.from_pubkey(known.public_key), [ours])
    for pair in (hidden, stranger, known):
        peer_id = ID.from_pubkey(pair.public_key)
        store.add_addr(peer_id, nowhere, 100)
        store.add_addrs(peer_id, [other], 100)
        assert store.consume_peer_record(seal_record(PeerRecord(peer_id, [nowhere, other]), pair.private_key), 100)
    store.clear_addrs(ID.from_pubkey(known.public_key))  # another peer answered there, once
    assert addresses(hidden) == []
    assert addresses(stranger) == [other]
    assert addresses(known) == [ours]
