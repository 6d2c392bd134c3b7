"""When spans begin, end and belong to which, with a recorder that only remembers."""

from dataclasses import dataclass, field

import pytest

from config.vocabulary import PeerId
from p2p import trace
from p2p.face import Call

OUTSIDE = f"00-{'a' * 32}-{'b' * 16}-01"
OTHER = f"00-{'c' * 32}-{'d' * 16}-01"


@dataclass
class Kept:
    name: str
    kind: str
    parent: str
    links: tuple[str, ...]
    traceparent: str
    known: dict = field(default_factory=dict)
    error: str | None = None

    def end(self, attributes, error):
        assert self.error is None, "it ended twice"
        self.known |= attributes
        self.error = error


@dataclass
class Recorder:
    kept: list[Kept] = field(default_factory=list)
    wanted: bool = True

    def start(self, name, kind, parent, links, attributes):
        if not self.wanted:
            return None
        number = len(self.kept) + 1
        self.kept.append(Kept(name, kind, parent, tuple(links), f"00-{'a' * 32}-{number:016x}-01", attributes))
        return self.kept[-1]


@pytest.fixture
def recorder():
    made = Recorder()
    with trace.recording(made):
        yield made


def call(traceparent):
    return Call(PeerId("peer"), "expert.run", {}, (), 0.0, traceparent)


def test_parts_belong_to_what_is_current(recorder):
    request = trace.begin_trace("http", OUTSIDE, method="POST")
    with request.here():
        with trace.span("layer", links=[OTHER, "nonsense"], layer=3) as layer:
            layer.set(rows=2)
            inner = trace.begin("expert.run", "client")
        aside = trace.begin("turn")
    inner.end()
    aside.end()
    request.end()
    http, layer_kept, inner_kept, aside_kept = recorder.kept
    assert (http.kind, http.parent, http.known) == ("server", OUTSIDE, {"method": "POST"})
    assert (layer_kept.parent, layer_kept.links) == (http.traceparent, (OTHER,))
    assert layer_kept.known == {"layer": 3, "rows": 2}
    assert inner_kept.parent == layer_kept.traceparent
    assert aside_kept.parent == http.traceparent
    assert {kept.error for kept in recorder.kept} == {""}


def test_a_failure_is_told_once(recorder):
    with trace.begin_trace("http", "").here(), pytest.raises(ValueError, match="no"), trace.span("layer") as layer:
        raise ValueError("no")
    layer.end()
    assert recorder.kept[1].error == "ValueError: no"


def test_without_a_trace_nothing_is_made(recorder):
    with trace.span("layer") as span:
        span.set(rows=1)
        assert trace.current.get() == ""
    with trace.during("nonsense"), trace.span("layer"):
        pass
    with trace.serving(call("")), trace.span("layer"):
        pass
    assert recorder.kept == []


@pytest.mark.parametrize("parent", ["", "nonsense", OUTSIDE.upper(), f"00-{'0' * 32}-{'b' * 16}-01", OUTSIDE + "-x"])
def test_what_is_no_traceparent_begins_a_trace(recorder, parent):
    trace.begin_trace("http", parent).end()
    assert recorder.kept[0].parent == ""


def test_a_peers_call_is_in_its_trace(recorder):
    with trace.serving(call(OUTSIDE)), trace.span("inner"):
        pass
    served, inner = recorder.kept
    assert (served.name, served.kind, served.parent) == ("expert.run", "server", OUTSIDE)
    assert inner.parent == served.traceparent
    with trace.serving(call(OUTSIDE)) as span:
        span.drop()
    assert recorder.kept[2].error is None


def test_who_is_not_kept_goes_on_under_its_own_trace(recorder):
    recorder.wanted = False
    with trace.serving(call(OUTSIDE)):
        assert trace.current.get() == OUTSIDE, "calls from here carry it on"
        with trace.span("inner"):
            assert trace.current.get() == OUTSIDE


def test_without_a_recorder_a_trace_is_only_carried_on():
    with trace.serving(call(OUTSIDE)), trace.span("inner"):
        assert trace.current.get() == OUTSIDE
    span = trace.begin_trace("http", OUTSIDE)
    with span.here():
        assert trace.current.get() == ""
    span.end()
