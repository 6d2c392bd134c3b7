"""The calls of stages, ``stage.open``, ``stage.run``, ``stage.result``, ``stage.close``: headers, bounds, digests.

Owns: what a stage's host and its orchestrator must read alike. Does not own: who is called, what runs.

A **ticket** (16 random bytes) stands for one sequence's key/value cache at one stage's host. A run carries rows of
several sequences, ``parts`` of one activation buffer as :mod:`dmoe.core.wire` makes it. Before a part runs, its cache
is cut to the part's position: what a former run put there (a draft that was refused, a try that failed) is forgotten.
A run that was overtaken by a later pass (``pass`` numbers grow) is refused, so that it cannot undo that one.

The path of a run stands in it: ``next`` lists the hosts behind this one with their tickets. A host gives its rows to
the first of them; the last one sends each part's last ``outputs`` rows to the orchestrator (``stage.result``), or puts
them into its answer if ``reply`` is set. Every host's answer carries a **trail**: what it and those behind it did, by
digest (``core/history``), so that the orchestrator counts the same leaves as each host, and what went wrong, by stage.
``stage.show`` asks a host for rows that it sent: the orchestrator does not see what hosts give on to each other.

Invariants:
1. Orchestrator and host compute the same kFLOP and the same leaf of every part of a run.
2. Every size is bounded before anything is allocated for it.
3. A header that was built is parsed into what it was built from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from struct import pack
from typing import Any

from config.errors import CODES, RequestError
from config.vocabulary import PeerId
from dmoe.core import wire
from dmoe.core.calls import CHANNEL_BYTES_MAX, Buffer, device_of
from dmoe.core.history import DIGEST_BYTES, Said

OPEN, RUN, RESULT, CLOSE = "stage.open", "stage.run", "stage.result", "stage.close"
SHOW = "stage.show"
SHOWN_ROWS_MAX = 512
TICKET_BYTES = 16
PARTS_MAX = 1024
HOPS_MAX = 128
LAYERS_MAX = 1 << 16
POSITIONS_MAX = 1 << 22
TEXT_MAX = 2000
NUMBER_MAX = 1 << 62
_LEAF_TAG = b"rios/stage-leaf/2\0"


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A request for a ticket. ``like``: another ticket whose first ``length`` positions the new one starts with."""

    model_id: str
    layers: tuple[int, int]
    capacity: int
    quote: int
    channel: bytes
    like: bytes = b""
    length: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one sequence: they follow its first ``position`` positions; the last ``outputs`` of them are wanted."""

    ticket: bytes
    position: int
    rows: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Hop:
    """A host further on, with its tickets for the parts, in their order."""

    peer_id: PeerId
    tickets: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class RunCall:
    """A run as a host reads it. ``number`` is the orchestrator's name for the pass: each is higher than the last."""

    number: int
    parts: tuple[Part, ...]
    hops: tuple[Hop, ...]
    reply: bool
    dtype: wire.Dtype
    rows: wire.FloatRows


@dataclass(frozen=True, slots=True)
class Step:
    """What one host did of a run. ``waited_us`` of its ``service_us`` were spent in its queue. ``said``: per part."""

    service_us: int
    waited_us: int
    device: str
    said: tuple[Said, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run did not get behind a host: ``hop`` counts from the one that answers (0: itself)."""

    hop: int
    code: str
    message: str
    hint: str = ""
    retry_after_ms: int = 0


def open_header(asked: OpenCall) -> dict[str, Any]:
    """The header of ``stage.open``."""
    header: dict[str, Any] = {
        "model": asked.model_id,
        "layers": list(asked.layers),
        "capacity": asked.capacity,
        "quote": asked.quote,
        "channel": asked.channel,
    }
    if asked.like:
        header |= {"like": asked.like, "length": asked.length}
    return header


def parse_open(header: Mapping[str, Any]) -> OpenCall:
    """Read ``stage.open``. Raises RequestError naming the field that is wrong."""
    model_id, channel, layers = header.get("model"), header.get("channel"), header.get("layers")
    if not isinstance(model_id, str) or len(model_id) != 64:
        raise _wrong(OPEN, "model must be an id of 64 hex digits")
    if not isinstance(channel, bytes) or len(channel) > CHANNEL_BYTES_MAX:
        raise _wrong(OPEN, f"channel must be at most {CHANNEL_BYTES_MAX} bytes")
    if not isinstance(layers, list) or len(layers) != 2 or not all(_within(n, 0, LAYERS_MAX) for n in layers):
        raise _wrong(OPEN, "layers must be the first and the last layer")
    like = _ticket(OPEN, header["like"]) if "like" in header else b""
    return OpenCall(
        model_id=model_id,
        layers=(layers[0], layers[1]),
        capacity=_integer(OPEN, header, "capacity", 1, POSITIONS_MAX),
        quote=_integer(OPEN, header, "quote", 0, NUMBER_MAX),
        channel=channel,
        like=like,
        length=_integer(OPEN, header, "length", 0, POSITIONS_MAX) if like else 0,
    )


def run_header(
    number: int, parts: Sequence[Part], hops: Sequence[Hop], shape: Mapping[str, Any], *, reply: bool
) -> dict[str, Any]:
    """The header of ``stage.run``; ``shape`` is what :func:`wire.encode` gave."""
    header = {
        "pass": number,
        "parts": [[part.ticket, part.position, part.rows, part.outputs] for part in parts],
        "next": [[hop.peer_id, list(hop.tickets)] for hop in hops],
        **shape,
    }
    if reply:
        header["reply"] = True
    return header


def parse_run(header: Mapping[str, Any], buffers: Sequence[Buffer]) -> RunCall:
    """Read ``stage.run``. Raises RequestError or IntegrityError naming the field that is wrong."""
    if len(buffers) != 1:
        raise _wrong(RUN, f"got {len(buffers)} buffers, need 1")
    listed = header.get("parts")
    if not isinstance(listed, list) or not 1 <= len(listed) <= PARTS_MAX:
        raise _wrong(RUN, f"parts must be a list of 1 to {PARTS_MAX}")
    parts = tuple(_part(item) for item in listed)
    rows = wire.decode(header, buffers[0])
    if sum(part.rows for part in parts) != len(rows):
        raise _wrong(RUN, f"the parts do not add up to {len(rows)} rows")
    hops = header.get("next")
    if not isinstance(hops, list) or len(hops) > HOPS_MAX:
        raise _wrong(RUN, f"next must be a list of at most {HOPS_MAX}")
    number = _integer(RUN, header, "pass", 0, NUMBER_MAX)
    path = tuple(_hop(item, len(parts)) for item in hops)
    tickets = [part.ticket for part in parts] + [ticket for hop in path for ticket in hop.tickets]
    if len(set(tickets)) < len(tickets):
        raise _wrong(RUN, "a ticket stands in it twice")  # rows would go round in circles
    return RunCall(number, parts, path, header.get("reply") is True, wire.dtype_of(header), rows)


def kept_rows(parts: Sequence[Part]) -> list[slice]:
    """Which rows of a run the orchestrator wants, part by part."""
    slices, end = [], 0
    for part in parts:
        end += part.rows
        slices.append(slice(end - part.outputs, end))
    return slices


def answer_header(trail: Sequence[Step], failure: Failure | None) -> dict[str, Any]:
    """The header of an answer to ``stage.run``, without the shape of rows in it."""
    header: dict[str, Any] = {"trail": [[s.service_us, s.waited_us, s.device, _joined(s.said)] for s in trail]}
    if failure is not None:
        f = failure
        header["failed"] = [f.hop, f.code, f.message[:TEXT_MAX], f.hint[:TEXT_MAX], f.retry_after_ms]
    return header


def parse_answer(header: Mapping[str, Any], hops: int, parts: int) -> tuple[list[Step], Failure | None]:
    """The trail and the failure in an answer of a host with ``hops`` hosts behind it to a run of so many parts. Raises
    RequestError ``protocol``."""
    trail, failed = header.get("trail"), header.get("failed")
    if not isinstance(trail, list) or len(trail) > hops + 1:
        raise RequestError("protocol", f"{RUN}: the answer's trail is malformed")
    return [_step(item, parts) for item in trail], None if failed is None else _failure(failed, hops)


def leaf(model_id: str, layers: tuple[int, int], part: Part, device: str, came: bytes, went: bytes) -> bytes:
    """The 32-byte digest of a run's part at one host: what a machine of which class made of which layers and of all
    rows that the sequence has had there (``came``, ``went``: see :class:`Said`). The last leaf of a sequence stands for
    everything that was computed of it. Beside whom it ran, and in which pieces, is not in it."""
    kind = device.encode()
    what = pack("<B5I", len(kind), *layers, part.position, part.rows, part.outputs)
    return sha256(b"".join((_LEAF_TAG, bytes.fromhex(model_id), what, kind, came, went))).digest()


def kflop(flops_per_row: int, part: Part) -> int:
    """Whole kFLOP of a run's part at one host."""
    return flops_per_row * part.rows // 1000


def show_header(ticket: bytes, first: int, rows: int) -> dict[str, Any]:
    """The header of ``stage.show``: rows that went out, from position ``first`` on."""
    return {"ticket": ticket, "first": first, "rows": rows}


def parse_show(header: Mapping[str, Any]) -> tuple[bytes, int, int]:
    """Read ``stage.show``: ticket, first, rows. Raises RequestError."""
    first = _integer(SHOW, header, "first", 0, POSITIONS_MAX)
    return _ticket(SHOW, header.get("ticket")), first, _integer(SHOW, header, "rows", 1, SHOWN_ROWS_MAX)


def tickets_of(header: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Read ``stage.close``. Raises RequestError."""
    tickets = header.get("tickets")
    if not isinstance(tickets, list) or len(tickets) > PARTS_MAX:
        raise _wrong(CLOSE, f"tickets must be a list of at most {PARTS_MAX}")
    return tuple(_ticket(CLOSE, ticket) for ticket in tickets)


def _part(item: object) -> Part:
    if not isinstance(item, list) or len(item) != 4:
        raise _wrong(RUN, "a part is a ticket, a position, a number of rows and one of outputs")
    ticket, position, rows, outputs = item
    if not _within(position, 0, POSITIONS_MAX) or not _within(rows, 1, wire.ROWS_MAX) or not _within(outputs, 0, rows):
        raise _wrong(RUN, f"a part's position, rows and outputs are {str(item[1:])[:80]}")
    return Part(_ticket(RUN, ticket), position, rows, outputs)


def _hop(item: object, parts: int) -> Hop:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str) or not isinstance(item[1], list):
        raise _wrong(RUN, "an entry of next is a peer id and a list of tickets")
    peer, tickets = item
    if not 0 < len(peer) <= 64 or len(tickets) != parts:
        raise _wrong(RUN, f"an entry of next needs a peer id and {parts} tickets")
    return Hop(PeerId(peer), tuple(_ticket(RUN, ticket) for ticket in tickets))


def _joined(said: Sequence[Said]) -> bytes:
    return b"".join(digest for each in said for digest in (each.came, each.before, each.went))


def _step(item: object, parts: int) -> Step:
    if not isinstance(item, list) or len(item) != 4 or not all(_within(n, 0, NUMBER_MAX) for n in item[:2]):
        raise RequestError("protocol", f"{RUN}: a step of the answer's trail is malformed")
    service_us, waited_us, device, joined = item
    if not isinstance(joined, bytes) or len(joined) != 3 * DIGEST_BYTES * parts:
        raise RequestError("protocol", f"{RUN}: a step of the answer's trail does not say what came and went")
    cut = [joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]
    said = tuple(Said(*cut[at : at + 3]) for at in range(0, len(cut), 3))
    return Step(service_us, waited_us, device_of({"device": device}), said)


def _failure(item: object, hops: int) -> Failure:
    if isinstance(item, list) and len(item) == 5:
        hop, code, message, hint, retry_ms = item
        texts = all(isinstance(text, str) and len(text) <= TEXT_MAX for text in (code, message, hint))
        if texts and _within(hop, 0, hops) and _within(retry_ms, 0, NUMBER_MAX):
            return Failure(hop, code if code in CODES else "protocol", message, hint, retry_ms)
    raise RequestError("protocol", f"{RUN}: the answer's failure is malformed")


def _ticket(method: str, value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != TICKET_BYTES:
        raise _wrong(method, f"a ticket is {TICKET_BYTES} bytes")
    return value


def _integer(method: str, header: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = header.get(name)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(method, f"{name} must be an integer from {least} to {most}")
    return value


def _within(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _wrong(method: str, what: str) -> RequestError:
    return RequestError("invalid_request", f"{method}: {what}")
