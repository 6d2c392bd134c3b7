"""Who may see the hidden states of a request: the operator's rule, and how a single request tightens it.

Hosts of hidden states can reconstruct the prompt they came from (docs/privacy.md), so who computes is who can read.

Owns: the rule and its name in messages. Does not own: who offers what (``core.routes``), the choice among those who
are allowed (``core.dispatch``, ``core.plan``).

Invariants:
1. This node is always allowed; a rule speaks of others only.
2. A request can only tighten what the config says: fewer peers, never more.
3. Whoever is refused by a rule is treated as if nobody were there, and the error names the rule.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import get_args

from config.errors import ConfigError, RequestError
from config.generation import PrivacyWish
from config.vocabulary import PeerId

_PEER_IDS = ("12D3", "16Uiu2", "Qm")
"""How peer ids begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """``trusted``: the peers that hidden states may be sent to if ``only_trusted``; the ``first`` and ``last`` layers
    of a model stay on this node in any case. ``asked``: what the request wanted beyond the config."""

    trusted: frozenset[PeerId] = frozenset()
    only_trusted: bool = False
    first: int = 0
    last: int = 0
    asked: PrivacyWish = ""

    @property
    def is_open(self) -> bool:
        """Anybody may compute anything."""
        return not (self.only_trusted or self.first or self.last or self.asked)

    @property
    def allowed(self) -> frozenset[PeerId] | None:
        """The other peers that may compute the layers that are not kept here; None: any."""
        if self.asked == "local":
            return frozenset()
        return self.trusted if self.only_trusted or self.asked == "trusted" else None

    def keeps(self, layer: int, layers: int) -> bool:
        """Whether this layer, of so many, stays on this node."""
        return layer < self.first or layer >= layers - self.last

    def allows(self, peer: PeerId, first: int, last: int, layers: int) -> bool:
        """Whether another peer may compute any of the layers ``first`` to ``last`` of a model with so many."""
        if self.is_open:
            return True
        kept = any(self.keeps(layer, layers) for layer in (first, last))
        allowed = self.allowed
        return not kept and (allowed is None or peer in allowed)

    def tightened(self, asked: PrivacyWish) -> "Privacy":
        """With what a request wants besides. Raises RequestError for an unknown wish: it must not pass as none."""
        if asked not in get_args(PrivacyWish):
            known = "trusted or local"
            raise RequestError(
                "invalid_request", f"privacy {asked!r:.60} is not {known}", f"ask for {known}", param="privacy"
            )
        return self if asked in ("", self.asked) else replace(self, asked="local" if self.asked == "local" else asked)

    def why(self, first: int, last: int, layers: int) -> str:
        """The rule that keeps the layers ``first`` to ``last`` from others, for messages; empty if none does."""
        if self.asked == "local":
            return "privacy local: nothing of this request may leave this node"
        if any(self.keeps(layer, layers) for layer in (first, last)):
            return f"dmoe.local_layers = [{self.first}, {self.last}] keeps them on this node"
        if self.allowed is not None:
            name = "dmoe.trusted_peers_only" if self.only_trusted else "privacy trusted"
            return f"{name} allows this node and the {len(self.allowed)} of dmoe.trusted_peers"
        return ""

    def described(self) -> str:
        """Every rule in force, for people; empty if there is none."""
        rules = []
        if self.asked == "local":
            return self.why(0, 0, 1)
        if self.allowed is not None:
            rules.append(replace(self, first=0, last=0).why(0, 0, 1))
        if self.first or self.last:
            rules.append(f"dmoe.local_layers = [{self.first}, {self.last}] stay on this node")
        return "; ".join(rules)


OPEN = Privacy()
"""No rule."""


def privacy_of(trusted: Collection[str], only_trusted: bool, local_layers: tuple[int, ...]) -> Privacy:
    """The operator's settings. Raises ConfigError for a peer id or layers that cannot be."""
    for peer in trusted:
        if not peer.startswith(_PEER_IDS):
            raise ConfigError("config", f"dmoe.trusted_peers: {peer[:80]!r} is no peer id", "as rios id shows it there")
    if len(local_layers) != 2 or min(local_layers) < 0:
        raise ConfigError(
            "config",
            f"dmoe.local_layers = {list(local_layers)} is not two numbers of layers",
            "e.g. local_layers = [2, 1]: the first two and the last one stay here",
        )
    first, last = local_layers
    return Privacy(
        trusted=frozenset(PeerId(peer) for peer in trusted), only_trusted=only_trusted, first=first, last=last
    )
