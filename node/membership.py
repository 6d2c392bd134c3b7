"""Which swarm a node is in: the seeds it starts from, and joining another one.

Fails as: a node that is in another private swarm, or another network, already -> ConfigError; nothing is written then.
"""

from pathlib import Path

from config import seeds
from config.errors import ConfigError, RiosError
from config.paths import Paths
from config.settings import P2pSettings
from p2p import swarmfile
from p2p.core.invite import Swarm


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


def describe(swarm: Swarm) -> str:
    """Name and id, for people."""
    return f"{swarm.name!r} ({swarm.id})" if swarm.name else swarm.id
