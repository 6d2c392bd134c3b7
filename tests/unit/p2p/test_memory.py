"""The in-memory network behaves like the real one where callers can see it."""

from collections.abc import Callable
from hashlib import sha256

import msgspec
import pytest
import trio

from config.errors import BusyError, RemoteError
from p2p import trace
from p2p.face import Call, ContentFile, Network, Reply
from p2p.memory import MemoryHub


async def echo(call: Call) -> Reply:
    return Reply({"from": call.peer_id, **call.header}, call.buffers)


async def test_call_and_errors():
    hub = MemoryHub(1)
    a, b = hub.add(), hub.add()
    face: Network = a
    b.serve("echo", echo)

    async def busy(call: Call) -> Reply:
        raise BusyError("later", retry_after_ms=7)

    async def bug(call: Call) -> Reply:
        raise ZeroDivisionError

    async def slow(call: Call) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    b.serve("busy", busy)
    b.serve("bug", bug)
    b.serve("slow", slow)
    reply = await face.call(b.peer_id, "echo", {"n": [1, b"x"]}, [b"abc", memoryview(b"de")], deadline_ms=1000)
    assert reply.header == {"from": a.peer_id, "n": [1, b"x"]}
    assert [bytes(x) for x in reply.buffers] == [b"abc", b"de"]
    with pytest.raises(BusyError) as caught:
        await a.call(b.peer_id, "busy", {}, deadline_ms=1000)
    assert caught.value.retry_after_ms == 7
    for method, code in (("bug", "internal"), ("slow", "deadline"), ("none", "not_found")):
        with pytest.raises(RemoteError) as error:
            await a.call(b.peer_id, method, {}, deadline_ms=50)
        assert error.value.code == code


async def test_kill_breaks_calls_and_leaves_the_view():
    hub = MemoryHub(2)
    a, b = hub.add(region="x"), hub.add()
    started = trio.Event()

    async def slow(call: Call) -> Reply:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    b.serve("slow", slow)

    async def caller() -> None:
        with pytest.raises(RemoteError) as error:
            await a.call(b.peer_id, "slow", {}, deadline_ms=60_000)
        assert error.value.code == "unavailable"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await started.wait()
        hub.kill(b.peer_id)
    assert set(a.directory.adverts()) == {a.peer_id}
    hub.revive(b.peer_id)
    assert set(a.directory.adverts()) == {a.peer_id, b.peer_id}


async def test_adverts_gossip_and_blobs(tmp_path):
    hub = MemoryHub(3)
    a, b = hub.add(), hub.add()
    seen = trio.Event()

    async def handler(peer, payload):
        assert (peer, payload) == (a.peer_id, b"hello")
        seen.set()

    b.subscribe("t", handler)
    await a.publish("t", b"hello")
    await seen.wait()
    before = b.directory.own().seq
    b.directory.update(lambda advert: msgspec.structs.replace(advert, load=5))
    assert a.directory.adverts()[b.peer_id].load == 5
    assert b.directory.own().seq > before

    data = b"q" * 100

    class Source:
        def read_chunk(self, digest: bytes) -> bytes | None:
            return data if digest == sha256(data).digest() else None

    b.blobs.offer(Source())
    file = ContentFile(sha256(data).hexdigest(), len(data), (sha256(data).digest(),))
    await a.blobs.fetch(file, tmp_path / "f", lambda: [b.peer_id])
    assert (tmp_path / "f").read_bytes() == data


async def test_streams_quick_handlers_and_traces_are_as_on_the_wire():
    hub = MemoryHub(4)
    a, b = hub.add(), hub.add()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ended = trio.Event()

    async def count(call, send):
        try:
            for n in range(call.header["to"]):
                await send(Reply({"n": n, "trace": call.trace}, [bytes(3)]))
            return {"end": True}
        finally:
            ended.set()

    b.serve("quick", echo, quick=lambda call: None if call.header.get("slow") else Reply({"quick": 1}))
    b.serve_stream("count", count)
    assert (await a.call(b.peer_id, "quick", {}, deadline_ms=1000)).header == {"quick": 1}
    assert (await a.call(b.peer_id, "quick", {"slow": 1}, deadline_ms=1000)).header["slow"] == 1
    with trace.during(parent):
        async with a.stream(b.peer_id, "count", {"to": 40}, deadline_ms=5000) as items:
            got = [item.header async for item in items]
    assert got == [{"n": n, "trace": parent} for n in range(40)]
    assert items.end == {"end": True}
    for source in (a, b):
        ended = trio.Event()
        async with source.stream(b.peer_id, "count", {"to": 1000}, deadline_ms=5000) as items:
            assert (await anext(items)).header["n"] == 0
        with trio.fail_after(1):
            await ended.wait()

    async def drain(method: str, first: Callable[[], None] = lambda: None) -> None:
        async with a.stream(b.peer_id, method, {"to": 10**6}, deadline_ms=5000) as items:
            async for _ in items:
                first()

    for method, first, code in (
        ("none", None, "not_found"),
        ("quick", None, "protocol"),
        ("count", lambda: hub.kill(b.peer_id), "unavailable"),
    ):
        with pytest.raises(RemoteError) as error:
            await drain(method, first or (lambda: None))
        assert error.value.code == code
