"""Error families by whose fault it is, and the one table that maps a code to exit code and HTTP status.

A code is what a machine reads (it also travels in RPC error frames); the message says what and where; the hint says
what to do. A bug is an ``assert`` and never one of these.
"""

from collections.abc import Mapping


class RiosError(Exception):
    """Root of all errors that RiOS raises on purpose.

    ``code`` stands in :data:`CODES`; ``hint`` tells the reader what to do about it (may be empty).
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        assert code in CODES, f"unknown error code {code!r}"
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(RiosError):
    """The operator's input is wrong: a setting, a flag, a file they wrote."""


class LocalError(RiosError):
    """This machine cannot do it: a port, the disk, memory, a missing file."""


class RequestError(RiosError):
    """The caller of an API asked for something that cannot be done. ``param`` names the part of the request."""

    def __init__(self, code: str, message: str, hint: str = "", *, param: str | None = None) -> None:
        super().__init__(code, message, hint)
        self.param = param


class RemoteError(RiosError):
    """Another peer failed or refused. ``peer_id`` is empty when no single peer is to blame."""

    def __init__(self, code: str, message: str, hint: str = "", *, peer_id: str = "") -> None:
        super().__init__(code, message, hint)
        self.peer_id = peer_id


class IntegrityError(RiosError):
    """Bytes are not what a hash, a signature or a rule says they must be."""


class BusyError(RiosError):
    """Try later. ``retry_after_ms`` is a hint, 0 if unknown."""

    def __init__(self, message: str, hint: str = "", *, retry_after_ms: int = 0) -> None:
        super().__init__("busy", message, hint)
        self.retry_after_ms = retry_after_ms


EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING = 0, 1, 2, 3

CODES: Mapping[str, tuple[int, int]] = {
    # code: (exit code, HTTP status)
    "config": (EXIT_USAGE, 500),
    "usage": (EXIT_USAGE, 400),
    "invalid_request": (EXIT_FAILED, 400),
    "context_length_exceeded": (EXIT_FAILED, 400),
    "unauthenticated": (EXIT_FAILED, 401),
    "payment_required": (EXIT_FAILED, 402),
    "forbidden": (EXIT_FAILED, 403),
    "not_found": (EXIT_FAILED, 404),
    "conflict": (EXIT_FAILED, 409),
    "too_large": (EXIT_FAILED, 413),
    "rate_limited": (EXIT_FAILED, 429),
    "busy": (EXIT_FAILED, 503),
    "unavailable": (EXIT_FAILED, 503),
    "no_replica": (EXIT_FAILED, 503),
    "deadline": (EXIT_FAILED, 504),
    "cancelled": (EXIT_FAILED, 499),
    "protocol": (EXIT_FAILED, 502),
    "integrity": (EXIT_FAILED, 502),
    "local": (EXIT_FAILED, 500),
    "disk_full": (EXIT_FAILED, 507),
    "port_taken": (EXIT_FAILED, 500),
    "not_running": (EXIT_NOT_RUNNING, 503),
    "internal": (EXIT_FAILED, 500),
}


def exit_code(code: str) -> int:
    """The process exit code for an error code."""
    return CODES[code][0]


def http_status(code: str) -> int:
    """The HTTP status for an error code."""
    return CODES[code][1]
