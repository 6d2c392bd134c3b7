"""Who may connect, besides having the swarm's key: everybody, or those on a list that the operator may change.

Asked at the end of every handshake, on both carriers; a seed and this node itself are always admitted.
"""

from collections.abc import Collection, Iterable

from config.errors import ConfigError, IntegrityError
from p2p.core.identity import public_key_of


class AllowList:
    """Empty: everybody."""

    def __init__(self, listed: Iterable[str], always: Collection[str]) -> None:
        """Raises ConfigError for what is no peer id."""
        self.listed = frozenset(checked(peer_id, "p2p.allow") for peer_id in listed)
        self._always = frozenset(always)

    def admits(self, peer_id: str) -> bool:
        """Whether a peer may stay."""
        return not self.listed or peer_id in self.listed or self.always(peer_id)

    def always(self, peer_id: str) -> bool:
        """Whether no list keeps a peer out."""
        return peer_id in self._always


def checked(peer_id: str, where: str) -> str:
    """The peer id. Raises ConfigError for anything else."""
    try:
        public_key_of(peer_id)
    except IntegrityError as error:
        hint = "peer ids look as `rios id` prints them, e.g. 12D3KooW..."
        raise ConfigError("config", f"{where}: {error.message}", hint) from error
    return peer_id
