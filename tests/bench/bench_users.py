"""Sixteen users at once beside one: tokens per second through the engine, time to the first token, fairness.

Run it as a program; the last line on stdout is one JSON object. One user and sixteen take turns, so that what else the
machine does hits both; ratios are medians over the rounds. Each user has a prompt of their own and reads the answer as
it comes. Prefix cache and drafts are off: what is measured is what sharing passes brings.
"""

import argparse
import json
import math
import statistics
import sys
import time

import trio
from bench_generate import machine, prepare, staged

from config.generation import Delta, GenerationRequest, Route, Sampling
from dmoe.engine import Engine
from dmoe.models import StoredModels
from dmoe.passes import PassOptions
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore

USERS = 16
NEW_TOKENS = 96
SUBJECTS = ("rivers", "bread", "clocks", "bridges", "violins", "whales", "tea", "paper")
ROUTES: tuple[Route, ...] = ("fused", "local", "stages")


def prompt_of(user: int) -> str:
    """About twenty tokens, a question's worth, that no other user's prompt begins with."""
    subject = SUBJECTS[user % len(SUBJECTS)]
    return f"{subject.capitalize()} {user}: a long essay about the history of {subject} since {1300 + 17 * user}."


class Crowd:
    """What one round of so many users came to."""

    def __init__(self, users: int) -> None:
        self.first = [math.inf] * users
        self.done = [math.inf] * users
        self.tokens = [0] * users

    @property
    def rate(self) -> float:
        """Tokens per second of all together."""
        return sum(self.tokens) / max(self.done)

    @property
    def first_p95(self) -> float:
        """Seconds within which 95 % had their first token."""
        return sorted(self.first)[math.ceil(0.95 * len(self.first)) - 1]

    @property
    def slowest_share(self) -> float:
        """Tokens per second of the slowest user, as a share of the mean."""
        rates = [tokens / done for tokens, done in zip(self.tokens, self.done, strict=True)]
        return min(rates) / statistics.mean(rates)


async def ask(engine: Engine, model: str, route: Route, user: int, crowd: Crowd, started: float) -> None:
    """One user's answer, read to its end."""
    sampling = Sampling(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    request = GenerationRequest(
        model=model, prompt=prompt_of(user), sampling=sampling, route=route, user=f"user {user}"
    )
    async with engine.stream(await engine.prepare(request)) as events:
        async for event in events:
            now = time.perf_counter() - started
            if isinstance(event, Delta):
                crowd.first[user] = min(crowd.first[user], now)
                crowd.tokens[user] += len(event.tokens)
            crowd.done[user] = now


async def round_of(engine: Engine, model: str, route: Route, users: int) -> Crowd:
    """So many users at once."""
    crowd, started = Crowd(users), time.perf_counter()
    async with trio.open_nursery() as nursery:
        for user in range(users):
            nursery.start_soon(ask, engine, model, route, user, crowd, started)
    return crowd


async def measure(
    store: ModelStore, threads: int, rounds: int, routes: tuple[Route, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures and ratios of every route that this machine has."""
    model = staged(store).name
    models = StoredModels(store, None, RuntimeOptions(device="cpu", threads=threads), "me")
    engine = Engine(models, generations_max=USERS, passes=PassOptions(drafts_max=0, prefix_positions_max=0))
    figures: dict[str, float] = {"threads": threads, "users": USERS}
    ratios: dict[str, float] = {}
    async with engine.running():
        for route in routes:
            fault = next(each for each in models.models() if each.name == model).fault(route)
            if fault is not None:
                print(f"route {route} is not measured: {fault}", file=sys.stderr)
                continue
            await round_of(engine, model, route, USERS)
            pairs = [
                (await round_of(engine, model, route, 1), await round_of(engine, model, route, USERS))
                for _ in range(rounds)
            ]
            ratios[f"{route}_users16_vs_1"] = round(statistics.median(many.rate / one.rate for one, many in pairs), 2)
            figures |= figures_of(route, pairs)
    ratios["users16_vs_1"] = min(ratios.values())
    return figures, ratios


def figures_of(route: Route, pairs: list[tuple[Crowd, Crowd]]) -> dict[str, float]:
    """Medians over the rounds; the share is the worst."""
    return {
        f"{route}_1_tokens_per_second": round(statistics.median(one.rate for one, _ in pairs), 1),
        f"{route}_16_tokens_per_second": round(statistics.median(many.rate for _, many in pairs), 1),
        f"{route}_1_first_token_seconds": round(statistics.median(one.first_p95 for one, _ in pairs), 3),
        f"{route}_16_first_token_p95_seconds": round(statistics.median(many.first_p95 for _, many in pairs), 3),
        f"{route}_slowest_user_share": round(min(many.slowest_share for _, many in pairs), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=ROUTES)
    arguments = parser.parse_args()
    store, _, _ = prepare()  # may import the model, which runs a loop of its own
    staged(store)
    figures, ratios = trio.run(measure, store, arguments.threads, arguments.rounds, tuple(arguments.routes))
    print(json.dumps({"name": "users", "machine": machine(), "figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    sys.exit(main())
