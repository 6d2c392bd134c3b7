"""A fake swarm and a fake ledger that implement the gateway's ports, in states that a real one takes hours to reach."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from config.accountbook import (
    LedgerBalance,
    LedgerChannel,
    LedgerCommittee,
    LedgerEntry,
    LedgerSummary,
    LedgerWitness,
    StatementLine,
)
from config.errors import RequestError
from config.swarm import (
    Deployment,
    DeploymentMode,
    MapShard,
    ModelMap,
    ShardHealth,
    Worker,
    WorkerGpu,
    WorkerHardware,
    WorkerReputation,
)

ME = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
MODEL = "c" * 64


def peer(number: int) -> str:
    return f"12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSC{number:05d}"


def worker(number: int, **changes: Any) -> Worker:
    made = Worker(
        peer_id=peer(number) if number else ME,
        name="helsinki-1" if not number else f"…{peer(number)[-8:]}",
        is_self=not number,
        version="0.3.0",
        region=("eu-north", "eu-west", "us-east", "ap-south")[number % 4],
        region_inferred=number % 3 == 2,
        roles=("witness",) if number < 4 else (),
        hardware=WorkerHardware(
            cpu="AMD EPYC 7543",
            cores=8 * (1 + number % 4),
            ram_bytes=(32 << 30) * (1 + number % 3),
            gpus=[WorkerGpu(name="RTX 4090", memory_bytes=24 << 30)] if number % 3 == 1 else [],
            expert_kflop_per_s=120_000_000,
            memory_bytes_per_s=40_000_000_000,
        ),
        round_trip_ms=0.0 if not number else (0.8, 9.6, 38.0, 142.0)[number % 4] + number,
        linked=True,
        reach="public",
        shards=0,
        models=[MODEL],
        offered_bytes=64 << 30,
        full=False,
        load=3 * number % 17,
        health="healthy",
        reputation=WorkerReputation(score=0.0, audits=120 + 7 * number, wrong=0, unclear=0),
        since_ms=1_790_000_000_000,
        microcredits_per_tflop=2500 + 100 * number,
        microcredits_per_kv_unit=10,
    )
    return replace(made, **changes)


@dataclass
class FakeSwarm:
    """``count`` nodes hold a model of 24 layers with 32 experts, four to a shard, two replicas each. ``dead`` go."""

    count: int = 8
    layers: int = 24
    experts: int = 32
    dead: set[int] = field(default_factory=set)
    wanted: dict[str, int] = field(default_factory=lambda: {MODEL: 2})
    name: str = "Qwen3-30B-A3B"
    changed_ms: dict[str, int] = field(default_factory=dict)

    def workers(self) -> Sequence[Worker]:
        held = [0] * self.count
        for shard in self._shards():
            for holder in shard.holders:
                held[holder] += 1
        made = [worker(number, shards=held[number]) for number in range(self.count)]
        return [
            replace(each, health="gone", linked=False, shards=0) if number in self.dead else each
            for number, each in enumerate(made)
        ]

    def _shards(self) -> list[MapShard]:
        found = []
        for layer in range(self.layers):
            for group in range(self.experts // 4):
                number = layer * 7 + group * 3
                holders = {number % self.count, (number * 5 + 2) % self.count}
                if number % 5 == 0:
                    holders.add((number + 3) % self.count)
                shard = MapShard(
                    id=f"l{layer}-g{group}",
                    kind="expert",
                    first_layer=layer,
                    last_layer=layer,
                    experts=list(range(group * 4, group * 4 + 4)),
                    holders=sorted(holders - self.dead),
                )
                found.append(shard)
        return found

    def maps(self) -> Sequence[ModelMap]:
        workers = [peer(number) if number else ME for number in range(self.count)]
        return [
            ModelMap(
                id=MODEL,
                model=self.name,
                layers=self.layers,
                experts=self.experts,
                wanted=2,
                workers=workers,
                shards=self._shards(),
            )
        ]

    def deployments(self) -> Sequence[Deployment]:
        return [self._deployment(model, replicas) for model, replicas in self.wanted.items()]

    def _deployment(self, model: str, replicas: int) -> Deployment:
        shards = [
            ShardHealth(
                id=each.id,
                kind="expert",
                wanted=replicas,
                there=len(each.holders),
                healthy=len(each.holders),
                problem="",
            )
            for each in self._shards()
        ]
        short = sum(each.healthy < replicas for each in shards)
        least = min(each.healthy for each in shards)
        return Deployment(
            id=model,
            model=self.name if model == MODEL else "tiny",
            mode="experts",
            replicas=replicas,
            state="ready" if not short else "degraded" if least else "failed",
            reason="" if not short else f"{short} of {len(shards)} shards have fewer replicas than wanted",
            deployed_here=True,
            changed_ms=self.changed_ms.get(model, 0),
            deployers=[ME],
            replicas_min=least,
            shards_ready=len(shards) - short,
            shards=shards,
        )

    async def deploy(self, model: str, replicas: int | None, mode: DeploymentMode) -> Deployment:
        if model not in ("tiny", "a" * 64):
            raise RequestError("not_found", f"no model {model!r} is here")
        self._want("a" * 64, replicas or 2)
        return self._deployment("a" * 64, self.wanted["a" * 64])

    async def scale(self, model_id: str, replicas: int) -> Deployment:
        self._want(model_id, replicas)
        return self._deployment(model_id, replicas)

    def _want(self, model_id: str, replicas: int) -> None:
        self.wanted[model_id] = replicas
        self.changed_ms[model_id] = max(time.time_ns() // 1_000_000, self.changed_ms.get(model_id, 0) + 1)

    async def undeploy(self, model_id: str) -> None:
        del self.wanted[model_id]


class FakeLedger:
    """A few entries of an account that pays workers."""

    def account(self) -> str:
        return ME

    def balance(self, account: str = "") -> LedgerBalance:
        return LedgerBalance(account=account or ME, balance=1_284_500_000, locked=92_000_000, seq=41)

    def summary(self) -> LedgerSummary:
        return LedgerSummary(
            net="ab" * 16,
            account=ME,
            entries=1842,
            accounts=57,
            channels=23,
            supply=25_000_000_000,
            waiting=0,
            epoch=2,
            tolerance="it stands one witness that lies",
            pending=False,
        )

    def committee(self) -> LedgerCommittee:
        witnesses = [LedgerWitness(key=peer(n), node=peer(n) if n else ME, is_self=not n) for n in range(4)]
        return LedgerCommittee(epoch=2, f=1, quorum=3, tolerance="it stands one witness that lies", witnesses=witnesses)

    async def statement(self, account: str = "") -> Sequence[StatementLine]:
        lines, balance = [], 0
        for n in range(30):
            kind, amount = (
                ("grant", 100_000_000)
                if n % 10 == 0
                else ("claim", 7_300_000 * n)
                if n % 3
                else ("open", -4_000_000 * n)
            )
            balance += amount
            lines.append(
                StatementLine(
                    place=n + 1,
                    seen_ms=1_795_000_000_000 + n * 3_600_000,
                    kind=kind,
                    amount=amount,
                    peer_id=peer(n % 6),
                    reference=f"{n:064x}",
                    balance=balance,
                )
            )
        return lines

    async def entries(self, *, limit: int, before: int | None) -> Sequence[LedgerEntry]:
        top = min(1842, (before or 1 << 62) - 1)
        return [
            LedgerEntry(
                place=place,
                id=f"{place * 7919:064x}"[::-1],
                account=peer(place % 6),
                seq=place % 50 + 1,
                seen_ms=1_795_000_000_000 + place * 60_000,
                epoch=2,
                votes=3 + place % 2,
                ops=[{"op": ("transfer", "open", "topup", "grant")[place % 4], "amount": 3_500_000 * (place % 9 + 1)}],
            )
            for place in range(top, max(0, top - limit), -1)
        ]

    async def entry(self, name: str) -> dict[str, Any]:
        if name == "0" * 64:
            raise RequestError("not_found", f"{name} is not in this ledger")
        votes = [
            {"witness": peer(n), "epoch": 2, "batch": 40 + n, "place": n, "root": "cd" * 32, "signature": "ef" * 64}
            for n in range(3)
        ]
        return {
            "kind": "entry",
            "id": name,
            "account": ME,
            "seq": 7,
            "prev": "00" * 32,
            "signature": "ab" * 64,
            "ops": [{"op": "transfer", "to": peer(2), "amount": 3_500_000}],
            "state": "final",
            "seen_ms": 1_795_000_000_000,
            "certificate": {"epoch": 2, "votes": votes, "valid": True, "problem": ""},
        }

    async def channels(self, account: str = "") -> Sequence[LedgerChannel]:
        return [
            LedgerChannel(
                channel=f"{n:064x}",
                side="buy" if n % 2 else "sell",
                payer=ME if n % 2 else peer(n),
                payee=peer(n) if n % 2 else ME,
                lock=20_000_000,
                promised=4_200_000 * n,
                paid=3_900_000 * n,
                calls=812 * n,
                closed=n == 5,
                expiry_ms=1_800_000_000_000,
                stopped="",
            )
            for n in range(1, 6)
        ]
