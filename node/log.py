"""Logs: five kinds (application, access, error, audit, security), as text for people or JSON for machines.

Every package logs through the standard library under ``rios.*``; the kind is a part of the logger's name where
there is one (``rios.gateway.access``, ``rios.audit``, ``rios.security``), else ``error`` from level error up, else
``application``. Everything goes to stderr: stdout is for data. Messages tell what strangers sent: in text their control
characters are escaped, so that none of them makes a line of its own or is obeyed by a terminal (JSON does that anyway).
"""

import io
import logging
import os
import re
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

_KINDS = frozenset({"access", "audit", "security"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _harmless(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["event"] = _escaped(str(event["event"]))
    return event


def _traceback(out: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    found = io.StringIO()
    structlog.dev.plain_traceback(found, exc_info)  # the default shows local variables, secrets among them
    out.write("\n".join(map(_escaped, found.getvalue().split("\n"))))


def _kind(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    named = _KINDS.intersection(str(event.get("logger", "")).split("."))
    otherwise = "error" if event.get("level") in ("error", "critical") else "application"
    event["kind"] = min(named, default=otherwise)
    return event


def setup(level: str, form: str, *, node: str = "") -> None:
    """Send the logs of this process to stderr. Libraries are heard from warning up only."""

    def add_node(_l: object, _n: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if node:
            event["node"] = node
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _kind,
        add_node,
    ]
    if form == "json":
        final: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        text = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=0, exception_formatter=_traceback)
        final = [_harmless, text]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rios").setLevel(level.upper())
