"""Trace context on its way: W3C's ``traceparent`` in the reserved header key ``tp``.

It is set while a call that carries one is served, and calls made from there carry it on.
https://www.w3.org/TR/trace-context/
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from p2p.face import Header

KEY = "tp"
TRACE_CHARS_MAX = 128

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
