"""Where spans go: OpenTelemetry's SDK, to a collector over OTLP/HTTP or into a file of JSON lines.

Imported only where ``node.trace_endpoint`` is set. The exporter works in a thread of its own, over a bounded queue:
what does not fit is dropped, and a collector that is away delays nobody.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

import trio
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from config.errors import ConfigError, LocalError
from config.settings import NodeSettings
from node.cli import VERSION
from p2p import trace
from p2p.trace import Attribute, Kind, Recording

_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_FILE = "file:"
_QUEUE_MAX, _BATCH_MAX, _DELAY_MS, _TIMEOUT_MS = 8192, 512, 1000, 2000


@asynccontextmanager
async def open_tracing(settings: NodeSettings, name: str) -> AsyncIterator[None]:
    """Record spans while the block runs; the last ones are sent at its end. Raises ConfigError, LocalError."""
    exporter, file = _exporter(settings.trace_endpoint)
    provider = TracerProvider(
        resource=Resource({"service.name": "rios", "service.version": VERSION, "service.instance.id": name}),
        sampler=ParentBased(TraceIdRatioBased(settings.trace_ratio)),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(exporter, _QUEUE_MAX, _DELAY_MS, _BATCH_MAX, export_timeout_millis=_TIMEOUT_MS)
    )
    try:
        with trace.recording(_Recorder(provider)):
            yield
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _TIMEOUT_MS / 1000):
            await trio.to_thread.run_sync(provider.shutdown, abandon_on_cancel=True)
        if file is not None:
            file.close()


def _exporter(endpoint: str) -> tuple[SpanExporter, TextIO | None]:
    if endpoint.startswith(_FILE):
        path = Path(endpoint.removeprefix(_FILE))
        try:
            file = path.open("a", buffering=1, encoding="utf-8")  # whole lines: nodes may share it
        except OSError as error:
            raise LocalError("local", f"cannot write traces to {path}: {error.strerror}") from error
        return ConsoleSpanExporter(out=file, formatter=lambda span: f"{span.to_json(indent=None)}\n"), file
    if not endpoint.startswith(("http://", "https://")):
        hint = "write http://host:4318/v1/traces, or file:/path"
        raise ConfigError("config", f"node.trace_endpoint {endpoint!r:.100} is neither a URL nor a file", hint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - 4 MB, not needed for a file
        OTLPSpanExporter,
    )

    return OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_MS / 1000), None


class _Recorder:
    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("rios")

    def start(
        self, name: str, kind: Kind, parent: str, links: Sequence[str], attributes: dict[str, Attribute]
    ) -> Recording | None:
        """See :class:`p2p.trace.Recorder`."""
        if parent and not _context_of(parent).trace_flags.sampled:
            return None
        context = set_span_in_context(NonRecordingSpan(_context_of(parent)), Context()) if parent else Context()
        span = self._tracer.start_span(
            f"rios.{name}",
            context=context,
            kind=_KINDS[kind],
            attributes={f"rios.{key}": value for key, value in attributes.items()},
            links=[Link(_context_of(link)) for link in links],
        )
        return _Recording(span) if span.is_recording() else None


class _Recording:
    def __init__(self, span: Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(self, attributes: dict[str, Attribute], error: str) -> None:
        """See :class:`p2p.trace.Recording`."""
        for key, value in attributes.items():
            self._span.set_attribute(f"rios.{key}", value)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


def _context_of(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
