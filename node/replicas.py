"""The command ``model.shards``: for each shard of a model the replicas wanted and there, and how each one fares.

Reads adverts, the deployments and what this node measured as a caller. Owns nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from config.vocabulary import PeerId
from dmoe.core.dispatch import PEER_WIDE
from dmoe.replicas import now_us
from node.control import Send
from p2p.core.advert import Advert

if TYPE_CHECKING:
    from node.daemon import Node


async def shards(node: "Node", args: Mapping[str, Any], _send: Send) -> Any:  # noqa: ANN401 - JSON
    """One row per shard: ``wanted`` replicas (of its deployments and by demand), those ``there``, each holder, and why
    this node has ``withdrawn`` it, if it has."""
    manifest = node.store.find(str(args.get("model", "")))
    adverts = node.network.directory.adverts()
    withdrawn = {(row["model_id"], row["shard"]): row["why"] for row in node.hosting.status()["withdrawn"]}
    rows = []
    for index, shard in enumerate(manifest.shards):
        holders = [
            _replica(node, peer, advert, index)
            for peer, advert in sorted(adverts.items())
            if (offer := advert.offer(manifest.model_id)) is not None and offer.holds(index)
        ]
        rows.append(
            {
                "id": shard.id,
                "kind": shard.kind,
                "wanted": node.hosting.deployments.book.wanted(manifest.model_id, shard.kind),
                "there": len(holders),
                "healthy": sum(not holder["state"] for holder in holders),
                "replicas": holders,
                "withdrawn": withdrawn.get((manifest.model_id, shard.id), ""),
            }
        )
    return {"model_id": manifest.model_id, "name": manifest.name, "shards": rows}


def _replica(node: "Node", peer: PeerId, advert: Advert, index: int) -> dict[str, Any]:
    """``state`` is empty if nothing is wrong; ``answered_s`` counts from the peer's last answer to this node (None: it
    was not asked yet); ``queue`` is what waits at the peer, in rows."""
    dispatcher, now = node.caller.dispatcher, now_us()
    known = dispatcher.peers.get(peer)
    answered = dispatcher.answered_at_us(peer)
    state = ""
    if advert.paused:
        state = "paused"
    elif dispatcher.held(peer, index, now) or dispatcher.held(peer, PEER_WIDE, now):
        state = "resting after a failure"
    elif known and known.strikes:
        state = f"{known.strikes} calls not answered"
    return {
        "peer_id": peer,
        "state": state,
        "queue": advert.load,
        "answered_s": round((now - answered) / 1e6, 1) if answered is not None else None,
    }
