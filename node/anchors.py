"""Where the gateway's audit log is anchored: on the ledger, and under the node's own signature.

The ledger has no entry that carries plain data, but a transfer carries 32 free bytes: the account it goes to. So the
hash itself is paid the network's least amount. Nobody has its private key, as it is a hash, so what was paid stays
there; the entry has a certificate of the witnesses like every other, and tells everybody that the hash was known then.

A node without a ledger, or without a credit, only signs the hash; the signature is in the log and in the audit log.
"""

import logging

from config.errors import RiosError
from ledger.ledger import Ledger
from p2p.core.identity import Identity, public_key_of, verify

TAG = b"rios/audit-anchor/1\0"
_log = logging.getLogger("rios.node")


class NodeAnchor:
    """The gateway's ``Anchor``."""

    def __init__(self, identity: Identity, ledger: Ledger | None) -> None:
        self._identity = identity
        self._ledger = ledger

    async def anchor(self, place: int, digest: bytes) -> dict[str, str]:
        """Sign it, and pay it. Raises RiosError if the ledger should take it and cannot now."""
        entry = await self._pay(digest)
        signature = self._identity.sign(TAG, message_of(place, digest)).hex()
        _log.info("audit log anchored: row %d %s entry %s signed %s", place, digest.hex(), entry or "-", signature)
        return {"peer_id": self._identity.peer_id, "signature": signature, "entry": entry}

    async def _pay(self, digest: bytes) -> str:
        ledger = self._ledger
        if ledger is None or ledger.balance() < ledger.genesis.min_amount:
            return ""
        item = await ledger.transfer(digest, ledger.genesis.min_amount)
        return item.id.hex()


def message_of(place: int, digest: bytes) -> bytes:
    """What is signed."""
    return place.to_bytes(8, "big") + digest


def is_signed(place: int, digest: bytes, peer_id: str, signature: str) -> bool:
    """Whether the peer anchored this hash at this place."""
    try:
        return verify(public_key_of(peer_id), TAG, message_of(place, digest), bytes.fromhex(signature))
    except (RiosError, ValueError):
        return False
