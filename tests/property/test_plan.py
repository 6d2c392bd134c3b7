"""The planner: the chosen plan is the best by its own estimates, chains of stages are the exact minimum, pins hold,
and what physics says of round trips and speed comes out."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.core import costs
from dmoe.core.costs import Cost, Group, Host, Shape, Stage, View
from dmoe.core.plan import KINDS, Pin, Wishes, plan
from dmoe.core.spans import Amount, Ask, Spans

LAYERS, GROUPS, CUTS = 6, 2, ((0, 1), (2, 3), (4, 5))
TRUNK, STAGES = LAYERS * GROUPS, [LAYERS * GROUPS + 1 + n for n in range(len(CUTS))]
EVERYTHING = frozenset(range(STAGES[-1] + 1))
ALL_RUN = frozenset(KINDS)
MS = 1000.0


def shape_of(*, dense=False, stages=True):
    groups = tuple(
        tuple(Group(layer * GROUPS + group, 4, Cost(4e6, 8e6)) for group in range(GROUPS)) for layer in range(LAYERS)
    )
    return Shape(
        name="made up",
        dense=dense,
        experts=8,
        top_k=8 if dense else 2,
        row_bytes=1152,
        kv_bytes_per_position=1000,
        attention=Cost(1e6, 1e6),
        head=Cost(5e6, 5e6),
        layers=groups,
        trunk=TRUNK,
        stages=tuple(Stage(shard, *cut) for shard, cut in zip(STAGES, CUTS, strict=True)) if stages else (),
        ram_bytes=(1 << 20,) * len(EVERYTHING),
        shard_ids=tuple(f"s{n}" for n in sorted(EVERYTHING)),
    )


def host(name, round_trip_ms=20.0, shards=EVERYTHING, **more):
    more = {"kflop_per_s": 20_000_000, "memory_bytes_per_s": 10_000_000_000, **more}
    return Host(peer_id=name, round_trip_us=round_trip_ms * MS, shards=frozenset(shards), **more)


def view_of(*peers, here=(TRUNK,), loaded=(), **more):
    return View(me=host("me", 0, here), peers=peers, loaded=frozenset(loaded), **{"runs": ALL_RUN, **more})


hosts = st.builds(
    host,
    st.just("?"),
    st.floats(0.1, 200),
    st.frozensets(st.integers(0, STAGES[-1])),
    kflop_per_s=st.integers(0, 50_000_000),
    cores=st.integers(1, 8),
    row_us=st.none() | st.floats(1, 5000),
    layer_row_us=st.none() | st.floats(1, 5000),
    queue_rows=st.integers(0, 50),
    microcredits_per_tflop=st.integers(0, 10_000_000),
    dialable=st.booleans(),
    barred=st.sampled_from(["", "", "", "paused"]),
)
views = st.builds(
    lambda me, peers, loaded, hops: View(
        me=replace(me, peer_id="me", round_trip_us=0.0, shards=me.shards | {TRUNK}, barred=""),
        peers=tuple(replace(peer, peer_id=name) for name, peer in zip("abcd", peers, strict=False)),
        loaded=frozenset(loaded) & me.shards,
        hops_us=hops,
        runs=ALL_RUN,
    ),
    hosts,
    st.lists(hosts, max_size=4),
    st.frozensets(st.integers(0, STAGES[-1])),
    st.dictionaries(st.sampled_from([("a", "b"), ("a", "c"), ("b", "c")]), st.floats(100, 300_000)),
)
asks = st.builds(
    Ask,
    prompt_tokens=st.integers(1, 2000),
    answer_tokens=st.integers(1, 500),
    batch=st.integers(1, 16),
    tokens_per_pass=st.floats(1, 4),
    rows_per_pass=st.integers(1, 5),
)
weights = st.sampled_from([0.0, 1.0, 50.0])


@given(views, asks, weights, st.booleans())
@settings(deadline=None)
def test_no_possible_candidate_is_better_than_the_chosen_one_and_planning_again_says_the_same(view, ask, weight, dense):
    shape, wishes = shape_of(dense=dense), Wishes(price_weight=weight)
    made = plan(shape, view, ask, wishes)
    assert {each.kind for each in made.candidates} == set(KINDS)
    for each in made.candidates:
        assert bool(each.why_not) != bool(each.spans)
        if each.spans:
            assert made.chosen is not None
            assert made.chosen.score <= each.score
            assert each.reason
            covered = [layer for span in each.spans for layer in range(span.first, span.last + 1)]
            assert covered == list(range(LAYERS))
            for span in each.spans:
                parts = span.round_trip_us + span.service_us + span.queue_us + span.other_us
                assert parts == pytest.approx(span.amount.pass_us)
    assert plan(shape, view, ask, wishes) == made
    shuffled = replace(view, peers=view.peers[::-1])
    assert plan(shape, shuffled, ask, wishes).chosen == made.chosen


@given(views, asks, weights, st.booleans())
@settings(deadline=None)
def test_a_chain_of_stages_is_the_exact_minimum_over_every_choice_of_hosts(view, ask, weight, mixed):
    shape, view = shape_of(), replace(view, runs=frozenset({"stages", "mixed"} if mixed else {"stages"}))
    wishes = Wishes(route="stages", price_weight=weight)
    made, spans = plan(shape, view, ask, wishes), Spans(shape, view, ask)

    def score(amount):
        return amount.prefill_us + ask.passes * amount.pass_us + weight * amount.microcredits

    def options(stage):
        found = [(peer, spans.stage(stage, peer)) for peer in spans.usable if stage.shard in peer.shards]
        needed = {TRUNK} | {group.shard for n in range(stage.first, stage.last + 1) for group in shape.layers[n]}
        if needed <= view.me.shards:
            found.append((view.me, spans.here(stage.first, stage.last, whole=False)))
        elif mixed and not isinstance(span := spans.experts(stage.first, stage.last), str):
            found.append((view.me, span))
        return found

    best = float("inf")
    for chain in product(*(options(stage) for stage in shape.stages)):
        total, place = Amount(), view.me
        for at, span in chain:
            total += spans.hop(place, at) + span.amount
            place = at
        best = min(best, score(total + spans.hop(place, view.me, last=True)))
    if made.chosen is None:
        assert best == float("inf")
    else:
        total = Amount()
        for span in made.chosen.spans:
            total += span.amount
        assert score(total) == pytest.approx(best)


@given(views, asks, st.sampled_from("abcd"), st.sampled_from(CUTS))
@settings(deadline=None)
def test_a_pinned_span_is_served_by_whom_it_is_pinned_to_or_nothing_is_possible(view, ask, peer, cut):
    made = plan(shape_of(), view, ask, Wishes(pins=(Pin(*cut, peer),)))
    for each in made.candidates:
        for span in each.spans:
            if span.first <= cut[1] and cut[0] <= span.last:
                assert span.peers == (peer,)
    stage = STAGES[CUTS.index(cut)]
    if not any(h.peer_id == peer and stage in h.shards and not h.barred for h in view.peers):
        assert made.chosen is None


@given(views, asks, st.sampled_from(KINDS))
@settings(deadline=None)
def test_a_pinned_route_is_the_only_one(view, ask, kind):
    made = plan(shape_of(), view, ask, Wishes(route=kind))
    allowed = {kind, "mixed"} if kind == "stages" else {kind}  # a mixture is carried out by the route stages
    assert made.chosen is None or made.chosen.kind in allowed
    assert all(each.why_not for each in made.candidates if each.kind not in allowed)


@given(views, asks)
@settings(deadline=None)
def test_only_the_named_stage_hosts_hold_stages(view, ask):
    made = plan(shape_of(), view, ask, Wishes(stage_hosts=("b",)))
    holders = {span.peers[0] for each in made.candidates for span in each.spans if span.where == "stage"}
    assert holders <= {"b"}


def kinds(made):
    return {each.kind: each for each in made.candidates}


def test_stages_cost_half_a_round_trip_more_than_their_number_and_experts_one_per_layer():
    far = [host(name, 100.0) for name in "abc"]
    near = {pair: 100 * MS for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
    peers = [replace(peer, shards=peer.shards - (set(STAGES) - {own})) for peer, own in zip(far, STAGES, strict=True)]
    made = kinds(plan(shape_of(), view_of(*peers, hops_us=near), Ask(), Wishes()))
    stages, experts = made["stages"], made["experts"]
    assert [span.peers for span in stages.spans] == [("a",), ("b",), ("c",)]
    assert 0.2 * MS * 1000 <= sum(span.round_trip_us for span in stages.spans) < 0.21 * MS * 1000
    assert sum(span.round_trip_us for span in experts.spans) == pytest.approx(LAYERS * 100 * MS)
    assert experts.reason.split()[0] > "1"
    assert "round trips" in experts.bottleneck


def test_a_stage_behind_a_router_costs_its_way_through_this_node():
    hidden = [host(name, 100.0, {stage}, dialable=False) for name, stage in zip("abc", STAGES, strict=True)]
    made = kinds(plan(shape_of(), view_of(*hidden), Ask(), Wishes()))
    assert sum(span.round_trip_us for span in made["stages"].spans) == pytest.approx(300 * MS, rel=0.01)


def test_what_is_here_and_fast_stays_here_and_a_far_faster_neighbour_takes_it():
    shape, slow = shape_of(), {"kflop_per_s": 200_000, "memory_bytes_per_s": 100_000_000}
    neighbour = host("a", 0.2, kflop_per_s=200_000_000, memory_bytes_per_s=200_000_000_000)
    local = View(me=host("me", 0), peers=(host("a", 20.0),), runs=ALL_RUN)
    assert plan(shape, local, Ask(), Wishes()).chosen.kind == "local"
    weak = View(me=host("me", 0, **slow), peers=(neighbour,), runs=ALL_RUN)
    assert plan(shape, weak, Ask(), Wishes()).chosen.kind == "stages"
    dense = View(me=host("me", 0), peers=(host("a", 20.0),), runs=ALL_RUN)
    assert plan(shape_of(dense=True), dense, Ask(), Wishes()).chosen.kind == "fused"


def test_a_mixture_is_taken_where_each_half_has_only_the_other_kind():
    stage = host("a", 5.0, {STAGES[0]})
    experts = host("b", 5.0, range(4, LAYERS * GROUPS))
    made = plan(shape_of(), view_of(stage, experts), Ask(), Wishes())
    assert made.chosen.kind == "mixed"
    assert [(span.where, span.first) for span in made.chosen.spans] == [("stage", 0), ("experts", 2), ("experts", 4)]
    assert "no replica of s0" in kinds(made)["experts"].why_not
    assert "layers 2 to 3" in kinds(made)["stages"].why_not
    cannot = plan(shape_of(), view_of(stage, experts, runs=frozenset({"experts", "stages"})), Ask(), Wishes())
    assert cannot.chosen is None
    assert kinds(cannot)["mixed"].why_not == "this node cannot run it"


def test_price_weighs_against_time():
    cheap = host("a", 40.0, {*STAGES}, microcredits_per_tflop=1000)
    dear = host("b", 20.0, {*STAGES}, microcredits_per_tflop=10_000_000)
    shape, view = shape_of(), view_of(cheap, dear)
    fast, thrifty = (plan(shape, view, Ask(), Wishes(price_weight=weight)).chosen for weight in (0.0, 1e6))
    assert {span.peers for span in fast.spans} == {("b",)}
    assert {span.peers for span in thrifty.spans} == {("a",)}
    assert thrifty.microcredits_per_million < fast.microcredits_per_million


def test_a_measured_time_counts_more_than_a_claim_and_a_queue_counts():
    boaster = host("a", 20.0, {*STAGES}, kflop_per_s=1 << 40, memory_bytes_per_s=1 << 50, layer_row_us=9000.0)
    honest = host("b", 20.0, {*STAGES})
    view = view_of(boaster, honest)
    assert {span.peers for span in plan(shape_of(), view, Ask(), Wishes()).chosen.spans} == {("b",)}
    busy = view_of(boaster, replace(honest, queue_rows=1000))
    assert {span.peers for span in plan(shape_of(), busy, Ask(), Wishes()).chosen.spans} == {("a",)}


@given(hosts, st.integers(1, 4), st.floats(100, 1e6), st.booleans())
def test_a_pass_that_was_measured_is_what_is_expected_of_the_next_one(made, rows, pass_us, whole):
    """Up to the head, whose share is known only by the claim."""
    shape, me = shape_of(dense=True), replace(made, peer_id="me", layer_row_us=None, shards=EVERYTHING)
    layer_row_us = costs.layer_row_us(shape, me, rows, pass_us, whole=whole)
    view = View(me=replace(me, layer_row_us=layer_row_us))
    expected = Spans(shape, view, Ask(batch=rows)).here(0, LAYERS - 1, whole=whole).amount.pass_us
    parts_us = pass_us - costs.head_us(shape, me, rows)
    pieces_us = 0 if whole else costs.pieces_us(shape, 0, LAYERS - 1)
    assert expected == pytest.approx(max(parts_us, pass_us / 10 + pieces_us), rel=1e-6)


def test_a_route_in_use_is_left_only_for_a_clearly_better_one():
    shape = shape_of()
    view = view_of(host("a", 20.0))
    made = kinds(plan(shape, view, Ask(), Wishes()))
    assert made["experts"].score > made["stages"].score
    assert plan(shape, view, Ask(), Wishes(), settled="experts").chosen.kind == "stages"
    close = View(me=host("me", 0, cores=1), peers=(), runs=ALL_RUN)
    fused, local = (kinds(plan(shape_of(dense=True), close, Ask(), Wishes()))[kind] for kind in ("fused", "local"))
    assert fused.score < local.score < fused.score / 0.9
    kept = plan(shape_of(dense=True), close, Ask(), Wishes(), settled="local").chosen
    assert kept.kind == "local"
    assert "in use" in kept.reason


def test_memory_and_missing_files_make_a_plan_impossible_and_say_so():
    shape = shape_of()
    tight = View(me=host("me", 0), runs=ALL_RUN, ram_bytes_free=4 << 20)
    assert "needs 13 MiB of memory, 4 MiB are free" in kinds(plan(shape, tight, Ask(), Wishes()))["local"].why_not
    bare = view_of(host("a"), here=())
    made = plan(shape, bare, Ask(), Wishes())
    assert made.chosen is None
    assert all(each.why_not == f"s{TRUNK} not on this node" for each in made.candidates if each.kind != "fused")
    paused = view_of(host("a", barred="paused by its operator"))
    assert "paused by its operator" in kinds(plan(shape, paused, Ask(), Wishes()))["experts"].why_not


def test_speculation_and_batches_make_passes_fewer_and_longer():
    shape, view = shape_of(), view_of(host("a", 100.0))
    plain = plan(shape, view, Ask(), Wishes()).chosen
    drafted = plan(shape, view, Ask(tokens_per_pass=2.5, rows_per_pass=4), Wishes()).chosen
    assert plain.token_us / 2.5 < drafted.token_us < plain.token_us
    batched = plan(shape, view, Ask(batch=16), Wishes()).chosen
    assert plain.token_us < batched.token_us < 16 * plain.token_us
