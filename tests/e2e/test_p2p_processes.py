"""Real node processes on loopback: they find each other, survive a kill, a restart and hostile bytes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError

from p2p.core.identity import Identity
from p2p.host import RPC_PROTOCOL, _id, open_host

DEAD_SEED = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.from_seed(b'dead' * 8).peer_id}"
ANY = "/ip4/127.0.0.1/tcp/0"


class Node:
    """A running node process."""

    def __init__(self, folder: Path, seeds: list[str], listen: str = ANY) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        program = Path(__file__).with_name("p2p_node.py")
        self.errors = (folder / "stderr").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(folder), listen, ",".join(seeds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        hello = json.loads(self._line())
        self.peer_id, self.address = hello["peer_id"], hello["address"]

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            pytest.fail(f"the node ended: {self.errors.read()[-3000:]}")
        return line

    def ask(self, **command: object) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def call(self, peer: "Node", method: str = "echo", deadline_ms: int = 5000, **more: object) -> dict:
        return self.ask(op="call", peer=peer.peer_id, method=method, deadline_ms=deadline_ms, **more)

    def sees(self, *peers: "Node", seconds: float = 20) -> bool:
        expected = sorted({self.peer_id, *(peer.peer_id for peer in peers)})
        return self.ask(op="wait", peers=[p.peer_id for p in peers], seconds=seconds)["view"] == expected

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def end(self) -> int:
        """A clean end; the exit code."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.close()
            return self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.errors.close()


@pytest.fixture
def start(tmp_path):
    nodes: list[Node] = []

    def make(name: str, seeds: list[str], listen: str = ANY) -> Node:
        nodes.append(Node(tmp_path / name, seeds, listen))
        return nodes[-1]

    yield make
    for node in nodes:
        node.end()


def test_three_nodes_a_dead_seed_a_kill_and_a_restart(start):
    a = start("a", [DEAD_SEED])
    b = start("b", [DEAD_SEED, a.address])
    c = start("c", [a.address, DEAD_SEED])
    assert a.sees(b, c)
    assert b.sees(a, c)
    assert c.sees(a, b)
    assert b.call(c, size=300_000) == {"from": b.peer_id, "size": 300_000}
    assert c.call(a)["from"] == c.peer_id
    assert a.call(b, "crash")["error"] == "internal"
    late = a.call(b, "slow", deadline_ms=300)
    assert late["error"] == "deadline"
    assert a.call(b)["size"] == 10

    old_peer, old_address = c.peer_id, c.address
    c.kill()
    failed = b.call(c, deadline_ms=4000)
    assert failed["error"] == "unavailable"
    assert failed["seconds"] < 4
    assert b.call(a)["from"] == b.peer_id
    assert a.sees(b)  # the dead peer leaves the view

    c = start("c", [a.address], old_address.partition("/p2p/")[0])
    assert c.peer_id == old_peer
    assert b.sees(a, c)
    assert b.call(c)["from"] == b.peer_id


def test_a_known_peer_is_found_again_without_any_seed(start):
    a = start("a", [])
    b = start("b", [a.address])
    assert b.sees(a)
    assert b.call(a)["size"] == 10
    assert b.end() == 0
    b = start("b", [])
    assert b.sees(a)


def test_hostile_bytes_do_not_end_a_node(start):
    a, b = start("a", []), start("b", [])
    port = int(a.address.split("/tcp/")[1].split("/")[0])
    noise = [b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(5000), b"\xff" * 64]
    noise.append(b"\x13/multistream/1.0.0\n\x07/noise\n" + os.urandom(200))
    for data in noise:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
    for number, data in enumerate((os.urandom(3000), b"\x00\x00\x00\x00\x09" + bytes(15), b"\xff" * 20, b"")):
        trio.run(_break_rpc, a, bytes([number]) * 32, data)
    b = start("c", [a.address])
    assert b.call(a)["size"] == 10


async def _break_rpc(node: Node, seed: bytes, data: bytes) -> None:
    """An authenticated peer that talks nonsense on every protocol; each time another one, since who does it again is
    not let in."""
    async with (
        trio.open_nursery() as nursery,
        open_host(Identity.from_seed(seed), listen=(ANY,), peers_max=4, nursery=nursery) as host,
    ):
        host.learn(node.peer_id, [node.address])
        await host.connect(node.peer_id)
        channel = await host.open_channel(node.peer_id)
        lost = trio.Event()
        channel.open(lambda _data: None, lost.set)
        if data:
            channel.send([data])
            with trio.fail_after(10):
                await lost.wait()
        else:
            await channel.close()
        raw = host._host
        for protocol in ("/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/kad/1.0.0", "/meshsub/1.1.0", RPC_PROTOCOL):
            with trio.move_on_after(1), suppress(BaseLibp2pError):  # the node may have had enough of this peer
                stream = await raw.new_stream(_id(node.peer_id), [protocol])
                await stream.write(os.urandom(300))
                await stream.reset()
        nursery.cancel_scope.cancel()


def test_a_clean_end_is_quick(start):
    a = start("a", [])
    b = start("b", [a.address])
    assert b.sees(a)
    started = time.monotonic()
    assert b.end() == 0
    assert time.monotonic() - started < 5
    assert a.sees()
