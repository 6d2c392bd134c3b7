"""Continuous batching: one loop per runner, and a pass while any of its answers has work.

Owns: the sequences of running answers and those kept for their beginnings, one pass after the other, drafts. Does not
own: who runs (``dmoe/core/scheduler.Admission`` in ``dmoe/engine.py``), what an answer is (``dmoe/core/answer.py``),
how a pass is computed (a :class:`dmoe.runner.Runner`).

Invariants:

1. One pass at a time; sequences are opened beside it, so a slow opening delays its own answer only.
2. An answer that is left takes part in no further pass. Its sequence is freed at once, or at the end of the pass or
   opening that uses it; a pass all of whose answers were left is cancelled.
3. A pass that fails has changed nothing: each of its answers is run alone once, and only those that fail end.
4. An answer whose reader is behind takes part in no pass; the others go on.
5. An answer whose prompt begins like one that is being read waits for that beginning instead of computing it again.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from config.errors import RiosError
from config.generation import Finished, FinishReason
from dmoe.core.answer import FloatRows, Step, Taken
from dmoe.core.prefixes import PREFIX_TOKENS_MIN, Prefixes, Tokens, common, tokens_of
from dmoe.core.scheduler import PassPlan, Ready
from dmoe.core.speculate import MODEL_KIND, NO_DRAFT, Draft, Lookup, ModelDrafts, Odds, Pace, allot
from dmoe.drafting import Drafter, Wanted
from dmoe.runner import Feed, Runner
from dmoe.slots import Held, Slot, Work
from dmoe.tallies import Totals
from p2p import trace

_SECONDS_MIN = 1e-6
_SPARE_POSITIONS_MAX = 256
"""A kept sequence with more unused positions is copied to one that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """Bounds. ``rows_max``: of a pass; ``drafts_max``: guessed tokens of one answer in a pass, 0 turns drafting off;
    ``prefix_positions_max``: of kept sequences, 0 keeps none."""

    rows_max: int = 256
    drafts_max: int = 16
    prefix_positions_max: int = 32_768


Over = Callable[[Slot, FinishReason | Exception], None]
"""Told once when an answer has ended by itself."""


class Passes:
    """The loop of one runner."""

    def __init__(
        self,
        load: Callable[[], Awaitable[Runner]],
        lock: trio.Lock,
        nursery: trio.Nursery,
        options: PassOptions,
        totals: Totals,
        over: Over,
        draft: Callable[[], Awaitable[Drafter | None]] | None = None,
    ) -> None:
        """``nursery`` holds the loop and the openings; ``load`` is asked by each opening, and loads once; ``lock`` is
        held during each pass, as the runner may also draft for another model; ``draft`` is asked once for the draft
        model, if there is one that fits."""
        self._load = load
        self._nursery = nursery
        self._options = options
        self._totals = totals
        self._over = over
        self._find_drafter = draft
        self._drafter: Drafter | None = None
        self._model_drafts = ModelDrafts()
        self._lock = lock
        self._slots: list[Slot] = []
        self._in_pass: list[Slot] = []
        self._pass_scope = trio.CancelScope()
        self._kept: Prefixes[Held] = Prefixes(options.prefix_positions_max)
        self._plan: PassPlan[Slot] = PassPlan(options.rows_max)
        self._pace = Pace()
        self._odds = Odds()
        self._work = trio.lowlevel.ParkingLot()
        self._loop = trio.CancelScope()
        self._runner: Runner | None = None

    @property
    def idle(self) -> bool:
        """No answer is here."""
        return not self._slots

    @property
    def kept_positions(self) -> int:
        """Positions kept for their beginnings."""
        return self._kept.positions

    def start(self, slot: Slot) -> None:
        """An answer has its slot."""
        slot.started = trio.current_time()
        self._slots.append(slot)
        self._nursery.start_soon(self._open, slot)

    def leave(self, slot: Slot) -> None:
        """Nobody wants the answer any more."""
        slot.opening.cancel()
        self._retire(slot)
        if all(each.over for each in self._in_pass):
            self._pass_scope.cancel()

    def wake(self) -> None:
        """There may be work."""
        self._work.unpark_all()

    async def run(self) -> None:
        """Passes while there is work, until :meth:`close`."""
        with self._loop:
            while True:
                ready = [slot for slot in self._slots if slot.work is not None and not slot.outbox.full]
                if ready:
                    await self._draft(ready)
                    steps = self._steps([slot for slot in ready if not slot.over])
                    if steps:
                        await self._pass(steps)
                else:
                    await self._work.park()

    def close(self) -> None:
        """End the loop and free every sequence."""
        self._loop.cancel()
        for slot in list(self._slots):
            self._retire(slot)
        for held in self._kept.clear():
            held.drop()
        if self._drafter is not None:
            self._drafter.close()

    # --- opening

    async def _open(self, slot: Slot) -> None:
        with slot.opening, trace.during(slot.trace):
            try:
                runner = self._runner = await self._load()
                await self._bring_drafter()
                held, length = await self._opened(runner, slot)
                if slot.over:
                    held.drop()
                    return
                held.sequence.bill = slot.bill
                slot.held, slot.odds = held, Odds(self._odds)
                slot.work = await slot.make(length)
            except Exception as failure:  # noqa: BLE001 - it reaches who asked for the answer
                self._end(slot, failure)
            else:
                self.wake()

    async def _bring_drafter(self) -> None:
        """Ask for the draft model once; again, if who asked left meanwhile."""
        find, self._find_drafter = self._find_drafter, None
        if find is not None:
            try:
                self._drafter = await find()
            except trio.Cancelled:
                self._find_drafter = find
                raise

    async def _opened(self, runner: Runner, slot: Slot) -> tuple[Held, int]:
        """A sequence, begun with what is known of its prompt already, and how much that is."""
        found = await self._beginning(slot) if slot.reuse else None
        if found is None:
            return Held(await runner.open(slot.positions)), 0
        source, length = found
        if source.sequence.report().missing:
            source.unpin()  # computed without some experts: nothing for another answer
            return Held(await runner.open(slot.positions)), 0
        try:
            sequence = await runner.open(slot.positions, like=source.sequence, length=length)
        finally:
            source.unpin()
        self._totals.prefix_hits += 1
        self._totals.prefix_tokens += length
        return Held(sequence), length

    async def _beginning(self, slot: Slot) -> tuple[Held, int] | None:
        """The sequence, pinned, with which this prompt has most in common, and how much: kept or running."""
        prompt = slot.prompt[:-1]  # the last token's output is needed, so it is always computed
        while not slot.over:
            kept = self._kept.find(slot.user, prompt)
            other, shared = self._longest_running(slot, prompt)
            if other is None or (kept is not None and kept[1] >= shared):
                if kept is not None:
                    kept[0].pin()
                return kept
            if other.held is not None and other.work is not None and other.work.length >= shared:
                other.held.pin()
                return other.held, shared
            await other.progress.park()
        return None

    def _longest_running(self, slot: Slot, prompt: Tokens) -> tuple[Slot | None, int]:
        """Of those that came before: the one whose prompt begins most like this one."""
        best, length = None, PREFIX_TOKENS_MIN - 1
        for other in self._slots[: self._slots.index(slot)]:
            if other.user == slot.user and other.reuse:
                shared = common(other.prompt, prompt)
                if shared > length:
                    best, length = other, shared
        return best, length

    # --- passes

    async def _draft(self, ready: Sequence[Slot]) -> None:
        """Guess what each answer will say: from its own text, else by the draft model, if there is one."""
        without = []
        for slot in ready:
            if slot.work is not None and not slot.work.prompt_left:
                slot.draft = self._lookup(slot, slot.work)
                if not slot.draft.tokens and self._drafter is not None and self._drafter.serves(slot):
                    without.append(slot)
        if self._drafter is not None and without:
            await self._ask(self._drafter, without, len(ready))

    def _lookup(self, slot: Slot, work: Work) -> Draft:
        useful = min(work.drafts_max, self._options.drafts_max)
        if useful < 1:
            return NO_DRAFT
        if slot.lookup is None:
            slot.lookup = Lookup(work.tokens, slot.positions)
        return slot.lookup.draft(useful)

    async def _ask(self, drafter: Drafter, slots: Sequence[Slot], rows: int) -> None:
        """Ask the draft model, as far as that pays."""
        asked = [slot for slot in slots if slot.work is not None and slot.work.drafts_max > 0]
        room = min((slot.work.drafts_max for slot in asked if slot.work is not None), default=0)
        odds = [slot.odds.of(MODEL_KIND) for slot in asked]
        most = min(room, self._options.drafts_max)
        count = self._model_drafts.count(odds, self._pace, drafter.pace, rows, most)
        if count:
            wanted = [Wanted(slot, slot.work.tokens, slot.positions) for slot in asked if slot.work is not None]
            guesses = await drafter.draft(wanted, count)
            for slot, tokens in zip(asked, guesses, strict=True):
                slot.draft = Draft(tokens, MODEL_KIND)

    def _steps(self, ready: Sequence[Slot]) -> list[tuple[Slot, Step]]:
        """What the next pass feeds."""
        drafts = self._shares(ready)
        plan = self._plan.plan(
            [
                Ready(slot, slot.user, slot.work.prompt_left, drafts.get(slot, 0))
                for slot in ready
                if slot.work is not None
            ]
        )
        return [(slot, slot.work.next(rows, slot.draft.tokens)) for slot, rows in plan if slot.work is not None]

    def _shares(self, ready: Sequence[Slot]) -> dict[Slot, int]:
        """How many guesses of each answer are worth a row. All are kept, to be compared with what is said."""
        chances = [
            (slot, slot.odds.of(slot.draft.kind), len(slot.draft.tokens))
            for slot in ready
            if slot.work is not None and not slot.work.prompt_left
        ]
        if not any(available for _, _, available in chances):
            return {}
        base, spare = self._plan.spare(
            [Ready(slot, slot.user, slot.work.prompt_left) for slot in ready if slot.work is not None]
        )
        counts = allot([(odds, available) for _, odds, available in chances], self._pace, base, spare)
        return {slot: count for (slot, _, _), count in zip(chances, counts, strict=True)}

    async def _pass(self, steps: Sequence[tuple[Slot, Step]]) -> None:
        """Run one pass; where it fails, each of its answers alone."""
        try:
            outputs = await self._forward(steps)
        except Exception as failure:  # noqa: BLE001 - it reaches who asked for the answer
            if len(steps) == 1:
                self._end(steps[0][0], failure)
                return
            for alone in steps:
                if not alone[0].over:
                    await self._pass([alone])
            return
        for (slot, step), rows in zip(steps, outputs, strict=False):  # none if all were left
            if not slot.over:
                self._take(slot, step, rows)

    async def _forward(self, steps: Sequence[tuple[Slot, Step]]) -> list[FloatRows]:
        """The outputs of a pass; none if it was cancelled because nobody wants them any more."""
        held = [slot.held for slot, _ in steps if slot.held is not None]
        feeds = [
            Feed(sequence=each.sequence, tokens=step.tokens, outputs=step.outputs, want=step.want)
            for each, (_, step) in zip(held, steps, strict=True)
        ]
        for each in held:
            each.pin()
        assert self._runner is not None
        self._in_pass, self._pass_scope = [slot for slot, _ in steps], trio.CancelScope()
        outputs: list[FloatRows] = []
        try:
            with self._pass_scope, self._tracing(steps):
                async with self._lock:
                    started = trio.current_time()
                    outputs = await self._runner.forward(feeds)
                self._count(sum(len(step.tokens) for _, step in steps), trio.current_time() - started)
        finally:
            self._in_pass = []
            for each, (slot, _) in zip(held, steps, strict=True):
                if slot.over:
                    each.sequence.bill = None  # it was left while it was computed, and paid for that
                each.unpin()
        return outputs

    @contextmanager
    def _tracing(self, steps: Sequence[tuple[Slot, Step]]) -> Iterator[None]:
        """A pass belongs to the first of its answers that is traced; the others' traces are linked to it."""
        traces = [slot.trace for slot, _ in steps if slot.trace]
        with trace.during(traces[0] if traces else ""):
            if not traces:
                yield
                return
            rows = sum(len(step.tokens) for _, step in steps)
            with trace.span("pass", links=traces[1:], answers=len(steps), rows=rows):
                yield

    def _count(self, rows: int, seconds: float) -> None:
        self._pace.observe(rows, max(seconds, _SECONDS_MIN))
        self._totals.passes += 1
        self._totals.rows += rows

    def _take(self, slot: Slot, step: Step, rows: FloatRows) -> None:
        """One answer's part of a pass."""
        assert slot.work is not None
        assert slot.held is not None
        saying = not slot.work.prompt_left
        try:
            taken = slot.work.take(step, rows)
            if slot.held.sequence.length > taken.length:
                slot.held.sequence.truncate(taken.length)
        except Exception as failure:  # noqa: BLE001 - it reaches who asked for the answer
            self._end(slot, failure)
            return
        if saying:
            self._learn(slot, len(step.tokens) - 1, taken)
        elif not slot.work.prompt_left:
            slot.prefilled = trio.current_time()
        slot.progress.unpark_all()
        for delta in taken.deltas:
            self._totals.said(len(delta.tokens), trio.current_time())
            if slot.lookup is not None:
                slot.lookup.extend(delta.tokens)
            slot.outbox.put(delta)
        if taken.reason is not None:
            self._finish(slot, taken.reason)

    def _learn(self, slot: Slot, fed: int, taken: Taken) -> None:
        said = [token for delta in taken.deltas for token in delta.tokens]
        right = slot.odds.observe(slot.draft, fed, said)
        self._totals.drafts_proposed += fed
        self._totals.drafts_accepted += min(right, fed)

    # --- ends

    def _finish(self, slot: Slot, reason: FinishReason) -> None:
        assert slot.work is not None
        assert slot.held is not None
        report = slot.held.sequence.report()
        event = Finished(
            reason=reason,
            prompt_tokens=len(slot.prompt),
            completion_tokens=slot.work.said,
            prefill_seconds=slot.prefilled - slot.started,
            decode_seconds=trio.current_time() - slot.prefilled,
            route=slot.route,
            expert_rows=report.expert_rows,
            serving=report.serving,
            retries=report.retries,
            missing=report.missing,
            cached_tokens=slot.work.cached,
        )
        self._totals.prompt_tokens += event.prompt_tokens
        slot.outbox.put(event)
        slot.outbox.end()
        self._retire(slot)
        self._over(slot, reason)

    def _end(self, slot: Slot, failure: Exception) -> None:
        slot.outbox.end(failure)
        self._retire(slot)
        self._over(slot, failure)

    def _retire(self, slot: Slot) -> None:
        """Out of the loop; its sequence is kept for its beginning or let go. A second call does nothing."""
        if slot.over:
            return
        slot.over = True
        if slot in self._slots:  # it was still waiting otherwise
            self._slots.remove(slot)
        slot.progress.unpark_all()
        if self._drafter is not None:
            self._drafter.forget(slot)
        if slot.held is None:
            return
        held, slot.held = slot.held, None
        work = slot.work
        usable = slot.reuse and not held.sequence.report().missing
        if work is None or not usable or self._loop.cancel_called or not self._kept.takes(work.length):
            held.drop()
        else:
            self._keep(held, slot, tokens_of(work.tokens[: work.length]))

    def _keep(self, held: Held, slot: Slot, tokens: Tokens) -> None:
        if slot not in self._in_pass:
            held.sequence.bill = None
        if slot.positions - len(tokens) > _SPARE_POSITIONS_MAX:
            self._nursery.start_soon(self._keep_copy, held, slot.user, tokens)
            return
        for gone in self._kept.add(held, slot.user, tokens):
            gone.drop()

    async def _keep_copy(self, held: Held, user: str, tokens: Tokens) -> None:
        """Keep a copy without the positions that the answer did not use."""
        assert self._runner is not None
        try:
            copy = Held(await self._runner.open(len(tokens), like=held.sequence, length=len(tokens)))
        except RiosError:
            return  # it would only have been faster
        finally:
            held.drop()
        for gone in self._kept.add(copy, user, tokens):
            gone.drop()
