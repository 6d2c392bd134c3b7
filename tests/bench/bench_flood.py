"""Five hostile peers flood a node and hold its sockets, over libp2p and HTTP: what honest users notice, what it costs.

A whole swarm of daemons (one orchestrator with the gateway, two workers, a tiny model), asked one question after the
other. Five hostile processes go through every attack of ``tests/e2e/hostile.py`` and ``tests/faults/http_hostile.py``
against the orchestrator and a worker. Quiet and besieged stretches alternate, so that both see the same machine. The
attackers run at the lowest priority: what is measured is what they do to the nodes, not that they share two cores with
them, as five other machines would not.

Figures: ``flood_memory_mb``, the largest growth of a node during an attack over its size before the first; and
``flood_p99_ratio``, p99 of honest answers under attack over that of the quiet stretches. Prints one JSON line.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from node.rig import NodeProcess
from tests.faults.rig import Rig, swarm_of

TESTS = Path(__file__).resolve().parents[1]
BOUNDS = {"flood_memory_mb": 256, "flood_p99_ratio": 2.0}
HOSTILE_PEERS = 5
STRETCHES, STRETCH_SECONDS = 6, 6.0
P2P = (
    *("silent", "multistream", "libp2p_noise", "lane_noise", "lane_length", "garbage", "call_flood", "unknown_methods"),
    *("frame_partial", "bad_frames", "half_read", "identities", "header_bombs", "kad_streams", "rpc_streams"),
)
HTTP = ("slow_head", "slow_body", "silent", "huge_length", "huge_chunk", "huge_head")
HTTP_WITH_KEY = ("half_body", "slow_chunks", "gzip_bomb", "deep_json", "never_read")
SPIN = "print('begin', flush=True)\nwhile True: pass"


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of all nodes: on a core in user and kernel mode, ready but waiting for one; and of the attackers."""

    user_s: float
    system_s: float
    waited_s: float
    attackers_s: float = 0.0

    def __sub__(self, before: "Spent") -> "Spent":
        return Spent(self.user_s - before.user_s, self.system_s - before.system_s, self.waited_s - before.waited_s)

    def per_answer(self, answers: int, seconds: float) -> dict[str, float]:
        """Milliseconds for each answer; of the attackers, the share of one core that they had."""
        each = {"user": self.user_s, "system": self.system_s, "waited": self.waited_s}
        told = {f"nodes_{what}_ms": round(1000 * spent / answers) for what, spent in each.items()}
        return {**told, "attackers_cores": round(self.attackers_s / seconds, 2)}


def _waited_s(pid: int) -> float:
    """How long a process' threads were ready to run and did not, where the kernel tells."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(path.read_text().split()[1])
    return total / 1e9


def _cpu_s(processes: list[subprocess.Popen[bytes]]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            total += sum(psutil.Process(process.pid).cpu_times()[:2])
    return total


class Besieged:
    """The swarm, its honest clients and its attackers."""

    def __init__(self, rig: Rig, stretch_s: float) -> None:
        self.rig = rig
        self.text = rig.reference(TOKENS)
        self.stretch_s = stretch_s
        self.quiet: list[float] = []
        self.attacked: list[float] = []
        self.sieges: list[dict[str, object]] = []
        self.size_before = self.sizes()
        self.growth_bytes = 0
        self._kinds = itertools.cycle(self._all_attacks())

    def sizes(self) -> list[int]:
        """Resident bytes of every node."""
        return [psutil.Process(node.process.pid).memory_info().rss for node in self.rig.swarm.nodes if node.process]

    def _all_attacks(self) -> list[tuple[str, list[str]]]:
        """Name and command of every attack, mixed."""
        rig, found = self.rig, []
        host, port = rig.url(rig.first).removeprefix("http://").split(":")
        program = str(TESTS / "faults" / "http_hostile.py")
        for number, kind in enumerate((*HTTP, *HTTP_WITH_KEY)):
            source = f"127.{60 + number}.1.1"
            key = rig.keys[rig.first.name] if kind in HTTP_WITH_KEY else ""
            found.append((f"http {kind}", [program, kind, host, port, str(self.stretch_s), key, source]))
        for number, kind in enumerate(P2P):
            target: NodeProcess = (rig.first, rig.workers[0])[number % 2]
            _, _, host, _, port, *_ = target.status["network"]["addresses"][0].split("/")
            source, program = f"127.{30 + number}.1.1", str(TESTS / "e2e" / "hostile.py")
            command = [program, kind, host, port, target.peer_id, str(self.stretch_s), source]
            found.insert(2 * number, (f"p2p {kind}", command))
        return found

    def ask_for(self, seconds: list[float]) -> None:
        """Honest questions for one stretch."""
        ends = time.monotonic() + self.stretch_s
        while time.monotonic() < ends:
            began = time.monotonic()
            text, _ = self.rig.ask(tokens=TOKENS)
            assert text == self.text
            seconds.append(time.monotonic() - began)
            grown = [now - before for now, before in zip(self.sizes(), self.size_before, strict=True)]
            self.growth_bytes = max(self.growth_bytes, *grown)

    def siege(self) -> None:
        """One stretch under attack by five peers at once."""
        chosen = [next(self._kinds) for _ in range(HOSTILE_PEERS)]
        seconds: list[float] = []
        spent = self.under([command for _, command in chosen], seconds)
        self.attacked += seconds
        self.sieges.append({"attacks": [name for name, _ in chosen], **told(seconds, spent)})

    def each_attack(self, only: str = "") -> dict[str, dict[str, float]]:
        """Five peers with the same attack, for each whose name contains ``only``: what honest answers took, and what
        each cost the nodes (:class:`Spent`). ``none``: no attack; ``spin``: five processes that only burn CPU time,
        which is what sharing a machine with attackers costs by itself."""
        found = {}
        for name, command in [("none", []), ("spin", ["-c", SPIN]), *self._all_attacks()]:
            if name in ("none", "spin") or only in name:
                seconds: list[float] = []
                spent = self.under([command] * HOSTILE_PEERS if command else [], seconds)
                found[name] = told(seconds, spent)
        return found

    def _spent(self) -> Spent:
        nodes = [node.process.pid for node in self.rig.swarm.nodes if node.process]
        times = [psutil.Process(pid).cpu_times() for pid in nodes]
        waits = [_waited_s(pid) for pid in nodes]
        return Spent(sum(each.user for each in times), sum(each.system for each in times), sum(waits))

    def under(self, commands: list[list[str]], seconds: list[float]) -> Spent:
        """Honest questions for one stretch while these attack."""
        attackers = [self._attacker(command) for command in commands]
        try:
            for attacker in attackers:
                assert attacker.stdout is not None
                assert attacker.stdout.readline() == b"begin\n"
            before, own_before = self._spent(), _cpu_s(attackers)
            self.ask_for(seconds)
            return replace(self._spent() - before, attackers_s=_cpu_s(attackers) - own_before)
        finally:
            for attacker in attackers:
                attacker.kill()
                attacker.wait()
                if attacker.stdout is not None:
                    attacker.stdout.close()

    def figures(self) -> dict[str, object]:
        """As printed."""
        return {
            "quiet_p50_s": round(sorted(self.quiet)[len(self.quiet) // 2], 4),
            "quiet_p99_s": round(p99(self.quiet), 4),
            "attacked_p50_s": round(sorted(self.attacked)[len(self.attacked) // 2], 4),
            "attacked_p99_s": round(p99(self.attacked), 4),
            "answers": [len(self.quiet), len(self.attacked)],
            "sieges": self.sieges,
        }

    def _attacker(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
            start_new_session=True,
        )
        with suppress(OSError):  # where the kernel groups processes by session, niceness counts inside of one only
            Path(f"/proc/{process.pid}/autogroup").write_text("19")
        return process


TOKENS = 60


def p99(seconds: list[float]) -> float:
    """The 99th percentile."""
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def told(seconds: list[float], spent: Spent) -> dict[str, float]:
    """Of one stretch: answers a second, their times in milliseconds, what each cost."""
    p50 = sorted(seconds)[len(seconds) // 2]
    times = {"p50_ms": round(1000 * p50), "p99_ms": round(1000 * p99(seconds))}
    return {"per_s": round(len(seconds) / sum(seconds), 1), **times, **spent.per_answer(len(seconds), sum(seconds))}


def stretches(count: int) -> Iterator[bool]:
    """Whether the next stretch is a quiet one; quiet ones begin and end it."""
    for _ in range(count):
        yield from (True, False)
    yield True


def measure(
    count: int = STRETCHES, seconds: float = STRETCH_SECONDS, keep: str = "", *, each: str | None = None
) -> dict[str, Any]:
    """The ratios, their bounds and the figures behind them, of ``count`` stretches under attack and as many without;
    ``each``: also what every attack with this in its name costs by itself."""
    with (
        nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder,
        swarm_of(Path(folder), settings={"p2p.loopback_limits": True}) as rig,
    ):
        besieged = Besieged(rig, seconds)
        for is_quiet in stretches(count):
            if is_quiet:
                besieged.ask_for(besieged.quiet)
            else:
                besieged.siege()
        print(f"# {besieged.figures()}", file=sys.stderr)
        figures = besieged.figures()
        if each is not None:
            figures["each_attack"] = besieged.each_attack(each)
        rig.check_money()
    ratios = {
        "flood_memory_mb": round(besieged.growth_bytes / 1e6, 1),
        "flood_p99_ratio": round(p99(besieged.attacked) / p99(besieged.quiet), 2),
    }
    return {"ratios": ratios, "bounds": BOUNDS, "figures": figures}


def main() -> None:
    """Run it and print the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stretches", type=int, default=STRETCHES, help="with an attack, and as many without")
    parser.add_argument("--seconds", type=float, default=STRETCH_SECONDS, help="of each")
    parser.add_argument("--keep", metavar="FOLDER", default="", help="keep the nodes' folders with their logs here")
    each = "also what every attack by itself costs the nodes; NAME: of those whose name has this in it"
    parser.add_argument("--each", nargs="?", const="", metavar="NAME", help=each)
    arguments = parser.parse_args()
    found = measure(arguments.stretches, arguments.seconds, arguments.keep, each=arguments.each)
    machine = {"cores": psutil.cpu_count(), "python": platform.python_version(), "load": psutil.getloadavg()[0]}
    print(json.dumps({"bench": "flood", **found, "machine": machine}))


if __name__ == "__main__":
    main()
