"""The gateway's certificate: TLS 1.3 for its connections, and a new one without a restart.

Connections keep what they began with; :meth:`Certificate.reload` is for those that come. A new certificate that cannot
be used changes nothing, and the log says why.
"""

import logging
import ssl
from pathlib import Path

import trio

from config.errors import ConfigError, RiosError
from config.settings import GatewaySettings
from gateway.wire import Wire

_logger = logging.getLogger("rios.gateway")

_HANDSHAKE_SECONDS = 10.0


class Certificate:
    """A chain and its key, from files. Blocking: make and reload it in a thread. Raises ConfigError."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self._context = self._load()

    def reload(self) -> None:
        """Read the files again."""
        try:
            self._context = self._load()
        except RiosError as error:
            _logger.error("the old certificate stays in use: %s", error)
        else:
            _logger.info("the certificate in %s is in use for new connections", self._chain)

    async def handshake(self, stream: Wire) -> trio.SSLStream[Wire]:
        """An encrypted stream. Raises trio.BrokenResourceError if the client wants none, or takes too long."""
        secure = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
        with trio.move_on_after(_HANDSHAKE_SECONDS) as patience:
            await secure.do_handshake()
        if patience.cancelled_caught:
            raise trio.BrokenResourceError
        return secure

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["http/1.1"])
        try:
            if self._key.stat().st_mode & 0o077:
                raise ConfigError("config", f"{self._key} is open to others than its owner", f"chmod 600 {self._key}")
            context.load_cert_chain(self._chain, self._key, password=_no_password)
        except ssl.SSLError as error:
            what = f"gateway.tls_certificate {self._chain} and gateway.tls_key {self._key}"
            hint = "both in PEM; the key belongs to the first certificate and has no password"
            raise ConfigError("config", f"{what} cannot be used: {error.reason or error}", hint) from error
        except OSError as error:
            named = error.filename or f"{self._chain} or {self._key}"
            raise ConfigError(
                "config", f"cannot read {named}: {error.strerror}", "see gateway.tls_certificate"
            ) from error
        return context


def _no_password() -> str:
    """Otherwise OpenSSL would ask on the terminal."""
    return ""


def certificate_of(settings: GatewaySettings) -> Certificate | None:
    """What the settings name; None: plain HTTP. Blocking. Raises ConfigError."""
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        missing = "tls_key" if settings.tls_certificate else "tls_certificate"
        raise ConfigError(
            "config", f"gateway.{missing} is not set", "TLS needs gateway.tls_certificate and gateway.tls_key"
        )
    if not settings.tls_certificate:
        return None
    return Certificate(Path(settings.tls_certificate), Path(settings.tls_key))
