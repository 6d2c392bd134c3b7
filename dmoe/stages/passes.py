"""Rows on their way: embedded here, through the stages wherever their hosts are, and through the head here.

Owns: one way through the stages for sequences whose stages are at the same peers. Does not own: second tries
(``caller``), tickets (``legs``), the calls of one chain (``chain``).

Invariants:
1. The stream is rounded to the manifest's wire dtype before every stage and behind the last, wherever each runs.
2. Until it is known that a cache holds more, no more is assumed: what a failed way leaves behind is overwritten.
"""

from collections.abc import Callable, Sequence
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import trio

from config.errors import RemoteError, RiosError
from dmoe.core import wire
from dmoe.core.manifest import Manifest
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.wire import FloatRows
from dmoe.replicas import now_us
from dmoe.runner import Feed, Want
from dmoe.stages.chain import Account, Rows, StageError, Way, run_span
from dmoe.stages.legs import Shared
from dmoe.stages.loading import SpreadLayers
from dmoe.stages.patience import Patience
from dmoe.stages.pieces import PIECES_AT_ONCE, Turn, one_behind_the_other
from dmoe.stages.segment import Ends
from dmoe.stages.sequence import Heard, StageSequence, spread_report
from dmoe.threads import here_or_aside

CHUNK_ROWS = 256
"""Rows of one sequence in one message: bounds the length of a step at a host."""
PIECE_ROWS_MIN = 48
"""A prompt that passes several hosts goes in pieces of at least so many rows: while one host computes a piece, the next
computes the one before. Smaller ones would cost more than they gain."""
PIECES_PER_HOST = 2
"""So many pieces per host: with S hosts and 2S pieces they compute about two thirds of the time, instead of 1/S."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence contributes to one way through the stages."""

    sequence: StageSequence
    position: int
    tokens: tuple[int, ...]
    outputs: int


class StagePasses:
    """Ways through a model's stages."""

    def __init__(self, shared: Shared, manifest: Manifest, ends: Ends, privacy: Privacy = OPEN) -> None:
        self._shared = shared
        self._manifest = manifest
        self._ends = ends
        self._privacy = privacy
        self._patience = Patience(shared, manifest, privacy)

    async def group(self, feeds: Items[Feed]) -> list[FloatRows]:
        """The outputs of feeds whose sequences are at the same peers."""
        kept: list[list[FloatRows]] = [[] for _ in feeds]
        longest = max(len(feed.tokens) for feed in feeds)
        size = self.piece_rows(sequence_of(feeds[0]), longest)
        pieces: list[list[Work]] = []
        owners: list[list[int]] = []
        for start in range(0, longest, size):
            owners.append([n for n, feed in enumerate(feeds) if len(feed.tokens) > start])
            pieces.append([_work_of(feeds[n], start, size) for n in owners[-1]])
        found = await self.in_pieces(pieces, range(len(self._manifest.stages)))
        for work, members, x in zip(pieces, owners, found, strict=True):
            first = 0
            for n, each in zip(members, work, strict=True):
                kept[n].append(x[first : first + each.outputs])
                first += each.outputs
        return await self._outputs(feeds, kept)

    async def _outputs(self, feeds: Items[Feed], kept: list[list[FloatRows]]) -> list[FloatRows]:
        """The head over all rows that are wanted, those of one kind together."""
        rows = [np.concatenate(each) for each in kept]
        found: list[FloatRows] = [np.zeros((0, 0), np.float32)] * len(feeds)
        wants: tuple[Want, ...] = ("logits", "hidden")
        for want in wants:
            members = [n for n, feed in enumerate(feeds) if feed.want == want]
            if not members:
                continue
            out = await self._head(np.concatenate([rows[n] for n in members]), want)
            first = 0
            for n in members:
                found[n] = out[first : first + len(rows[n])]
                first += len(rows[n])
        return found

    def piece_rows(self, sequence: StageSequence, rows: int) -> int:
        """How many of ``rows`` rows of a sequence go together: fewer where hosts can work at the same time."""
        hosts = len({leg.link.peer for leg in sequence.legs.values()})
        if hosts < 2:
            return CHUNK_ROWS
        return min(CHUNK_ROWS, max(PIECE_ROWS_MIN, -(-rows // (PIECES_PER_HOST * hosts))))

    async def in_pieces(
        self,
        pieces: Sequence[Sequence[Work]],
        stages: range,
        arrived: Callable[[int], None] = lambda piece: None,
    ) -> list[FloatRows]:
        """Every piece of a pass through these stages, one behind the other: of each, the rows that it wants come out.
        ``arrived``: told of each that is through."""
        found: list[FloatRows] = [np.zeros((0, 0), np.float32)] * len(pieces)
        rows = [sum(len(each.tokens) for each in work) for work in pieces]

        async def through(piece: int, turn: Turn) -> None:
            ahead = sum(rows[max(0, piece - PIECES_AT_ONCE) : piece])
            found[piece] = await self._through(pieces[piece], stages, turn, ahead)
            arrived(piece)

        await one_behind_the_other(len(pieces), through)
        return found

    def embedded(self, tokens: Items[int], count: int) -> FloatRows:
        """The first ``count`` tokens as rows, as they travel to the first stage."""
        return wire.rounded(self._embedded(tokens[:count]), self._manifest.wire_dtype)

    def _embedded(self, tokens: Items[int]) -> FloatRows:
        rows: FloatRows = self._ends.embedding.gather(np.array(tokens, np.int64))
        return rows

    async def _head(self, rows: FloatRows, want: Want) -> FloatRows:
        if self._ends.is_quick(len(rows)):
            return await here_or_aside(partial(self._ends.outputs, rows, want))
        return await trio.to_thread.run_sync(self._ends.outputs, rows, want)

    async def _through(self, work: Sequence[Work], stages: range, turn: Turn, ahead: int) -> FloatRows:
        """One piece; ``ahead`` rows of its pass may still be under way in front of it."""
        tokens = [token for each in work for token in each.tokens]
        x = wire.rounded(await here_or_aside(partial(self._embedded, tokens)), self._manifest.wire_dtype)
        deadline = trio.current_time() + self.pass_seconds(len(stages))
        for each in work:
            for stage in stages:  # until it is known that more is there, no more is
                leg = each.sequence.legs[stage]
                leg.held = min(leg.held, each.position)
        legs = work[0].sequence.legs
        forward = self._shared.may_forward and not work[0].sequence.hub

        def together(stage: int) -> object:
            """Stages here in one part of the way, hosts that give on in one, every other host by itself."""
            return "here" if legs[stage].here is not None else forward or stage

        runs = [list(run) for _, run in groupby(stages, key=together)]
        for index, run in enumerate(runs):
            is_last = index == len(runs) - 1
            await turn.enter(index)
            if legs[run[0]].here is not None:
                for stage in run:
                    x = await self._here(work, stage, x, deadline)
                if is_last:
                    x = _wanted(work, x)
            else:
                sent = partial(turn.leave, index)
                x = await self._there(work, run, x, deadline, sent, ahead, is_last=is_last)
            turn.leave(index)
        return x

    async def _here(self, work: Sequence[Work], stage: int, x: FloatRows, deadline: float) -> FloatRows:
        link = work[0].sequence.legs[stage].link
        tickets = []
        for each in work:
            ticket = each.sequence.legs[stage].here
            assert ticket is not None
            if ticket.closed:
                raise StageError(link, RemoteError("not_found", "the cache here was given up"))
            tickets.append(ticket)
            if isinstance(spread := ticket.stage.segment, SpreadLayers):
                spread.charge(ticket.cache, each.sequence.bill)
        places = [(each.position, len(each.tokens)) for each in work]
        try:
            with run_span(link, "internal", len(x)):
                job = await self._shared.host.compute(tickets, places, x, deadline, self._shared.chains.number())
        except RiosError as error:
            raise StageError(link, error) from error
        assert job.answer is not None
        for each in work:
            if spread_report(each.sequence.legs[stage]) is None:  # else others computed it, and are told of there
                each.sequence.count(link, len(each.tokens))
        return wire.rounded(job.answer, self._manifest.wire_dtype)

    async def _there(
        self,
        work: Sequence[Work],
        stages: Items[int],
        x: FloatRows,
        latest: float,
        sent: Callable[[], None],
        ahead: int,
        *,
        is_last: bool,
    ) -> FloatRows:
        self._check_allowed(work, stages)
        first = work[0].sequence
        way = Way(
            self._manifest.model_id,
            self._manifest.wire_dtype,
            self._manifest.architecture.hidden,
            tuple(first.legs[stage].link for stage in stages),
            self._shared.may_forward and not first.hub,
        )
        parts = [
            Rows(
                tuple(each.sequence.legs[stage].ticket for stage in stages),
                each.position,
                len(each.tokens),
                each.outputs if is_last else len(each.tokens),
                tuple(each.sequence.came(stage, each.position) for stage in stages),
                each.sequence.bill,
            )
            for each in work
        ]
        for each in work:
            for stage in stages:
                each.sequence.count(each.sequence.legs[stage].link, len(each.tokens))
        told = partial(self._told, work, [each.sequence.cuts for each in work])
        started = trio.current_time()
        deadline = latest if first.patient else self._patience.until(way.links, ahead + len(x), latest)
        try:
            found = await self._shared.chains.run(way, parts, x, deadline, told, sent)
        except StageError as failed:
            if deadline < latest and failed.error.code == "deadline":
                self._patience.gave_up()
            raise
        self._patience.took(way.links, ahead + len(x), trio.current_time() - started)
        return found

    def _check_allowed(self, work: Sequence[Work], stages: Items[int]) -> None:
        """The last gate before rows leave: hosts were chosen by the same rule."""
        layers = self._manifest.architecture.layers
        for link in (each.sequence.legs[stage].link for each in work for stage in stages):
            assert self._privacy.allows(link.peer, *link.layers, layers), (
                f"layers {link.layers} are not for {link.peer}"
            )

    def _told(self, work: Sequence[Work], cuts: Sequence[int], account: Account) -> None:
        """A host says what it did: it is there."""
        for each, before, part, said in zip(work, cuts, account.parts, account.said, strict=True):
            each.sequence.hear(Heard(account.link, part, account.device, said), before)
        self._shared.dispatcher.seen(account.link.peer, now_us())
        self._shared.directions.ran(self._manifest, account.link.stage, account.link.peer)
        self._shared.measured(self._manifest.model_id, account)

    def pass_seconds(self, stages: int) -> float:
        """How long one way through so many stages may take."""
        return self._shared.timeout_ms * (1 + stages) / 1000


def _work_of(feed: Feed, start: int, rows: int) -> Work:
    """A feed's rows from ``start`` on, ``rows`` of them at most."""
    tokens, sequence = feed.tokens[start : start + rows], sequence_of(feed)
    after = len(feed.tokens) - start - len(tokens)  # rows of this feed that are still to come
    return Work(sequence, sequence.length + start, tokens, max(0, min(len(tokens), feed.outputs - after)))


def sequence_of(feed: Feed) -> StageSequence:
    """The sequence of a feed, which is one of stages."""
    assert isinstance(feed.sequence, StageSequence)
    return feed.sequence


def _wanted(work: Sequence[Work], x: FloatRows) -> FloatRows:
    """The rows that come out of a way."""
    kept, end = [], 0
    for each in work:
        end += len(each.tokens)
        kept.append(x[end - each.outputs : end])
    return kept[0] if len(kept) == 1 else np.concatenate(kept)
