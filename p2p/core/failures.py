"""Errors as they travel in RPC error frames: a small map and back.

Invariants:
1. A :class:`RiosError` reaches the caller with its code, message and hint; a busy one with its retry hint.
2. Whatever a peer sends becomes one of our errors: unknown codes turn into ``protocol``, long texts are cut.
"""

from collections.abc import Mapping
from typing import Any

from config.errors import CODES, BusyError, RemoteError, RiosError

TEXT_MAX = 2000


def to_header(error: RiosError) -> dict[str, Any]:
    """What an error frame says about ``error``."""
    header: dict[str, Any] = {"code": error.code, "message": error.message[:TEXT_MAX], "hint": error.hint[:TEXT_MAX]}
    if isinstance(error, BusyError):
        header["retry_after_ms"] = error.retry_after_ms
    return header


def internal() -> dict[str, Any]:
    """What an error frame says about a handler that failed by a bug; the details stay in that node's log."""
    return {"code": "internal", "message": "the handler failed; its node's log says how", "hint": ""}


def from_header(header: Mapping[str, Any], peer_id: str) -> RiosError:
    """The error to raise at the caller for an error frame of ``peer_id``."""
    code, message, hint = header.get("code"), header.get("message"), header.get("hint")
    text = message[:TEXT_MAX] if isinstance(message, str) else "the peer gave no reason"
    advice = hint[:TEXT_MAX] if isinstance(hint, str) else ""
    if code == "busy":
        retry = header.get("retry_after_ms")
        return BusyError(text, advice, retry_after_ms=retry if isinstance(retry, int) and 0 <= retry < 1 << 40 else 0)
    if not isinstance(code, str) or code not in CODES:
        return RemoteError("protocol", f"unknown error code from the peer: {text}", advice, peer_id=peer_id)
    return RemoteError(code, text, advice, peer_id=peer_id)
