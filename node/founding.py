"""The genesis file of a node: reading the one in force, founding a network, joining one.

A node without the file neither pays nor is paid. Fails as: a wrong or unreadable file, or one of another network than
the node is in already -> ConfigError.
"""

from pathlib import Path

from config.errors import ConfigError, IntegrityError
from config.files import write_whole
from config.paths import Paths
from config.settings import Settings
from ledger.core import genesis as genesis_file
from ledger.core.genesis import Genesis
from p2p.core.identity import Identity, is_valid_key, public_key_of


def in_force(settings: Settings, paths: Paths) -> Genesis | None:
    """The network's genesis, or None if this node has no file."""
    configured = settings.ledger.genesis_file
    file = (paths.config_file.parent / Path(configured).expanduser()) if configured else paths.genesis
    if not file.exists():
        if configured:
            raise ConfigError("config", f"ledger.genesis_file: there is no file {file}", "get it from the network")
        return None
    return read(file)


def read(file: Path) -> Genesis:
    """A genesis file; every complaint names it."""
    try:
        return genesis_file.from_json(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", f"cannot read the genesis file {file}: {error}", "is it the right file?") from error
    except ConfigError as error:
        raise ConfigError("config", f"{file}: {error.message}", error.hint) from error


def check_free(paths: Paths, genesis: Genesis, *, force: bool) -> None:
    """Refuse (:class:`ConfigError`) if this node is in another network, unless ``force``."""
    if paths.genesis.exists() and not force and read(paths.genesis).net != genesis.net:
        raise ConfigError(
            "usage",
            f"this node is in another network already: {paths.genesis}",
            "--force replaces it; its ledger belongs to the old network, so better use another node.data_dir",
        )


def join(paths: Paths, genesis: Genesis, *, force: bool) -> None:
    """Make ``genesis`` this node's network. A node that is in another one stays there unless ``force``."""
    check_free(paths, genesis, force=force)
    write_whole(paths.genesis, genesis.to_json())


def found(paths: Paths, identity: Identity) -> Genesis:
    """Start a network whose issuer, root and only witness is this node."""
    key = identity.public_key
    genesis = Genesis(issuer=key, root=key, witnesses=(key,))
    write_whole(paths.genesis, genesis.to_json())
    return genesis


def payout(settings: Settings) -> bytes | None:
    """The account that is paid for this node's work, None for its own.

    Raises :class:`ConfigError` for what is no account: money sent there would be lost.
    """
    text = settings.ledger.payout_account
    if not text:
        return None
    try:
        key = public_key_of(text)
    except IntegrityError as error:
        raise ConfigError("config", f"ledger.payout_account: {error.message}", "a peer id, e.g. 12D3KooW...") from error
    if not is_valid_key(key):
        raise ConfigError("config", f"ledger.payout_account: {text} is no valid key", "check the account's peer id")
    return key
