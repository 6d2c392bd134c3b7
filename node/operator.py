"""What an operator may ask of a running node: the commands of the control socket, and their JSON.

Reads and drives the parts of a :class:`node.daemon.Node`; owns no behaviour of its own.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil
import trio

from config.errors import ConfigError, RequestError, RiosError
from dmoe.bringing import Bringing
from dmoe.core.manifest import Manifest
from node import answering, committees, ledger_answers, membership, plan, replicas, walls
from node.cli import VERSION
from node.control import Command, Send
from p2p import allow, clock
from p2p.core.identity import peer_id_of, public_key_of

if TYPE_CHECKING:
    from node.daemon import Node

Args = Mapping[str, Any]
REPORT_SECONDS = 0.2
FIND_SECONDS_MAX = 20.0
"""For how long ``model fetch`` looks for somebody who has the model."""
"""Between reports about something that takes its time."""


def commands(node: "Node") -> Mapping[str, Command]:
    """Every command by name."""
    return {
        name: _bound(node, command)
        for name, command in {
            "status": _status,
            "health": _health,
            "peers": _peers,
            "peers.bans": _peers_bans,
            "peers.ban": _peers_ban,
            "peers.unban": _peers_unban,
            "swarm.allow": _swarm_allow,
            "clock": _clock,
            "pause": _pause,
            "resume": _resume,
            "chat": answering.chat,
            "embed": answering.embed,
            "plan": plan.answer,
            "model.list": _model_list,
            "model.deploy": _model_deploy,
            "model.scale": _model_scale,
            "model.undeploy": _model_undeploy,
            "model.shards": replicas.shards,
            "model.health": _model_health,
            "model.holdings": _model_holdings,
            "model.progress": _model_progress,
            "model.fetch": _model_fetch,
            "audit.list": _audit_list,
            "audit.forgive": _audit_forgive,
            **ledger_answers.COMMANDS,
            "ledger.committee": committees.committee,
            "ledger.issuer": committees.issuer,
            "ledger.allow": committees.allow,
            "ledger.trust": committees.trust,
        }.items()
    }


def _bound(node: "Node", command: Callable[["Node", Args, Send], Awaitable[Any]]) -> Command:
    async def run(args: Args, send: Send) -> Any:  # noqa: ANN401 - JSON
        return await command(node, args, send)

    return run


# --- audits


async def _audit_list(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    if node.caller.audit is None:
        raise RequestError("not_found", "nothing is audited here", "set dmoe.audit_share above 0")
    return node.caller.audit.statistics()


async def _audit_forgive(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    if node.caller.audit is None:
        raise RequestError("not_found", "nothing is audited here", "set dmoe.audit_share above 0")
    peer = peer_id_of(public_key_of(args["peer"]))
    return {"forgiven": node.caller.audit.trust.forgive(peer)}


# --- node


async def _status(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    engine = node.engine.statistics()
    network = dict(node.network.statistics())
    process = psutil.Process()
    times = process.cpu_times()
    return {
        "node": {
            "peer_id": node.identity.peer_id,
            "name": node.settings.node.name,
            "version": VERSION,
            "uptime_s": round(time.monotonic() - node.started_at, 1),
            "rss_bytes": process.memory_info().rss,
            "cpu_seconds": round(times.user + times.system, 2),
            "data_dir": str(node.paths.data),
        },
        "network": {
            "addresses": list(node.network.addresses),
            "links": len(node.network.peers()),
            "known": len(node.network.directory.adverts()),
            **node.network.standing(),
            "swarm": node.swarm,
            "details": network,
        },
        "work": {
            "device": node.options.providers()[0].removesuffix("ExecutionProvider"),
            "shards": node.shards_served(),
            "paused": node.worker.paused,
            "expert_rows": node.expert_rows(),
            "models": [asdict(model) for model in node.engine.models()],
            "active": engine.active,
            "waiting": engine.waiting,
            "tokens": engine.completion_tokens,
            "tokens_per_s": engine.tokens_per_s,
            "engine": asdict(engine),
            "hosting": node.hosting.status(),
            "worker": node.worker.statistics(),
            "stages": node.stage_host.statistics(),
            "sandbox": {**node.cells.statistics(), "kinds": walls.kinds(node)},
            "caller": node.caller.statistics(),
            "planner": node.planner.statistics(),
        },
        "ledger": _ledger_summary(node),
        "gateway": {"url": node.gateway_url} if node.gateway_url else None,
    }


def _ledger_summary(node: "Node") -> Any:  # noqa: ANN401 - JSON
    if node.ledger is None:
        return None
    return {
        **node.ledger.statistics(),
        "f": node.ledger.book.state.committees.current.f,
        "issuer": peer_id_of(node.ledger.book.state.committees.issuer),
        "account": node.identity.peer_id,
    }


async def _health(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    ok, reasons = node.ready()
    return {"ok": ok, "reasons": reasons, "idle_reasons": node.idle_reasons()}


async def _peers(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    linked = set(node.network.peers())
    links = node.network.links.statistics()
    regions = node.network.locator.regions()
    rows = []
    for peer_id, advert in sorted(node.network.directory.adverts().items()):
        offers = advert.models
        rows.append(
            {
                "peer_id": peer_id,
                "self": peer_id == node.identity.peer_id,
                "linked": peer_id in linked or peer_id == node.identity.peer_id,
                "addresses": list(advert.addresses),
                "version": advert.version,
                "region": regions[peer_id][0],
                "region_inferred": regions[peer_id][1],
                "distance_ms": node.network.directory.distance_ms(peer_id),
                "roles": list(advert.roles),
                "cpu": advert.hardware.cpu,
                "cores": advert.hardware.cores,
                "ram_bytes": advert.hardware.ram_bytes,
                "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in advert.hardware.gpus],
                "expert_kflop_per_s": advert.hardware.expert_kflop_per_s,
                "memory_bytes_per_s": advert.hardware.memory_bytes_per_s,
                "offered_bytes": advert.offered_bytes,
                "full": advert.full,
                "paused": advert.paused,
                "reach": advert.reach,
                "load": advert.load,
                "shards": sum(byte.bit_count() for offer in offers for byte in offer.shards),
                "models": [offer.model_id for offer in offers],
                "microcredits_per_tflop": max((offer.microcredits_per_tflop for offer in offers), default=0),
                "expires_ms": advert.expires_ms,
                "link": links.get(peer_id),
                **node.network.doors.peer(peer_id),
            }
        )
    return rows


async def _peers_bans(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """Who is shut out, and what the doors refused so far by limit."""
    doors = node.network.doors
    return {"bans": [asdict(row) for row in doors.bans()], **doors.statistics()}


async def _peers_ban(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    minutes = args.get("minutes")
    if type(minutes) is not int or minutes <= 0:
        raise ConfigError("usage", f"{minutes!r} is not a time", "a whole number of minutes above 0")
    subject = str(args.get("subject", ""))
    if subject == node.identity.peer_id:
        raise ConfigError("usage", f"{subject} is this node itself", "rios pause takes no work, Ctrl-C stops the node")
    row = node.network.doors.ban(subject, minutes)
    await node.network.doors.save()
    return asdict(row)


async def _peers_unban(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    subject = str(args.get("subject", ""))
    was_banned = node.network.doors.unban(subject)
    await node.network.doors.save()
    return {"subject": subject, "was_banned": was_banned}


async def _swarm_allow(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """Put a peer on the list of those admitted, or off it (``deny``), or do without a list (``everybody``)."""
    hung_up = membership.change_allowed(
        node.paths,
        node.network,
        "" if args.get("everybody") else allow.checked(str(args.get("peer", "")), "PEER"),
        deny=bool(args.get("deny")),
        configured=node.settings.p2p.allow,
    )
    return {"allow": sorted(node.network.allowed.listed), "hung_up": hung_up}


async def _clock(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """How far this clock is from those of linked peers; None if none tells."""
    skew = await clock.measure(node.network, node.network.peers())
    return asdict(skew) if skew else None


async def _pause(node: "Node", args: Args, send: Send) -> Any:  # noqa: ANN401 - JSON
    """Take no more work; with ``wait``, return when what was in flight is done."""
    node.pause(True)
    if args.get("wait"):
        await send({"in_flight": node.worker.statistics()["active"]})
        await node.worker.drained()
    return {"paused": True, "in_flight": node.worker.statistics()["active"]}


async def _resume(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    node.pause(False)
    return {"paused": False}


# --- models


def _manifest(node: "Node", args: Args) -> Manifest:
    return node.store.find(str(args.get("model", "")))


async def _model_list(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    deployed = {each["model_id"]: each for each in node.hosting.status()["deployments"]}
    answering = {model.id: model for model in node.engine.models()}
    rows = []
    for model_id, manifest in node.store.manifests().items():
        low, high = _replicas(node, manifest)
        model = answering.get(model_id)
        wanted = deployed.get(model_id, {}).get("replicas", 0)
        rows.append(
            {
                "id": model_id,
                "name": manifest.name,
                "licence": manifest.licence,
                "publisher": manifest.publisher,
                "quantisation": manifest.quantisation,
                "shards": len(manifest.shards),
                "shards_held": sum(node.store.has_shard(model_id, shard.id) for shard in manifest.shards),
                "replicas_min": low,
                "replicas_max": high,
                "replicas_wanted": wanted,
                "deployed": wanted > 0,
                "ready": bool(model and model.ready),
                "reason": model.reason if model else "not answered with here (dmoe.orchestrate)",
                "detail": deployed.get(model_id, {}).get("shards", []),
            }
        )
    return rows


def _replicas(node: "Node", manifest: Manifest) -> tuple[int, int]:
    offers = [
        offer
        for advert in node.network.directory.adverts().values()
        if (offer := advert.offer(manifest.model_id)) is not None
    ]
    counts = [
        sum(offer.holds(manifest.shard_index(shard.id)) for offer in offers) for shard in manifest.expert_shards()
    ]
    return min(counts, default=0), max(counts, default=0)


async def _model_deploy(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    manifest = _manifest(node, args)
    replicas = node.settings.dmoe.replicas if args.get("replicas") is None else args["replicas"]
    mode = args.get("mode") or "experts"
    await node.hosting.deploy(manifest.model_id, int(replicas), mode)
    return {"model_id": manifest.model_id, "name": manifest.name, "replicas": int(replicas), "mode": mode}


async def _model_scale(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    manifest = _manifest(node, args)
    record = await node.hosting.scale(manifest.model_id, int(args["replicas"]))
    return {
        "model_id": manifest.model_id,
        "name": manifest.name,
        "replicas": record.replicas,
        "mode": record.mode,
    }


async def _model_undeploy(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    manifest = _manifest(node, args)
    await node.hosting.undeploy(manifest.model_id)
    return {"model_id": manifest.model_id, "name": manifest.name}


async def _model_health(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    manifest = _manifest(node, args)
    low, high = _replicas(node, manifest)
    model = next((each for each in node.engine.models() if each.id == manifest.model_id), None)
    return {
        "ready": bool(model and model.ready),
        "reason": model.reason if model else "not answered with here",
        "replicas_min": low,
        "replicas_max": high,
    }


async def _model_holdings(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """What this node serves of a model."""
    manifest = _manifest(node, args)
    served = node.worker.indices(manifest.model_id)
    shards = [shard for index, shard in enumerate(manifest.shards) if index in served]
    return {
        "shards": [shard.id for shard in shards],
        "layers": sorted({n for shard in shards for n in range(shard.layers[0], shard.layers[1] + 1)}),
        "experts": sorted({expert for shard in shards for expert in shard.experts}),
    }


async def _model_progress(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """Bytes of shards fetched from peers, and still to come."""
    shards = [shard for each in node.hosting.status()["deployments"] for shard in each["shards"]]
    return {
        "bytes_done": sum(shard["bytes_done"] for shard in shards),
        "bytes_total": sum(shard["bytes_total"] for shard in shards),
        "bytes_fetched": node.network.blobs.fetched_bytes,
        "errors": [f"{shard['id']}: {shard['error']}" for shard in shards if shard["error"]],
    }


async def _model_fetch(node: "Node", args: Args, send: Send) -> Any:  # noqa: ANN401 - JSON
    """Bring a model's trunk here, or all of it; events tell how far it is."""
    name, watched = str(args.get("model", "")), Bringing()
    manifest: Manifest | None = None
    refused: RiosError | None = None
    ensure = node.hosting.bringer.whole if args.get("whole") else node.hosting.bringer.trunk

    async def say() -> None:
        event = {"name": watched.name, "done": watched.bytes_done, "total": watched.bytes_total}
        await send({**event, "error": watched.error})

    async def report() -> None:
        while watched.name or trio.current_time() < found_by:
            await say()
            await trio.sleep(REPORT_SECONDS)
        nursery.cancel_scope.cancel()  # looked for long enough; what was found is fetched however long it takes

    found_by = trio.current_time() + FIND_SECONDS_MAX
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        try:
            manifest = await ensure(name, watched)
        except RiosError as error:
            refused = error
        nursery.cancel_scope.cancel()
    if refused is not None:
        raise refused  # outside of the nursery, which would wrap it
    if manifest is None:
        why = f" ({watched.error})" if watched.error else ""
        message = f"no node that this one knows offers a model {name[:80]!r}{why}"
        raise RequestError("not_found", message, "rios model ls; names are case-sensitive")
    await say()
    return {"model_id": manifest.model_id, "name": manifest.name, "bytes": watched.bytes_total}
