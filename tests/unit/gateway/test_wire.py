"""What a connection knows of its client: how long it kept writes waiting, and nothing of what else took time."""

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.wire import Wire


def pair() -> tuple[Wire, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return Wire(trio.SocketStream(ours)), trio.SocketStream(theirs)


async def test_what_fits_does_not_count_and_what_waits_does(nursery: trio.Nursery) -> None:
    wire, client = pair()
    for _ in range(10):
        await wire.send_all(b"x" * 10)
    assert await client.receive_some(1000) == b"x" * 100
    assert wire.blocked_seconds() == 0
    data = bytes(range(256)) * 1000
    nursery.start_soon(wire.send_all, data)
    await wait_all_tasks_blocked()
    await trio.sleep(0.1)
    assert 0.1 <= wire.blocked_seconds() < 5, "also while it waits"
    got = b""
    while len(got) < len(data):
        got += await client.receive_some()
    assert got == data
    await wait_all_tasks_blocked()
    before = wire.blocked_seconds()
    await trio.sleep(0.1)
    assert wire.blocked_seconds() == before
    await wire.aclose()
    await client.aclose()


async def test_a_write_to_nobody_and_one_that_is_given_up() -> None:
    wire, client = pair()
    with trio.move_on_after(0.05) as scope:
        await wire.send_all(bytes(1 << 20))
    assert scope.cancelled_caught
    assert wire.blocked_seconds() > 0
    await client.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await wire.send_all(b"x")
    await wire.aclose()
    with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
        await wire.send_all(b"x")
