"""How fast a swarm of 32 processes on loopback forms, and a node in it finds who serves a shard; also after 10 died.

Each process is a network (``p2p.open_network``: links, adverts, DHT, gossip), not a whole daemon: the models and the
ledger above it are left out. Each of 64 shards is served by four nodes, eight shards a node.

- ``join_s``: from the last node's listening until every view holds all adverts and every DHT routing table has peers.
- ``find_p95_s``: a new node, once it has joined, calls ``directory.find_providers`` for every shard: what a user of the
  directory sees. It answers from the local view where that knows, as it does for a node that has joined.
- ``find_dht_p95_s``: the same node looks shards up in the DHT whatever its view knows (``finder.look_up``).
- ``find_after_kill_p95_s``: 10 of the 32 are killed with SIGKILL; at once the same node and some others find every
  shard that still has a provider, and call what they found, one after another, until a live one answers. ``_dht_``: the
  DHT look-up until a live provider is confirmed; ``_new_``: a node that joins after the kill.
- memory and idle CPU per node, over some seconds without any work.

The last line of stdout is one JSON object.

    python tests/bench/bench_directory.py [--nodes N] [--kill N]
"""

import argparse
import json
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

SHARDS = 64
HELD = 8
AT_ONCE = 2
"""Processes that start at the same time."""
IDLE_SECONDS = 8.0
LIMIT_SECONDS = 120.0
BOUNDS = {"join_s": 30.0, "find_p95_s": 2.0, "find_after_kill_p95_s": 2.0}


class Node:
    """A node process."""

    def __init__(self, folder: Path, seeds: list[str], first: int, count: int) -> None:
        program = Path(__file__).with_name("directory_node.py")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(folder), ",".join(seeds), str(first), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.shards = range(first, first + count)

    def hello(self) -> None:
        """Wait until it listens."""
        told = self._read()
        self.peer_id, self.address, self.listening = told["peer_id"], told["address"], told["at"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"node {self.process.pid} ended with {self.process.wait(10)}")
        read: dict[str, Any] = json.loads(line)
        return read

    def ask(self, **command: object) -> dict[str, Any]:
        """One command, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Run:
    """One swarm, from its start to its end."""

    def __init__(self, folder: Path, nodes: int, kill: int) -> None:
        self._folder = folder
        self._nodes: list[Node] = []
        self._all: list[Node] = []
        self._count, self._kill = nodes, kill
        self._random = random.Random(1)
        self.figures: dict[str, Any] = {}

    def start(self, seeds: list[str], first: int, count: int) -> Node:
        node = Node(self._folder / str(len(self._all)), seeds, first, count)
        self._all.append(node)
        return node

    def everybody(self, **command: object) -> list[dict[str, Any]]:
        """Ask all nodes at once."""
        with ThreadPoolExecutor(len(self._nodes)) as pool:
            return list(pool.map(lambda node: node.ask(**command), self._nodes))

    def form(self) -> None:
        """Start the swarm, a few processes at a time; everybody knows two seeds."""
        began = time.monotonic()
        seeds: list[str] = []
        while len(self._nodes) < self._count:
            some = []
            for number in range(len(self._nodes), min(self._count, len(self._nodes) + AT_ONCE)):
                some.append(self.start(seeds, number * HELD % SHARDS, HELD))
            for node in some:
                node.hello()
                seeds = seeds if len(seeds) == 2 else [*seeds, node.address]
            self._nodes += some
        last = max(node.listening for node in self._nodes)
        told = self.everybody(op="joined", adverts=self._count, seconds=60)
        if any(each["adverts"] < self._count for each in told):
            raise SystemExit(f"not joined after 60 s: {sorted(each['adverts'] for each in told)}")
        self.figures |= {
            "start_s": round(last - began, 2),
            "join_s": round(max(each["at"] for each in told) - last, 3),
            "dht_peers_min": min(each["dht_peers"] for each in told),
        }
        self._seeds = seeds

    def newcomer(self, adverts: int) -> Node:
        """A node that serves nothing, when it has joined."""
        node = self.start(self._seeds, 0, 0)
        node.hello()
        told = node.ask(op="joined", adverts=adverts, seconds=60)
        node.join_s = told["at"] - node.listening  # type: ignore[attr-defined]
        return node

    def settle(self) -> None:
        """Wait until the provider records are in the DHT."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while any(each["announced"] < HELD + 1 for each in self.everybody(op="announced")):
            if time.monotonic() > deadline:
                raise SystemExit("the provider records did not get into the DHT")
            time.sleep(1)

    def idle(self) -> None:
        """Memory and CPU of nodes that have nothing to do."""
        processes = [psutil.Process(node.process.pid) for node in self._nodes]

        def cpu() -> list[float]:
            return [sum(process.cpu_times()[:2]) for process in processes]

        before, began = cpu(), time.monotonic()
        time.sleep(IDLE_SECONDS)
        took = time.monotonic() - began
        shares = [100 * (b - a) / took for a, b in zip(before, cpu(), strict=True)]
        memory = [process.memory_full_info() for process in processes]
        self.figures |= {
            "idle_cpu_percent_per_node": round(statistics.mean(shares), 2),
            "rss_mib_per_node": round(statistics.mean(each.rss for each in memory) / 2**20, 1),
            "pss_mib_per_node": round(statistics.mean(each.pss for each in memory) / 2**20, 1),
        }

    def find(self, node: Node, name: str, *, dht: bool, shards: list[int], dead: set[str]) -> None:
        """Find shards; every one must lead to a provider that lives."""
        rows = node.ask(op="find", shards=shards, dht=dht)["rows"]
        failed = [row["shard"] for row in rows if not set(row["found"]) - dead]
        self.figures[f"{name}_p50_s"] = round(statistics.median(row["seconds"] for row in rows), 5)
        self.figures[f"{name}_p95_s"] = p95([row["seconds"] for row in rows])
        self.figures[f"{name}_failed"] = len(failed)

    def kill(self) -> set[str]:
        """SIGKILL at once; not the seeds, which the new nodes were given."""
        victims = self._random.sample(self._nodes[2:], self._kill)
        for node in victims:
            node.process.send_signal(signal.SIGKILL)
        for node in victims:
            node.process.wait()
            self._nodes.remove(node)
        return {node.peer_id for node in victims}

    def run(self) -> None:
        """Everything."""
        self.form()
        print(f"# joined: {self.figures}", file=sys.stderr)
        newcomer = self.newcomer(self._count + 1)
        self.figures["new_join_s"] = round(newcomer.join_s, 3)  # type: ignore[attr-defined]
        everything = list(range(SHARDS))
        self.find(newcomer, "find", dht=False, shards=everything, dead=set())
        self.settle()
        sampled = self._random.sample(everything, 16)
        self.find(newcomer, "find_dht", dht=True, shards=sampled, dead=set())
        self.idle()
        dead = self.kill()
        left = sorted({shard for node in self._nodes for shard in node.shards})
        self._reach_after_kill([newcomer, *self._nodes[:3]], left, dead)
        self.find(newcomer, "find_after_kill_dht", dht=True, shards=[s for s in sampled if s in left], dead=dead)
        late = self.newcomer(len(self._nodes) + 2)
        self.figures["new_join_after_kill_s"] = round(late.join_s, 3)  # type: ignore[attr-defined]
        self.find(late, "find_after_kill_new", dht=False, shards=left, dead=dead)

    def _reach_after_kill(self, askers: list[Node], shards: list[int], dead: set[str]) -> None:
        with ThreadPoolExecutor(len(askers)) as pool:
            told = list(pool.map(lambda node: node.ask(op="reach", shards=shards)["rows"], askers))
        rows = [row for each in told for row in each]
        self.figures |= {
            "find_after_kill_p50_s": round(statistics.median(row["seconds"] for row in rows), 5),
            "find_after_kill_p95_s": p95([row["seconds"] for row in rows]),
            "find_after_kill_max_s": round(max(row["seconds"] for row in rows), 3),
            "find_after_kill_failed": sum(not row["reached"] or row["reached"] in dead for row in rows),
            "calls_per_find_after_kill": round(statistics.mean(row["calls"] for row in rows), 2),
        }

    def end(self) -> None:
        """Leave nothing behind."""
        for node in self._all:
            node.end()


def p95(seconds: list[float]) -> float:
    """The 95th percentile."""
    return round(sorted(seconds)[min(len(seconds) - 1, int(0.95 * len(seconds)))], 5)


def main() -> None:
    """Run it and print the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--kill", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), arguments.nodes, arguments.kill)
        try:
            run.run()
        finally:
            run.end()
    machine = {"cores": psutil.cpu_count(), "python": platform.python_version(), "load": psutil.getloadavg()[0]}
    ratios = {name: run.figures[name] for name in BOUNDS}
    print(
        json.dumps(
            {"bench": "directory", "ratios": ratios, "bounds": BOUNDS, "figures": run.figures, "machine": machine}
        )
    )


if __name__ == "__main__":
    main()
