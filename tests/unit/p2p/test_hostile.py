"""What hostile peers may try below the RPC: every way ends with their connection, not with this node's memory or time.

The session and the host are fakes here; with real ones the other side would have to be a rewritten libp2p.
"""

from functools import partial
from hashlib import sha256
from os import urandom
from types import SimpleNamespace

import msgspec
import pytest
import trio
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo

from config.errors import BusyError, RemoteError
from p2p import directory as directory_module
from p2p import fetch, kademlia
from p2p.blobs import PeerBlobs
from p2p.core import advert as adverts
from p2p.core.advert import Advert
from p2p.core.identity import Identity
from p2p.core.view import View
from p2p.directory import PeerDirectory, now_ms
from p2p.face import ContentFile, Reply
from p2p.fetch import PEERS_MAX
from p2p.streams import WAITING_MAX, WINDOW_BYTES, Channel


class FakeSession:
    def __init__(self):
        self.failed = False
        self.congested = False
        self.pushed = []
        self.sink = None

    def claim(self, stream_id, sink):
        self.sink = sink

    def push(self, messages):
        self.pushed += messages

    def fail(self):
        if not self.failed:
            self.failed = True
            self.sink.on_closed()


@pytest.fixture
def channel():
    session = FakeSession()
    yamux = SimpleNamespace(secured_conn=session, stream_buffers={1: bytearray(b"early")}, peer_id="p")
    stream = SimpleNamespace(
        stream_id=1, send_window=1000, recv_window=256 << 10, closed=False, recv_closed=False, is_initiator=False
    )
    made = Channel(SimpleNamespace(muxed_conn=yamux, muxed_stream=stream))
    made.session = session
    made.got = []
    made.open(lambda data: made.got.append(len(data)), lambda: None)
    return made


def test_a_peer_that_sends_past_its_window_is_hung_up_on(channel):
    part = memoryview(bytes(1 << 20))
    for _ in range(WINDOW_BYTES >> 20):
        channel.on_data(part)
    assert not channel.session.failed
    channel.consumed(WINDOW_BYTES)  # opens the window again
    for _ in range(WINDOW_BYTES >> 20):
        channel.on_data(part)
    assert not channel.session.failed
    taken = len(channel.got)
    channel.on_data(memoryview(b"x"))
    assert channel.session.failed
    assert channel.closed
    channel.on_data(part)
    assert len(channel.got) == taken


def test_a_peer_that_asks_and_never_reads_is_hung_up_on(channel):
    sent = 0
    while not channel.session.failed:
        channel.send([bytes(20)])
        sent += 1
        assert sent < 2 * WAITING_MAX
    assert not channel._waiting


async def test_many_peers_that_have_nothing_do_not_hide_the_one_that_has(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ROUNDS_S", (0.0,))
    data = urandom(1000)
    file = ContentFile(sha256(data).hexdigest(), len(data), (sha256(data).digest(),))
    peers = [f"liar-{n:02}" for n in range(3 * PEERS_MAX)] + ["zhonest"]

    class Network:
        async def call(self, peer_id, method, header, buffers=(), *, deadline_ms, bulk=False):
            await trio.lowlevel.checkpoint()
            if peer_id == "zhonest":
                return Reply({}, [data])
            raise RemoteError("not_found", "no such chunk")

    await PeerBlobs(Network(), "me").fetch(file, tmp_path / "file", lambda: peers)
    assert (tmp_path / "file").read_bytes() == data


async def test_a_peer_that_is_always_busy_does_not_keep_a_download_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ROUNDS_S", (0.0,))
    monkeypatch.setattr(fetch, "BUSY_MAX", 3)
    file = ContentFile(sha256(b"x").hexdigest(), 1, (sha256(b"x").digest(),))

    class Network:
        async def call(self, peer_id, method, header, buffers=(), *, deadline_ms, bulk=False):
            await trio.lowlevel.checkpoint()
            raise BusyError("come again", retry_after_ms=1)

    with trio.fail_after(30), pytest.raises(RemoteError, match="come again"):
        await PeerBlobs(Network(), "me").fetch(file, tmp_path / "file", lambda: ["busy"])


def test_provider_records_of_endless_keys_are_bounded():
    store = ProviderStore.__new__(ProviderStore)
    store.providers = {}
    store._persist_path = None
    kademlia.bound_providers(store)
    provider = PeerInfo(ID(b"peer"), [])
    for n in range(kademlia.PROVIDED_MAX + 10):
        store.add_provider(n.to_bytes(4, "big"), provider)
    store.add_provider(bytes(kademlia.PROVIDED_KEY_BYTES_MAX + 1), provider)
    assert len(store.providers) == kademlia.PROVIDED_MAX
    assert (0).to_bytes(4, "big") not in store.providers
    assert (kademlia.PROVIDED_MAX + 9).to_bytes(4, "big") in store.providers


def _advert(n: int, **fields: object) -> tuple[str, bytes]:
    identity = Identity.from_seed(n.to_bytes(32, "big"))
    now = now_ms()
    made = adverts.sign(identity, Advert(identity.peer_id, now, now + 60_000, **fields))
    return identity.peer_id, made.data


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_a_flood_of_adverts_is_bounded_and_linked_peers_come_in_all_the_same(monkeypatch, bound):
    linked: list[str] = []
    fake_host = SimpleNamespace(accept_records=lambda *_: None, learn=lambda *_: None)
    caller = SimpleNamespace(peers=lambda: tuple(linked), is_linked=lambda peer: peer in linked)
    me = Identity.from_seed(b"m" * 32)
    bounds = {"adverts_max": 20} if bound == "number" else {"bytes_max": 20 * 300}
    monkeypatch.setattr(directory_module, "View", partial(View, **bounds))
    view = PeerDirectory(me, fake_host, caller, Advert(me.peer_id, 0, 0), advert_seconds=60)
    for n in range(60):
        view.offer(_advert(n, region="x" * 100)[1])
    full = len(view.adverts())
    assert 10 < full <= 25
    friends = [_advert(n, region="y" * 100) for n in range(100, 110)]
    assert view.offer(_advert(99)[1]), "a stranger takes another's place"
    linked += [peer for peer, _ in friends]
    assert all(view.offer(data) for _, data in friends)
    assert {me.peer_id, *linked} <= set(view.adverts())
    assert len(view.adverts()) <= 25
    view.update(lambda own: msgspec.structs.replace(own, region="z" * 200))
    assert view.own().region == "z" * 200
