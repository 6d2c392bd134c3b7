"""Which route answers a request, and who serves what on it: estimates, choice and the reasons, as plain values.

Owns: the candidates, their expected times and prices, the pins. Does not own: what is known (``core.costs.View``, made
by ``dmoe/planning``), what a span costs (``core.spans``), carrying a plan out.

A candidate is a list of spans of layers: here, a stage at a host, or attention here with experts wherever they are. The
stream passes from one to the next and home: (S+1)/2 round trips for S stages where all are equally far. An answer takes
a pass per prompt chunk and one per ``tokens_per_pass`` answer tokens. Chains of stages come from dynamic programming
over (layers done, where the stream is): the exact minimum of time plus ``price_weight`` times price over at most
``REPLICAS_MAX`` hosts per stage, in O(stages * hosts^2).

Invariants:
1. The chosen plan is, by its own estimate, never worse than any other candidate that is possible (but for ``settled``:
   a route in use is kept until another is better by a tenth).
2. Pins are kept or the candidate is impossible; an impossible candidate says why.
3. Deterministic: ties go to the smaller peer id.
4. No candidate uses a peer that the privacy rule keeps from its layers; one that is impossible for it names the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from config.vocabulary import PeerId
from dmoe.core import costs
from dmoe.core.costs import Host, Shape, Stage, View
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.spans import REPLICAS_MAX, Amount, Ask, Span, Spans

Kind = Literal["experts", "stages", "local", "fused", "mixed"]

KINDS: tuple[Kind, ...] = ("fused", "local", "stages", "mixed", "experts")
"""Where two are equally good, the first of them is taken."""
SWITCH_GAIN = 0.9
MILLION = 1_000_000
_NAMED_MAX = 3


@dataclass(frozen=True, slots=True)
class Pin:
    """Layers ``first`` to ``last`` are ``here``, with their ``experts`` anywhere, or a stage at this peer."""

    first: int
    last: int
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the operator laid down. ``stage_hosts``: only these peers hold stages; empty: any.
    ``price_weight``: microseconds of waiting that a microcredit is worth. ``privacy``: who may compute what."""

    route: Literal["auto", "experts", "stages", "local", "fused", "mixed"] = "auto"
    stage_hosts: tuple[PeerId, ...] = ()
    pins: tuple[Pin, ...] = ()
    price_weight: float = 0.0
    privacy: Privacy = OPEN

    def spreads(self, first: int, last: int) -> bool:
        """Whether some of these layers are pinned to experts elsewhere."""
        return any(pin.where == "experts" and pin.first <= last and first <= pin.last for pin in self.pins)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to answer. Impossible ones have ``why_not`` and no spans; the others say in ``reason`` why they were
    chosen or passed over."""

    kind: Kind
    spans: tuple[Span, ...] = ()
    first_token_us: float = 0.0
    token_us: float = 0.0
    answer_us: float = 0.0
    microcredits_per_million: float = 0.0
    score: float = float("inf")
    bottleneck: str = ""
    reason: str = ""
    why_not: str = ""

    @property
    def is_possible(self) -> bool:
        """Whether it could be carried out now."""
        return not self.why_not


@dataclass(frozen=True, slots=True)
class Plan:
    """The candidates, best first, and the chosen one (None: nothing is possible)."""

    ask: Ask
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None


def plan(shape: Shape, view: View, ask: Ask, wishes: Wishes, *, settled: Kind | None = None) -> Plan:
    """Estimate every candidate and choose. ``settled``: the route in use, left only for a clearly better one."""
    planner = _Planner(shape, view, ask, wishes)
    found = sorted((planner.candidate(kind) for kind in KINDS), key=lambda each: (each.score, KINDS.index(each.kind)))
    possible = [each for each in found if each.is_possible]
    if not possible:
        return Plan(ask, tuple(found), None)
    chosen = best = possible[0]
    for each in possible:
        if each.kind == settled and each.score * SWITCH_GAIN <= best.score:
            chosen = each
    told = [_with_reason(each, chosen, best, wishes) if each.is_possible else each for each in found]
    return Plan(ask, tuple(told), next(each for each in told if each.kind == chosen.kind))


_Way = tuple[float, tuple[Span, ...]]
"""The score of the best chain to a place, and its spans."""


class _Planner:
    """One planning: the arguments and what was computed from them already."""

    def __init__(self, shape: Shape, view: View, ask: Ask, wishes: Wishes) -> None:
        self._shape = shape
        self._view = view
        self._ask = ask
        self._wishes = wishes
        self._spans = Spans(shape, view, ask, wishes.privacy)

    def candidate(self, kind: Kind) -> Candidate:
        """One candidate, estimated or with the reason why it is impossible."""
        why_not = self._forbidden(kind)
        spans: Sequence[Span] = ()
        if not why_not and kind in ("local", "fused"):
            spans, why_not = self._all_here(kind)
        elif not why_not and kind == "experts":
            span = self._spans.experts(0, len(self._shape.layers) - 1)
            spans, why_not = ((), span) if isinstance(span, str) else ((span,), "")
        elif not why_not:
            spans, why_not = self._chain(mixed=kind == "mixed")
        return Candidate(kind=kind, why_not=why_not) if why_not else self._valued(kind, spans)

    def _forbidden(self, kind: Kind) -> str:
        """Why this route is out whoever is there; empty if it is not."""
        shape, route = self._shape, self._wishes.route
        if route not in ("auto", kind) and (route, kind) != ("stages", "mixed"):
            return f'dmoe.route = "{route}"'
        if kind not in self._view.runs:
            return "this node cannot run it"
        for pin in self._wishes.pins if kind in ("fused", "local", "experts") else ():
            if pin.where != ("experts" if kind == "experts" else "here"):
                return f"layers {pin.first} to {pin.last} are pinned to {pin.where}"
        if kind == "fused" and not shape.dense:
            return "only dense models have a fused graph"
        if kind == "mixed" and shape.dense:
            return "stages and experts of a dense model round differently: they are not mixed"
        if kind in ("stages", "mixed") and not shape.stages:
            return "the model was imported without stages"
        return self._absent((shape.trunk,)) or self._too_large((shape.trunk,))

    def _absent(self, shards: Sequence[int]) -> str:
        absent = [self._shape.shard_ids[shard] for shard in shards if shard not in self._view.me.shards]
        more = f" and {len(absent) - _NAMED_MAX} more" if len(absent) > _NAMED_MAX else ""
        return f"{', '.join(absent[:_NAMED_MAX])}{more} not on this node" if absent else ""

    def _too_large(self, shards: Sequence[int]) -> str:
        positions = (self._ask.prompt_tokens + self._ask.answer_tokens) * max(1, self._ask.batch)
        needed = sum(self._shape.ram_bytes[shard] for shard in set(shards) - self._view.resident)
        needed += positions * self._shape.kv_bytes_per_position
        free = self._view.ram_bytes_free
        return f"needs {needed >> 20} MiB of memory, {free >> 20} MiB are free" if needed > free else ""

    def _files(self, first: int, last: int) -> list[int]:
        """What running these layers here needs."""
        groups = {group.shard for layer in range(first, last + 1) for group in self._shape.layers[layer]}
        return sorted({self._shape.trunk} | groups)

    def _all_here(self, kind: Kind) -> tuple[Sequence[Span], str]:
        last = len(self._shape.layers) - 1
        shards = self._files(0, last)
        if why_not := self._absent(shards) or self._too_large(shards):
            return (), why_not
        return (self._spans.here(0, last, whole=kind == "fused"),), ""

    # --- chains of stages

    def _chain(self, *, mixed: bool) -> tuple[Sequence[Span], str]:
        """The best chain from the first layer to the last and home: stages and, ``mixed``, spans with experts
        elsewhere."""
        me, layers = self._view.me, len(self._shape.layers)
        hosts = {me.peer_id: me, **{peer.peer_id: peer for peer in self._spans.usable}}
        ways: dict[int, dict[PeerId, _Way]] = {0: {me.peer_id: (0.0, ())}}
        lacking = ""
        for start in range(layers):
            for stage in self._shape.stages if start in ways else ():
                if stage.first != start:
                    continue
                options, why_not = self._options(stage, mixed)
                lacking = lacking or why_not
                for host, span in options:
                    self._extend(ways.setdefault(stage.last + 1, {}), ways[start], hosts, host, span)
        if layers not in ways:
            return (), lacking or f"no stage begins with layer {max(ways)}"
        spans = self._home(ways[layers], hosts)
        kinds = {span.where for span in spans}
        if mixed and not {"stage", "experts"} <= kinds and self._wishes.route == "auto":
            return (), "no mixture is better than its parts"
        if kinds == {"here"} and self._wishes.route == "auto":
            return (), "every stage is best here: that is the route local"
        return spans, ""

    def _extend(
        self, after: dict[PeerId, _Way], before: dict[PeerId, _Way], hosts: dict[PeerId, Host], host: Host, span: Span
    ) -> None:
        """Try ``span`` at ``host`` after every place where the stream may be."""
        for place in sorted(before):
            score, spans = before[place]
            reached = span.after(self._spans.hop(hosts[place], host))
            total = score + self._score(reached.amount)
            if host.peer_id not in after or total < after[host.peer_id][0]:
                after[host.peer_id] = (total, (*spans, reached))

    def _home(self, ended: dict[PeerId, _Way], hosts: dict[PeerId, Host]) -> Sequence[Span]:
        """The best of the chains that reached the last layer, with the way back to this node."""
        back = {peer: self._spans.hop(hosts[peer], self._view.me, last=True) for peer in ended}
        best = min(ended, key=lambda peer: (ended[peer][0] + self._score(back[peer]), peer))
        *spans, last = ended[best][1]
        return (*spans, last.after(back[best]))

    def _options(self, stage: Stage, mixed: bool) -> tuple[list[tuple[Host, Span]], str]:
        """Every way to do a stage, and what to say if there is none."""
        me = self._view.me
        holders = [peer for peer in self._spans.usable if stage.shard in peer.shards]
        wished = self._wishes.stage_hosts
        allowed = [
            peer
            for peer in holders
            if (not wished or peer.peer_id in wished)
            and self._agrees(stage, peer.peer_id)
            and self._spans.allows(peer, stage.first, stage.last)
        ]
        found = [(peer, self._spans.stage(stage, peer)) for peer in allowed]
        found.sort(key=lambda each: each[1].amount.pass_us + each[0].round_trip_us)
        del found[REPLICAS_MAX:]
        files = self._files(stage.first, stage.last)
        is_here = not self._absent(files) and not self._wishes.spreads(stage.first, stage.last)
        if is_here and self._agrees(stage, "here") and not self._too_large(files):
            found.append((me, self._spans.here(stage.first, stage.last, whole=self._shape.dense)))
        if mixed and not is_here and self._agrees(stage, "experts"):
            span = self._spans.experts(stage.first, stage.last)
            if isinstance(span, Span):
                found.append((me, span))
        if found:
            return found, ""
        barred = self._spans.barred(stage.shard, stage.first, stage.last)
        why = "its holders are not the pinned ones" if holders and not barred else f"no replica{barred}"
        return [], f"layers {stage.first} to {stage.last} ({self._shape.shard_ids[stage.shard]}): {why}"

    def _agrees(self, stage: Stage, where: str) -> bool:
        """Whether every pin that touches these layers says so."""
        touching = (pin for pin in self._wishes.pins if pin.first <= stage.last and stage.first <= pin.last)
        return all(pin.where == where for pin in touching)

    # --- values

    def _score(self, amount: Amount) -> float:
        return amount.prefill_us + self._ask.passes * amount.pass_us + self._wishes.price_weight * amount.microcredits

    def _valued(self, kind: Kind, spans: Sequence[Span]) -> Candidate:
        head = costs.head_us(self._shape, self._view.me, self._ask.decode_rows)
        total = Amount(head, head)
        for span in spans:
            total += span.amount
        tokens = max(1, self._ask.prompt_tokens + self._ask.answer_tokens)
        return Candidate(
            kind=kind,
            spans=tuple(spans),
            first_token_us=total.prefill_us,
            token_us=total.pass_us / max(1.0, self._ask.tokens_per_pass),
            answer_us=total.prefill_us + self._ask.passes * total.pass_us,
            microcredits_per_million=total.microcredits * MILLION / tokens,
            score=self._score(total),
            bottleneck=_bottleneck(spans, head),
        )


def _bottleneck(spans: Sequence[Span], head_us: float) -> str:
    """What takes the largest part of a decoding pass."""
    parts = {
        "round trips": sum(span.round_trip_us for span in spans),
        "queues": sum(span.queue_us for span in spans),
        "calls, link and pieces": sum(span.other_us for span in spans),
        "head": head_us,
    }
    for span in spans:
        who = f" at {span.peers[0][-8:]}" if span.where == "stage" else " here" if span.where == "here" else ""
        parts[f"computing layers {span.first} to {span.last}{who}"] = span.service_us
    worst = max(parts, key=lambda name: parts[name])
    return f"{worst} ({round(100 * parts[worst] / max(1e-9, sum(parts.values())))} %)"


def _with_reason(candidate: Candidate, chosen: Candidate, best: Candidate, wishes: Wishes) -> Candidate:
    if candidate.kind == chosen.kind:
        if chosen.kind != best.kind:
            reason = "in use, and nothing is better by a tenth"
        elif wishes.route != "auto":
            reason = f'dmoe.route = "{wishes.route}"'
        else:
            reason = "the best of time and price" if wishes.price_weight else "the fastest"
        rules = wishes.privacy.described()
        return replace(candidate, reason=f"{reason} that is allowed: {rules}" if rules else reason)
    slower = candidate.answer_us / max(1e-9, chosen.answer_us)
    is_dearer = candidate.microcredits_per_million > chosen.microcredits_per_million
    if slower >= 1:
        reason = f"{slower:.1f} times slower{', and dearer' if is_dearer else ''}"
    else:
        reason = "faster, but too dear" if is_dearer else "not better by a tenth"
    return replace(candidate, reason=f"{reason}; mostly {candidate.bottleneck}")
