"""Traces at a receiver of OTLP/HTTP, read with OpenTelemetry's own protobuf classes: what one HTTP request shows of the
calls to other processes, and what a receiver that is gone or slow does to answers: nothing.
"""

import gzip
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from config.settings import NodeSettings
from node import tracing
from node.rig import NodeProcess, wait_for
from p2p import trace
from tests.faults.rig import Rig, swarm_of
from tests.ports import free_port

TOKENS, QUESTIONS = 3, 4
ROUTES = ("experts", "stages")
CLIENT, SERVER = Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER


@dataclass
class Received:
    """A span, and whose it is."""

    span: Span
    node: str

    @property
    def name(self) -> str:
        return self.span.name.removeprefix("rios.")

    @property
    def known(self) -> dict[str, Any]:
        """Its attributes."""
        values = {each.key.removeprefix("rios."): each.value for each in self.span.attributes}
        return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


@dataclass
class Receiver:
    """What came. While ``answers`` is not set, it takes what is sent and says nothing to it."""

    port: int
    answers: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    spans: list[Received] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    def take(self, sent: ExportTraceServiceRequest) -> None:
        for each in sent.resource_spans:
            about = {pair.key: pair.value.string_value for pair in each.resource.attributes}
            assert about["service.name"] == "rios"
            node = about["service.instance.id"]
            self.spans += [Received(span, node) for scope in each.scope_spans for span in scope.spans]

    def of(self, trace_id: str) -> list[Received]:
        return [each for each in self.spans if each.span.trace_id.hex() == trace_id]


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    """A receiver, as the OTLP specification has it (OTLP/HTTP, binary protobuf)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received.asked += 1
            received.answers.wait()
            received.take(ExportTraceServiceRequest.FromString(body))
            said = ExportTraceServiceResponse().SerializeToString()
            with suppress(OSError):  # who sent it did not wait
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    received = Receiver(server.server_port)
    received.answers.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield received
    finally:
        received.answers.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Rig]:
    settings = {"node.trace_endpoint": receiver.url, "node.trace_ratio": 0.0}
    folder = tmp_path_factory.mktemp("swarm")
    with swarm_of(folder, workers=2, replicas=1, mode="both", routes=ROUTES, settings=settings) as made:
        yield made


def ask(rig: Rig, node: NodeProcess) -> str:
    """A question under a trace of the client's; that trace, and the client's span."""
    traced = f"{secrets.token_hex(16)}-{secrets.token_hex(8)}"
    body = {"model": rig.model, "prompt": "What is it?", "max_tokens": TOKENS, "min_tokens": TOKENS}
    headers = {"authorization": f"Bearer {rig.keys[node.name]}", "traceparent": f"00-{traced}-01"}
    answer = httpx.post(f"{rig.url(node)}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == TOKENS
    return traced


def way_up(spans: list[Received], of: Received) -> list[str]:
    """The names of a span's parents, nearest first."""
    return [each.name for each in parents(spans, of)]


def ancestor(spans: list[Received], of: Received, name: str) -> bytes:
    return next(each.span.span_id for each in parents(spans, of) if each.name == name)


def parents(spans: list[Received], of: Received) -> Iterator[Received]:
    known = {each.span.span_id: each for each in spans}
    while of.span.parent_span_id in known:
        of = known[of.span.parent_span_id]
        yield of


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_is_one_trace_with_every_call_under_it(rig: Rig, receiver: Receiver, route: str) -> None:
    node = rig.orchestrators[ROUTES.index(route)]
    trace_id, client = ask(rig, node).split("-")
    method, way = {
        "experts": ("expert.run", ["layer", "pass", "generation", "http"]),
        "stages": ("stage.run", ["pass", "generation", "http"]),
    }[route]

    def calls(kind: int) -> list[Received]:
        return [each for each in receiver.of(trace_id) if (each.span.kind, each.name) == (kind, method)]

    def has_come() -> bool:
        """All of the gateway's node, and the other end of each call."""
        ends = {each.span.parent_span_id for each in calls(SERVER)}
        there = any(each.name == "http" for each in receiver.of(trace_id))
        return there and all(each.span.span_id in ends for each in calls(CLIENT))

    wait_for(has_come, "all spans to be received", 20)
    spans = receiver.of(trace_id)
    assert len({each.span.span_id for each in spans}) == len(spans)
    [http] = [each for each in spans if each.name == "http"]
    assert (http.span.kind, http.span.parent_span_id.hex(), http.node) == (SERVER, client, node.name)
    assert (http.known["route"], http.known["status"]) == ("/v1/completions", 200)
    assert all(way_up(spans, each)[-1] == "http" for each in spans if each is not http), "nothing beside it"
    passes = [each for each in spans if each.name == "pass"]
    asked = [each for each in calls(CLIENT) if each.node == node.name]
    assert len(passes) >= TOKENS
    assert {tuple(way_up(spans, each)) for each in asked} == {tuple(way)}
    assert {each.span.span_id for each in passes} == {ancestor(spans, each, "pass") for each in asked}
    names = {worker.peer_id: worker.name for worker in rig.workers}
    for each in calls(CLIENT):
        served = [other for other in calls(SERVER) if other.span.parent_span_id == each.span.span_id]
        assert [other.node for other in served] == [names[each.known["peer"]]], "each call has its other end"
    assert {each.node for each in calls(SERVER)} <= set(names.values())  # which of them, placement chooses
    if route == "experts":
        layers = {each.known["layer"] for each in spans if each.name == "layer"}
        assert {each.known["layer"] for each in asked} == layers
    else:
        opened = [each for each in spans if (each.span.kind, each.name) == (CLIENT, "stage.open")]
        assert {each.known["stage"] for each in opened} == set(range(len(opened)))
    for each in spans:
        assert each.span.status.code != Status.STATUS_CODE_ERROR, each.span
        assert each.span.end_time_unix_nano >= each.span.start_time_unix_nano > 0


def test_a_receiver_that_hangs_holds_up_no_answer_and_hears_of_later_ones(rig: Rig, receiver: Receiver) -> None:
    node, before = rig.first, receiver.asked
    receiver.answers.clear()
    first = ask(rig, node).split("-")[0]
    wait_for(lambda: receiver.asked > before, "spans to be sent", 20)
    for _ in range(QUESTIONS):
        ask(rig, node)
    assert not receiver.of(first), "all of that while the receiver said nothing"
    receiver.answers.set()
    last = ask(rig, node).split("-")[0]
    wait_for(lambda: any(each.name == "http" for each in receiver.of(last)), "spans to come again", 20)


async def test_a_full_queue_drops_spans_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_QUEUE_MAX", 64)
    monkeypatch.setattr(tracing, "_BATCH_MAX", 16)
    monkeypatch.setattr(tracing, "_TIMEOUT_MS", 300)
    with receiving() as receiver:
        receiver.answers.clear()
        async with tracing.open_tracing(NodeSettings(trace_endpoint=receiver.url), "here"):
            for number in range(1000):
                trace.begin_trace("http", "", number=number).end()
        assert not receiver.spans, "it was left while the receiver said nothing"
        assert receiver.asked
    assert len(receiver.spans) <= 64 + 2 * 16


async def test_who_comes_late_gets_what_is_made_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_TIMEOUT_MS", 300)
    monkeypatch.setattr(tracing, "_DELAY_MS", 20)
    port = free_port()

    def numbers(receiver: Receiver) -> set[int]:
        return {each.known["number"] for each in receiver.spans}

    async with tracing.open_tracing(NodeSettings(trace_endpoint=f"http://127.0.0.1:{port}/v1/traces"), "here"):
        trace.begin_trace("http", "", number=1).end()
        await trio.sleep(0.5)  # tried in vain
        with receiving(port) as receiver:
            trace.begin_trace("http", "", number=2).end()
            await trio.to_thread.run_sync(wait_for, lambda: 2 in numbers(receiver), "the later span", 10)


def test_answers_come_though_the_receiver_is_gone(tmp_path: Path) -> None:
    settings = {"node.trace_endpoint": f"http://127.0.0.1:{free_port()}/v1/traces"}
    with swarm_of(tmp_path, workers=1, replicas=1, settings=settings) as rig:
        for _ in range(QUESTIONS):
            ask(rig, rig.first)
        assert rig.first.stop() == 0
        assert "Traceback" not in rig.first.log_file.read_text()
