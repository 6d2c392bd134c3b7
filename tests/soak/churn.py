"""Churn: a swarm of twelve daemons in which a node joins or dies every ten seconds while four clients ask all the time.

Not a test (``test_churn`` runs a short one); ``make soak MINUTES=60`` runs this for an hour. Two nodes ask and pay, one
by way of experts and one by way of stages (the first is witness and publisher, too); up to ten others serve, the rest
of twelve are dead. Who dies, how (killed, hung and killed, ended in order) and whether it comes back with its files or
without comes from the seed.

Checked: every answer is the one given before the churn began (greedy and sampled with a seed); at the end every shard
has its replicas again, every ledger verifies, they agree, and every voucher is paid. Prints one JSON line.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from node.rig import NodeProcess
from tests.faults.rig import MODEL, SECONDS_MAX, Rig, swarm_of

WORKERS, SPARE, LIVE_MIN = 10, 2, 7
REPLICAS = 3
STEP_SECONDS = 10.0
CLIENTS = 4
TOKENS = 40
QUESTIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": text}], **sampling}
    for text, sampling in (
        ("What is it?", {"temperature": 0}),
        ("Who was it, and where?", {"temperature": 0}),
        ("Why is it so?", {"temperature": 0.8, "seed": 7, "top_p": 0.9}),
        ("And what is it now, after all of that?", {"temperature": 1.0, "seed": 11}),
    )
]
ENDINGS = ("kill", "kill", "kill", "freeze", "stop")


@dataclass
class Told:
    """What the clients saw."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    lowest: int = 99


class Client(threading.Thread):
    """Asks one gateway one question after the other until told to end."""

    def __init__(self, rig: Rig, number: int, references: Mapping[tuple[str, int], str], told: Told) -> None:
        super().__init__(daemon=True)
        self._node = rig.orchestrators[number % len(rig.orchestrators)]
        self._number = number
        self._references = references
        self._told = told
        self._http = client_of(rig, self._node)
        self.ended = threading.Event()

    def run(self) -> None:
        """See the class."""
        number = self._number
        while not self.ended.is_set():
            number = (number + 1) % len(QUESTIONS)
            started = time.monotonic()
            try:
                text = asked(self._http, number)
            except (httpx.HTTPError, KeyError) as error:
                said = error.response.text if isinstance(error, httpx.HTTPStatusError) else repr(error)
                self._told.failed[f"{self._node.name}: {said[:300]}"] += 1
                time.sleep(0.5)
                continue
            self._told.seconds.append(time.monotonic() - started)
            self._told.answers += 1
            if text != self._references[self._node.name, number]:
                self._told.wrong.append(f"{self._node.name}, question {number}: {text!r}")
        self._http.close()


def client_of(rig: Rig, node: NodeProcess) -> httpx.Client:
    """An HTTP client of a node's gateway."""
    headers = {"Authorization": f"Bearer {rig.keys[node.name]}"}
    return httpx.Client(base_url=rig.url(node), headers=headers, timeout=SECONDS_MAX)


def asked(http: httpx.Client, number: int) -> str:
    """The answer to one of the questions."""
    body = {"model": MODEL, "max_tokens": TOKENS, "min_tokens": TOKENS, **QUESTIONS[number]}
    answer = http.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


class Churn:
    """Lets nodes join and die."""

    def __init__(self, rig: Rig, seed: int, told: Told) -> None:
        self._rig = rig
        self._random = random.Random(seed)
        self._told = told
        self._frozen: list[NodeProcess] = []

    def step(self) -> None:
        """One event."""
        self._end_frozen()
        live, dead = self._rig.live, [worker for worker in self._rig.workers if not worker.alive]
        joins = len(live) <= LIVE_MIN or (bool(dead) and self._random.random() < 0.5)
        if joins:
            self._join(self._random.choice(dead), empty=self._random.random() < 0.5)
        else:
            self._die(self._random.choice(live), self._random.choice(ENDINGS))
        with suppress(ValueError):
            self._told.lowest = min(self._told.lowest, *self._rig.counts().values())

    def _join(self, node: NodeProcess, *, empty: bool) -> None:
        if empty:  # as a new node, as far as shards go; what it was promised stays
            shutil.rmtree(node.data / "models", ignore_errors=True)
            (node.data / "hosting.json").unlink(missing_ok=True)
        node.start()
        self._say("join without its files" if empty else "return", node)

    def _die(self, node: NodeProcess, how: str) -> None:
        if how == "kill":
            node.kill()
        elif how == "stop":
            node.stop()
        else:
            assert node.process is not None
            node.process.send_signal(19)  # SIGSTOP: it hangs, and dies at the next step
            self._frozen.append(node)
        self._say(how, node)

    def _end_frozen(self) -> None:
        for node in self._frozen:
            node.kill()
        self._frozen.clear()

    def _say(self, event: str, node: NodeProcess) -> None:
        self._told.events[event] += 1
        print(f"# {time.strftime('%H:%M:%S')} {event}: {node.name}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Everybody comes back."""
        self._end_frozen()
        dead = [worker for worker in self._rig.workers if not worker.alive]
        self._rig.start(*dead)
        for node in self._rig.live:
            node.wait_started()


def run(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """The whole of it; the figures. Raises AssertionError if an answer, a credit or a replica is missing."""
    told = Told()
    with swarm_of(folder, workers=WORKERS, replicas=REPLICAS, mode="both", routes=("experts", "stages")) as rig:
        for number in range(SPARE):
            rig.add_worker(f"spare-{number}")
        rig.wait_replicas(REPLICAS)
        references = {}
        for node in rig.orchestrators:
            with client_of(rig, node) as http:
                references |= {(node.name, number): asked(http, number) for number in range(len(QUESTIONS))}
        clients = [Client(rig, number, references, told) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        churn, ends = Churn(rig, seed, told), time.monotonic() + 60 * minutes
        while time.monotonic() < ends:
            began = time.monotonic()
            churn.step()
            time.sleep(max(0.0, min(ends, began + STEP_SECONDS) - time.monotonic()))
        for client in clients:
            client.ended.set()
        for client in clients:
            client.join(SECONDS_MAX)
        churn.end()
        began = time.monotonic()
        rig.wait_replicas(REPLICAS, seconds=120)
        restored_s = time.monotonic() - began
        print(f"# {figures(told, restored_s, {}, minutes=minutes, seed=seed)}", file=sys.stderr)
        money = rig.check_money()
    return figures(told, restored_s, money, minutes=minutes, seed=seed)


def figures(told: Told, restored_s: float, money: Mapping[str, int], **how: float) -> dict[str, Any]:
    """As printed."""
    seconds = sorted(told.seconds)
    return {
        "bench": "churn",
        **how,
        "answers": told.answers,
        "wrong": len(told.wrong),
        "wrong_told": told.wrong[:3],
        "failed": sum(told.failed.values()),
        "failed_told": dict(told.failed.most_common(5)),
        "p50_s": round(seconds[len(seconds) // 2], 3),
        "p99_s": round(seconds[int(0.99 * len(seconds))], 3),
        "max_s": round(seconds[-1], 3),
        "events": dict(told.events),
        "fewest_replicas_seen": told.lowest,
        "restored_s": round(restored_s, 1),
        "money": dict(money),
    }


def main() -> int:
    """Run it, print the JSON line; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the nodes' folders with their logs here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = run(Path(arguments.keep or folder), arguments.minutes, arguments.seed)
    print(json.dumps(told))
    return int(bool(told["wrong"] or told["failed"]))


if __name__ == "__main__":
    sys.exit(main())
