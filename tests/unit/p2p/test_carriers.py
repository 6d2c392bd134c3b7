"""One RPC, two carriers: what holds over the direct lane holds over libp2p streams."""

from hashlib import sha256
from os import urandom

import pytest
import trio
import trio.testing

from config.errors import RemoteError
from config.settings import P2pSettings
from p2p import holding, trace
from p2p.core.identity import Identity
from p2p.face import Call, LeftError, Reply
from p2p.network import open_network
from p2p.waiting import NotSentError

ANY = ("/ip4/127.0.0.1/tcp/0",)


@pytest.fixture(params=["lane", "stream"])
def carrier(request):
    return request.param


@pytest.fixture
async def start(tmp_path, nursery, carrier):
    async def run(name, settings, task_status):
        identity = Identity.from_seed(sha256(name.encode()).digest())
        async with open_network(identity, settings, data_dir=tmp_path / name, version="1") as network:
            task_status.started(network)
            await trio.sleep_forever()

    async def make(name, *seeds, **settings):
        settings = {"lane": carrier == "lane"} | settings
        every = P2pSettings(listen=ANY, seeds=tuple(s.addresses[0] for s in seeds), **settings)

        async def started(task_status=trio.TASK_STATUS_IGNORED):
            await run(name, every, task_status)

        return await nursery.start(started)

    return make


@pytest.fixture
async def pair(start, carrier):
    a = await start("a")
    b = await start("b", a)
    with trio.fail_after(10):
        await b.links.get(a.peer_id)
        while not (a.links.ready(b.peer_id) and b.links.ready(a.peer_id)):  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert {n.links.ready(m.peer_id).carrier.kind for n, m in ((a, b), (b, a))} == {carrier}
    return a, b


async def echo(call: Call) -> Reply:
    return Reply({"from": call.peer_id, **call.header}, call.buffers)


def quick_echo(call: Call) -> Reply | None:
    return None if call.header.get("decline") else Reply({"quick": True}, call.buffers)


async def test_unary_quick_and_bulk_calls_of_every_size(pair):
    a, b = pair
    for node in pair:
        node.serve("echo", echo)
        node.serve("quick", echo, quick=quick_echo)
    for source, target in ((a, b), (b, a)):
        for size in (0, 1, 100, 65_535, 65_536, 66_000, 5_000_000):
            data = urandom(size)
            for bulk in (False, True):
                reply = await source.call(
                    target.peer_id, "echo", {"x": [1, None, b"y"]}, [data, b"", b"z"], deadline_ms=9000, bulk=bulk
                )
                assert reply.header == {"from": source.peer_id, "x": [1, None, b"y"]}
                assert [bytes(part) for part in reply.buffers] == [data, b"", b"z"]
            reply = await source.call(target.peer_id, "quick", {}, [data], deadline_ms=9000)
            assert (reply.header, bytes(reply.buffers[0])) == ({"quick": True}, data)
        reply = await source.call(target.peer_id, "quick", {"decline": 1}, deadline_ms=9000)
        assert reply.header == {"from": source.peer_id, "decline": 1}


async def test_a_stream_is_ordered_flow_controlled_and_cancelled_when_left(pair):
    a, b = pair
    sent = 0
    ended = trio.Event()

    async def count(call, send):
        nonlocal sent
        try:
            for n in range(call.header["to"]):
                await send(Reply({"n": n}, [bytes(1000)]))
                sent = n + 1
            return {"sum": sent}
        finally:
            ended.set()

    b.serve_stream("count", count)
    b.serve("echo", echo)
    async with a.stream(b.peer_id, "count", {"to": 100}, deadline_ms=9000) as items:
        assert [item.header["n"] async for item in items] == list(range(100))
        assert items.end == {"sum": 100}
    ended, sent = trio.Event(), 0
    async with a.stream(b.peer_id, "count", {"to": 10_000}, deadline_ms=9000) as items:
        assert (await anext(items)).header["n"] == 0
        await trio.sleep(0.2)
        assert 1 <= sent <= 32, "the sender waits for the reader"
    with trio.fail_after(5):
        await ended.wait()
    for method, code in (("none", "not_found"), ("echo", "protocol")):
        with pytest.raises(RemoteError) as error:
            async with a.stream(b.peer_id, method, {}, deadline_ms=5000) as items:
                await anext(items)
        assert error.value.code == code
    with pytest.raises(RemoteError) as error:
        await a.call(b.peer_id, "count", {"to": 3}, deadline_ms=5000)
    assert error.value.code == "protocol"
    assert (await a.call(b.peer_id, "echo", {"still": 1}, deadline_ms=5000)).header["still"] == 1


async def test_the_trace_travels_with_calls_made_while_serving(pair):
    a, b = pair
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def inner(call: Call) -> Reply:
        return Reply({"trace": call.trace, "keys": sorted(call.header)})

    async def outer(call: Call) -> Reply:
        return await b.call(a.peer_id, "inner", {"k": 1}, deadline_ms=5000)

    a.serve("inner", inner)
    b.serve("outer", outer)
    with trace.during(parent):
        reply = await a.call(b.peer_id, "outer", {}, deadline_ms=5000)
    assert reply.header == {"trace": parent, "keys": ["k"]}
    reply = await a.call(b.peer_id, "outer", {}, deadline_ms=5000)
    assert reply.header == {"trace": "", "keys": ["k"]}


async def test_hundreds_in_flight_keep_apart(pair):
    a, b = pair
    release = trio.Event()
    waiting = 0

    async def wait(call: Call) -> Reply:
        nonlocal waiting
        waiting += 1
        if waiting == 200:
            release.set()
        await release.wait()
        return Reply({"n": call.header["n"]}, call.buffers)

    b.serve("wait", wait)
    done = []

    async def one(number: int) -> None:
        data = bytes([number]) * (number * 2000)
        reply = await a.call(b.peer_id, "wait", {"n": number}, [data], deadline_ms=20_000)
        assert (reply.header, bytes(reply.buffers[0])) == ({"n": number}, data)
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(one, number)
    assert sorted(done) == list(range(200))
    assert a.links.ready(b.peer_id).in_flight == 0


async def test_deadline_cancellation_and_the_caller_s_end_reach_the_handler(pair):
    a, b = pair
    ended: list[str] = []
    began = trio.Event()

    async def slow(call: Call) -> Reply:
        began.set()
        assert call.deadline - trio.current_time() < 61
        try:
            await trio.sleep_forever()
        finally:
            ended.append(call.header["why"])
        raise AssertionError

    b.serve("slow", slow)
    for source, target, deadline_ms in ((a, b, 100), (a, b, 1)):
        with pytest.raises(RemoteError) as error:
            await source.call(target.peer_id, "slow", {"why": "deadline"}, deadline_ms=deadline_ms)
        assert error.value.code == "deadline"
    began = trio.Event()
    async with trio.open_nursery() as nursery:

        async def caller() -> None:
            await a.call(b.peer_id, "slow", {"why": "cancel"}, deadline_ms=60_000)

        nursery.start_soon(caller)
        await began.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        while ended[-1:] != ["cancel"]:  # noqa: ASYNC110
            await trio.sleep(0.01)
    link = a.links.ready(b.peer_id)
    assert link.in_flight == 0
    b.serve("echo", echo)
    assert (await a.call(b.peer_id, "echo", {"still": 1}, deadline_ms=5000)).header["still"] == 1


async def test_a_handler_that_holds_what_it_got_stops_the_sender_not_the_link(pair, monkeypatch):
    monkeypatch.setattr(holding, "HELD_BYTES_MAX", 4 << 20)
    a, b = pair
    release = trio.Event()
    held = 0

    async def hold(call: Call) -> Reply:
        nonlocal held
        held += len(call.buffers[0])
        await release.wait()
        held -= len(call.buffers[0])
        return Reply({})

    b.serve("hold", hold)
    done = 0

    async def one() -> None:
        nonlocal done
        await a.call(b.peer_id, "hold", {}, [bytes(1 << 20)], deadline_ms=20_000)
        done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(one)
        await trio.sleep(1)
        assert 4 << 20 <= held <= 16 << 20, "about what may be held and a window"
        release.set()
    assert done == 40


async def test_bulk_never_stands_in_the_way(pair):
    a, b = pair
    arrived = trio.Event()

    async def take(call: Call) -> Reply:
        return Reply({}, [bytes(30 << 20)])

    b.serve("take", take)
    b.serve("quick", echo, quick=quick_echo)
    between = 0

    async def download() -> None:
        await a.call(b.peer_id, "take", {}, deadline_ms=20_000, bulk=True)
        arrived.set()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(download)
        while not arrived.is_set():
            await a.call(b.peer_id, "quick", {}, deadline_ms=2000)
            between += 1
    assert between > 3, "calls are answered while 90 MiB are on their way"
    bulk = a.statistics()["links"][b.peer_id]["bulk"]
    assert bulk["bytes_in"] > 90 << 20
    assert a.statistics()["links"][b.peer_id]["bytes_in"] < 1 << 20


async def test_a_broken_link_fails_what_runs_and_the_next_call_works(pair, carrier):
    a, b = pair
    began, ended = trio.Event(), trio.Event()

    async def wait(call: Call) -> Reply:
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    b.serve("wait", wait)
    b.serve("echo", echo)
    async with trio.open_nursery() as nursery:

        async def caller() -> None:
            with pytest.raises(RemoteError) as error:
                await a.call(b.peer_id, "wait", {}, deadline_ms=20_000)
            assert error.value.code == "unavailable"

        nursery.start_soon(caller)
        await began.wait()
        broken = a.links.ready(b.peer_id)
        await broken.carrier.close()
    with pytest.raises(NotSentError):
        await broken.call("echo", {}, (), trio.current_time() + 5)
    with trio.fail_after(5):
        await ended.wait()  # the handler is cancelled with the link
    assert (await a.call(b.peer_id, "echo", {"again": 1}, deadline_ms=9000)).header["again"] == 1
    assert a.links.ready(b.peer_id).carrier.kind == carrier
    with trio.fail_after(10):
        while any(len(links) != 1 for node in pair for links in node.links._links.values()):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_calls_begun_together_are_under_way_together(pair):
    a, b = pair
    inside, gate, gone = [], trio.Event(), trio.Event()

    async def meet(call: Call) -> Reply:
        inside.append(call.header["n"])
        try:
            await gate.wait()
        finally:
            if not gate.is_set():
                gone.set()
        return Reply({"n": call.header["n"]}, call.buffers)

    a.serve("meet", meet)
    a.serve("echo", echo)
    with trio.fail_after(20):
        begun = [b.begin(a.peer_id, "meet", {"n": n}, [bytes([n])], deadline_ms=9000) for n in range(5)]
        while len(inside) < 5:  # noqa: ASYNC110 - all of them, and this task waited for none
            await trio.sleep(0.01)
        begun[4].cancel()
        await gone.wait()
        gate.set()
        for n in (3, 0, 2, 1):
            reply = await begun[n].wait()
            assert reply.header == {"n": n}
            assert bytes(reply.buffers[0]) == bytes([n])
            assert begun[n].answered_ns
        early = b.begin(a.peer_id, "echo", {}, deadline_ms=9000)
        await b.call(a.peer_id, "echo", {}, deadline_ms=9000)
        while not early.answered_ns:  # noqa: ASYNC110 - its answer came before anybody waited
            await trio.sleep(0.01)
        early.cancel()
        assert (await early.wait()).header["from"] == b.peer_id


async def test_a_wait_that_is_left_ends_and_the_call_goes_on(pair):
    a, b = pair
    gate, gone = trio.Event(), []

    async def slow(call: Call) -> Reply:
        await gate.wait()
        return Reply({"n": call.header["n"]})

    a.serve("slow", slow)
    with trio.fail_after(20):
        begun = b.begin(a.peer_id, "slow", {"n": 1}, deadline_ms=9000)
        begun.leave()  # nobody waits: nothing happens

        async def wait() -> None:
            try:
                await begun.wait()
            except LeftError:
                gone.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            begun.leave()
            begun.leave()
        assert gone
        gate.set()
        assert (await begun.wait()).header == {"n": 1}
        begun.leave()  # its answer is here: nothing happens


async def test_what_was_begun_ends_with_its_deadline_its_wait_or_its_link(pair):
    a, b = pair
    stopped = []

    async def never(call: Call) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            stopped.append(call.header["n"])

    a.serve("never", never)
    with trio.fail_after(20):
        late = b.begin(a.peer_id, "never", {"n": 0}, deadline_ms=50)
        with pytest.raises(RemoteError, match="deadline"):
            await late.wait()
        given_up = b.begin(a.peer_id, "never", {"n": 1}, deadline_ms=9000)
        with trio.move_on_after(0.05):
            await given_up.wait()
        while stopped != [0, 1]:  # noqa: ASYNC110
            await trio.sleep(0.01)
        cut = b.begin(a.peer_id, "never", {"n": 2}, deadline_ms=9000)
        await b.links.drop(a.peer_id)
        with pytest.raises(RemoteError, match="broke"):
            await cut.wait()
    assert b.begin("nobody", "never", {}, deadline_ms=50) is None


async def test_a_call_that_was_not_sent_takes_another_way(pair):
    a, b = pair
    b.serve("echo", echo)
    old = a.links.ready(b.peer_id)
    sending = old.call("echo", {"n": 1}, (), trio.current_time() + 5)
    old.say_goodbye("another link is used")
    with pytest.raises(NotSentError):
        await sending
    a.links._choose(b.peer_id)

    async def close_soon() -> None:
        await trio.sleep(0.1)
        await old.carrier.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close_soon)
        with trio.fail_after(9):
            while True:
                try:
                    reply = await a.call(b.peer_id, "echo", {"n": 2}, deadline_ms=5000)
                    break
                except NotSentError:  # there is no other link yet
                    await trio.sleep(0.05)
    assert reply.header["n"] == 2
    assert a.links.ready(b.peer_id) is not old
