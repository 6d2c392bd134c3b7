"""Where things live on disk: one data folder per node, found by the XDG rules.

Owns names and places only; whoever writes a file creates it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAUSE_NOTE = "rios pause was asked for; rios resume removes this file\n"
"""What stands in :attr:`Paths.paused`: the file itself says it all."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Every path of a node, all below ``data`` but the config file."""

    config_file: Path
    data: Path

    @property
    def key(self) -> Path:
        """The identity key, mode 0600."""
        return self.data / "identity.key"

    @property
    def genesis(self) -> Path:
        """The network's genesis, unless the config names another file."""
        return self.data / "genesis.json"

    @property
    def swarm(self) -> Path:
        """The private swarm's key and seeds, mode 0600; missing in a public swarm."""
        return self.data / "swarm.json"

    @property
    def ledger(self) -> Path:
        """The ledger's database."""
        return self.data / "ledger.db"

    @property
    def epoch_keys(self) -> Path:
        """Keys of a witness, one file per epoch, mode 0600; erased when their epoch is over."""
        return self.data / "epoch-keys"

    @property
    def accounts(self) -> Path:
        """The gateway's embedded accounts database."""
        return self.data / "gateway.db"

    @property
    def models(self) -> Path:
        """Models and their shards."""
        return self.data / "models"

    @property
    def hosting(self) -> Path:
        """What is deployed and served, remembered across restarts."""
        return self.data / "hosting.json"

    @property
    def trust(self) -> Path:
        """What is known about the honesty of peers, remembered across restarts."""
        return self.data / "trust.json"

    @property
    def evidence(self) -> Path:
        """Proofs that peers gave wrong answers; of real prompts, so nobody else's business."""
        return self.data / "evidence"

    @property
    def paused(self) -> Path:
        """There while the operator wants this node to take no work."""
        return self.data / "paused"

    @property
    def network(self) -> Path:
        """Peers remembered across restarts."""
        return self.data / "network"

    @property
    def control(self) -> Path:
        """The control socket of the running daemon."""
        return self.data / "control.sock"

    @property
    def lock(self) -> Path:
        """Held by the running daemon, so that two never share a data folder."""
        return self.data / "daemon.lock"


def config_file(environ: Mapping[str, str], home: Path) -> Path:
    """The config file's place: ``$RIOS_CONFIG``, else ``$XDG_CONFIG_HOME/rios/rios.toml``."""
    if environ.get("RIOS_CONFIG"):
        return Path(environ["RIOS_CONFIG"])
    base = Path(environ["XDG_CONFIG_HOME"]) if environ.get("XDG_CONFIG_HOME") else home / ".config"
    return base / "rios" / "rios.toml"


def data_dir(configured: str, environ: Mapping[str, str], home: Path, *, beside: Path) -> Path:
    """The data folder: the setting (relative to the config file's folder), else ``$XDG_DATA_HOME/rios``."""
    if configured:
        return (beside / Path(configured).expanduser()).absolute()
    base = Path(environ["XDG_DATA_HOME"]) if environ.get("XDG_DATA_HOME") else home / ".local" / "share"
    return base / "rios"


def cache_dir(environ: Mapping[str, str], home: Path) -> Path:
    """Downloads that can be fetched again: ``$XDG_CACHE_HOME/rios``."""
    base = Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else home / ".cache"
    return base / "rios"
