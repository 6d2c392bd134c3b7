"""One layer on its way to its experts, and the form of a single call: what is sent to a peer, what its answer must be.

Owns: which rows go to which sum groups, the request's buffers, the checks on an answer. Does not own: whom to ask
(``session``), sending (``p2p``), the header's fields (``core.calls``).

Invariants:
1. Rows are rounded once per layer, as the wire does it; a part of them travels with the same bits as the whole.
2. A row goes to a peer only if it chose an expert of the groups asked there.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.core import wire
from dmoe.core.calls import Buffer, Indices, Weights
from dmoe.core.routes import ModelMap, Place
from dmoe.core.routing import NOBODY
from dmoe.core.wire import FloatRows
from p2p.face import Reply


class Work:
    """One chunk of rows of one layer: what is asked, what came back, what went wrong. ``deadline`` is a trio time,
    ``first`` the first row's place in the pass."""

    __slots__ = (
        "_row_groups",
        "_seen",
        "buffer",
        "busy_ms",
        "calls_failed",
        "count",
        "deadline",
        "error",
        "experts",
        "first",
        "grace_until",
        "layer",
        "lost",
        "model",
        "partials",
        "pauses",
        "shape",
        "tried",
        "wanted",
        "weights",
    )

    def __init__(
        self,
        model: ModelMap,
        layer: int,
        h: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
        deadline: float,
        first: int = 0,
    ) -> None:
        self.model = model
        self.first = first
        self.layer = layer
        self.count = len(h)
        self.shape, self.buffer = wire.encode(h, model.dtype)
        self.experts = experts
        self.weights = weights
        self.deadline = deadline
        self.partials: dict[int, FloatRows] = {}
        self.tried: dict[int, set[PeerId]] = {}
        self.busy_ms: dict[int, int] = {}
        self.error: RiosError | None = None
        self.calls_failed = 0
        self.pauses = 0
        self.grace_until = 0.0
        self.lost: set[int] = set()
        """Sum groups that the sum does without: the other experts of a row weigh more instead."""
        self._seen: FloatRows | None = None
        self._row_groups: list[list[int]] = []
        self.wanted: Sequence[int] = range(len(model.layers[layer]))
        """The sum groups that some row needs, ascending."""
        if experts is not None:
            self._row_groups = model.group_of[experts].tolist()
            self.wanted = sorted({group for groups in self._row_groups for group in groups} - {NOBODY})

    @property
    def rows(self) -> FloatRows:
        """``f32[N, H]`` as every replica sees them."""
        if self._seen is None:
            self._seen = wire.decode(self.shape, self.buffer)
        return self._seen

    def total(self) -> FloatRows:
        """The sum of all partial sums."""
        known = [self.partials[group] for group in self.wanted if group not in self.lost]
        total = wire.total(known, (self.count, self.model.width))
        if self.lost:
            # every expert of a row weighs more by the same factor, and so does their sum
            total *= self._rescaled(self.lost)[:, None]
        return total

    def has(self, groups: Sequence[int]) -> bool:
        """Whether all these groups are answered."""
        return self.partials.keys() >= set(groups)

    def leave_out(self, group: int) -> bool:
        """Do without a sum group. False, and nothing changed, if a row would have no expert left."""
        if not np.isfinite(self._rescaled(self.lost | {group})).all():
            return False
        self.lost.add(group)
        self.partials.pop(group, None)
        return True

    def chosen_of(self, group: int) -> list[tuple[int, Indices]]:
        """Which experts of a sum group the rows chose, ascending, and which rows of the pass those are."""
        assert self.experts is not None
        chosen = sorted(set(self.experts[self.model.group_of[self.experts] == group].tolist()))
        choosers = [np.flatnonzero((self.experts == expert).any(axis=1)) for expert in chosen]
        return [(expert, (self.first + rows).astype(np.int32)) for expert, rows in zip(chosen, choosers, strict=True)]

    def _rescaled(self, lost: Collection[int]) -> FloatRows:
        """``f32[N]``: a row's whole weight over what is left of it without these groups; infinite if nothing is."""
        assert self.experts is not None
        assert self.weights is not None
        gone = np.isin(self.model.group_of[self.experts], list(lost))
        left = np.where(gone, np.float32(0), self.weights).sum(axis=1, dtype=np.float32)
        whole = self.weights.sum(axis=1, dtype=np.float32)
        factor: FloatRows = np.full(self.count, np.inf, np.float32)
        np.divide(whole, left, out=factor, where=left > 0)
        return factor

    def needed(self, groups: Sequence[int]) -> int | Indices:
        """How many of these groups each row needs: ``[N]``, or one number for all rows."""
        if self.experts is None:
            return len(groups)
        asked = set(groups)
        return np.array([len(asked.intersection(mine)) for mine in self._row_groups], np.int32)

    def rows_for(self, groups: Sequence[int]) -> NDArray[np.intp] | None:
        """Which rows chose an expert of these groups; None: all of them."""
        if self.experts is None or len(groups) == len(self.wanted):
            return None
        asked = set(groups)
        chosen = [row for row, mine in enumerate(self._row_groups) if not asked.isdisjoint(mine)]
        return None if len(chosen) == self.count else np.array(chosen, np.intp)


class Request:
    """What one peer is sent of a :class:`Work`. ``chosen``: the rows that go there, None for all."""

    __slots__ = ("buffers", "chosen", "experts", "shape")

    def __init__(self, work: Work, places: Sequence[Place]) -> None:
        self.chosen = chosen = work.rows_for([place.group for place in places])
        self.shape, buffer, self.experts, weights = work.shape, work.buffer, work.experts, work.weights
        if chosen is not None:
            # already rounded: rounding again changes nothing
            self.shape, buffer = wire.encode(work.rows[chosen], work.model.dtype)
        self.buffers: list[Buffer] = [buffer]
        if self.experts is not None:
            assert weights is not None
            if chosen is not None:
                self.experts, weights = self.experts[chosen], weights[chosen]
            ids, scales = np.ascontiguousarray(self.experts, "<i4"), np.ascontiguousarray(weights, "<f4")
            self.buffers += [ids.data.cast("B"), scales.data.cast("B")]

    @property
    def rows(self) -> int:
        """How many rows are sent."""
        return int(self.shape["shape"][0])

    def spread(self, work: Work, partial: FloatRows) -> FloatRows:
        """A partial sum of the rows sent as one of all rows."""
        if self.chosen is None:
            return partial
        whole = np.zeros((work.count, work.model.width), np.float32)
        whole[self.chosen] = partial
        return whole


def answer_of(reply: Reply, peer: PeerId, groups: int, shape: Mapping[str, Any]) -> tuple[FloatRows, float]:
    """The partial sums ``f32[G, N, H]`` of an answer to rows of this ``shape``, and the service time (us) the peer
    claims. Raises RemoteError (``protocol``, ``integrity``) if it is not what was asked for."""
    count, width = shape["shape"]
    if len(reply.buffers) != 1:
        raise RemoteError("protocol", f"{peer} answered with {len(reply.buffers)} buffers", peer_id=peer)
    try:
        rows = wire.decode(reply.header, reply.buffers[0])
    except IntegrityError as error:
        raise RemoteError("integrity", f"{peer} answered with {error.message}", peer_id=peer) from error
    if rows.shape != (groups * count, width) or reply.header.get("dtype") != shape.get("dtype"):
        raise RemoteError("protocol", f"{peer} answered with shape {list(rows.shape)}", peer_id=peer)
    service = reply.header.get("service_us", 0)
    return rows.reshape(groups, count, width), float(service) if type(service) is int and service >= 0 else 0.0
