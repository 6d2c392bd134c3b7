"""Bank test: four witnesses (f = 1) and three clients as real processes, credits moved all the time, everything fails.

Not a test (``test_bank`` runs a very short one); ``make bank MINUTES=5`` runs this. Clients transfer, grant, open
channels, top up, pay each other for work by vouchers, claim, reclaim after expiry, two things at a time each. A thief
signs two entries for a slot and claims above freezes (:mod:`tests.soak.bank_thief`). A seeded nemesis kills (-9),
stops, cuts off and slows down (:mod:`tests.soak.bank_nemesis`). The ledger's clock runs faster than the machine's, so
that channels expire.

Checked (:mod:`tests.soak.bank_judge`): every read of every node totals the supply; no negative balance; no two final
entries in a slot; a client reads what it was told; at the end, healed, every client can still pay, all nodes agree,
every acknowledged entry and claim is in every file, every file verifies, and a second count comes to the same.
Choices come from the seed; what happens when is up to the machine. Prints one JSON line.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.soak.bank_judge import Judge
from tests.soak.bank_nemesis import Nemesis
from tests.soak.bank_node import BROKEN
from tests.soak.bank_rig import Answer, Bank, Member
from tests.soak.bank_thief import Thief

TASKS_PER_CLIENT = 2
READ_PAUSE_S = 0.3
GRANT = 20_000_000
CONVERGE_SECONDS_MAX = 600
FORKED_SECONDS_MAX = 30
"""Nodes that were made to contradict each other will never agree: no use to wait for long."""
HOUR_MS = 3600 * 1000


class Recorder:
    """Every command of the clients and its answer, in a file; what is final goes to the judge."""

    def __init__(self, path: Path, judge: Judge) -> None:
        self._file = path.open("w", buffering=1)
        self._judge = judge
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def ask(self, member: Member, op: str, **fields: Any) -> Answer:
        """Give a command, keep both."""
        grants = sum(amount for kind, _, amount, *_ in fields.get("ops", ()) if kind == "grant")
        self._judge.tried_grants += grants
        began = time.time()
        answer = member.ask(op, **fields)
        outcome = "unknown" if answer is None else "ok" if "ok" in answer else "refused"
        with self._lock:
            self._file.write(
                json.dumps({"at": began, "s": time.time() - began, "who": member.name, "op": op, **fields}
                           | {"answer": answer}) + "\n"
            )  # fmt: skip
            self.counts[f"{self._name(op, fields)} {outcome}"] += 1
            if outcome == "refused":
                assert answer is not None
                self.errors[f"{self._name(op, fields)}: {answer['error'][0]}"] += 1
        if outcome == "ok":
            assert answer is not None
            self._keep(answer["ok"], grants)
        return answer

    def _name(self, op: str, fields: dict[str, Any]) -> str:
        return "+".join(sorted({str(one[0]) for one in fields["ops"]})) if op == "entry" else op

    def _keep(self, told: dict[str, Any], grants: int) -> None:
        if "entry" in told:
            self._judge.final(told["account"], told["seq"], told["entry"])
            self._judge.granted += grants
        for channel, paid in told.get("claims", {}).items():
            self._judge.claimed(channel, paid)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Customer(threading.Thread):
    """One of a client's tasks."""

    def __init__(self, bank: Bank, member: Member, number: int, seed: int, recorder: Recorder) -> None:
        super().__init__(daemon=True)
        self._others = [other for other in bank.clients if other is not member]
        self._member = member
        self._issuer = member is bank.clients[0]
        self._random = random.Random(f"customer {seed} {member.name} {number}")
        self._recorder = recorder
        self._opened: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Do one thing after the other."""
        kinds = {"transfer": 30, "work": 25, "several": 10, "settle": 12, "reclaim": 6, "open": 7, "topup": 7}
        kinds |= {"overdraw": 3} | ({"grant": 12} if self._issuer else {})
        while not self.ended.wait(self._random.uniform(0.0, 0.6)):
            if not self._member.running:
                continue
            (kind,) = self._random.choices(list(kinds), list(kinds.values()))
            getattr(self, f"_{kind}")()

    def _ask(self, op: str, **fields: Any) -> Answer:
        return self._recorder.ask(self._member, op, **fields)

    def _other(self) -> Member:
        return self._random.choice(self._others)

    def _transfer(self) -> None:
        self._ask("entry", ops=[["transfer", self._other().key, self._random.randrange(1, 500_000)]])

    def _overdraw(self) -> None:
        self._ask("entry", ops=[["transfer", self._other().key, 1 << 50]])

    def _grant(self) -> None:
        self._ask("entry", ops=[["grant", self._other().key, self._random.randrange(1, 2_000_000)]])

    def _work(self) -> None:
        self._ask("work", worker=self._other().key, calls=self._random.randrange(1, 30))

    def _settle(self) -> None:
        self._ask("settle")

    def _reclaim(self) -> None:
        self._ask("reclaim")

    def _open(self) -> None:
        self._append(self._an_open())

    def _an_open(self) -> list[Any]:
        return ["open", self._other().key, self._random.randrange(10_000, 200_000), self._random.randrange(2 * HOUR_MS)]

    def _topup(self) -> None:
        if self._opened:
            self._append(["topup", self._random.choice(self._opened), self._random.randrange(1, 50_000)])

    def _several(self) -> None:
        ops = [["transfer", self._other().key, self._random.randrange(1, 50_000)] for _ in range(2)]
        self._append(*ops, self._an_open(), self._an_open())

    def _append(self, *ops: list[Any]) -> None:
        answer = self._ask("entry", ops=list(ops))
        if answer and "ok" in answer:
            self._opened = (self._opened + answer["ok"]["opened"])[-8:]


class Reader(threading.Thread):
    """Reads one node after the other."""

    def __init__(self, bank: Bank, seed: int, judge: Judge) -> None:
        super().__init__(daemon=True)
        self._members = list(bank.members.values())
        self._random = random.Random(f"reader {seed}")
        self._judge = judge
        self.ended = threading.Event()

    def run(self) -> None:
        """See the class."""
        while not self.ended.wait(READ_PAUSE_S):
            read(self._random.choice(self._members), self._judge)


def read(member: Member, judge: Judge) -> dict[str, Any] | None:
    """One read, judged."""
    floor = judge.seq_of(member.key)
    told = member.ask("read", seconds=10)
    if told is None or "ok" not in told:
        return None
    judge.read(member.name, told["ok"], member.key, floor)
    return dict(told["ok"])


def converge(bank: Bank, recorder: Recorder, judge: Judge) -> float:
    """After healing: every client pays once more, then all nodes agree. Seconds until they did."""
    began = time.monotonic()
    seconds = FORKED_SECONDS_MAX if judge.violations else CONVERGE_SECONDS_MAX
    ends = began + seconds
    waiting = list(bank.clients)
    while waiting and time.monotonic() < ends:
        for client in list(waiting):
            other = next(one for one in bank.clients if one is not client)
            answer = recorder.ask(client, "entry", ops=[["transfer", other.key, 1]])
            if answer and "ok" in answer:
                waiting.remove(client)
        time.sleep(0.2)
    for client in waiting:
        judge.wrong(f"I6: {client.name} cannot pay any more, with every witness up and reachable")
    clients = {client.key for client in bank.clients}
    while not _closed(bank, recorder, judge, clients):  # channels claim and close by themselves: wait for the last
        if time.monotonic() > ends:
            judge.wrong(f"channels of clients are still open {seconds} s after everything was healed")
            break
    while time.monotonic() < ends:
        states = [read(member, judge) for member in bank.members.values()]
        if all(states) and len({s["digest"] for s in states if s}) == 1 and not any(s["pending"] for s in states if s):
            return time.monotonic() - began
        time.sleep(0.5)
    judge.wrong(f"I5: the nodes do not agree {seconds} s after everything was healed")
    return time.monotonic() - began


def _closed(bank: Bank, recorder: Recorder, judge: Judge, payers: set[str]) -> bool:
    """Claim and reclaim at every client; whether no channel of a client is open any more anywhere."""
    for client in bank.clients:
        recorder.ask(client, "settle")
        recorder.ask(client, "reclaim")
    states = [read(member, judge) for member in bank.members.values()]
    return all(states) and not any(
        line[0] in payers for state in states if state for line in state["channels"].values()
    )


def run(folder: Path, minutes: float, seed: int, **how: Any) -> dict[str, Any]:
    """The whole of it; the figures, violations among them. ``how``: :class:`Bank`'s options."""
    judge = Judge()
    bank = Bank(folder, seed, **how)
    recorder = Recorder(folder / "history.jsonl", judge)
    try:
        bank.start()
        for client in bank.clients:
            answer = recorder.ask(bank.clients[0], "entry", ops=[["grant", client.key, GRANT]])
            assert answer, "the first grants must be answered"
        customers = [
            Customer(bank, client, number, seed, recorder)
            for client in bank.clients
            for number in range(TASKS_PER_CLIENT)
        ]
        nemesis, thief = Nemesis(bank, seed, judge.wrong), Thief(bank, seed, judge)
        tasks = [*customers, thief, Reader(bank, seed, judge)]
        for task in (*tasks, nemesis):
            task.start()
        time.sleep(60 * minutes)
        for task in tasks:
            task.ended.set()
        nemesis.end()
        for task in tasks:
            task.join()
        for witness in bank.witnesses:  # all at once, once more: whoever forgot a promise is found now
            witness.kill()
        for witness in bank.witnesses:
            witness.start()
        for witness in bank.witnesses:
            witness.wait_up()
        thief.finish()
        converged_s = converge(bank, recorder, judge)
        for member in bank.members.values():
            member.stop()
        held = judge.files({name: member.ledger_file for name, member in bank.members.items()}, bank.genesis)
    finally:
        recorder.close()
        bank.close()
    return {
        "bench": "bank",
        "minutes": minutes,
        "seed": seed,
        "lines": "network namespaces" if bank.rig else f"loopback, lines stay whole ({bank.why_loopback})",
        "violations": judge.violations,
        "acknowledged_entries": len(judge.acknowledged),
        "acknowledged_claims": len(judge.claims),
        "reads": sum(judge.reads.values()),
        "operations": dict(sorted(recorder.counts.items())),
        "errors": dict(recorder.errors.most_common(12)),
        "nemesis": dict(sorted(nemesis.counts.items())),
        "starts": sum(member.starts for member in bank.members.values()),
        "thief": dict(sorted(thief.counts.items())),
        "converged_s": round(converged_s, 1),
        "tracebacks": {m.name: n for m in bank.members.values() if (n := m.log().count("Traceback"))},
        "held": held,
    }


def main() -> int:
    """Run it, print the JSON line; 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=int, default=300, help="how much faster the ledger's clock runs")
    parser.add_argument("--loopback", action="store_true", help="no network namespaces, no partitions")
    parser.add_argument("--broken", choices=sorted(BROKEN), default="", help="a build that forgets to write this")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the nodes' folders and the history here")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # cleans up on its way
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        told = run(
            folder, arguments.minutes, arguments.seed,
            speed=arguments.speed, loopback=arguments.loopback, broken=arguments.broken,
        )  # fmt: skip
    print(json.dumps(told))
    return int(bool(told["violations"]))


if __name__ == "__main__":
    sys.exit(main())
