"""What happens to the nodes of the bank test: killed, stopped, cut off, slowed down. All choices come from the seed.

Not a test. Without network namespaces lines stay whole: kills and stops are left.

Invariants: everything that was done is undone by :meth:`Nemesis.end`; a process that ends without being killed is a
violation.
"""

import contextlib
import heapq
import itertools
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from tests.netns.rig import TABLE, Host
from tests.soak.bank_rig import Bank, Member

DOWN_MAX = 2
"""So many nodes are dead, starting or stopped at once, at most: else hardly anything becomes final."""
PAUSE_S = (1.0, 3.0)
TIME_OFF_S = (0.3, 3.0)
PART_S = (3.0, 9.0)
SLOW_S = (4.0, 10.0)


class Nemesis(threading.Thread):
    """Does one thing after the other until told to end."""

    def __init__(self, bank: Bank, seed: int, wrong: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self._bank = bank
        self._random = random.Random(f"nemesis {seed}")
        self._wrong = wrong
        self._undo: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._down: set[str] = set()
        self._parted = False
        self._slow: set[str] = set()
        self.ended = threading.Event()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """See the class."""
        kinds = ["kill witness", "kill witness", "kill client", "stop"]
        if self._bank.rig is not None:
            kinds += ["part", "part", "slow"]
        self._do("kill witness")  # also the shortest run has one
        while not self.ended.wait(self._random.uniform(*PAUSE_S)):
            self._due(time.monotonic())
            self._look()
            self._do(self._random.choice(kinds))

    def end(self) -> None:
        """Undo everything; everybody runs afterwards."""
        self.ended.set()
        self.join()
        self._due(float("inf"))
        for member in self._bank.members.values():
            member.wait_up()
        self._look()

    def _due(self, now: float) -> None:
        while self._undo and self._undo[0][0] <= now:
            heapq.heappop(self._undo)[2]()

    def _later(self, seconds: tuple[float, float], undo: Callable[[], None]) -> None:
        heapq.heappush(self._undo, (time.monotonic() + self._random.uniform(*seconds), next(self._numbers), undo))

    def _look(self) -> None:
        """Whoever serves again is not down any more; whoever ended by itself is a fault."""
        for member in self._bank.members.values():
            if member.died:
                self._wrong(f"{member.name} ended by itself: {member.tail()}")
                member.start()
        self._down = {name for name in self._down if not self._bank.members[name].running} | {
            name for name in self._down if name in self._stopped
        }

    @property
    def _stopped(self) -> set[str]:
        return {name for name, member in self._bank.members.items() if member.stopped}

    def _do(self, kind: str) -> None:
        if kind == "part":
            if not self._parted:
                self._part()
            return
        members = self._bank.clients if kind == "kill client" else self._bank.witnesses
        if kind in ("stop", "slow"):
            members = list(self._bank.members.values())
        victim = self._random.choice(members)
        if kind == "slow":
            self._slow_down(victim)
        elif victim.name not in self._down and len(self._down) < DOWN_MAX:
            self._down.add(victim.name)
            self._take_down(kind, victim)

    def _take_down(self, kind: str, victim: Member) -> None:
        if kind == "stop":
            victim.send_signal(signal.SIGSTOP)
            victim.stopped = True
            self._later(PART_S, lambda: self._go_on(victim))
        else:
            victim.kill()
            self._later(TIME_OFF_S, victim.start)
        self._say(kind, victim.name)

    def _go_on(self, victim: Member) -> None:
        victim.stopped = False
        victim.send_signal(signal.SIGCONT)

    # lines

    def _part(self) -> None:
        rig = self._bank.rig
        assert rig is not None
        kind, these, those = self._split()
        one_way = self._random.random() < 0.4
        (rig.mute if one_way else rig.part)(these, those)
        self._parted = True
        self._later(PART_S, self._heal)
        self._say(f"{kind}, one way" if one_way else kind, "|".join(str(len(side)) for side in (these, those)))

    def _split(self) -> tuple[str, Sequence[Host], Sequence[Host]]:
        """The name of a partition and its two sides (in this order for one that is one-way)."""
        witnesses, clients = _hosts(self._bank.witnesses), _hosts(self._bank.clients)
        for hosts in (witnesses, clients):
            self._random.shuffle(hosts)
        kind = self._random.choice(("minority", "majority", "halves", "client", "witnesses"))
        cut, rest = {
            "minority": (witnesses[:1], witnesses[1:] + clients),
            "majority": (witnesses[:3], witnesses[3:] + clients),
            "halves": (witnesses[:2] + clients[:1], witnesses[2:] + clients[1:]),
            "client": (clients[:1], witnesses + clients[1:]),
            "witnesses": (witnesses[:2], witnesses[2:]),
        }[kind]
        return (f"part {kind}", cut, rest) if self._random.random() < 0.5 else (f"part {kind}", rest, cut)

    def _heal(self) -> None:
        assert self._bank.rig is not None
        self._bank.rig.heal()
        self._parted = False

    def _slow_down(self, victim: Member) -> None:
        """Lose packets, or let through a few kilobytes a second only (the rest is lost, so that TCP goes slower)."""
        host = victim.host
        assert host is not None
        if victim.name in self._slow:
            return
        self._slow.add(victim.name)
        if self._random.random() < 0.5:
            host.lose(self._random.choice((10, 20, 30)))
            self._say("slow: loss", victim.name)
        else:
            rule = f'iifname != "lo" limit rate over {self._random.choice((8, 24))} kbytes/second drop'
            host.run("nft", "-f", "-", stdin=TABLE.format(table="ip narrow", hook="input priority -300", rules=rule))
            self._say("slow: narrow", victim.name)
        self._later(SLOW_S, lambda: self._speed_up(victim, host))

    def _speed_up(self, victim: Member, host: Host) -> None:
        host.lose(0)
        with contextlib.suppress(RuntimeError):
            host.run("nft", "delete", "table", "ip", "narrow")
        self._slow.discard(victim.name)

    def _say(self, event: str, who: str) -> None:
        self.counts[event] += 1
        print(f"# {time.strftime('%H:%M:%S')} {event}: {who}", file=sys.stderr, flush=True)


def _hosts(members: Sequence[Member]) -> list[Host]:
    return [member.host for member in members if member.host is not None]
