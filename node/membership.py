"""Which swarm a node is in: the seeds it starts from, whom it admits, and joining another one.

Fails as: a node that is in another private swarm, or another network, already -> ConfigError; nothing is written then.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from config import seeds
from config.errors import ConfigError, RiosError
from config.paths import Paths
from config.settings import P2pSettings
from p2p import swarmfile
from p2p.core.invite import Swarm
from p2p.network import PeerNetwork


def seeds_of(settings: P2pSettings, beside: Path, swarm: Swarm | None) -> tuple[str, ...]:
    """Every seed: the config's, its seed list's (relative to ``beside``), and those that came with the invite."""
    listed = seeds.collect(settings.seeds, settings.seeds_file, beside)
    return tuple(dict.fromkeys((*listed, *(swarm.seeds if swarm else ()))))


def check_free(paths: Paths, wanted: Swarm | None, *, force: bool) -> Swarm | None:
    """The private swarm the node is in, if any. Raises ConfigError if it is another than ``wanted`` (None: any is),
    unless ``force``; a damaged swarm file counts as none then."""
    try:
        here = swarmfile.load(paths.swarm)
    except RiosError:
        if force:
            return None
        raise
    if here is not None and not force and (wanted is None or wanted.key != here.key):
        raise ConfigError(
            "usage",
            f"this node is in a private swarm already: {describe(here)}, {paths.swarm}",
            "--force leaves it for the other one; a node with another node.data_dir can be in both at the same time",
        )
    return here


def change_allowed(
    paths: Paths, network: PeerNetwork, peer_id: str, *, deny: bool, configured: Sequence[str]
) -> list[str]:
    """Admit one more peer or one less, now and after a restart; an empty ``peer_id``: everybody who has the key. Where
    there was no list, it begins with the members known now. Returns whom this hung up on."""
    swarm = swarmfile.load(paths.swarm)
    if swarm is None:
        hint = "rios peers ban shuts a peer out; p2p.allow in the config lists whom a node of a public swarm admits"
        raise ConfigError("usage", "this node is in no private swarm", hint)
    if (deny or not peer_id) and (peer_id in configured or (configured and not peer_id)):
        what = peer_id or f"{len(configured)} peers"
        raise ConfigError("usage", f"p2p.allow in the config lists {what}", "take it out there, and restart the node")
    if deny and network.allowed.always(peer_id):
        who = "this node itself" if peer_id == network.peer_id else "a seed of this node, which is always admitted"
        raise ConfigError("usage", f"{peer_id} is {who}", "rios peers ban shuts a seed out; rios swarm show lists them")
    listed: set[str] = set()
    if peer_id:
        listed = set(network.allowed.listed) or {*network.directory.adverts(), network.peer_id}
        listed = listed - {peer_id} if deny else listed | {peer_id}
    swarmfile.save(paths.swarm, replace(swarm, allow=tuple(sorted(listed - set(configured)))))
    network.allowed.listed = frozenset(listed)
    out = [peer for peer in network.peers() if not network.allowed.admits(peer)]
    for peer in out:
        network.doors.hang_up(peer)
    return [str(peer) for peer in out]


def describe(swarm: Swarm) -> str:
    """Name and id, for people."""
    return f"{swarm.name!r} ({swarm.id})" if swarm.name else swarm.id
