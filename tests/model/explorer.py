"""Every interleaving of a small scope over the real core: certificates, freezes and one change of the committee.

Not a test (``test_model`` explores parts of it); ``make model`` runs this. n = 4, f = 1 in each epoch; the fourth
witness lies in any way it can, payer and payee sign whatever helps them; certificates and handovers arrive at any
witness at any time or never. What honest witnesses do is computed by ``ledger.core`` itself (:mod:`tests.model.locals`)
with signatures that cost nothing; certificates are checked by the real verifier.

Reductions, each exact: honest witnesses of an epoch are interchangeable, so a global state is the sorted states of its
members; the liar's votes and freezes are always there; a certificate is there as soon as it can be made, and whether
it breaks an invariant is looked at then, not when somebody learns it. A witness that has handed over learns no more.

Checked in every state: I1 (two certificates in one slot, also of different epochs), I2 to I4 inside every witness
(``State.check_invariants``) and across them (a certified claim above a certified reclaim), I5 (same set of objects,
same digest). Scopes with ``honest`` have an honest payer or payee, before the channel's expiry, and look at the states
in which nothing can happen any more: there it must have got what it is owed (I6).

Breadth first, so a counterexample is a shortest one. Needs about 300 bytes a state.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tests.model.fastsign import fast_signatures
from tests.model.locals import Event, Local, Locals
from tests.model.things import CLAIMED, Things

Global = tuple[tuple[int, ...], tuple[int, ...], str]
"""Sorted numbers of the old and of the new witnesses' states, the name of the reclaim that was signed (or empty)."""
Final = dict[str, tuple[int, ...]]
"""What is certified, and in which epochs."""


@dataclass(frozen=True)
class Scope:
    """What is explored. ``new``: honest witnesses of the next committee that take part (0: no change); ``twins``: each
    of them stands for so many that do the same."""

    name: str
    kind: str
    new: int = 0
    twins: int = 1
    restarts: int = 0
    honest: bool = False
    told: str = ""


SCOPES = (
    Scope("slot", "slot", restarts=1, told="two entries in one slot, witnesses restart"),
    Scope("channel", "channel", restarts=1, told="a claim, freezes and a reclaim, witnesses restart"),
    Scope("slot-change", "slot", new=1, twins=2, told="two entries in one slot while the committee changes"),
    Scope(
        "channel-change", "channel", new=1, twins=2, told="a claim, freezes and a reclaim while the committee changes"
    ),
    Scope("slot-change-2", "slot", new=2, told="the same with two new witnesses of their own mind"),
    Scope("slot-live", "slot", new=1, twins=3, honest=True, told="an honest payer's entry gets through the change"),
    Scope(
        "channel-live", "channel", new=1, twins=3, honest=True, told="an honest payee's claim gets through the change"
    ),
)


@dataclass
class Result:
    """What an exploration found."""

    scope: Scope
    states: int = 0
    transitions: int = 0
    depth: int = 0
    locals: int = 0
    core_runs: int = 0
    seconds: float = 0.0
    complete: bool = False
    violation: str = ""
    trace: tuple[str, ...] = ()


class Explorer:
    """Breadth first over one scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.things = Things(scope.kind)
        if scope.honest and scope.kind == "slot":
            self.things.wanted = ("e1",)
        self.locals = Locals(self.things)
        self._parents: dict[Global, tuple[Global, str, int, Event] | None] = {}
        self._lies: dict[str, list[Any]] = {}
        self._contents: dict[Any, int] = {}
        self._known_steps: dict[Any, list[tuple[Event, int]]] = {}
        self._known_final: dict[Any, Final] = {}

    def run(self, *, states_max: int = 10**9, seconds_max: float = 1e9) -> Result:
        """Explore until a violation, the end, or a limit."""
        began = time.monotonic()
        old = self.locals.first(0)
        new = [self.locals.first(1)] * self.scope.new
        first: Global = ((old.number,) * 3, tuple(one.number for one in new), "")
        self._parents[first] = None
        result, level = Result(self.scope), [first]
        while level and not result.violation:
            following: list[Global] = []
            for state in level:
                if len(self._parents) > states_max or time.monotonic() - began > seconds_max:
                    break
                final = self._final(state)
                result.violation = self._wrong(state, final) or self._expand(state, final, following, result)
                if result.violation:
                    result.trace = tuple(self._trace(state))
                    break
            else:
                result.depth += bool(following)
                level = following
                continue
            break
        result.complete = not level or bool(result.violation)
        result.states, result.locals, result.core_runs = len(self._parents), len(self.locals.all), self.locals.runs
        result.seconds = time.monotonic() - began
        return result

    def _expand(self, state: Global, final: Final, following: list[Global], result: Result) -> str:
        moved = False
        for role, number, event, then in self._moves(state, final):
            moved = True
            result.transitions += 1
            if then not in self._parents:
                self._parents[then] = (state, role, number, event)
                following.append(then)
        return "" if moved or not self.scope.honest else self._stuck(final)

    # what can happen

    def _moves(self, state: Global, final: Final) -> Iterator[tuple[str, int, Event, Global]]:
        old, new, reclaim = state
        learnable = tuple(final)
        for number in dict.fromkeys(old):
            for event, then in self._steps(number, reclaim, learnable, ()):
                yield "w", number, event, (_replaced(old, number, then), new, reclaim)
        handed = tuple(sorted(self._handed(old))) if new else ()
        for number in dict.fromkeys(new):
            for event, then in self._steps(number, reclaim, learnable, handed):
                yield "v", number, event, (old, _replaced(new, number, then), reclaim)
        if self.things.kind == "channel" and not reclaim and not self.scope.honest:
            for name in self._reclaims(state):
                yield "p", -1, ("sign", name), (old, new, name)

    def _handed(self, old: tuple[int, ...]) -> Iterator[int]:
        """The handovers that are there, by number of their content."""
        for number in old:
            content = self.locals.all[number].handover
            if content is not None:
                yield self._contents.setdefault(content, len(self._contents))

    def _steps(
        self, number: int, reclaim: str, learnable: tuple[str, ...], handed: tuple[int, ...]
    ) -> list[tuple[Event, int]]:
        """What changes one witness, with the number of the state it then is in."""
        key = (number, reclaim, learnable, handed)
        known = self._known_steps.get(key)
        if known is None:
            local = self.locals.all[number]
            steps = [
                (event, self.locals.after(local, event)) for event in self._events(local, reclaim, learnable, handed)
            ]
            known = self._known_steps[key] = [(event, then.number) for event, then in steps if then is not local]
        return known

    def _events(
        self, local: Local, reclaim: str, learnable: tuple[str, ...], handed: tuple[int, ...]
    ) -> Iterator[Event]:
        for name in self._names(reclaim):
            if name not in local.gave:
                yield ("vote", name)
        if self.things.kind == "channel" and local.froze is None and not self.scope.honest:
            yield ("freeze",)
        if local.restarts < self.scope.restarts:
            yield ("restart",)
        if local.idle:
            return
        if self.scope.new and local.epoch == 0 and "change" not in local.learned:
            yield ("learn", "change")
        yield from (("learn", name) for name in learnable if name not in local.learned)
        if local.epoch:
            yield from self._receiving(local, handed, reclaim)

    def _receiving(self, local: Local, handed: tuple[int, ...], reclaim: str) -> Iterator[Event]:
        contents = list(self._contents)
        left = Counter(contents[number] for number in handed)
        left.subtract(content for who, content in local.received if who == "honest")
        yield from (("receive", "honest", content) for content, count in left.items() if count > 0)
        if not any(who == "liar" for who, _ in local.received):
            if reclaim not in self._lies:
                self._lies[reclaim] = self.things.lies([reclaim] if reclaim else [])
            yield from (("receive", "liar", content) for content in self._lies[reclaim])

    def _reclaims(self, state: Global) -> set[str]:
        found = set()
        for epoch in (0, 1) if self.scope.new else (0,):
            frozen = [f for n in state[epoch] if (f := self.locals.all[n].froze) is not None]
            frozen = sorted(frozen * (self.scope.twins if epoch else 1))[:3]
            # one that pays the whole claim can contradict nothing
            found |= {name} if (name := self.things.reclaim(0, epoch, tuple(frozen))) else set()
        return found

    # what is final

    def _names(self, reclaim: str) -> tuple[str, ...]:
        return (*self.things.wanted, reclaim) if reclaim else tuple(self.things.wanted)

    def _final(self, state: Global) -> Final:
        """What can be certified now, and in which epochs."""
        gave = [[g for number in part if (g := self.locals.all[number].gave)] for part in state[:2]]
        key = (*(tuple(sorted(part)) for part in gave), state[2])
        known = self._known_final.get(key)
        if known is None:
            certified = {name: tuple(self._epochs_of(state, name)) for name in self._names(state[2])}
            known = self._known_final[key] = {name: epochs for name, epochs in certified.items() if epochs}
        return known

    def _epochs_of(self, state: Global, name: str) -> Iterator[int]:
        for epoch in (0, 1) if self.scope.new else (0,):
            honest = sum(name in self.locals.all[number].gave for number in state[epoch])
            if self.things.certified(name, epoch, min(3, honest * (self.scope.twins if epoch else 1))):
                yield epoch

    def _wrong(self, state: Global, final: Final) -> str:
        old, new, reclaim = state
        for number in (*old, *new):
            if self.locals.all[number].bad:
                return self.locals.all[number].bad
        slots: dict[Any, str] = {}
        for name in final:
            slot = self.things.slot_of(name)
            if slot is not None and slots.setdefault(slot, name) != name:
                both = f"{slots[slot]} (epoch {_list(final[slots[slot]])}) and {name} (epoch {_list(final[name])})"
                return f"I1: two entries are certified in one slot: {both}"
        total = self.things.reclaimed(reclaim) if reclaim in final else None
        if total is not None and "claim" in final and total < CLAIMED:
            return f"I4: a claim of {CLAIMED} is certified (epoch {_list(final['claim'])}), and so is a {reclaim}"
        return ""

    def _stuck(self, final: Final) -> str:
        """Nothing can happen any more: whoever is honest must have got its due."""
        name = self.things.wanted[0]
        return "" if name in final else f"I6: nothing can happen any more, and {name} is not final"

    # telling

    def _trace(self, state: Global) -> Iterator[str]:
        """The way to a state, with names for the witnesses."""
        steps: list[tuple[str, int, Event]] = []
        at: Global | None = state
        while at is not None:
            parent = self._parents[at]
            at = None
            if parent is not None:
                at, role, number, event = parent
                steps.append((role, number, event))
        places = {"w": [self.locals.first(0).number] * 3, "v": [self.locals.first(1).number] * self.scope.new}
        for role, number, event in reversed(steps):
            if role == "p":
                yield f"the payer signs a {event[1]}"
                continue
            where = places[role].index(number)
            then = self.locals.after(self.locals.all[number], event)
            places[role][where] = then.number
            yield _told(f"{role}{where}", self.locals.all[number], event, then)


def _replaced(numbers: tuple[int, ...], one: int, other: int) -> tuple[int, ...]:
    left = list(numbers)
    left.remove(one)
    return tuple(sorted([*left, other]))


def _list(epochs: tuple[int, ...]) -> str:
    return " and ".join(map(str, epochs))


def _told(who: str, before: Local, event: Event, then: Local) -> str:
    kind = event[0]
    if kind == "vote":
        line = f"{who} votes for {event[1]}" if then.gave != before.gave else f"{who} is shown {event[1]}, refuses it"
    elif kind == "freeze":
        line = f"{who} freezes the channel at {then.froze}"
    elif kind == "learn":
        line = f"{who} learns the certificate of {event[1]}"
    elif kind == "receive":
        whose = "the liar" if event[1] == "liar" else "an honest witness"
        line = f"{who} receives the handover of {whose} ({_lines(event[2])})"
    else:
        line = f"{who} is killed and starts again"
    if then.handover is not None and before.handover is None:
        line += f", stops and hands over ({_lines(then.handover)})"
    if then.phase != before.phase and then.phase == "voting":
        line += ", is ready"
    return line


def _lines(content: Any) -> str:
    frontier, locks, claims, freezes = content
    accounts = ", ".join(f"{key}/{seq}" for key, seq in frontier[1])
    parts = [f"frontier {accounts or 'empty'}"]
    parts += [f"lock {name}" for name in locks] + ["voucher" for _ in claims]
    parts += [f"freeze at {held[3]}" for held in freezes]
    return "; ".join(parts)


def explore(scope: Scope, *, off: str = "", **limits: Any) -> Result:
    """One scope, with a rule of the product switched off where ``off`` names one (:mod:`tests.model.off`)."""
    from tests.model.off import RULES

    with ExitStack() as stack:
        stack.enter_context(fast_signatures())
        if off:
            RULES[off].switch_off(stack)
        return Explorer(scope).run(**limits)


def main() -> int:
    """Explore all scopes, then every scope with a rule switched off; 1 if anything is not as it must be."""
    from tests.model.off import RULES

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scope", choices=[scope.name for scope in SCOPES], action="append")
    parser.add_argument("--off", choices=sorted(RULES), action="append", help="only with this rule switched off")
    parser.add_argument("--states", type=int, default=3_000_000, help="give up above so many states")
    parser.add_argument("--seconds", type=float, default=1e9, help="give up a scope after so long")
    arguments = parser.parse_args()
    limits = {"states_max": arguments.states, "seconds_max": arguments.seconds}
    failed, scopes = False, {scope.name: scope for scope in SCOPES}
    for scope in [] if arguments.off else [scopes[name] for name in arguments.scope or scopes]:
        result = explore(scope, **limits)
        _print(result, "")
        failed |= bool(result.violation) or not result.complete
    for name in arguments.off or ([] if arguments.scope else RULES):
        result = explore(scopes[RULES[name].scope], off=name, **limits)
        _print(result, name)
        failed |= not result.violation
    return int(failed)


def _print(result: Result, off: str) -> None:
    told = {
        "scope": result.scope.name, "off": off, "states": result.states, "transitions": result.transitions,
        "depth": result.depth, "witness_states": result.locals, "core_runs": result.core_runs,
        "seconds": round(result.seconds, 1), "complete": result.complete, "violation": result.violation,
    }  # fmt: skip
    print(json.dumps(told), flush=True)
    for number, line in enumerate(result.trace, 1):
        print(f"  {number:2} {line}")


if __name__ == "__main__":
    sys.exit(main())
