"""A swarm of real node processes and what goes wrong in one: no money, dead nodes, damaged files, full disks, liars.

One orchestrator with the gateway, two workers that each hold every shard of a tiny model with random weights; asked by
the real openai client over HTTP. The orchestrator does not hedge, so that second tries are seen (with hedges:
``faults``). Every test leaves the swarm whole for the next one.
"""

import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import trio

from config.errors import BusyError, RemoteError, RiosError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from node.rig import NodeProcess, rios, wait_for
from p2p.core.advert import Hardware, ModelOffer, bitmap
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network
from tests.faults.rig import GRANT, PLAIN, PRICE, Rig, small_disk, swarm_of

TOKENS = 150
STOP_AFTER = 10
CALL_SECONDS = 4
"""After so long a call is given up, and its shards are asked for elsewhere."""


def ask(rig: Rig, on_piece: Callable[[int], None] = lambda count: None) -> tuple[str, Any]:
    """A greedy answer of exactly ``TOKENS`` tokens, streamed over HTTP; and who computed it."""
    text, details = [], None
    with rig.client() as client:
        stream = client.chat.completions.create(
            model=rig.model,
            messages=[{"role": "user", "content": "What is it?"}],
            temperature=0,
            max_tokens=TOKENS,
            stream=True,
            extra_body={"min_tokens": TOKENS},
        )
        for chunk in stream:
            details = (chunk.model_extra or {}).get("rios") or details
            if chunk.choices and chunk.choices[0].delta.content:
                text.append(chunk.choices[0].delta.content)
                on_piece(len(text))
    return "".join(text), details


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("faults")
    settings = {"dmoe.call_timeout_ms": 1000 * CALL_SECONDS, "ledger.microcredits_per_tflop": 10 * PRICE}
    with swarm_of(folder, settings=settings, layers_per_shard=3, asks_with=PLAIN, grant=False) as made:
        yield made


@pytest.fixture(scope="module")
def text(rig: Rig) -> str:
    """The answer without any fault, from a node that has money."""
    if not rig.first.ask("ledger.balance")["balance"]:
        rig.first.ask("ledger.grant", to=rig.first.peer_id, microcredits=GRANT)
    return ask(rig)[0]


def test_nothing_is_served_for_free_and_money_mends_it_at_once(rig: Rig) -> None:
    with pytest.raises(openai.APIStatusError) as refused, rig.client() as client:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=5)
    assert refused.value.status_code == 402
    assert refused.value.code == "insufficient_quota"  # what the API calls it
    assert "microcredits" in str(refused.value)
    assert "grant" in str(refused.value)
    assert [rig.rows(worker) for worker in rig.workers] == [0, 0]
    rig.first.ask("ledger.grant", to=rig.first.peer_id, microcredits=GRANT)
    # a refused payer is asked again after a rest of half a second at most: no restart, no command
    wait_for(lambda: bool(_answer(rig)), "an answer that is paid for", 10)
    assert sum(rig.rows(worker) for worker in rig.workers) > 0


def _answer(rig: Rig) -> str:
    try:
        return ask(rig)[0]
    except openai.APIError:
        return ""


def test_the_openai_client_gets_answers_and_clear_errors(rig: Rig, text: str) -> None:
    question: Any = {"model": "tiny", "messages": [{"role": "user", "content": "What is it?"}], "temperature": 0}
    with rig.client() as client:
        answer = client.chat.completions.create(**question, max_tokens=8, extra_body={"min_tokens": 8})
        assert text.startswith(answer.choices[0].message.content or "?")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        chunks = list(
            client.chat.completions.create(
                **question, max_tokens=8, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nothing", messages=question["messages"])
    with rig.client(key="rk-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_stopped_worker_delays_the_answer_and_is_used_again(rig: Rig, text: str) -> None:
    victim = max(rig.workers, key=rig.rows)
    pid = victim.process.pid if victim.process else 0
    try:
        stopped, details = ask(rig, lambda count: os.kill(pid, signal.SIGSTOP) if count == STOP_AFTER else None)
        assert stopped == text
        if not details["retries"]:  # the answer was ahead of its reader, and over by then: the next one meets it
            stopped, details = ask(rig)
            assert stopped == text
        assert details["retries"] > 0
        assert set(details["serving"]) <= {worker.peer_id for worker in rig.workers}
    finally:
        os.kill(pid, signal.SIGCONT)
    rig.wait_replicas()
    before = rig.rows(victim)
    wait_for(lambda: ask(rig)[0] == text and rig.rows(victim) > before, "the worker to be used again", 60)


def test_a_killed_worker_comes_back_with_its_shards_from_disk(rig: Rig, text: str) -> None:
    victim = rig.workers[0]
    held = rig.held(victim)
    assert held
    died, _ = ask(rig, lambda count: victim.kill() if count == STOP_AFTER else None)
    assert died == text
    assert not victim.alive
    rig.start(victim)
    rig.wait_replicas()
    assert rig.held(victim) == held
    assert rig.fetched(victim) == 0
    assert ask(rig)[0] == text


def test_damaged_shards_are_named_and_fetched_again(rig: Rig, text: str) -> None:
    victim = rig.workers[1]
    held = rig.held(victim)
    victim.stop()
    altered, truncated = rig.shard_file(victim, 0), rig.shard_file(victim, 1)
    good = {file: file.read_bytes() for file in (altered, truncated)}
    altered.write_bytes(good[altered][:-1] + bytes([good[altered][-1] ^ 1]))
    truncated.write_bytes(good[truncated][:-100])
    log_before = len(victim.log_file.read_text())
    rig.start(victim)
    rig.wait_replicas()
    assert rig.held(victim) == held
    assert {file: file.read_bytes() for file in good} == good
    assert rig.fetched(victim) == sum(map(len, good.values()))
    log = victim.log_file.read_text()[log_before:]
    assert f"{altered} was altered" in log
    assert f"{truncated} has" in log
    assert ask(rig)[0] == text


def test_without_any_replica_there_is_a_clear_error_and_no_hang(rig: Rig, text: str) -> None:
    gone = [worker.peer_id for worker in rig.workers]
    for worker in rig.workers:
        worker.kill()
    with rig.client() as client, pytest.raises(openai.InternalServerError) as refused:  # at once: links break
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=5)
    assert refused.value.status_code in (503, 504)
    assert "layer" in str(refused.value)

    def known() -> bool:
        with rig.client() as client, pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=5)
        message = str(refused.value)
        if refused.value.code != "no_replica" or "layers 0 to 2" not in message or "experts 0" not in message:
            return False
        seen = re.search(r": last seen (\d+) s ago; replicas: ", message)
        return seen is not None and int(seen[1]) < 60 and all(peer in message for peer in gone)

    wait_for(known, "the error to name layers, experts, and who had them when", 20)
    assert not rig.first.ask("model.health", model=rig.model)["ready"]
    rig.start(rig.workers[0])
    rig.wait_replicas(1)
    assert ask(rig)[0] == text
    rig.start(rig.workers[1])
    rig.wait_replicas()


def test_a_killed_orchestrator_goes_on_as_itself_with_its_money(rig: Rig, text: str) -> None:
    me, node = rig.first.peer_id, rig.first
    promised = _promised(node)
    assert promised

    def die(count: int) -> None:
        if count == STOP_AFTER:
            node.kill()

    with suppress(openai.APIError, httpx.HTTPError):
        ask(rig, die)
    assert not node.alive
    rig.start(node)
    assert node.peer_id == me
    assert node.ask("ledger.verify")["verified"] is True
    rig.wait_replicas()
    wait_for(lambda: _answer(rig) == text, "the same answer as before", 20)
    assert _promised(node).keys() == promised.keys(), "the same channels go on"
    assert all(_promised(node)[channel] >= amount for channel, amount in promised.items())
    rig.check_money()


def test_a_model_is_fetched_and_deployed_with_a_word_on_how_far_it_is(rig: Rig, text: str) -> None:
    worker = rig.workers[0]
    events = list(worker.request("model.fetch", model="tiny", whole=True))
    assert events[-1][0] == "result"
    assert events[-1][1]["bytes"] > 0
    assert events[-2][1]["done"] == events[-2][1]["total"] == events[-1][1]["bytes"]
    manifest = json.loads((worker.data / "models" / rig.model / "manifest.json").read_text())
    for shard in manifest["shards"]:
        for file in shard["files"]:
            assert (worker.data / "models" / rig.model / file["path"]).stat().st_size == file["size_bytes"]
    assert "is here" in rios(worker, "model", "fetch", "tiny")
    with pytest.raises(RiosError, match="offers a model 'Tiny'"):
        list(worker.request("model.fetch", model="Tiny"))
    assert "holds 2 replicas" in rios(rig.first, "model", "deploy", "tiny", "--replicas", "2", "--wait")
    assert ask(rig)[0] == text


def test_a_paused_worker_is_left_at_once_keeps_its_place_and_comes_back(rig: Rig, text: str) -> None:
    rig.wait_replicas()
    paused, other = rig.workers
    held = rig.held(paused)
    rested, details = ask(rig, lambda count: rios(paused, "pause", "--wait") if count == STOP_AFTER else None)
    assert rested == text
    assert paused.ask("status")["work"]["worker"]["active"] == 0
    wait_for(lambda: _seen(rig, paused)["paused"], "the others to know", 10)
    before = rig.rows(paused)
    assert ask(rig)[0] == text
    assert rig.rows(paused) == before
    assert rig.held(paused) == held
    assert "paused by its operator" in rios(paused, "status")

    paused.stop()
    rig.start(paused)  # still paused
    wait_for(lambda: rig.held(paused) == held, "its shards from disk", 20)
    assert "paused by its operator" in rios(paused, "status")
    wait_for(lambda: _seen(rig, paused)["paused"], "the others to know again", 10)
    _, details = ask(rig)
    assert set(details["serving"]) == {other.peer_id}
    assert rig.rows(paused) == 0

    rios(paused, "resume")
    wait_for(lambda: ask(rig)[0] == text and rig.rows(paused) > 0, "the worker to be used again", 30)
    assert "paused" not in rios(paused, "status")
    rig.check_money()


def _seen(rig: Rig, node: NodeProcess) -> Any:
    return next((peer for peer in rig.first.ask("peers") if peer["peer_id"] == node.peer_id), {"paused": None})


def _promised(node: NodeProcess) -> dict[str, int]:
    return {each["channel"]: each["promised"] for each in node.ask("ledger.channels") if each["side"] == "buy"}


class Hostile:
    """Peers with keys of their own and no scruples, in a thread beside the real nodes.

    The first answers every call for experts, free of charge, with nonsense (not with plausible wrong numbers: only an
    audit could tell those); the second wants money and names impossible terms; the third wants money and never says
    on what terms.
    """

    def __init__(self, rig: Rig, folder: Path) -> None:
        self._rig = rig
        self._folder = folder
        self._turn = 0
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event
        self._up = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self.networks: list[PeerNetwork] = []
        self.asked = dict.fromkeys(("experts", "terms", "silence"), 0)

    def __enter__(self) -> "Hostile":
        self._thread.start()
        assert self._up.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join(20)

    def run(self, work: Callable[[], Any]) -> Any:
        """Run an async function beside the peers."""
        return trio.from_thread.run(work, trio_token=self._token)

    async def _main(self) -> None:
        self._token, self._stop = trio.lowlevel.current_trio_token(), trio.Event()
        seeds = tuple(node.status["network"]["addresses"][0] for node in self._rig.swarm.nodes)
        settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=seeds, advert_seconds=5)
        async with AsyncExitStack() as stack:
            for number, price in enumerate((0, 1, 1)):
                identity = Identity.from_seed(os.urandom(32))  # whom nobody has found out yet
                network = await stack.enter_async_context(
                    open_network(identity, settings, data_dir=self._folder / str(number), version="0")
                )
                self.networks.append(network)
                offer = ModelOffer(self._rig.model, bitmap(set(range(64))), 1, price, 0)
                fast = Hardware(expert_kflop_per_s=1 << 60)
                network.directory.update(
                    lambda own, offer=offer, fast=fast: msgspec.structs.replace(
                        own, models=(offer,), hardware=fast, offered_bytes=1 << 61
                    )
                )
            self.networks[0].serve("expert.run", self._lie)
            self.networks[1].serve("ledger.terms", self._impossible_terms)
            self.networks[2].serve("ledger.terms", self._silence)
            self._up.set()
            await self._stop.wait()

    async def _lie(self, call: Call) -> Reply:
        self.asked["experts"] += 1
        self._turn += 1
        (count, width), groups = call.header["shape"], len(call.header["groups"])
        shape = [groups * count, width]
        size = 2 * groups * count * width
        lies: list[Reply | RiosError] = [
            Reply({"shape": shape}, [b"\x00\x7e" * (size // 2)]),  # NaN
            Reply({"shape": [1 << 40, 1 << 40]}, [b""]),
            Reply({"shape": [groups * count + 1, width]}, [bytes(size + 2 * width)]),
            Reply({"shape": shape, "service_us": -1}, [bytes(size)] * 200),
            Reply({"shape": shape, "bf16": 7}, [bytes(size)]),
            Reply({}, []),
            Reply({"shape": [0.5, None]}, [bytes(32 << 20)]),
            BusyError("later", retry_after_ms=1 << 39),
            BusyError("sooner", retry_after_ms=0),
            RemoteError("forbidden", "x" * 100_000),
            RemoteError("payment_required", "more"),
        ]
        lie = lies[self._turn % len(lies)]
        if isinstance(lie, RiosError):
            raise lie
        return lie

    async def _impossible_terms(self, _call: Call) -> Reply:
        self.asked["terms"] += 1
        net = self._rig.first.ask("status")["ledger"]["net"]
        return Reply({"net": bytes.fromhex(net), "payout": b"nowhere"})

    async def _silence(self, _call: Call) -> Reply:
        self.asked["silence"] += 1
        await trio.sleep_forever()
        raise AssertionError


METHODS = (
    "advert.exchange", "advert.push", "blob.get", "deploy.list", "expert.run", "ledger.buckets", "ledger.channel",
    "ledger.fetch", "ledger.freeze", "ledger.heads", "ledger.push", "ledger.receipt", "ledger.submit", "ledger.terms",
    "ledger.attest", "ledger.checkpoint", "ledger.page", "model.have", "model.manifest", "no.such.method",
)  # fmt: skip
FIELDS = (
    "before", "bf16", "buckets", "certificates", "channel", "channels", "digest", "groups", "known", "layer", "model",
    "net", "number", "object", "pages", "quote", "ranges", "receipt", "root", "shape", "since", "summary", "top_k",
    "voucher",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1 << 62, 0.5, float("nan"), "", "x" * 64, b"", bytes(16), bytes(32), bytes(64), [], [[]], {},
    [1 << 60], [b"x"] * 3, [None, 1], [1, 128], {"a": 1 << 62}, {b"b": None}, b"\x93" * 40, [[bytes(32), 1, 1 << 62]],
)  # fmt: skip


async def _bother(hostile: Hostile, target: str) -> int:
    """Calls with every field wrong in every way, several at a time; how many were answered or refused."""
    network, dice, told = hostile.networks[0], random.Random(7), 0
    net = bytes.fromhex(hostile._rig.first.ask("status")["ledger"]["net"])

    async def one(method: str, header: dict[str, Any], buffers: list[bytes]) -> None:
        nonlocal told
        with suppress(RiosError):
            await network.call(PeerId(target), method, header, buffers, deadline_ms=10_000)
        told += 1

    for method in METHODS:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                header = {field: dice.choice(VALUES) for field in FIELDS if dice.random() < 0.9}
                header |= {"net": net} if dice.random() < 0.7 else {}
                header |= {"model": hostile._rig.model} if dice.random() < 0.7 else {}
                buffers = [dice.randbytes(dice.choice((0, 1, 256, 70_000))) for _ in range(dice.randrange(4))]
                nursery.start_soon(one, method, header, buffers)
    return told


def test_hostile_peers_change_no_answer_and_no_balance(rig: Rig, text: str, tmp_path: Path) -> None:
    before = {node.name: len(node.log_file.read_text()) for node in rig.swarm.nodes}
    with Hostile(rig, tmp_path) as hostile:
        liars = {network.peer_id for network in hostile.networks}
        wait_for(
            lambda: liars <= {peer["peer_id"] for peer in rig.first.ask("peers")},
            "the hostile peers to be taken for nodes",
            60,
        )
        for _ in range(5):
            answer, details = ask(rig)
            assert answer == text
            assert set(details["serving"]) <= {worker.peer_id for worker in rig.workers}
        # by probes, if by nothing else: who fails one is not asked for an answer
        wait_for(lambda: ask(rig)[0] == text and all(hostile.asked.values()), f"each to be asked, {hostile.asked}", 120)
        for node in rig.swarm.nodes:
            assert hostile.run(lambda node=node: _bother(hostile, node.peer_id)) == 40 * len(METHODS)
        assert ask(rig)[0] == text
        bought = {each["peer_id"] for each in rig.first.ask("ledger.channels") if each["side"] == "buy"}
        assert bought <= {worker.peer_id for worker in rig.workers}, "no lock for those who name no terms"
    assert all(node.alive for node in rig.swarm.nodes)
    for node in rig.swarm.nodes:
        assert "Traceback" not in node.log_file.read_text()[before[node.name] :], node.name
    assert ask(rig)[0] == text
    assert rig.check_money()["paid"] > 0


def test_a_worker_with_a_full_disk_says_so_and_the_others_answer(rig: Rig, text: str) -> None:
    node = rig.add_worker("worker-3")
    with small_disk(node.data / "models", "100k"):
        rig.start(node)
        try:
            wait_for(lambda: bool(node.ask("model.progress")["errors"]), "a word about the disk", 30)
            (error, *_) = node.ask("model.progress")["errors"]
            assert "shard" in error
            assert str(node.data / "models") in error
            assert "free some space" in error
            assert ask(rig)[0] == text
        finally:
            assert node.stop() == 0
            rig.swarm.nodes.remove(node)
            rig.workers.remove(node)
