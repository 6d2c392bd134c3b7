"""What a span of layers costs on a plan: in this process, as a stage at a host, or with its experts wherever they are.

Owns: the expected time of a pass through a span, of the stream's way between hosts, the price of the work. Does not
own: which spans make a plan (``core.plan``), the figures they are made from (``core.costs``).

Experts: per layer, attention here, then the slowest of the peers called (round trip, queue, service), the calls
themselves and what they send over this node's link. Groups are given to peers as the dispatcher does it. A sparse layer
calls only some of its peers: the slowest is an expectation, with the peers taken as independent.

Invariants:
1. Pure and deterministic; ties go to the smaller peer id.
2. Bounded: at most :data:`REPLICAS_MAX` hosts of a shard are looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from config.vocabulary import PeerId
from dmoe.core import costs
from dmoe.core.costs import Group, Host, Shape, Stage, View
from dmoe.core.dispatch import CALL_US, PRICE_RATIO_MAX, PRICE_WEIGHT
from dmoe.core.privacy import OPEN, Privacy

Where = Literal["here", "experts", "stage"]

CHUNK_ROWS = 256
REPLICAS_MAX = 16
STAGE_CALL_US = 300.0
"""What handing the stream to another host costs beside way and service."""
TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A class of requests. ``batch``: sequences that share a pass. ``tokens_per_pass``: what speculation gains, paid
    with ``rows_per_pass`` rows."""

    prompt_tokens: int = 256
    answer_tokens: int = 128
    batch: int = 1
    tokens_per_pass: float = 1.0
    rows_per_pass: int = 1

    @property
    def passes(self) -> float:
        """Passes after the prompt."""
        return self.answer_tokens / max(1.0, self.tokens_per_pass)

    @property
    def decode_rows(self) -> int:
        """Rows of such a pass, all sequences together."""
        return max(1, self.batch) * max(1, self.rows_per_pass)

    @property
    def paid_rows(self) -> float:
        """Rows of one answer."""
        return self.prompt_tokens + self.passes * max(1, self.rows_per_pass)

    def over_prompt(self, pass_us: Callable[[int], float]) -> float:
        """The time of all passes over the prompt; ``pass_us`` gives that of one with so many rows."""
        whole, rest = divmod(max(1, self.prompt_tokens), CHUNK_ROWS)
        return (whole * pass_us(CHUNK_ROWS) if whole else 0.0) + (pass_us(rest) if rest else 0.0)


@dataclass(frozen=True, slots=True)
class Amount:
    """What a part of a plan adds: to the first token, to every pass, to the answer's price."""

    prefill_us: float = 0.0
    pass_us: float = 0.0
    microcredits: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.prefill_us + other.prefill_us,
            self.pass_us + other.pass_us,
            self.microcredits + other.microcredits,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Layers ``first`` to ``last`` on one decoding pass: who serves them (this node first where it takes part), and
    where the time goes (us); ``other_us``: calls, link, pieces."""

    first: int
    last: int
    where: Where
    peers: tuple[PeerId, ...]
    round_trip_us: float = 0.0
    service_us: float = 0.0
    queue_us: float = 0.0
    other_us: float = 0.0
    microcredits_per_tflop: int = 0
    amount: Amount = Amount()

    def after(self, way: Amount) -> "Span":
        """This span with the stream's way to it (or back from it) added."""
        return replace(self, round_trip_us=self.round_trip_us + way.pass_us, amount=self.amount + way)


class Spans:
    """Spans of one model for one class of requests, as one view shows the hosts."""

    def __init__(self, shape: Shape, view: View, ask: Ask, privacy: Privacy = OPEN) -> None:
        self._shape = shape
        self._view = view
        self._ask = ask
        self._privacy = privacy
        self._layers: dict[tuple[bool, tuple[int, ...]], Span | str] = {}
        self.usable = tuple(peer for peer in sorted(view.peers, key=lambda peer: peer.peer_id) if not peer.barred)

    def here(self, first: int, last: int, *, whole: bool) -> Span:
        """Whole layers in this process: as one graph, or in pieces."""
        shape, me, rows = self._shape, self._view.me, self._ask.decode_rows
        pieces = 0.0 if whole else costs.pieces_us(shape, first, last)

        def pass_us(rows: int) -> float:
            return costs.layers_us(shape, me, first, last, rows) + pieces

        return Span(
            first=first,
            last=last,
            where="here",
            peers=(me.peer_id,),
            service_us=pass_us(rows) - pieces,
            other_us=pieces,
            amount=Amount(self._ask.over_prompt(pass_us), pass_us(rows)),
        )

    def stage(self, stage: Stage, host: Host) -> Span:
        """A stage at a host, without the way to it."""
        shape, rows, layers = self._shape, self._ask.decode_rows, stage.last - stage.first + 1
        queue = host.queue_rows * costs.layers_us(shape, host, stage.first, stage.last, 1) / layers

        def pass_us(rows: int) -> float:
            return costs.layers_us(shape, host, stage.first, stage.last, rows) + queue

        work = costs.layers_flops(shape, stage.first, stage.last)
        credits = work * host.microcredits_per_tflop / TERA * self._ask.paid_rows
        return Span(
            first=stage.first,
            last=stage.last,
            where="stage",
            peers=(host.peer_id,),
            service_us=pass_us(rows) - queue,
            queue_us=queue,
            microcredits_per_tflop=host.microcredits_per_tflop,
            amount=Amount(self._ask.over_prompt(pass_us), pass_us(rows), credits),
        )

    def hop(self, a: Host, b: Host, *, last: bool = False) -> Amount:
        """The stream's way from one host to the next; only the last rows of a prompt come back at the end."""
        if a.peer_id == b.peer_id:
            return Amount()
        way, decode_rows = self._view.one_way_us(a, b) + STAGE_CALL_US, self._ask.decode_rows
        speed = min(host.bytes_per_s for host in (a, b) if host is not self._view.me)

        def sent_us(rows: int) -> float:
            return way + rows * self._shape.row_bytes * 1e6 / speed

        return Amount(
            self._ask.over_prompt(lambda rows: sent_us(min(rows, decode_rows) if last else rows)), sent_us(decode_rows)
        )

    def experts(self, first: int, last: int) -> Span | str:
        """Attention here, experts wherever they are; or which shard nobody has."""
        found: list[Span] = []
        for layer in range(first, last + 1):
            span = self._layer(layer)
            if isinstance(span, str):
                return f"layer {layer}: {span}"
            found.append(span)
        me = self._view.me.peer_id
        total = Amount()
        for span in found:
            total += span.amount
        return Span(
            first=first,
            last=last,
            where="experts",
            peers=(me, *sorted({peer for span in found for peer in span.peers} - {me})),
            round_trip_us=sum(span.round_trip_us for span in found),
            service_us=sum(span.service_us for span in found),
            queue_us=sum(span.queue_us for span in found),
            other_us=sum(span.other_us for span in found),
            microcredits_per_tflop=max(span.microcredits_per_tflop for span in found),
            amount=total,
        )

    def barred(self, shard: int, first: int, last: int) -> str:
        """Why those who hold a shard of these layers are not asked, for messages."""
        causes = {peer.barred for peer in self._view.peers if peer.barred and shard in peer.shards}
        if any(shard in peer.shards and not self.allows(peer, first, last) for peer in self._view.peers):
            causes.add(self._privacy.why(first, last, len(self._shape.layers)))
        return f" (its holders: {', '.join(sorted(causes))})" if causes else ""

    # --- one layer with its experts elsewhere

    def _layer(self, layer: int) -> Span | str:
        """Layers of the same shards cost the same, if they stay here alike."""
        groups = self._shape.layers[layer]
        key = (self._privacy.keeps(layer, len(self._shape.layers)), tuple(group.shard for group in groups))
        if key not in self._layers:
            self._layers[key] = self._layer_afresh(layer, groups)
        return self._layers[key]

    def _layer_afresh(self, layer: int, groups: Sequence[Group]) -> Span | str:
        holders = [(group, self._holders(layer, group)) for group in groups]
        if self._view.may_miss and not self._shape.dense:
            holders = [each for each in holders if each[1] or self._withheld(each[0])] or holders
        for group, hosts in holders:
            if not hosts:
                return f"no replica of {self._shape.shard_ids[group.shard]}{self.barred(group.shard, layer, layer)}"
        decode = self._called(holders, self._ask.decode_rows)
        prefill = self._ask.over_prompt(lambda rows: self._called(holders, rows).amount.pass_us)
        return replace(decode, amount=replace(decode.amount, prefill_us=prefill))

    def _withheld(self, group: Group) -> bool:
        """Whether somebody has it, whom the privacy rule may be what excludes: nothing is done without then."""
        return not self._privacy.is_open and any(group.shard in peer.shards for peer in self.usable)

    def _holders(self, layer: int, group: Group) -> list[Host]:
        """Who can compute a group, nearest and fastest first. This node counts with what is loaded, as its caller
        does, and for a layer that stays here with what is on its disk."""
        found = [peer for peer in self.usable if group.shard in peer.shards and self.allows(peer, layer, layer)]
        is_kept = self._privacy.keeps(layer, len(self._shape.layers))
        if group.shard in self._view.loaded or (is_kept and group.shard in self._view.me.shards):
            found.append(self._view.me)
        found.sort(key=lambda host: host.round_trip_us + costs.experts_us(self._shape, host, (group,), 1))
        return found[:REPLICAS_MAX]

    def allows(self, peer: Host, first: int, last: int) -> bool:
        """Whether the privacy rule lets another peer compute these layers."""
        return self._privacy.allows(peer.peer_id, first, last, len(self._shape.layers))

    def _called(self, holders: Sequence[tuple[Group, Sequence[Host]]], rows: int) -> Span:
        """The calls of one layer as the dispatcher would make them: every group goes where the layer ends first."""
        mine: dict[PeerId, list[Group]] = {}
        by_id: dict[PeerId, Host] = {}
        ends: dict[PeerId, float] = {}
        for group, hosts in sorted(holders, key=lambda each: (len(each[1]), each[0].shard)):
            best = self._best(group, hosts, mine, max(ends.values(), default=0.0), rows)
            mine.setdefault(best.peer_id, []).append(group)
            by_id[best.peer_id] = best
            ends[best.peer_id] = self._end_us(best, mine[best.peer_id], rows)
        return self._layer_span(mine, by_id, ends, rows)

    def _best(
        self,
        group: Group,
        hosts: Sequence[Host],
        mine: Mapping[PeerId, Sequence[Group]],
        latest_us: float,
        rows: int,
    ) -> Host:
        cheapest = min(host.microcredits_per_tflop for host in hosts)

        def score(host: Host) -> tuple[float, float, str]:
            had = mine.get(host.peer_id, ())
            end = self._end_us(host, (*had, group), rows)
            ratio = min((host.microcredits_per_tflop + 1) / (cheapest + 1), PRICE_RATIO_MAX)
            call = CALL_US if not had and host.peer_id != self._view.me.peer_id else 0.0
            return (max(latest_us, end) + call) * (1 + PRICE_WEIGHT * (ratio - 1)), end, host.peer_id

        return min(hosts, key=score)

    def _layer_span(
        self,
        mine: Mapping[PeerId, Sequence[Group]],
        by_id: Mapping[PeerId, Host],
        ends: Mapping[PeerId, float],
        rows: int,
    ) -> Span:
        shape, me = self._shape, self._view.me
        chance = {peer: self._asked(groups, rows) for peer, groups in mine.items()}
        remote = sorted(peer for peer in mine if peer != me.peer_id)
        other = 0.0
        for peer in remote:  # one line out of this node, however many are called
            sent = (1 + len(mine[peer])) * rows * shape.row_bytes
            other += chance[peer] * (CALL_US + sent * 1e6 / by_id[peer].bytes_per_s)
        other += costs.PIECE_US * (1 + len(mine.get(me.peer_id, ())))
        round_trip = queue = 0.0
        service, left = costs.attention_us(shape, me, rows), 1.0
        slowest_first = sorted(mine, key=lambda peer: (-ends[peer], peer))
        for peer in slowest_first:
            # the chance that this is the last one to be waited for; a row asks somebody
            waited = left if peer == slowest_first[-1] else left * chance[peer]
            left -= waited
            round_trip += waited * by_id[peer].round_trip_us
            queue += waited * self._queue_us(by_id[peer])
            service += waited * costs.experts_us(shape, by_id[peer], mine[peer], rows)
        rates = {peer: by_id[peer].microcredits_per_tflop for peer in remote}
        credits = sum(costs.flops(shape, mine[peer]) * rates[peer] for peer in remote) / TERA * self._ask.paid_rows
        return Span(
            first=0,
            last=0,
            where="experts",
            peers=tuple(sorted(mine)),
            round_trip_us=round_trip,
            service_us=service,
            queue_us=queue,
            other_us=other,
            microcredits_per_tflop=max(rates.values(), default=0),
            amount=Amount(0.0, round_trip + queue + service + other, credits),
        )

    def _end_us(self, host: Host, groups: Sequence[Group], rows: int) -> float:
        return host.round_trip_us + self._queue_us(host) + costs.experts_us(self._shape, host, groups, rows)

    def _queue_us(self, host: Host) -> float:
        some = next((groups for groups in self._shape.layers if groups), ())[:1]
        return host.queue_rows * costs.experts_us(self._shape, host, some, 1)

    def _asked(self, groups: Sequence[Group], rows: int) -> float:
        """The chance that a pass calls a peer for these groups."""
        return self._shape.touched(min(self._shape.experts, sum(group.experts for group in groups)), rows)
