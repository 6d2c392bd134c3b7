"""Commands that work on files of this machine, whether a daemon runs or not."""

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from config import seeds
from config.errors import ConfigError, LocalError, RequestError, RiosError
from config.load import Loaded, render_reference, to_toml
from config.paths import Paths
from config.settings import DmoeSettings, sections
from config.vocabulary import format_credits
from node import progress, threads
from node.cli import VERSION, Context, Output, parse_credits
from p2p.core.identity import Identity

if TYPE_CHECKING:
    from dmoe.core.manifest import Manifest
    from dmoe.store import ModelStore

ANSWER_SECONDS_MAX = 5.0
"""How long a running daemon may take for a word."""

# --- node


def run(context: Context) -> Output | int:
    """``rios run``"""
    loaded = context.settings()
    settings, paths = loaded.settings, context.paths(loaded)
    threads.bound(settings.dmoe.threads)
    gc.disable()  # an eighth of the start: everything that is loaded stays
    from node import daemon, log  # noqa: PLC0415 - loads everything

    gc.freeze()
    gc.enable()
    if not paths.key.exists():
        raise ConfigError("config", f"there is no key {paths.key}", "make one: rios init")
    log.setup(settings.node.log_level, settings.node.log_format, node=settings.node.name)
    code = daemon.run(settings, paths, context.passphrase(), until_stdin_closes=context.args.until_stdin_closes)
    return Output({"stopped": True}, "", code) if context.as_json else code


def demo(context: Context) -> int:
    """``rios demo``"""
    from node import demo as steps  # noqa: PLC0415

    return steps.run(once=context.args.once, as_json=context.as_json)


def doctor(context: Context) -> Output:
    """``rios doctor``"""
    from node import doctor as checks  # noqa: PLC0415

    return checks.diagnose(context)


def version(_context: Context) -> Output:
    """``rios version``"""
    data = {"rios": VERSION, "python": sys.version.split()[0]}
    data |= {name: metadata.version(name) for name in ("libp2p", "onnxruntime", "numpy", "trio")}
    return Output(data, "\n".join(f"{name} {text}" for name, text in data.items()))


def paths_show(context: Context) -> Output:
    """``rios paths``"""
    paths = context.paths()
    names = ("config_file", "data", "key", "genesis", "swarm", "ledger", "accounts", "models", "network", "control")
    data = {name: str(getattr(paths, name)) for name in names}
    return Output(data, "\n".join(f"{name:12} {path}" for name, path in data.items()))


# --- config


def config_check(context: Context) -> Output:
    """``rios config check``"""
    from node import founding  # noqa: PLC0415

    loaded = context.settings()
    settings = loaded.settings
    listed = seeds.collect(settings.p2p.seeds, settings.p2p.seeds_file, context.config_file.parent)
    for name in ("listen", "announce"):
        for address in getattr(settings.p2p, name):
            seeds.host_port(address, f"p2p.{name}")
    founding.payout(settings)
    where = str(context.config_file) if context.config_file.exists() else "no config file; defaults"
    notes = _notes(settings.dmoe)
    data = {"ok": True, "config": where, "seeds": list(listed), "notes": notes}
    return Output(data, "\n".join([f"ok: {where}, {len(listed)} seeds", *(f"note: {note}" for note in notes)]))


def _notes(dmoe: DmoeSettings) -> list[str]:
    """What works but should be written otherwise. Raises ConfigError for pins and privacy that cannot be kept."""
    from dmoe.core.privacy import privacy_of  # noqa: PLC0415
    from dmoe.planning import wishes_of  # noqa: PLC0415

    privacy_of(dmoe.trusted_peers, dmoe.trusted_peers_only, dmoe.local_layers)
    wishes_of(dmoe.route, dmoe.stage_hosts, dmoe.plan_pins, dmoe.plan_price_weight)
    notes = []
    if dmoe.fused:
        told = "has no effect beside it" if dmoe.route != "auto" else 'still works; write route = "fused"'
        notes.append(f"dmoe.fused is deprecated and {told}")
    return notes


def config_show(context: Context) -> Output:
    """``rios config show``"""
    loaded = context.settings()
    data: dict[str, Any] = {}
    lines: list[str] = []
    for name, kind in sections().items():
        lines += ([""] if lines else []) + [f"[{name}]"]
        for spec in fields(kind):
            value = getattr(getattr(loaded.settings, name), spec.name)
            origin = loaded.origin[f"{name}.{spec.name}"]
            note = f"  # {origin}" if context.args.origin else ""
            lines.append(f"{spec.name} = {to_toml(value)}{note}")
            data.setdefault(name, {})[spec.name] = {"value": value, "origin": origin} if context.args.origin else value
    return Output(data, "\n".join(lines))


def config_reference(_context: Context) -> Output:
    """``rios config reference``"""
    data = {name: {spec.name: spec.metadata["help"] for spec in fields(kind)} for name, kind in sections().items()}
    return Output(data, render_reference().rstrip("\n"))


# --- identity


def own_identity(context: Context) -> tuple[Identity, Paths]:
    """This node's key, and its paths."""
    from p2p import keyfile  # noqa: PLC0415

    paths = context.paths()
    if not paths.key.exists():
        raise LocalError("not_found", f"there is no key {paths.key}", "make one: rios init")
    return keyfile.load(paths.key, passphrase=context.passphrase()), paths


def id_show(context: Context) -> Output:
    """``rios id``"""
    from node import control  # noqa: PLC0415

    identity, paths = own_identity(context)
    try:
        addresses = control.ask(paths.control, "status", seconds=ANSWER_SECONDS_MAX)["network"]["addresses"]
    except RiosError:
        addresses = []
    data = {"peer_id": identity.peer_id, "addresses": addresses}
    shown = addresses or ["(start the node to see its addresses)"]
    return Output(data, "\n".join([identity.peer_id, *(f"  {address}" for address in shown)]))


def id_export(context: Context) -> Output:
    """``rios id export``"""
    from p2p import keyfile  # noqa: PLC0415

    identity, _ = own_identity(context)
    target = Path(context.args.file)
    keyfile.save(target, identity, passphrase=context.passphrase())
    return Output({"file": str(target)}, f"wrote {target}; whoever has it can act and spend as this node")


def id_import(context: Context) -> Output:
    """``rios id import``"""
    from p2p import keyfile  # noqa: PLC0415

    paths = context.paths()
    identity = keyfile.load(Path(context.args.file), passphrase=context.passphrase())
    if paths.key.exists() and not context.args.force:
        raise ConfigError("usage", f"there is a key already: {paths.key}", "--force keeps it as a backup beside it")
    require_stopped(paths, "works with its old key")
    paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = paths.key.with_suffix(f".new-{os.getpid()}")
    keyfile.save(new, identity, passphrase=context.passphrase())
    if paths.key.exists():
        paths.key.rename(paths.key.with_suffix(f".replaced-{int(time.time())}"))
    new.rename(paths.key)
    return Output({"peer_id": identity.peer_id}, f"this node is now {identity.peer_id}")


# --- models


def require_stopped(paths: Paths, doing: str) -> None:
    """Raise LocalError ``conflict`` if a daemon runs here and ``doing`` says why that matters."""
    from node import control  # noqa: PLC0415

    try:
        control.ask(paths.control, "health", seconds=ANSWER_SECONDS_MAX)
    except RiosError as error:
        if error.code == "not_running":
            return
    raise LocalError("conflict", f"the daemon is running and {doing}", "stop it first")


def _store(context: Context) -> "ModelStore":
    from dmoe.store import ModelStore  # noqa: PLC0415

    return ModelStore(context.paths().models)


def model_ls(context: Context) -> Output:
    """``rios model ls`` with the daemon stopped."""
    store = _store(context)
    rows: list[dict[str, Any]] = []
    for model_id, manifest in store.manifests().items():
        held = sum(store.has_shard(model_id, shard.id) for shard in manifest.shards)
        rows.append({"id": model_id, "name": manifest.name, "shards": len(manifest.shards), "shards_held": held})
    lines = [f"{row['name']}  {row['id'][:16]}  {row['shards_held']}/{row['shards']} shards here" for row in rows]
    note = "(the daemon is not running: replicas elsewhere are unknown)"
    return Output(rows, "\n".join([*lines, note]) if lines else "no models; try: rios model import bundled")


def verified_shards(store: "ModelStore", manifest: "Manifest") -> int:
    """How many of a model's shards are here. Raises IntegrityError for a file that is truncated or altered."""
    held = 0
    for shard in manifest.shards:
        if any(store.path(manifest.model_id, file).exists() for file in shard.files):
            store.verify_shard(manifest.model_id, shard.id)
            held += 1
    if store.path(manifest.model_id, manifest.tokenizer).exists():
        store.verify_file(manifest.model_id, manifest.tokenizer)
    return held


def model_verify(context: Context) -> Output:
    """``rios model verify``"""
    count = context.settings().settings.dmoe.threads
    threads.bound(count)
    from dmoe import golden  # noqa: PLC0415
    from dmoe.runtime import RuntimeOptions  # noqa: PLC0415

    store = _store(context)
    manifest = store.find(context.args.model)
    held = verified_shards(store, manifest)
    data: dict[str, Any] = {"name": manifest.name, "shards": len(manifest.shards), "shards_verified": held}
    text = f"{manifest.name}: {held} of {len(manifest.shards)} shards here, all hashes right"
    if held == len(manifest.shards):
        options = RuntimeOptions(device="cpu", threads=count)
        total = sum(shard.size_bytes for shard in manifest.parts)
        with progress.bar("bytes") as show:
            ran = progress.counted(show, total, "golden logits")
            data["golden_difference"] = trio.run(golden.verify, manifest, store, options, ran)
        text += f"\n  golden logits: largest difference {data['golden_difference']:.2e}"
        text += f" (tolerance {manifest.golden.tolerance:.2e})"
    return Output(data, text)


def model_rm(context: Context) -> Output:
    """``rios model rm``"""
    store = _store(context)
    manifest = store.find(context.args.model)
    require_stopped(context.paths(), "may serve this model")
    store.remove(manifest.model_id)
    return Output({"model_id": manifest.model_id}, f"removed {manifest.name}")


# --- gateway


@contextmanager
def open_books(context: Context) -> Iterator[Any]:
    """The gateway's accounts, whether a gateway runs or not."""
    from gateway.accounts import open_accounts  # noqa: PLC0415

    loaded: Loaded = context.settings()
    paths = context.paths(loaded)
    paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open_accounts(loaded.settings.gateway, paths.data) as accounts:
        yield accounts


def user_ls(context: Context) -> Output:
    """``rios gateway user ls``"""
    with open_books(context) as accounts:
        rows = [{**asdict(user), "balance": accounts.balance(user.id).available} for user in accounts.list_users()]
    return Output(rows, "\n".join(f"{row['name']:24} {format_credits(row['balance']):>16} credits" for row in rows))


def user_credit(context: Context) -> Output:
    """``rios gateway user credit``"""
    amount = parse_credits(context.args.credits)
    from gateway.audit import OPERATOR  # noqa: PLC0415 - loads SQLAlchemy, as all of these
    from gateway.billing.payment import top_up  # noqa: PLC0415

    with open_books(context) as accounts:
        top_up(accounts.database, OPERATOR, accounts.find_user(context.args.name).id, amount, "")
        balance = accounts.balance(context.args.name).available
    return Output({"balance": balance}, f"{context.args.name} now has {format_credits(balance)} credits")


def key_create(context: Context) -> Output:
    """``rios gateway key create``"""
    from gateway import managing  # noqa: PLC0415
    from gateway.audit import OPERATOR  # noqa: PLC0415

    with open_books(context) as accounts:
        try:
            accounts.find_user(context.args.user)
        except RequestError:
            managing.add_user(accounts, OPERATOR, context.args.user, None, "developer")
        made = managing.issue_key(accounts, OPERATOR, context.args.user, context.args.name)
    data = {"key_id": made.key.id, "user": context.args.user, "secret": made.secret}
    return Output(data, f"{made.secret}\n  shown only now; revoke it with: rios gateway key revoke {made.key.id}")


def key_ls(context: Context) -> Output:
    """``rios gateway key ls``"""
    with open_books(context) as accounts:
        names = {user.id: user.name for user in accounts.list_users()}
        rows = [{**asdict(key), "user": names[key.user_id]} for key in accounts.list_keys()]
    lines = [
        f"{row['id']}  {row['user']:24} {'revoked' if row['revoked_at_ms'] else 'works'}  {row['name']}" for row in rows
    ]
    return Output(rows, "\n".join(lines) or "no keys; make one: rios gateway key create --user NAME")


def key_revoke(context: Context) -> Output:
    """``rios gateway key revoke``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.managing import end_key  # noqa: PLC0415

    with open_books(context) as accounts:
        end_key(accounts, OPERATOR, context.args.key_id, None)
    return Output({"key_id": context.args.key_id}, f"revoked {context.args.key_id}; gateways follow within seconds")
