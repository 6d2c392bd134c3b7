"""The first minute: a swarm of real processes answers a question, loses a node in mid-answer, and settles its bills.

Drives everything from outside, as an operator and an API client would: config files, processes, the control socket,
HTTP. Owns what is shown and what is checked; every check that fails is named and ends the demo with exit code 1.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from config.errors import EXIT_FAILED, EXIT_OK, LocalError, RiosError
from config.vocabulary import format_credits
from node.rig import NodeProcess, Swarm, rios, wait_for
from p2p.core.identity import Identity

QUESTION = "What is the capital of France? Answer, then describe the city in five sentences."
EXPECTED = "Paris"
MIN_TOKENS = 64
MAX_TOKENS = 160
KILL_AFTER_TOKENS = 20
REPLICAS = 2
ORCHESTRATOR_BYTES_MAX = 40 << 20
"""Little room for experts in the node that answers: the others have to work, however placement falls out."""
MEET_SECONDS_MAX = 30.0
PLACEMENT_SECONDS_MAX = 180.0
LEDGER_SECONDS_MAX = 20.0
HTTP_SECONDS_MAX = 120.0
GRANT_MICROCREDITS = 1_000_000_000


@dataclass(slots=True)
class Answer:
    """One streamed answer and what the gateway said about it."""

    text: str = ""
    tokens: int = 0
    tokens_per_s: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What ``--json`` prints."""

    answer: str = ""
    reference_answer: str = ""
    answer_after_kill: str = ""
    tokens_per_s: float = 0.0
    local_tokens_per_s: float = 0.0
    nodes: list[dict[str, Any]] = field(default_factory=list)
    killed_peer: str = ""
    ledger: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def faults(self) -> list[str]:
        """Every check that failed, in words."""
        found = []
        if self.answer != self.reference_answer:
            found.append("the swarm's answer differs from the reference computed in one local process")
        if self.answer_after_kill != self.answer:
            found.append("the answer after a node was killed differs from the one before")
        if EXPECTED not in self.answer:
            found.append(f"the answer does not contain {EXPECTED!r}")
        found += [f"node {n['peer_id']} computed no expert rows" for n in self.nodes if not n["expert_rows"]]
        found += [f"the ledger on {peer} does not verify" for peer, ok in self.ledger["verified"].items() if not ok]
        if not self.ledger["sum_ok"]:
            found.append("the ledger's balances do not add up to what was granted")
        if not self.ledger["certificates"]:
            found.append("the ledger holds no certificates: nobody was paid")
        return found


class Demo:
    """The steps, in order."""

    def __init__(self, swarm: Swarm, console: Console) -> None:
        self.swarm = swarm
        self.console = console
        self.outcome = Outcome()
        self.orchestrator: NodeProcess
        self.workers: list[NodeProcess] = []
        self.model = ""
        self.api_key = ""
        self.aside = ThreadPoolExecutor(2)
        """For one-shot commands that take their time while something else is waited for."""

    def say(self, text: str = "") -> None:
        """One line for people."""
        self.console.print(text, highlight=False)

    def write(self, text: str) -> None:
        """A piece of an answer, as it is: rendering each token would take from the cores that the nodes share."""
        if not self.console.quiet:
            self.console.file.write(text)
            self.console.file.flush()

    def run(self) -> Outcome:
        """Everything up to the verified ledger."""
        started = time.monotonic()
        try:
            self.start_nodes()
            self.place_model()
            self.show_placement()
            self.first_answer()
            self.reference()
            self.sample_nodes()
            self.answer_with_a_death()
            self.check_ledger()
        finally:
            self.aside.shutdown(cancel_futures=True)
        self.outcome.seconds = round(time.monotonic() - started, 1)
        return self.outcome

    # --- the swarm

    def start_nodes(self) -> None:
        """One node with the gateway, two more that know only its address as a seed."""
        self.say("[bold]1. Three nodes[/] (separate processes on loopback; they know one seed address)")
        economy = {"ledger.microcredits_per_tflop": 10_000_000, "ledger.sync_seconds": 1, "p2p.advert_seconds": 5}
        shared = {**economy, "dmoe.replicas": REPLICAS, "dmoe.threads": 1, "node.log_level": "info"}
        self.orchestrator = self.swarm.add(
            "orchestrator",
            {
                **shared,
                "dmoe.threads": 2,
                "dmoe.ram_bytes_max": ORCHESTRATOR_BYTES_MAX,
                "gateway.enabled": True,
                "gateway.port": 0,
                "ledger.witness": True,
                "dmoe.orchestrate": ("SmolLM2-135M-Instruct",),
            },
            ("--new-network",),
        )
        importing = self.aside.submit(self.import_model)
        genesis = self.orchestrator.data / "genesis.json"
        publisher = str(json.loads(genesis.read_text())["issuer"])
        seeds = self.swarm.folder / "seeds.txt"
        for name in ("worker-1", "worker-2"):
            settings = {**shared, "p2p.seeds_file": str(seeds), "dmoe.publishers": (publisher,)}
            self.workers.append(self.swarm.add(name, settings, ("--genesis", str(genesis))))
        key = json.loads(rios(self.orchestrator, "gateway", "key", "create", "--user", "demo", "--json"))
        rios(self.orchestrator, "gateway", "user", "credit", "demo", "1000")
        self.api_key = key["secret"]
        importing.result()
        self.swarm.start(self.orchestrator)
        seed = str(self.orchestrator.status["network"]["addresses"][0])
        dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.from_seed(bytes(32)).peer_id}"
        seeds.write_text(f"# the orchestrator, and a dead seed that is tolerated\n{seed}\n{dead}\n")
        self.swarm.start(*self.workers)
        wait_for(self.all_acquainted, "the nodes to find each other", MEET_SECONDS_MAX)
        for node in self.swarm.nodes:
            self.say(f"   {node.name:13} {node.peer_id}  pid {node.process.pid if node.process else '-'}")
        self.orchestrator.ask("ledger.grant", to=publisher, microcredits=GRANT_MICROCREDITS)

    def all_acquainted(self) -> bool:
        """Whether every node has everybody's advert: placement then sees all candidates."""
        count = len(self.swarm.nodes)
        return all(node.ask("status")["network"]["known"] == count for node in self.swarm.nodes)

    def import_model(self) -> None:
        """The bundled model, cut into shards in the orchestrator's data folder."""
        began = time.monotonic()
        with self.console.status("   importing the bundled model"):
            result = json.loads(rios(self.orchestrator, "model", "import", "bundled", "--json"))
        self.model = result["model_id"]
        self.say(
            f"   {result['name']}: {result['params'] / 1e6:.0f}M parameters, {result['shards']} shards,"
            f" {result['bytes'] / 1e6:.0f} MB, imported in {time.monotonic() - began:.1f} s"
        )

    def place_model(self) -> None:
        """Deploy, then watch the empty nodes fetch what falls to them."""
        self.say(f"[bold]2. Placement[/] ({REPLICAS} replicas a shard; chunks come from peers, hashes are verified)")
        self.orchestrator.ask("model.deploy", model=self.model, replicas=REPLICAS)
        same = self.aside.submit(self.answer_alone, "local")  # its text only: its speed means nothing beside the rest
        columns = (
            TextColumn("   {task.description:13}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            bars = {node.name: progress.add_task(node.name, total=None) for node in self.workers}

            def ready() -> bool:
                for node in self.workers:
                    fetch = node.ask("model.progress")
                    progress.update(bars[node.name], completed=fetch["bytes_done"], total=fetch["bytes_total"] or None)
                if not all(node.alive for node in self.swarm.nodes):
                    raise LocalError("local", "a node ended while shards were placed:\n" + self._logs())
                health = self.orchestrator.ask("model.health", model=self.model)
                return bool(health["ready"]) and int(health["replicas_min"]) >= REPLICAS

            wait_for(ready, "every shard to have its replicas", PLACEMENT_SECONDS_MAX)
        self.outcome.reference_answer = same.result()["text"]

    def _logs(self) -> str:
        return "\n".join(f"{node.name}: {node.log_tail(5)}" for node in self.swarm.nodes if not node.alive)

    def show_placement(self) -> None:
        """Who holds what."""
        table = Table(box=None, padding=(0, 2))
        for heading in ("", "node", "shards held", "layers", "experts", "fetched"):
            table.add_column(heading)
        for node in self.swarm.nodes:
            held = node.ask("model.holdings", model=self.model)
            fetched = node.ask("model.progress")["bytes_fetched"]
            table.add_row(
                "", node.name, str(len(held["shards"])), spans(held["layers"]), spans(held["experts"]),
                f"{fetched / 1e6:.1f} MB" if fetched else "-",
            )  # fmt: skip
        self.console.print(table)

    # --- answers

    def ask(self, question: str, on_token: Callable[[int], None] | None = None, *, greedy: bool = True) -> Answer:
        """Stream one answer over HTTP, printing it as it comes."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0 if greedy else 0.7,
            "min_tokens": MIN_TOKENS if greedy else 0,
            "max_tokens": MAX_TOKENS,
        }
        url = str(self.orchestrator.ask("status")["gateway"]["url"])
        headers = {"authorization": f"Bearer {self.api_key}"}
        answer = Answer()
        times: list[float] = []
        self.write("   ")
        try:
            with httpx.stream(
                "POST",
                f"{url}/v1/chat/completions",
                json=body,
                headers=headers,
                timeout=HTTP_SECONDS_MAX,
                trust_env=False,  # a proxy for the internet must not see loopback traffic
            ) as response:
                self._read(response, answer, times, on_token)
        except httpx.HTTPError as error:
            raise LocalError("local", f"the gateway at {url}: {error or type(error).__name__}") from error
        self.write("\n")
        if answer.tokens > 1 and len(times) > 1:
            answer.tokens_per_s = round((answer.tokens - 1) / (times[-1] - times[0]), 2)
        return answer

    def _read(
        self, response: httpx.Response, answer: Answer, times: list[float], on_token: Callable[[int], None] | None
    ) -> None:
        if response.status_code != 200:
            raise LocalError("local", f"the gateway answered {response.status_code}: {response.read().decode()}")
        for event in _events(response):
            if "error" in event:
                raise LocalError("local", f"the answer broke off: {event['error']['message']}")
            answer.details = event.get("rios") or answer.details
            if usage := event.get("usage"):
                answer.tokens = usage["completion_tokens"]
            text = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if text:
                answer.text += text
                times.append(time.monotonic())
                self.write(text)
                if on_token is not None:
                    on_token(len(times))

    def first_answer(self) -> None:
        """The question, with tokens per second and who served what."""
        self.say("[bold]3. The question[/] (over the HTTP gateway, streaming, greedy)")
        self.say(f"   > {QUESTION}")
        answer = self.ask(QUESTION)
        self.outcome.answer, self.outcome.tokens_per_s = answer.text, answer.tokens_per_s
        self.say(f"   [green]{answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s[/], experts served by:")
        for peer, served in answer.details["serving"].items():
            rows = answer.details["expert_rows"].get(peer, 0)
            self.say(
                f"   {self.name_of(peer):13} layers {spans(served['layers'])}, experts {spans(served['experts'])},"
                f" {rows} rows"
            )

    def reference(self) -> None:
        """The same question in one local process, without a network."""
        self.say("[bold]4. The reference[/] (one process, no network)")
        self.outcome.local_tokens_per_s = speed = self.answer_alone("fused")["tokens_per_s"]
        equal = self.outcome.reference_answer == self.outcome.answer
        verdict = "[green]identical text[/]" if equal else "[red]different text[/]"
        share = self.outcome.tokens_per_s / speed
        self.say(f"   {verdict}; {speed:.1f} tokens/s in one local graph: the swarm reaches {share:.2f} of that")

    def answer_alone(self, route: str) -> Any:  # noqa: ANN401 - JSON
        """The question answered in one process that knows no network."""
        limits = ("--max-tokens", str(MAX_TOKENS), "--min-tokens", str(MIN_TOKENS), "--temperature", "0")
        args = ("chat", "--local", "--json", *limits, "--route", route, "--model", self.model, QUESTION)
        return json.loads(rios(self.orchestrator, *args))

    def sample_nodes(self) -> None:
        """What each node did so far, before anything is killed."""
        for node in self.swarm.nodes:
            held = node.ask("model.holdings", model=self.model)
            status = node.ask("status")
            self.outcome.nodes.append(
                {
                    "peer_id": node.peer_id,
                    "layers": held["layers"],
                    "experts": held["experts"],
                    "expert_rows": status["work"]["expert_rows"],
                    "rss_bytes": status["node"]["rss_bytes"],
                }
            )

    def answer_with_a_death(self) -> None:
        """Ask again and kill the worker that did most, in the middle."""
        rows = {entry["peer_id"]: entry["expert_rows"] for entry in self.outcome.nodes}
        victim = max(self.workers, key=lambda node: int(rows[node.peer_id]))
        self.outcome.killed_peer = victim.peer_id
        self.say(f"[bold]5. The same question; {victim.name} is killed after {KILL_AFTER_TOKENS} pieces of text[/]")

        def maybe_kill(count: int) -> None:
            if count == KILL_AFTER_TOKENS:
                victim.kill()
                self.write(f" <{victim.name} killed> ")

        answer = self.ask(QUESTION, maybe_kill)
        self.outcome.answer_after_kill = answer.text
        if victim.alive:
            raise LocalError("local", f"the answer was too short to kill {victim.name} in its middle")
        same = answer.text == self.outcome.answer
        self.say(
            f"   {'[green]identical text[/]' if same else '[red]different text[/]'},"
            f" {answer.tokens_per_s:.1f} tokens/s, {answer.details['retries']} calls retried on another replica"
        )

    # --- money

    def check_ledger(self) -> None:
        """Settle, let every survivor re-check every signature, and show who was paid."""
        self.say("[bold]6. The ledger[/] (on every surviving node, re-verified from genesis)")
        survivors = [node for node in self.swarm.nodes if node.alive]
        for node in survivors:
            node.ask("ledger.settle")
        reports: dict[str, Any] = {}

        def converged() -> bool:
            reports.update({node.peer_id: node.ask("ledger.verify") for node in survivors})
            return len({report["digest"] for report in reports.values()}) == 1

        wait_for(converged, "the ledgers of all surviving nodes to agree", LEDGER_SECONDS_MAX)
        first = reports[self.orchestrator.peer_id]
        self.outcome.ledger = {
            "verified": {peer: bool(report["verified"]) for peer, report in reports.items()},
            "entries": first["entries"],
            "certificates": first["certificates"],
            "sum_ok": all(report["sum_ok"] for report in reports.values()),
            "balances": first["balances"],
        }
        channels = self.orchestrator.ask("ledger.channels")
        table = Table(box=None, padding=(0, 2))
        for heading in ("", "node", "balance (credits)", "vouchers promised", "settled"):
            table.add_column(heading, justify="right" if heading not in ("", "node") else "left")
        for node in self.swarm.nodes:
            own = [each for each in channels if each["payee"] == node.peer_id]
            table.add_row(
                "",
                self.name_of(node.peer_id),
                format_credits(first["balances"].get(node.peer_id, 0)),
                format_credits(sum(each["promised"] for each in own)) if own else "-",
                format_credits(sum(each["paid"] for each in own)) if own else "-",
            )
        self.console.print(table)
        self.say(
            f"   {first['entries']} entries, {first['certificates']} certificates, digest {first['digest'][:16]};"
            f" verified on {sum(self.outcome.ledger['verified'].values())} of {len(survivors)} nodes;"
            f" sums {'add up' if self.outcome.ledger['sum_ok'] else '[red]do not add up[/]'}"
        )

    def name_of(self, peer_id: str) -> str:
        """A node's name."""
        return next((node.name for node in self.swarm.nodes if node.peer_id == peer_id), peer_id)

    def converse(self) -> None:
        """Further questions from the terminal until Ctrl-C or end of input."""
        url = self.orchestrator.ask("status")["gateway"]["url"]
        self.say(f"\nThe swarm stays up. API: [bold]{url}/v1[/]  key: {self.api_key}")
        self.say("Ask something (Ctrl-C ends everything):")
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                return
            if not question:
                continue
            try:
                answer = self.ask(question, greedy=False)
            except RiosError as error:
                self.console.print(str(error), style="red", markup=False, highlight=False)
            else:
                self.say(f"   [green]{answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s[/]")


def _events(response: httpx.Response) -> Sequence[Any] | Any:  # noqa: ANN401 - parsed JSON
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def spans(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    out: list[list[int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out) or "-"


def run(*, once: bool, as_json: bool) -> int:
    """The ``rios demo`` command; returns the exit code. With ``as_json`` only the result goes to stdout."""
    console = Console(file=sys.stderr if as_json else sys.stdout, soft_wrap=True)
    stay = not once and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    with Swarm() as swarm:
        demo = Demo(swarm, console)
        outcome = demo.run()
        faults = outcome.faults()
        for fault in faults:
            console.print(f"[bold red]MISMATCH[/] {fault}")
        if not faults:
            console.print(f"[bold green]All checks passed[/] in {outcome.seconds:.0f} s.")
        if stay and not faults:
            with contextlib.suppress(KeyboardInterrupt):
                demo.converse()
            console.print("\nstopping the swarm")
    if as_json:
        print(json.dumps(asdict(outcome), separators=(",", ":")))  # noqa: T201 - the command's output
    return EXIT_FAILED if faults else EXIT_OK
