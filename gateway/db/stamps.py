"""What marks a row: its id and its time."""

import secrets
import time


def now_ms() -> int:
    """Unix time in milliseconds by this host's clock. What gateways compare with each other's is told by
    :meth:`Database.now_ms`."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """A unique id that sorts by time: 32 hex digits."""
    return f"{now_ms():012x}{secrets.token_hex(10)}"
