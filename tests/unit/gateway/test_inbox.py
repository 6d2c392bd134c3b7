"""What a connection tells its application: in order, bounded, and never too late that its client left."""

from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from gateway.inbox import Inbox

LEFT = {"type": "http.disconnect"}


def part(number: int) -> dict[str, Any]:
    return {"type": "http.request", "body": b"%d" % number, "more_body": True}


async def test_messages_come_in_their_order_and_who_asks_first_waits() -> None:
    inbox, got = Inbox(), []

    async def take() -> None:
        got.extend([await inbox.receive() for _ in range(3)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        for number in range(3):
            await inbox.put(part(number))
    assert got == [part(number) for number in range(3)]


async def test_who_sends_more_than_is_taken_waits_but_not_to_say_that_the_client_left() -> None:
    inbox, sent = Inbox(), []

    async def send() -> None:
        for number in range(12):
            await inbox.put(part(number))
            sent.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        assert len(sent) == 10
        await inbox.put(LEFT)
        assert await inbox.receive() == part(0)
        await wait_all_tasks_blocked()
        assert len(sent) == 10, "eleven wait still: the ten, less one, and the client's leaving"
        for _ in range(2):
            await inbox.receive()
        await wait_all_tasks_blocked()
        assert len(sent) == 12


async def test_who_watches_hears_what_waits_and_what_comes_and_holds_nobody_up() -> None:
    inbox, heard = Inbox(), []

    async def send() -> None:
        for number in range(15):
            await inbox.put(part(number))
        await inbox.put(LEFT)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        inbox.watch(heard.append)
    assert heard == [*(part(number) for number in range(15)), LEFT]
