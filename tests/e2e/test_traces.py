"""One request's trace: from HTTP through admission and generation to every layer's call at another process."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.rig import wait_for
from tests.faults.rig import Rig, swarm_of

TOKENS = 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "spans.jsonl"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Iterator[Rig]:
    settings = {"node.trace_endpoint": f"file:{file}", "node.trace_ratio": 0.0}
    with swarm_of(tmp_path_factory.mktemp("swarm"), workers=1, replicas=1, settings=settings) as made:
        yield made


def ask(rig: Rig, traceparent: str) -> None:
    body = {"model": rig.model, "prompt": "What is it?", "max_tokens": TOKENS, "min_tokens": TOKENS}
    headers = {"authorization": f"Bearer {rig.keys[rig.first.name]}", "traceparent": traceparent}
    answer = httpx.post(f"{rig.url(rig.first)}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


def spans_of(file: Path, trace_id: str) -> list[Any]:
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    return [span for span in spans if span["context"]["trace_id"] == f"0x{trace_id}"]


def named(spans: list[Any], name: str) -> list[Any]:
    return [span for span in spans if span["name"] == f"rios.{name}"]


def parents(spans: list[Any], span: Any) -> Iterator[str]:
    """The names of a span's parents, nearest first."""
    known = {each["context"]["span_id"]: each for each in spans}
    while span["parent_id"] in known:
        span = known[span["parent_id"]]
        yield span["name"].removeprefix("rios.")


def test_a_request_shows_each_layers_calls_at_each_peer(rig: Rig, file: Path) -> None:
    trace_id, client = secrets.token_hex(16), secrets.token_hex(8)
    ask(rig, f"00-{trace_id}-{client}-01")
    worker = rig.workers[0].peer_id
    wait_for(lambda: bool(named(spans_of(file, trace_id), "http")), "the spans to be written", 10)
    wait_for(lambda: len(served(spans_of(file, trace_id))) >= TOKENS, "the worker's spans to be written", 10)
    spans = spans_of(file, trace_id)
    [http] = named(spans, "http")
    assert http["parent_id"] == f"0x{client}"
    assert http["attributes"]["rios.route"] == "/v1/completions"
    assert http["attributes"]["rios.status"] == 200
    for part in ("limits", "reservation", "turn", "generation"):
        [span] = named(spans, part)
        assert list(parents(spans, span))[-1] == "http"
    [generation] = named(spans, "generation")
    assert generation["attributes"]["rios.completion_tokens"] == TOKENS
    assert len(named(spans, "pass")) >= TOKENS
    layers = {span["attributes"]["rios.layer"] for span in named(spans, "layer")}
    calls = [span for span in named(spans, "expert.run") if span["kind"] == "SpanKind.CLIENT"]
    assert {span["attributes"]["rios.layer"] for span in calls} == layers
    assert {span["attributes"]["rios.peer"] for span in calls} == {worker}
    assert list(parents(spans, calls[0])) == ["layer", "pass", "generation", "http"]
    assert {span["resource"]["attributes"]["service.instance.id"] for span in served(spans)} != {
        http["resource"]["attributes"]["service.instance.id"]
    }
    assert list(parents(spans, served(spans)[0])) == ["expert.run", "layer", "pass", "generation", "http"]


def served(spans: list[Any]) -> list[Any]:
    """The other process' part."""
    return [span for span in named(spans, "expert.run") if span["kind"] == "SpanKind.SERVER"]


def test_who_says_nothing_or_no_is_not_traced(rig: Rig, file: Path) -> None:
    """The ratio is 0, so only requests that come with a trace are."""
    before = file.read_text()
    unsampled, sampled = secrets.token_hex(16), secrets.token_hex(16)
    for traceparent in (f"00-{unsampled}-{'1' * 16}-00", "", "nonsense", f"00-{sampled}-{'1' * 16}-01"):
        ask(rig, traceparent)
    wait_for(lambda: bool(named(spans_of(file, sampled), "http")), "the last one's spans to be written", 10)
    new = [json.loads(line) for line in file.read_text().removeprefix(before).splitlines()]
    others = {span["context"]["trace_id"] for span in new if span["name"] == "rios.http"}
    assert others == {f"0x{sampled}"}
