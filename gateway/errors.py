"""Errors as HTTP clients of OpenAI's API expect them.

Owns the one translation from :class:`config.errors.RiosError` to status, body and headers, and what of an error clients
are not told. The body is always ``{"error": {"message", "type", "param", "code"}}``; a status that says "later" comes
with ``retry-after`` (seconds) and ``retry-after-ms``.
"""

import logging
from collections.abc import Mapping
from math import ceil

import msgspec

from config.errors import BusyError, LocalError, RequestError, RiosError, http_status

_logger = logging.getLogger("rios.gateway")

_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}

# Clients look for OpenAI's names; every other code travels under RiOS's own name.
_CODES: Mapping[str, str] = {
    "unauthenticated": "invalid_api_key",
    "payment_required": "insufficient_quota",
    "rate_limited": "rate_limit_exceeded",
}

_RETRY_AFTER_MS = 1000


class ApiError(RequestError):
    """A caller's mistake that the API can point at. ``param`` names the request field."""

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        *,
        param: str | None = None,
        public_code: str | None = None,
        retry_after_ms: int = 0,
        status: int | None = None,
    ) -> None:
        super().__init__(code, message, hint, param=param)
        self.public_code = public_code
        self.retry_after_ms = retry_after_ms
        self.status = status


class StoreError(LocalError):
    """The accounts database fails. The message is for who runs it: it says where it is, and what its driver says.
    Clients are told ``public``."""

    def __init__(self, code: str, message: str, hint: str, *, public: str) -> None:
        super().__init__(code, message, hint)
        self.public = public


def told(error: RiosError) -> str:
    """What clients are told of an error. What they are not is in the log."""
    if not isinstance(error, StoreError):
        return str(error)
    _logger.warning("%s", error)
    return error.public


def error_status(error: RiosError) -> int:
    """The HTTP status of an error. A code without a status of its own kind is the server's fault."""
    if isinstance(error, ApiError) and error.status is not None:
        return error.status
    status = http_status(error.code)
    return 503 if status == 499 else status


def error_object(error: RiosError) -> dict[str, object]:
    """The body of an error answer, also used as an event in a stream that fails midway."""
    code: str | None = _CODES.get(error.code, error.code)
    param = None
    if isinstance(error, RequestError):
        param = error.param
    if isinstance(error, ApiError):
        code = error.public_code or code
    elif error.code == "not_found":
        code, param = "model_not_found", "model"
    elif error.code == "context_length_exceeded":
        param = param or "messages"
    kind = _TYPES.get(error_status(error), "server_error")
    return {"error": {"message": told(error), "type": kind, "param": param, "code": code}}


def error_body(error: RiosError) -> bytes:
    """:func:`error_object` as JSON."""
    return msgspec.json.encode(error_object(error))


def error_headers(error: RiosError) -> dict[str, str]:
    """``retry-after`` headers where trying later makes sense, and the challenge of a 401."""
    status = error_status(error)
    if status == 401:
        return {"www-authenticate": "Bearer"}
    wait_ms = error.retry_after_ms if isinstance(error, ApiError | BusyError) else 0
    if status not in (429, 503) and not wait_ms:
        return {}
    wait_ms = wait_ms or _RETRY_AFTER_MS
    return {"retry-after": str(max(1, ceil(wait_ms / 1000))), "retry-after-ms": str(wait_ms)}


def internal_error(request_id: str) -> RiosError:
    """What a caller learns of a bug: the id under which the operator finds it in the log."""
    return RiosError("internal", "the server failed at this request", f"its log names request {request_id}")


def unsupported(param: str, why: str = "") -> ApiError:
    """A parameter of OpenAI's API that this server does not have, at a value that asks for it."""
    message = f"{param} is not supported by this model server" + (f": {why}" if why else "")
    return ApiError("invalid_request", message, param=param, public_code="unsupported_parameter")


def invalid(param: str | None, message: str) -> ApiError:
    """A value that is wrong."""
    return ApiError("invalid_request", message, param=param, public_code="invalid_value")
