"""Traces: one request's work across tasks, threads and peers, as spans.

Owns: the current trace (W3C's ``traceparent``), its way with calls in the reserved header key ``tp``, and when a span
begins and ends. Does not own: what becomes of spans: ``node/tracing.py`` installs a :class:`Recorder` where the
operator wants any. Without one, and for requests that nobody traces, nothing is made.

A trace is set while a call that carries one is served, and calls made from there carry it on. A span is current only
where it is said to be (:meth:`Span.here`): generators and callbacks run in whoever's context asks them.
https://www.w3.org/TR/trace-context/
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, Protocol

from p2p.face import Call, Header

KEY = "tp"
TRACE_CHARS_MAX = 128
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Kind = Literal["internal", "server", "client"]
Attribute = str | int | float | bool

current: ContextVar[str] = ContextVar("traceparent", default="")
"""The traceparent of what is being done now; empty: none."""


def on(header: Header) -> Header:
    """The header to send, with the current trace in it if there is one."""
    trace = current.get()
    return {**header, KEY: trace} if trace and KEY not in header else header


def off(header: dict[str, Any]) -> str:
    """Take the trace out of a received header; what is none counts as none."""
    trace = header.pop(KEY, "")
    return trace if isinstance(trace, str) and len(trace) <= TRACE_CHARS_MAX else ""


@contextmanager
def during(trace: str) -> Iterator[None]:
    """Have it be the current one."""
    token = current.set(trace)
    try:
        yield
    finally:
        current.reset(token)


# --- spans


class Recording(Protocol):
    """A span that is kept."""

    traceparent: str

    def end(self, attributes: dict[str, Attribute], error: str) -> None:
        """It is over; ``error`` is empty if all went well."""


class Recorder(Protocol):
    """Keeps spans. Called often, from the event loop: it must not wait."""

    def start(
        self, name: str, kind: Kind, parent: str, links: Sequence[str], attributes: dict[str, Attribute]
    ) -> Recording | None:
        """A span that begins now; None: this trace is not kept. ``parent`` and ``links`` are valid traceparents;
        without a parent it begins a trace."""


class Span:
    """What is being done, from :func:`begin` to :meth:`end`; after that it does nothing."""

    __slots__ = ("_attributes", "_recording", "_traceparent")

    def __init__(self, recording: Recording | None, traceparent: str) -> None:
        self._recording = recording
        self._traceparent = traceparent
        self._attributes: dict[str, Attribute] = {}

    def here(self) -> AbstractContextManager[None]:
        """What is done in the block belongs to it."""
        return _NOWHERE if self._recording is None else during(self._traceparent)

    def set(self, **attributes: Attribute) -> None:
        """What is known of it only now."""
        self._attributes.update(attributes)

    def end(self, error: BaseException | None = None) -> None:
        """It is over. The second time nothing happens."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.end(self._attributes, "" if error is None else f"{type(error).__name__}: {error}"[:300])

    def drop(self) -> None:
        """It never was."""
        self._recording = None

    def is_kept_by_nobody(self) -> bool:
        """Whether nothing becomes of it."""
        return self._recording is None


_NOWHERE = nullcontext()


_recorder: Recorder | None = None


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Spans of this process go there while the block runs."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def begin(name: str, kind: Kind = "internal", links: Sequence[str] = (), **attributes: Attribute) -> Span:
    """A part of the current trace, if there is one."""
    parent = current.get()
    if not parent or _recorder is None or not is_traceparent(parent):
        return Span(None, "")
    return _made(_recorder.start(name, kind, parent, [link for link in links if is_traceparent(link)], attributes))


def begin_trace(name: str, parent: str, **attributes: Attribute) -> Span:
    """What a request from outside makes this process do; ``parent``: what it calls its trace, maybe nonsense."""
    if _recorder is None:
        return Span(None, "")
    return _made(_recorder.start(name, "server", parent if is_traceparent(parent) else "", (), attributes))


def is_traceparent(text: str) -> bool:
    """Whether it is one of version 00."""
    return _TRACEPARENT.fullmatch(text) is not None


def _made(recording: Recording | None) -> Span:
    return Span(None, "") if recording is None else Span(recording, recording.traceparent)


def span(
    name: str, kind: Kind = "internal", links: Sequence[str] = (), **attributes: Attribute
) -> AbstractContextManager[Span]:
    """The block as a part of the current trace."""
    made = begin(name, kind, links, **attributes)
    return nullcontext(made) if made.is_kept_by_nobody() else _ended(made)


@contextmanager
def _ended(made: Span) -> Iterator[Span]:
    try:
        with made.here():
            yield made
    except BaseException as error:
        made.end(error)
        raise
    finally:
        made.end()


@contextmanager
def serving(call: Call) -> Iterator[Span]:
    """A peer's call, while it is served: in its trace, if it came with one."""
    if not call.trace:
        yield Span(None, "")
        return
    with during(call.trace), span(call.method, "server", peer=str(call.peer_id)) as made:
        yield made
