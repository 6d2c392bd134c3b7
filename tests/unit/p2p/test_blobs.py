"""Files between peers over real hosts: stalling peers, peers with parts, limits."""

from hashlib import sha256
from os import urandom

import pytest
import trio

from config.errors import ConfigError, RiosError
from config.settings import P2pSettings
from p2p.core.chunks import CHUNK_BYTES
from p2p.core.identity import Identity
from p2p.face import Call, ContentFile, Reply
from p2p.network import PeerNetwork, open_network
from p2p.services import Service

ANY = ("/ip4/127.0.0.1/tcp/0",)
COUNT = 8
DATA = urandom((COUNT - 1) * CHUNK_BYTES + 5000)
PARTS = [DATA[at : at + CHUNK_BYTES] for at in range(0, len(DATA), CHUNK_BYTES)]
FILE = ContentFile(sha256(DATA).hexdigest(), len(DATA), tuple(sha256(part).digest() for part in PARTS))


class Source:
    """Some of the file's chunks, in memory."""

    def __init__(self, *indices: int) -> None:
        self.chunks = {FILE.chunks[index]: PARTS[index] for index in indices or range(COUNT)}
        self.asked: list[int] = []

    def read_chunk(self, digest: bytes) -> bytes | None:
        self.asked.append(FILE.chunks.index(digest))
        return self.chunks.get(digest)


@pytest.fixture
async def nodes(tmp_path, nursery):
    async def run(name: str, settings: P2pSettings, task_status=trio.TASK_STATUS_IGNORED) -> None:
        identity = Identity.from_seed(sha256(name.encode()).digest())
        async with open_network(identity, settings, data_dir=tmp_path / name, version="1") as network:
            task_status.started(network)
            await trio.sleep_forever()

    async def start(name: str, *known: PeerNetwork, **settings: object) -> PeerNetwork:
        network = await nursery.start(run, name, P2pSettings(listen=ANY, **settings))
        for other in known:
            network._host.learn(other.peer_id, other.addresses)
        return network

    return start


def stall(network: PeerNetwork, *, after: int = 0) -> list[bytes]:
    """Let a node answer so many questions for chunks, and then none; what it was asked for in vain."""
    asked: list[bytes] = []
    honest, left = network.blobs.serve_get, after

    async def silent(call: Call) -> Reply:
        nonlocal left
        if left > 0:
            left -= 1
            return await honest(call)
        asked.append(call.header["digest"])
        await trio.sleep_forever()
        raise AssertionError

    network._services["blob.get"] = Service(silent)
    return asked


async def test_a_peer_that_stalls_costs_the_end_little(nodes, tmp_path):
    honest, silent = await nodes("a"), await nodes("b")
    c = await nodes("c", honest, silent)
    honest.blobs.offer(Source())
    silent.blobs.offer(Source())
    asked = stall(silent, after=2)
    done: list[int] = []
    with trio.fail_after(15):  # one deadline for a chunk is 20 s
        await c.blobs.fetch(FILE, tmp_path / "x", lambda: [honest.peer_id, silent.peer_id], done.append)
    assert (tmp_path / "x").read_bytes() == DATA
    assert asked, "it was waited for"
    assert sum(done) == len(DATA)
    assert c.blobs.fetched_bytes == len(DATA)
    link = c.links.ready(honest.peer_id)
    assert link is not None
    assert link.bulk is not None, "chunks stay out of the way of calls"


async def test_who_fetches_the_same_file_gives_what_it_has(nodes, tmp_path, nursery):
    even, silent = await nodes("a"), await nodes("b")
    half = await nodes("c", even, silent)
    d = await nodes("d", even, half)
    source = Source(*range(0, COUNT, 2))
    even.blobs.offer(source)
    silent_asked = stall(silent)
    part = b"".join(PARTS[i] if i % 2 else bytes(len(PARTS[i])) for i in range(COUNT))
    (tmp_path / "half.part").write_bytes(part)
    # it waits for the rest, from somebody who gives nothing
    nursery.start_soon(half.blobs.fetch, FILE, tmp_path / "half", lambda: [silent.peer_id])
    with trio.fail_after(10):
        while not silent_asked:  # noqa: ASYNC110 - what is waited for is in another node
            await trio.sleep(0.01)
    assert await d.blobs.parts(half.peer_id, FILE.sha256, COUNT) == frozenset(range(1, COUNT, 2))
    assert await d.blobs.parts(even.peer_id, FILE.sha256, COUNT) is None
    with trio.fail_after(15):
        await d.blobs.fetch(FILE, tmp_path / "x", lambda: [even.peer_id, half.peer_id])
    assert (tmp_path / "x").read_bytes() == DATA
    assert half.blobs.served_bytes == sum(len(PARTS[i]) for i in range(1, COUNT, 2))
    assert even.blobs.served_bytes == sum(len(PARTS[i]) for i in range(0, COUNT, 2))


@pytest.mark.parametrize("side", ["upload", "download"])
async def test_limits_hold_and_are_counted(nodes, tmp_path, side):
    rate = 4 * CHUNK_BYTES
    limit = {f"blob_{side}_bytes_per_second_max": rate}
    a = await nodes("a", **(limit if side == "upload" else {}))
    b = await nodes("b", a, **(limit if side == "download" else {}))
    a.blobs.offer(Source())
    began = trio.current_time()
    await b.blobs.fetch(FILE, tmp_path / "x", lambda: [a.peer_id])
    assert (tmp_path / "x").read_bytes() == DATA
    assert trio.current_time() - began >= (len(DATA) - rate - 2 * CHUNK_BYTES) / rate  # the burst is free
    limited = (a if side == "upload" else b).statistics()["blobs"]["limited"]
    assert limited[f"blob_{side}_bytes_per_second_max"] > 0


async def test_an_upload_limit_that_is_used_up_is_named(nodes, tmp_path):
    a = await nodes("a", blob_upload_bytes_per_second_max=1 << 16)
    b = await nodes("b", a)
    a.blobs.offer(Source())
    told: list[str] = []

    async def get(index: int) -> None:
        try:
            await b.blobs.get(a.peer_id, FILE.chunks[index], 1.0)
        except RiosError as error:
            told.append(str(error))

    async with trio.open_nursery() as nursery:
        for index in range(COUNT):
            nursery.start_soon(get, index)
    assert any("p2p.blob_upload_bytes_per_second_max" in text for text in told)


async def test_a_limit_too_small_for_a_chunk_is_refused(tmp_path):
    settings = P2pSettings(listen=ANY, blob_upload_bytes_per_second_max=1000)
    with pytest.raises(ConfigError, match="blob_upload_bytes_per_second_max = 1000"):
        async with open_network(Identity.from_seed(b"z" * 32), settings, data_dir=tmp_path, version="1"):
            pass
