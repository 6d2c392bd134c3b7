"""Prometheus metrics of a node, read from the statistics its parts already keep; labels are few and bounded."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from node.cli import VERSION

if TYPE_CHECKING:
    from dmoe.engine import EngineStatistics
    from node.daemon import Node


class NodeCollector(Collector):
    """Asks the node when somebody scrapes; costs nothing otherwise."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        node = self._node
        yield InfoMetricFamily("rios_node", "This node", {"peer_id": node.identity.peer_id, "version": VERSION})
        yield _gauge("rios_resident_bytes", "Resident memory", self._process.memory_info().rss)
        times = self._process.cpu_times()
        yield _counter("rios_cpu_seconds", "CPU time used", times.user + times.system)
        yield _gauge("rios_peers_linked", "Peers with a live link", len(node.network.peers()))
        yield _gauge("rios_peers_known", "Nodes with a valid advert", len(node.network.directory.adverts()))
        yield from _directory(node)
        yield from _doors(node)
        yield from _reach(node)
        yield from _calls(node)
        work = node.worker.statistics()
        yield _counter("rios_expert_calls", "Expert calls served", work["calls"])
        yield _counter("rios_expert_calls_quick", "Expert calls answered at once, without a queue", work["quick_calls"])
        yield _counter(
            "rios_expert_batches", "Times that experts ran: rows / batches is how well calls share", work["batches"]
        )
        refused = CounterMetricFamily("rios_expert_calls_refused", "Expert calls refused, by limit", labels=["limit"])
        for limit, count in work["refused_by"].items():
            refused.add_metric([limit], count)
        yield refused
        yield from _audits(node)
        yield _counter("rios_expert_rows", "Expert rows computed", node.expert_rows())
        yield _gauge("rios_expert_rows_waiting", "Expert rows in queues", node.worker.rows_waiting())
        yield _gauge("rios_shards_served", "Shards loaded and served", node.shards_served())
        yield _gauge("rios_paused", "1 while the operator paused this node", int(node.worker.paused))
        yield from _cells(node)
        blobs = node.network.blobs
        yield _counter("rios_blob_bytes_served", "Bytes of model files sent to peers", blobs.served_bytes)
        yield _counter("rios_blob_bytes_fetched", "Bytes of model files fetched from peers", blobs.fetched_bytes)
        limited = CounterMetricFamily("rios_blob_limit", "Times a limit on model files was hit", labels=["limit"])
        for limit, count in blobs.limited.items():
            limited.add_metric([limit], count)
        yield limited
        models = CounterMetricFamily(
            "rios_models_refused", "What of others' models was refused or stopped", labels=["kind"]
        )
        for kind, count in node.store.refused.by_kind.items():
            models.add_metric([kind], count)
        yield models
        engine = node.engine.statistics()
        yield _gauge("rios_generations_active", "Answers in progress", engine.active)
        yield _gauge("rios_generations_waiting", "Answers waiting for a slot", engine.waiting)
        yield _counter("rios_prompt_tokens", "Prompt tokens read", engine.prompt_tokens)
        yield _counter("rios_completion_tokens", "Tokens generated", engine.completion_tokens)
        outcomes = CounterMetricFamily("rios_generations", "Answers by outcome", labels=["outcome"])
        for outcome in ("finished", "failed", "cancelled"):
            outcomes.add_metric([outcome], getattr(engine, outcome))
        yield outcomes
        yield from _generation(engine)
        if node.ledger is not None:
            yield _gauge("rios_ledger_balance_microcredits", "Free balance of this node", node.ledger.balance())
            yield _counter("rios_ledger_entries", "Entries applied", node.ledger.statistics()["entries"])


def _audits(node: "Node") -> Iterator[Metric]:
    audit = node.caller.audit
    if audit is None:
        return
    outcomes = CounterMetricFamily("rios_audits", "Answers of peers looked at, by outcome", labels=["outcome"])
    for outcome, count in audit.counts.items():
        outcomes.add_metric([outcome], count)
    yield outcomes
    yield _counter("rios_audit_rows", "Rows times groups asked for again", audit.rows_audited)
    yield _counter("rios_audit_seconds", "Seconds spent on computing answers again in fp64", audit.busy_seconds)


def _generation(engine: "EngineStatistics") -> Iterator[Metric]:
    yield _gauge("rios_generation_tokens_per_second", "Tokens generated per second of late", engine.tokens_per_s)
    yield _counter("rios_passes", "Passes through models: rows / passes is how well answers share", engine.passes)
    yield _counter("rios_pass_rows", "Tokens fed: of prompts, answers and drafts", engine.rows)
    yield _counter("rios_drafts_proposed", "Guessed tokens that were fed", engine.drafts_proposed)
    yield _counter("rios_drafts_accepted", "Guessed tokens that came true", engine.drafts_accepted)
    yield _counter("rios_prefix_hits", "Answers that began with what was computed before", engine.prefix_hits)
    yield _counter("rios_prefix_tokens", "Prompt tokens that were not computed again", engine.prefix_tokens)
    yield _gauge("rios_prefix_positions", "Cache positions kept for later prompts", engine.prefix_positions)
    yield _gauge("rios_kv_positions", "Cache positions of running answers", engine.kv_positions)


def _calls(node: "Node") -> Iterator[Metric]:
    """What this node asked of others."""
    budget, dispatcher = node.caller.hedges.budget, node.caller.dispatcher
    yield _counter("rios_expert_calls_made", "Calls for experts to peers, hedges not included", budget.calls)
    yield _counter("rios_expert_calls_hedged", "Calls to a second replica because the first was late", budget.hedges)
    yield _counter("rios_expert_hedges_won", "Late calls whose second replica was quicker", node.caller.hedges.won)
    yield _counter("rios_expert_calls_retried", "Calls made again after a failure", dispatcher.retried)
    yield _gauge("rios_peers_ejected", "Peers that rest because they are far off their like", len(dispatcher.ejected))


def _cells(node: "Node") -> Iterator[Metric]:
    figures = node.cells.statistics()
    yield _gauge("rios_cells_running", "Cells (processes of untrusted shards) that run", figures["running"])
    yield _counter("rios_cell_calls", "Expert calls answered out of cells", figures["calls"])
    yield _counter("rios_cell_restarts", "Times that a cell was started again", figures["restarts"])
    yield _counter("rios_cell_kills", "Cells killed past a deadline or for breaking the rules", figures["killed"])
    yield _counter("rios_cell_deaths", "Cells that ended by themselves: a limit, a forbidden call", figures["died"])
    yield _counter(
        "rios_cell_withdrawals", "Shards withdrawn because they keep ending their cell", figures["withdrawn"]
    )
    yield _gauge("rios_cell_ram_bytes", "Memory that cells take beside their shards", figures["ram_bytes"])
    yield _counter("rios_cell_refusals", "Shards not loaded because no cell could be had", figures["refused"])


def _directory(node: "Node") -> Iterator[Metric]:
    figures = node.network.directory.statistics()
    refused = CounterMetricFamily(
        "rios_adverts_refused", "Adverts and heartbeats not taken, by reason", labels=["reason"]
    )
    old = figures["refused"].get("stale", 0)  # gossip brings everything more than once
    for reason, count in figures["refused"].items():
        if reason != "stale":
            refused.add_metric([reason], count)
    yield refused
    yield _counter("rios_adverts_stale", "Adverts and heartbeats that were known already", old)
    yield _counter("rios_provider_searches", "Searches for a shard beyond the local view", figures["searches"])
    yield _counter("rios_provider_searches_dht", "Those that went as far as the DHT", figures["dht_searches"])


def _doors(node: "Node") -> Iterator[Metric]:
    doors = node.network.doors.statistics()
    yield _gauge("rios_connections_open", "Open connections with a proven peer", doors["open"])
    yield _gauge("rios_connections_undecided", "Handshakes under way", doors["undecided"])
    refused = CounterMetricFamily("rios_doors_refused", "What was refused, by the limit that was hit", labels=["limit"])
    for limit, count in doors["refused"].items():
        refused.add_metric([limit], count)
    yield refused
    faults = CounterMetricFamily("rios_peer_faults", "What peers did wrong", labels=["fault"])
    for fault, count in doors["faults"].items():
        faults.add_metric([fault], count)
    yield faults
    yield _gauge("rios_doors_banned", "Peers, addresses and subnets shut out now", doors["banned"])
    yield _counter("rios_doors_bans", "Bans begun", doors["bans_made"])
    yield _counter("rios_doors_shunned", "Sources that were not listened to for a while", doors["shunned"])
    scores = GaugeMetricFamily("rios_peer_score_min", "The lowest score of a linked peer (100: clean)")
    scores.add_metric([], min((node.network.doors.peer(p)["score"] for p in node.network.peers()), default=100))
    yield scores


def _reach(node: "Node") -> Iterator[Metric]:
    found = node.network.statistics()["reachability"]
    reach = GaugeMetricFamily("rios_reach", "1 for what this node is: public, relayed, private", labels=["reach"])
    word = node.network.directory.own().reach
    for each in ("public", "relayed", "private"):
        reach.add_metric([each], int(each == word))
    yield reach
    yield _gauge("rios_relay_reservations", "Peers that are reached through this node", found["relay"]["reservations"])
    yield _gauge("rios_relay_circuits", "Connections passed on now", found["relay"]["circuits"])
    yield _counter("rios_relay_bytes", "Bytes passed on", found["relay"]["passed_bytes"])
    refused = CounterMetricFamily("rios_relay_refused", "What relaying refused, by the limit hit", labels=["limit"])
    for limit, count in found["relay"]["refused"].items():
        refused.add_metric([limit], count)
    yield refused


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value)


def registry_of(node: "Node") -> CollectorRegistry:
    """A registry with the node's metrics; the gateway adds its own."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(node))
    return registry
