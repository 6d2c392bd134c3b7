"""The call ``expert.run``: its header, its bounds, its price in kFLOP and the digest both sides keep of it.

Owns: what caller and worker must read alike. Does not own: who is called, what runs.

Request: header ``{"model", "layer", "groups", "quote", "channel", "shape", "bf16"?, "dtype"?, "top_k"?}``; buffers:
rows as :mod:`dmoe.core.wire` makes them and, if ``top_k`` is set, expert indices ``i32[N, k]``, weights ``f32[N, k]``
(index -1, weight 0: a place that the row does not use).
Answer: header ``{"shape", "bf16"?, "dtype"?, "service_us", "device"?}``; buffer: the partial sums of the groups, in
the order asked, stacked as ``[groups * N, H]`` and rounded once per row.

Invariants:
1. Caller and worker compute the same kFLOP and the same leaf from what they sent and received.
2. Every size is bounded before anything is allocated for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from struct import pack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import RequestError
from dmoe.core import wire
from dmoe.core.routing import NOBODY

METHOD = "expert.run"
GROUPS_MAX = 1024
LAYERS_MAX = 1 << 16
TOP_K_MAX = 256
CHANNEL_BYTES_MAX = 64
SMALL = 64
"""Up to so many elements Python's own containers are quicker than numpy."""
_LEAF_TAG = b"rios/leaf/2\0"
DEVICE_MAX = 32
"""Characters of a device class."""

Indices = NDArray[np.int32]
Weights = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """A request as the worker reads it. ``experts`` and ``weights`` are None where every expert is always chosen."""

    model_id: str
    layer: int
    groups: tuple[int, ...]
    quote: int
    channel: bytes
    dtype: wire.Dtype
    rows: wire.FloatRows
    experts: Indices | None
    weights: Weights | None


def build(
    model_id: str, layer: int, groups: Sequence[int], quote: int, channel: bytes, shape: Mapping[str, Any], top_k: int
) -> dict[str, Any]:
    """The request's header; ``shape`` is what :func:`wire.encode` gave, ``top_k`` 0 if there is no routing."""
    header = {"model": model_id, "layer": layer, "groups": list(groups), "quote": quote, "channel": channel, **shape}
    if top_k:
        header["top_k"] = top_k
    return header


def parse(header: Mapping[str, Any], buffers: Sequence[memoryview]) -> ExpertCall:
    """Read a request. Raises RequestError or IntegrityError naming the field that is wrong."""
    layer, quote = _integer(header, "layer", LAYERS_MAX), _integer(header, "quote", 1 << 62)
    top_k = _integer(header, "top_k", TOP_K_MAX) if "top_k" in header else 0
    model_id, channel, groups = header.get("model"), header.get("channel"), header.get("groups")
    if not isinstance(model_id, str) or len(model_id) != 64:
        raise RequestError("invalid_request", "expert.run: model must be an id of 64 hex digits")
    if not isinstance(channel, bytes) or len(channel) > CHANNEL_BYTES_MAX:
        raise RequestError("invalid_request", f"expert.run: channel must be at most {CHANNEL_BYTES_MAX} bytes")
    if not _is_groups(groups):
        raise RequestError("invalid_request", f"expert.run: groups must be 1 to {GROUPS_MAX} different indices")
    assert groups is not None
    if len(buffers) != (3 if top_k else 1):
        raise RequestError("invalid_request", f"expert.run: got {len(buffers)} buffers, need {3 if top_k else 1}")
    rows = wire.decode(header, buffers[0])
    if not len(rows):
        raise RequestError("invalid_request", "expert.run: no rows")
    experts = weights = None
    if top_k:
        experts = _matrix(buffers[1], np.dtype("<i4"), len(rows), top_k, "experts")
        weights = _matrix(buffers[2], np.dtype("<f4"), len(rows), top_k, "weights")
        if not wire.is_finite(weights) or experts.min() < NOBODY:
            raise RequestError("invalid_request", "expert.run: routing holds an index below -1 or a weight not finite")
    return ExpertCall(model_id, layer, tuple(groups), quote, channel, wire.dtype_of(header), rows, experts, weights)


def kflop(
    group_experts: Sequence[Sequence[int]], flops_per_row: Sequence[int], rows: int, experts: Indices | None
) -> int:
    """Whole kFLOP of one call. ``flops_per_row`` of a group is the cost of a row that chose all its experts; a row that
    chose some of them counts for that part, rounded down per group."""
    if experts is None:
        return rows * sum(flops_per_row) // 1000
    flops = 0
    for members, cost in zip(group_experts, flops_per_row, strict=True):
        flops += _times_chosen(experts, members) * cost // len(members)
    return flops // 1000


@dataclass(frozen=True, slots=True)
class Bytes:
    """What travelled one way, as far as its meaning goes: buffers, and which rows are bf16 (``bf16`` of the header)."""

    buffers: Sequence[Buffer]
    bf16: bytes = b""

    def digest(self) -> bytes:
        """32 bytes that fix every number."""
        found = sha256(pack("<I", len(self.bf16)) + self.bf16)
        for buffer in self.buffers:
            found.update(buffer)
        return found.digest()


def leaf(
    model_id: str, layer: int, groups: Sequence[int], rows: int, device: str, asked: Bytes, answered: Bytes
) -> bytes:
    """The 32-byte digest of a call: what was asked of which experts (their shard and its hash follow from the model's
    id, which is a hash of the manifest) and what a machine of which class answered. With the manifest it fixes every
    number, so that anybody can judge it; who answered whom, on which network, is said by the receipt above it."""
    what = pack(f"<{2 + len(groups)}I", layer, rows, *groups)
    kind = device.encode()
    said = (_LEAF_TAG, _bytes_of(model_id), pack("<BI", len(kind), len(groups)), kind, what)
    return sha256(b"".join((*said, asked.digest(), answered.digest()))).digest()


def device_of(header: Mapping[str, Any]) -> str:
    """The device class that an answer names; empty if it names none."""
    device = header.get("device", "")
    known = isinstance(device, str) and len(device) <= DEVICE_MAX and device.isascii() and device.isprintable()
    return str(device) if known else ""


def bf16_of(header: Mapping[str, Any]) -> bytes:
    """Which rows of a request or an answer are bf16."""
    found = header.get("bf16", b"")
    return bytes(found) if isinstance(found, bytes | bytearray | memoryview) else b""


def _times_chosen(experts: Indices, members: Sequence[int]) -> int:
    if experts.size <= SMALL:
        wanted = frozenset(members)
        return sum(expert in wanted for expert in experts.ravel().tolist())
    first, last = members[0], members[-1]
    if last - first + 1 == len(members):  # ascending, so without gaps: much cheaper than a search
        return int(np.count_nonzero((experts >= first) & (experts <= last)))
    return int(np.count_nonzero(np.isin(experts, members)))


@lru_cache(maxsize=256)
def _bytes_of(model_id: str) -> bytes:
    return bytes.fromhex(model_id)


def _integer(header: Mapping[str, Any], name: str, limit: int) -> int:
    value = header.get(name)
    if type(value) is not int or not 0 <= value <= limit:
        raise RequestError("invalid_request", f"expert.run: {name} must be an integer from 0 to {limit}")
    return value


def _is_groups(groups: object) -> bool:
    return (
        isinstance(groups, list)
        and 1 <= len(groups) <= GROUPS_MAX
        and all(type(group) is int and 0 <= group < GROUPS_MAX for group in groups)
        and len(set(groups)) == len(groups)
    )


def _matrix(buffer: memoryview, dtype: "np.dtype[Any]", rows: int, columns: int, name: str) -> NDArray[Any]:
    if len(buffer) != rows * columns * dtype.itemsize:
        raise RequestError("invalid_request", f"expert.run: {name} must be [{rows}, {columns}] of {dtype.name}")
    return np.frombuffer(buffer, dtype).reshape(rows, columns)
