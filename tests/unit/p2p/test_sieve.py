"""The sieve: who is shunned for how long, and that the kernel really keeps them out, on real sockets."""

import socket
import sys

import pytest
import trio

from p2p.core.sieve import (
    INSTRUCTION,
    REFUSED_BURST,
    SHUN_SECONDS,
    SHUN_SECONDS_MAX,
    SHUNNED_MAX,
    Shunned,
    program,
)
from p2p.sieve import Sieve, unfiltered

FLOODER, NEIGHBOUR = "127.9.1.1", "127.9.1.2"
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux has such filters")


def flood(shunned: Shunned, host: str, now: float) -> bool:
    return any([shunned.refuse(host, now) for _ in range(int(REFUSED_BURST) + 1)])


def test_who_is_refused_now_and_then_is_not_shunned():
    shunned = Shunned()
    assert not any(shunned.refuse(FLOODER, 0.2 * n) for n in range(1000))
    assert shunned.out(0.0) == ()


def test_a_flooder_is_shunned_longer_each_time_and_forgiven():
    shunned, now, spans = Shunned(), 0.0, []
    for _ in range(5):
        assert flood(shunned, FLOODER, now)
        assert shunned.out(now) == (FLOODER,)
        spans.append(shunned.next_end() - now)
        now = shunned.next_end()
        assert shunned.out(now) == ()
    assert spans == [SHUN_SECONDS, 2 * SHUN_SECONDS, SHUN_SECONDS_MAX, SHUN_SECONDS_MAX, SHUN_SECONDS_MAX]
    assert flood(shunned, FLOODER, now + 1000)
    assert shunned.next_end() == now + 1000 + SHUN_SECONDS


def test_an_ipv6_network_of_64_bits_is_one_source():
    shunned = Shunned()
    assert any(shunned.refuse(f"2001:db8:1:2::{n:x}", 0.0) for n in range(int(REFUSED_BURST) + 1))
    assert shunned.out(0.0) == ("2001:db8:1:2::/64",)
    assert not verdict(program(shunned.out(0.0)), packet("2001:db8:1:2::ffff"))


def test_so_many_are_shunned_at_once():
    shunned = Shunned()
    for n in range(2 * SHUNNED_MAX):
        flood(shunned, f"203.0.{n}.1", 0.0)
    assert len(shunned.out(0.0)) == SHUNNED_MAX


def verdict(instructions: bytes, packet: bytes) -> int:
    """What a kernel would do with an IP packet."""
    code = list(INSTRUCTION.iter_unpack(instructions))
    at = accumulator = 0
    cells: dict[int, int] = {}
    while True:
        kind, if_true, if_false, operand = code[at]
        at += 1
        match kind:
            case 0x20:
                start = operand - 0xFFF00000
                accumulator = int.from_bytes(packet[start : start + 4], "big")
            case 0x02:
                cells[operand] = accumulator
            case 0x60:
                accumulator = cells[operand]
            case 0x74:
                accumulator >>= operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x05:
                at += operand
            case _:
                return operand


def packet(host: str) -> bytes:
    if ":" in host:
        return b"\x60" + bytes(7) + socket.inet_pton(socket.AF_INET6, host) + bytes(16)
    return b"\x45" + bytes(11) + socket.inet_aton(host) + bytes(4)


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("203.0.113.7", False),
        ("203.0.113.8", True),
        ("198.51.100.1", False),
        ("2001:db8:1:2::9", False),  # of the same /64
        ("2001:db8:1:3::1", True),
        ("2001:db9:1:2::1", True),
    ],
)
def test_a_program_drops_what_it_names(host, passes):
    code = program(["203.0.113.7", "::ffff:198.51.100.1", "2001:db8:1:2::1", "fe80::1%eth0"])
    assert bool(verdict(code, packet(host))) == passes


def test_a_program_of_the_most_sources_is_one():
    code = program(
        [*(f"10.0.{n}.1" for n in range(SHUNNED_MAX)), *(f"2001:db8:0:{n:x}::1" for n in range(SHUNNED_MAX))]
    )
    assert not verdict(code, packet(f"10.0.{SHUNNED_MAX - 1}.1"))
    assert not verdict(code, packet(f"2001:db8:0:{SHUNNED_MAX - 1:x}::5"))
    assert verdict(code, packet("10.1.0.1"))


async def connects(source: str, port: int, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        with trio.socket.socket() as client:
            await client.bind((source, 0))
            await client.connect(("127.0.0.1", port))
        return True
    return False


@linux
async def test_the_kernel_keeps_a_flooder_out_for_a_while_and_nobody_else():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sieve, port = Sieve(), listener.socket.getsockname()[1]
    async with listener, trio.open_nursery() as nursery:
        sieve.watch(listener.socket)
        nursery.start_soon(sieve.run)
        with trio.socket.socket() as before:
            await before.bind((FLOODER, 0))
            await before.connect(("127.0.0.1", port))
            served = await listener.accept()
            for _ in range(int(REFUSED_BURST) + 1):
                sieve.refuse(FLOODER)
            assert sieve.times == 1
            await before.send(b"x")
            assert await served.receive_some(1) == b"x", "what is connected stays so"
            await served.aclose()
        assert not await connects(FLOODER, port, 0.3)
        assert await connects(NEIGHBOUR, port, 0.3)
        assert await connects(FLOODER, port, 10 * SHUN_SECONDS), "its kernel tries again, and is heard then"
        nursery.cancel_scope.cancel()


def flooded(sieve: Sieve, host: str) -> None:
    for _ in range(int(REFUSED_BURST) + 1):
        sieve.refuse(host)


def instructions_of(listener: trio.SocketListener) -> int:
    """Of the filter that it has (``SO_GET_FILTER``)."""
    return len(listener.socket.getsockopt(socket.SOL_SOCKET, 26, 1024))


@linux
async def test_who_is_shunned_for_a_second_does_not_wait_for_one_who_is_for_four():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sieve = Sieve()
    async with listener, trio.open_nursery() as nursery:
        sieve.watch(listener.socket)
        nursery.start_soon(sieve.run)
        for _ in range(2):
            flooded(sieve, FLOODER)
            await trio.sleep(sieve._shunned.next_end() - trio.current_time() + 0.1)
        flooded(sieve, FLOODER)
        await trio.sleep(0.1)  # it sleeps by now
        one = instructions_of(listener)
        flooded(sieve, NEIGHBOUR)
        assert instructions_of(listener) > one
        await trio.sleep(1.2 * SHUN_SECONDS)
        assert instructions_of(listener) == one
        nursery.cancel_scope.cancel()


@linux
async def test_a_filter_that_cannot_be_replaced_keeps_nobody_out(monkeypatch):
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sieve, port = Sieve(), listener.socket.getsockname()[1]
    async with listener:
        sieve.watch(listener.socket)
        flooded(sieve, FLOODER)
        assert not await connects(FLOODER, port, 0.3)
        with monkeypatch.context() as patched:
            patched.setattr("p2p.sieve.program", lambda hosts: bytes(INSTRUCTION.size))  # the kernel takes no such one
            flooded(sieve, NEIGHBOUR)
        assert await connects(FLOODER, port, 3.0)
        flooded(sieve, "127.9.1.3")
        assert not await connects("127.9.1.3", port, 0.3), "the next one is tried"


@linux
async def test_the_most_sources_fit_into_what_kernels_give_a_socket():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sieve, port = Sieve(), listener.socket.getsockname()[1]
    async with listener:
        sieve.watch(listener.socket)
        for n in range(SHUNNED_MAX - 1):
            flooded(sieve, f"2001:db8:0:{n:x}::1")
        flooded(sieve, FLOODER)
        assert not await connects(FLOODER, port, 0.3)
        assert await connects(NEIGHBOUR, port, 0.3)
    looks = sum(
        kind == 0x20 for kind, *_ in INSTRUCTION.iter_unpack(program(f"2001:db8:0:{n:x}::1" for n in range(64)))
    )
    assert looks == 4


@linux
async def test_an_accepted_socket_loses_its_listeners_filter():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sieve, port = Sieve(), listener.socket.getsockname()[1]
    async with listener:
        sieve.watch(listener.socket)
        for _ in range(int(REFUSED_BURST) + 1):
            sieve.refuse(FLOODER)
        with trio.socket.socket() as client:
            await client.bind((NEIGHBOUR, 0))
            await client.connect(("127.0.0.1", port))
            served = await listener.accept()
            unfiltered(served.socket)
            with pytest.raises(FileNotFoundError):
                served.socket.setsockopt(socket.SOL_SOCKET, 27, 0)  # nothing is left to take off
            unfiltered(served.socket)
            await served.aclose()


async def test_a_listener_that_is_closed_is_forgotten():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sieve = Sieve()
    sieve.watch(listener.socket)
    await listener.aclose()
    for _ in range(int(REFUSED_BURST) + 1):
        sieve.refuse(FLOODER)
    sieve.refuse(FLOODER)


@linux
async def test_a_listener_that_comes_later_is_kept_when_the_others_filter_goes():
    first, late = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
    sieve, port = Sieve(), late.socket.getsockname()[1]
    async with first, late, trio.open_nursery() as nursery:
        sieve.watch(first.socket)
        nursery.start_soon(sieve.run)
        for _ in range(int(REFUSED_BURST) + 1):
            sieve.refuse(FLOODER)
        sieve.watch(late.socket)
        await trio.sleep(1.2 * SHUN_SECONDS)
        for _ in range(int(REFUSED_BURST) + 1):
            sieve.refuse(FLOODER)
        assert not await connects(FLOODER, port, 0.3)
        nursery.cancel_scope.cancel()
