"""From the settings to a gateway's identity: key file, signing keys, rules, the other provider."""

import logging
from pathlib import Path

import trio

from config.errors import ConfigError
from config.settings import GatewaySettings
from gateway.accounts import Accounts
from gateway.guard import Guard
from gateway.identity.browser import Home
from gateway.identity.identity import Identity, Rules
from gateway.identity.oidc import Oidc
from gateway.identity.provider import Provider, check_provider
from gateway.identity.tokens import Tokens, has_others
from gateway.identity.vault import KEY_FILE, Vault, open_vault, read_private
from gateway.metrics import Metrics
from gateway.till import Till

_logger = logging.getLogger("rios.gateway")

CALLBACK_PATH = "/v1/auth/oidc/callback"
_OTHER_KEY_FILE = (
    "another gateway of this accounts database has another key file: second factors set up there do not work here; "
    f"let all of them have the same {KEY_FILE} (gateway.identity_key_file)"
)
_ISSUER = "rios"
"""Of access tokens, where the settings do not name the gateway's address."""


async def open_identity(
    settings: GatewaySettings, data_dir: Path, accounts: Accounts, till: Till, metrics: Metrics, *, url: str
) -> tuple[Guard, Identity]:
    """``url``: where this gateway listens. Raises ConfigError for settings that cannot be right, LocalError."""
    home = Home(_public_url(settings.identity_public_url))
    vault = await trio.to_thread.run_sync(open_vault, settings.identity_key_file, data_dir)
    if await trio.to_thread.run_sync(has_others, accounts.database, vault):
        _logger.warning(_OTHER_KEY_FILE)
    signer = Tokens(
        accounts.database,
        vault,
        till.in_thread,
        issuer=home.url or _ISSUER,
        seconds=60 * settings.identity_access_minutes,
    )
    guard = Guard(accounts, till, signer, home, require_key=settings.require_key)
    rules = Rules(
        sign_up=settings.identity_sign_up,
        oidc_sign_up=settings.oidc_sign_up,
        session_seconds=3600 * settings.identity_session_hours,
        proxies=frozenset(settings.trusted_proxies),
    )
    oidc = await trio.to_thread.run_sync(_oidc, settings, home.url or url, vault)
    return guard, Identity(
        accounts, till, guard, metrics, home=home, vault=vault, signer=signer, rules=rules, oidc=oidc
    )


def _oidc(settings: GatewaySettings, url: str, vault: Vault) -> Oidc | None:
    if not settings.oidc_issuer:
        return None
    secret = ""
    if settings.oidc_credentials_file:
        secret = read_private(Path(settings.oidc_credentials_file), "gateway.oidc_credentials_file").decode().strip()
    provider = Provider(
        issuer=settings.oidc_issuer,
        client_id=settings.oidc_client_id,
        secret=secret,
        redirect_uri=f"{url}{CALLBACK_PATH}",
        scopes=settings.oidc_scopes,
    )
    return Oidc(check_provider(provider), vault)


def _public_url(text: str) -> str:
    url = text.rstrip("/")
    scheme, _, authority = url.partition("://")
    if url and (scheme not in ("http", "https") or not authority or set(authority) & set("/?#@ ")):
        hint = "write scheme and host, e.g. https://gateway.example"
        raise ConfigError("config", f"gateway.identity_public_url {text!r:.80} is not an address", hint)
    return url
