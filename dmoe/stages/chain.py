"""One pass through hosts of stages: rows out, rows back, and an account of who did what.

Owns: a chain's calls, forwarded from host to host or one after the other, and counting them for payment. Does not own:
which hosts (``route``), sequences and second tries (``caller``).

Forwarded, the rows go to the first host, from each host to the next, and from the last one home: (S+1)/2 round trips.
The hosts' answers follow behind and are read in the background: they say who did what, and what went wrong where.
Otherwise every host answers with its rows, one round trip each: the way for hosts that cannot reach each other.

Invariants:
1. Every step that a host says it took is counted for payment once, with the same kFLOP and leaf as there.
2. A failure names the stage: :class:`StageError`.
3. A host that gives rows which are not those it signs for is told of (``disputed``), once the rows are here: off the
   token's path.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import trio

from config.errors import BusyError, IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.bills import Bill
from dmoe.core import history, stagecalls, wire
from dmoe.core.history import Said
from dmoe.core.stagecalls import Failure, Hop, Part, Step
from dmoe.core.wire import Dtype, FloatRows
from dmoe.ports import Quote
from dmoe.purse import Purse
from dmoe.stages.results import Expected, Results
from p2p import trace
from p2p.face import Network, Pending, Reply

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Link:
    """One host of a chain: who runs which layers, and how it is paid."""

    stage: int
    peer: PeerId
    layers: tuple[int, int]
    flops_per_row: int
    channel: bytes
    quote: Quote


@dataclass(frozen=True, slots=True)
class Way:
    """The hosts that rows pass, one behind the other. ``forward``: they give them on themselves."""

    model_id: str
    dtype: Dtype
    width: int
    links: tuple[Link, ...]
    forward: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The next ``rows`` rows of a pass: one sequence's, with its tickets per link. The last ``outputs`` come back.
    ``came``: per link the digest of what the host has had so far; empty if that is not known."""

    tickets: tuple[bytes, ...]
    position: int
    rows: int
    outputs: int
    came: tuple[bytes, ...] = ()
    bill: Bill | None = None
    """Who pays; None: nobody any more."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a host did, for estimates, reports and audits. ``said``: of every one of ``parts``, by digest."""

    link: Link
    rows: int
    service_us: int
    waited_us: int
    device: str = ""
    parts: tuple[Part, ...] = ()
    said: tuple[Said, ...] = ()


class StageError(Exception):
    """A stage failed a pass: which one, and why. ``between``: it could not be reached by the host before it."""

    def __init__(self, link: Link, error: RiosError, *, between: bool = False) -> None:
        super().__init__(f"stage {link.stage} at {link.peer}: {error}")
        self.link = link
        self.error = error
        self.between = between


Tell = Callable[[Account], None]


class Chains:
    """Runs passes. ``nursery`` outlives them: what the hosts answer is read there."""

    def __init__(self, network: Network, purse: Purse) -> None:
        self.disputed: Callable[[PeerId, str], None] = lambda peer, why: None
        self.nursery: trio.Nursery | None = None
        self.leaving = False
        """The nursery is about to close."""
        self.contradicted: set[tuple[PeerId, PeerId]] = set()
        """Neighbours on a way that said different things about the rows between them, or nothing. Who of the two lies
        is found out where their rows pass this node."""
        self._network = network
        self._purse = purse
        self._results = Results(network)

    def number(self) -> int:
        """A name for a pass, higher than all before."""
        return self._results.number()

    async def run(
        self,
        way: Way,
        parts: Sequence[Rows],
        x: FloatRows,
        deadline: float,
        tell: Tell,
        sent: Callable[[], None] = lambda: None,
    ) -> FloatRows:
        """``f32[N, H]`` through a way's stages; of each part its last ``outputs`` rows come back. ``deadline`` is a
        trio time. ``sent``: told once the next rows may be sent after these, which is before the end; hosts put
        right what overtakes. Raises StageError."""
        if way.forward and len(way.links) > 1:
            with run_span(way.links[0], "client", len(x), hosts=len(way.links)):
                return await self._forwarded(way, parts, x, deadline, tell, sent)
        for index, link in enumerate(way.links):
            is_last = index == len(way.links) - 1
            wanted = [p if is_last else replace(p, outputs=p.rows) for p in parts]
            with run_span(link, "client", len(x)):
                x = await self._one(way, index, wanted, x, deadline, tell, sent if is_last else lambda: None)
        return x

    async def _one(
        self,
        way: Way,
        index: int,
        parts: Sequence[Rows],
        x: FloatRows,
        deadline: float,
        tell: Tell,
        sent: Callable[[], None],
    ) -> FloatRows:
        """One host, which answers with its rows."""
        link = way.links[index]
        shape, buffer = wire.encode(x, way.dtype)
        own = _parts(parts, index)
        header = stagecalls.run_header(self.number(), own, (), shape, reply=True)
        try:
            left_ms = max(1, int((deadline - trio.current_time()) * 1000))
            sent()
            reply = await self._network.call(link.peer, stagecalls.RUN, header, (buffer,), deadline_ms=left_ms)
            trail, _ = _answer_of(reply, link, 0, len(parts))
            if len(trail) != 1:
                raise RemoteError("protocol", f"{link.peer} does not say what it did", peer_id=link.peer)
            rows = _rows_of(reply.header, reply.buffers, way, parts)
        except RiosError as error:
            if error.code == "deadline":
                self._lost((link,), parts)
            raise StageError(link, error) from error
        except BaseException:
            self._lost((link,), parts)
            raise
        self._count(way, index, parts, trail[0], tell)
        self._compare(link, parts, trail[0], rows)
        self._compare_came(link, index, parts, trail[0], x)
        return rows

    async def _forwarded(
        self,
        way: Way,
        parts: Sequence[Rows],
        x: FloatRows,
        deadline: float,
        tell: Tell,
        sent: Callable[[], None],
    ) -> FloatRows:
        shape, buffer = wire.encode(x, way.dtype)
        first, rest = way.links[0], way.links[1:]
        hops = [Hop(link.peer, tuple(p.tickets[n] for p in parts)) for n, link in enumerate(rest, 1)]
        expected = self._results.expect(way.links[-1].peer)
        header = stagecalls.run_header(expected.number, _parts(parts, 0), hops, shape, reply=False)
        left_ms = max(1, int((deadline - trio.current_time()) * 1000))
        call = (first.peer, stagecalls.RUN, header, (buffer,))
        assert self.nursery is not None, "chains run while the node does"
        failed: list[StageError] = []
        try:
            pending = self._begin(call, left_ms)
            self.nursery.start_soon(self._account, way, parts, x.copy(), pending, call, left_ms, expected, failed, tell)
            sent()
            with trio.move_on_at(deadline):
                await expected.happened.wait()
            if failed:
                raise failed[0]
            if expected.header is None or expected.buffer is None:
                late = RemoteError("deadline", f"no rows came back within {left_ms} ms", peer_id=first.peer)
                raise StageError(first, expected.error or late)
            try:
                return _rows_of(expected.header, (expected.buffer,), way, parts)
            except RiosError as error:
                raise StageError(way.links[-1], error) from error
        finally:
            self._results.forget(expected)

    def _begin(self, call: tuple[PeerId, str, dict[str, object], tuple[memoryview]], left_ms: int) -> Pending | None:
        try:
            return self._network.begin(*call, deadline_ms=left_ms)
        except RiosError:
            return None  # the slow way meets it again

    async def _account(
        self,
        way: Way,
        parts: Sequence[Rows],
        x: FloatRows,
        pending: Pending | None,
        call: tuple[PeerId, str, dict[str, object], tuple[memoryview]],
        left_ms: int,
        expected: Expected,
        failed: list[StageError],
        tell: Tell,
    ) -> None:
        """Read what the hosts answer to ``x``: count it; end the pass if it cannot succeed any more. Never raises
        RiosError."""
        first = way.links[0]
        try:
            if pending is not None:
                reply = await pending.wait()
            else:
                reply = await self._network.call(*call, deadline_ms=left_ms)
            trail, failure = _answer_of(reply, first, len(way.links) - 1, len(parts))
        except RiosError as error:
            # the first host may have refused it, but not for lack of time; of the others nobody tells
            self._lost(way.links if error.code in ("deadline", "unavailable") else (), parts)
            failed.append(StageError(first, error))
            expected.fail(error)
            return
        for index, step in enumerate(trail):
            self._count(way, index, parts, step, tell)
        if trail:
            self._compare_came(first, 0, parts, trail[0], x)
        for index, (one, other) in enumerate(pairwise(trail)):
            if any(a.went != b.came for a, b in zip(one.said, other.said, strict=True)):
                self._contradict(way, index, "disagree about the rows between them")
        if failure is None and len(trail) < len(way.links):
            self._contradict(way, max(0, len(trail) - 1), "gave rows on, and not all behind them say what they did")
        if len(trail) == len(way.links) and expected.header is not None and expected.buffer is not None:
            with suppress(RiosError):  # what is malformed ends the pass
                rows = _rows_of(expected.header, (expected.buffer,), way, parts)
                self._compare(way.links[-1], parts, trail[-1], rows)
        if failure is not None:
            if failure.code in ("deadline", "unavailable"):
                self._lost(way.links[len(trail) :], parts)
            failed.append(_failure_of(way, failure, len(trail)))
            expected.fail(failed[0].error)

    def _contradict(self, way: Way, index: int, how: str) -> None:
        """From now on rows between the two hosts pass this node."""
        giver, taker = way.links[index].peer, way.links[index + 1].peer
        if (giver, taker) not in self.contradicted:
            log.warning("%s and %s %s", giver, taker, how)
        self.contradicted.add((giver, taker))

    def _count(self, way: Way, index: int, given: Sequence[Rows], step: Step, tell: Tell) -> None:
        link, waited_us = way.links[index], min(step.waited_us, step.service_us)
        parts = _parts(given, index)
        rows = sum(part.rows for part in parts)
        tell(Account(link, rows, step.service_us, waited_us, step.device, tuple(parts), step.said))
        if self._purse.buyer is None or not link.channel:
            return
        spare = self._purse.bills.purpose("kept")
        for each, part, said in zip(given, parts, step.said, strict=True):
            work = stagecalls.kflop(link.flops_per_row, part)
            leaf = stagecalls.leaf(way.model_id, link.layers, part, step.device, said.came, said.went)
            self._purse.count_run(link.peer, link.channel, link.quote, work, leaf, each.bill or spare)

    def _lost(self, links: Sequence[Link], parts: Sequence[Rows]) -> None:
        """Hosts that may have computed their part, of which nobody will tell."""
        for link in links:
            rows = sum(part.rows for part in parts)
            self._purse.lost(link.peer, link.channel, link.quote, link.flops_per_row * rows // 1000)

    def _compare(self, link: Link, parts: Sequence[Rows], step: Step, rows: FloatRows) -> None:
        """Whether rows that came home are those that their host says it sent."""
        first = 0
        for part, said in zip(parts, step.said, strict=True):
            if history.digest(rows[first : first + part.outputs], said.before) != said.went:
                self.disputed(link.peer, "it sent other rows than those it signed for")
                return
            first += part.outputs

    def _compare_came(self, link: Link, index: int, parts: Sequence[Rows], step: Step, x: FloatRows) -> None:
        """Whether a host signs for the rows that this node sent it."""
        first = 0
        for part, said in zip(parts, step.said, strict=True):
            before = part.came[index] if part.came else b""
            if before and history.digest(x[first : first + part.rows], before) != said.came:
                self.disputed(link.peer, "it signed for other rows than those it was sent")
                return
            first += part.rows


def run_span(link: Link, kind: trace.Kind, rows: int, hosts: int = 1) -> AbstractContextManager[trace.Span]:
    """Rows at a host as a part of their request's trace, until they are here; of ``hosts`` that give them on, at the
    first."""
    first, last = link.layers
    peer, layers = str(link.peer), f"{first}-{last}"
    return trace.span(stagecalls.RUN, kind, peer=peer, stage=link.stage, layers=layers, rows=rows, hosts=hosts)


def _parts(parts: Sequence[Rows], index: int) -> list[Part]:
    return [Part(p.tickets[index], p.position, p.rows, p.outputs) for p in parts]


def _answer_of(reply: Reply, link: Link, hops: int, parts: int) -> tuple[list[Step], Failure | None]:
    try:
        return stagecalls.parse_answer(reply.header, hops, parts)
    except RiosError as error:
        raise RemoteError(error.code, f"{link.peer}: {error.message}", peer_id=link.peer) from error


def _failure_of(way: Way, failure: Failure, steps: int) -> StageError:
    """A failure that a host reports, as one of the stage it speaks of."""
    link = way.links[min(failure.hop, len(way.links) - 1)]
    error: RiosError = RemoteError(failure.code, failure.message, failure.hint, peer_id=link.peer)
    if failure.code == "busy":
        error = BusyError(failure.message, failure.hint, retry_after_ms=failure.retry_after_ms)
    # the host before it ran its part, and could not hand the rows on
    between = failure.code == "unavailable" and failure.hop == steps > 0
    return StageError(link, error, between=between)


def _rows_of(header: object, buffers: Sequence[object], way: Way, parts: Sequence[Rows]) -> FloatRows:
    """The rows of an answer. Raises RemoteError if they are not those that were asked for."""
    last = way.links[-1]
    if not isinstance(header, dict) or len(buffers) != 1:
        raise RemoteError("protocol", f"{last.peer} answered without rows", peer_id=last.peer)
    try:
        rows = wire.decode(header, buffers[0])  # type: ignore[arg-type]
    except IntegrityError as error:
        raise RemoteError("integrity", f"{last.peer} answered with {error.message}", peer_id=last.peer) from error
    wanted = (sum(part.outputs for part in parts), way.width)
    if rows.shape != wanted or wire.dtype_of(header) != way.dtype:
        raise RemoteError("protocol", f"{last.peer} answered with shape {list(rows.shape)}", peer_id=last.peer)
    return rows
