"""``rios doctor``: every check says ok, warn or fail, what it saw, why it matters and the exact fix.

Works with the daemon stopped and running; changes nothing.
"""

import os
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import trio

from config import seeds
from config.errors import EXIT_FAILED, EXIT_OK, RiosError
from config.load import Loaded
from config.paths import Paths
from config.vocabulary import GIB, MIB, PeerId
from node import control, founding, local, membership, walls
from node.cli import Context, Output
from p2p import swarmfile
from p2p.core.advert import CLOCK_SKEW_MS_MAX
from p2p.core.identity import Identity
from p2p.core.invite import Swarm

if TYPE_CHECKING:
    from dmoe.cells.sandbox import Wall

DISK_COMFORTABLE_BYTES = 2 * GIB
DISK_FREE_BYTES_MIN = 16 * MIB
DIAL_SECONDS_MAX = 3.0
ANSWER_SECONDS_MAX = 5.0
CLOCK_COMFORTABLE_MS = 2000

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome. ``why`` and ``fix`` are empty when all is well."""

    level: Level
    what: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at."""

    loaded: Loaded
    paths: Paths
    passphrase: str
    running: bool


def diagnose(context: Context) -> Output:
    """Run all checks; exit code 1 if one of them failed."""
    findings: list[Finding] = []
    try:
        loaded = context.settings()
    except RiosError as error:
        findings.append(Finding("fail", error.message, "without a right config nothing starts", error.hint))
    else:
        paths = context.paths(loaded)
        origin = str(context.config_file) if context.config_file.exists() else "defaults (no config file)"
        findings.append(Finding("ok", f"config: {origin}"))
        patient = Patient(loaded, paths, context.passphrase(), _running(paths))
        for check in CHECKS:
            findings += _guarded(check, patient)
    text = "\n".join(_line(finding) for finding in findings)
    failed = any(finding.level == "fail" for finding in findings)
    return Output([asdict(finding) for finding in findings], text, EXIT_FAILED if failed else EXIT_OK)


def _line(finding: Finding) -> str:
    line = f"{finding.level:4}  {finding.what}"
    if finding.why:
        line += f"\n      why it matters: {finding.why}"
    if finding.fix:
        line += f"\n      fix: {finding.fix}"
    return line


def _guarded(check: Callable[[Patient], Iterator[Finding]], patient: Patient) -> Iterator[Finding]:
    try:
        yield from check(patient)
    except RiosError as error:
        yield Finding("fail", error.message, (check.__doc__ or "").strip(), error.hint)
    except OSError as error:
        yield Finding("fail", str(error), (check.__doc__ or "").strip(), "check the owner and mode of that file")


def _running(paths: Paths) -> bool:
    try:
        control.ask(paths.control, "health", seconds=ANSWER_SECONDS_MAX)
    except RiosError as error:
        return error.code != "not_running"
    return True


def _versions(_: Patient) -> Iterator[Finding]:
    """versions that do not fit fail in strange ways"""
    names = ("libp2p", "onnxruntime", "numpy", "trio")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    yield Finding("ok", f"Python {sys.version.split()[0]}, {versions}")


def _daemon(patient: Patient) -> Iterator[Finding]:
    """a node that does not run earns and serves nothing"""
    if not patient.running:
        yield Finding("warn", "the daemon is not running", "nothing is served", "rios run")
        return
    health = control.ask(patient.paths.control, "health", seconds=ANSWER_SECONDS_MAX)
    if health["ok"]:
        yield Finding("ok", "the daemon is running and well")
    for reason in health["reasons"]:
        yield Finding("warn", reason, "part of this node's work cannot be done", "rios status, and the daemon's log")
    for reason in health["idle_reasons"]:
        yield Finding("warn", f"no work comes in: {reason}", "an idle node earns nothing", "rios peers; rios model ls")


def _reach(patient: Patient) -> Iterator[Finding]:
    """a node that nobody can dial serves through relays, or nobody"""
    if not patient.running:
        return
    network = control.ask(patient.paths.control, "status", seconds=ANSWER_SECONDS_MAX)["network"]
    what = f"reach: {network['reach']}: {network['why']}"
    if network["reach"] in ("public", "local"):
        yield Finding("ok", what)
    elif network["reach"] == "relayed":
        yield Finding("warn", what, "calls take a detour, with the relays' limits", network["fix"])
    elif network["reach"] == "private":
        yield Finding("warn", what, "only peers that this node dials itself can call it", network["fix"])
    else:
        yield Finding("warn", what, "whether others can reach this node is not known", network["fix"])


def _key(patient: Patient) -> Iterator[Finding]:
    """the key is the node's identity and its account"""
    from p2p import keyfile  # noqa: PLC0415 - only this check needs it

    if not patient.paths.key.exists():
        yield Finding("fail", f"there is no key {patient.paths.key}", "the key is the node's identity", "rios init")
        return
    identity = keyfile.load(patient.paths.key, passphrase=patient.passphrase)
    yield Finding("ok", f"key of {identity.peer_id}")


def _disk(patient: Patient) -> Iterator[Finding]:
    """a full disk stops the ledger and the fetching of shards"""
    folder = patient.paths.data if patient.paths.data.exists() else Path.home()
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free at {folder}"
    if free >= DISK_COMFORTABLE_BYTES:
        yield Finding("ok", text)
    else:
        level: Level = "fail" if free < DISK_FREE_BYTES_MIN else "warn"
        yield Finding(level, text, "shards and the ledger need room", "free some space or move node.data_dir")


def _ports(patient: Patient) -> Iterator[Finding]:
    """a taken port keeps the node from starting"""
    if patient.running:
        return
    settings = patient.loaded.settings
    wanted = [seeds.host_port(address, "p2p.listen") for address in settings.p2p.listen]
    if settings.gateway.enabled:
        wanted.append((settings.gateway.host, settings.gateway.port))
    for host, port in wanted:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                yield Finding(
                    "fail",
                    f"cannot listen on {host}:{port}: {error.strerror}",
                    "the node cannot start",
                    "stop what uses it (ss -ltnp) or change p2p.listen / gateway.port",
                )
            else:
                yield Finding("ok", f"port {host}:{port or 'any'} is free")


def _seeds(patient: Patient) -> Iterator[Finding]:
    """without a living seed a new node finds nobody"""
    swarm = swarmfile.load(patient.paths.swarm)
    listed = membership.seeds_of(patient.loaded.settings.p2p, patient.paths.config_file.parent, swarm)
    yield Finding("ok", f"private swarm {membership.describe(swarm)}" if swarm else "public swarm: no swarm key")
    if not listed:
        yield Finding("ok", "no seeds configured: this node starts a swarm or waits to be found")
        return
    alive = 0
    addresses = []
    for seed in listed:
        if not seeds.is_name(seed):
            addresses.append(seed)
            continue
        try:
            named = _named(patient, seed)
            yield Finding("ok", f"seed {seed} stands for {len(named)} addresses")
            addresses += named
        except RiosError as error:
            yield Finding("warn", error.message, "one way in less", error.hint)
    for seed in addresses:
        where = ":".join(map(str, seeds.host_port(seed, "p2p.seeds")))
        try:
            yield Finding("ok", f"seed {where} {_greeting(patient, seed, swarm)}")
            alive += 1
        except (OSError, RiosError) as error:
            text = error.message if isinstance(error, RiosError) else str(error)
            yield Finding("warn", f"seed {where}: {text}", "one way in less", "ask its operator, or remove it")
    if alive:
        return
    fix = "check the network and p2p.seeds"
    if patient.running and control.ask(patient.paths.control, "status", seconds=ANSWER_SECONDS_MAX)["network"]["links"]:
        yield Finding(
            "warn", "no seed can be reached, but other peers are linked", "after a restart it may be alone", fix
        )
    else:
        yield Finding("fail", "no seed can be reached", "the node stays alone", fix)


def _named(patient: Patient, seed: str) -> list[str]:
    """The seeds that a dnsaddr stands for."""
    from p2p.names import Names  # noqa: PLC0415 - loads the DNS client

    return trio.run(Names(patient.loaded.settings.p2p.dns_servers).expand, seed)


def _greeting(patient: Patient, seed: str, swarm: Swarm | None) -> str:
    """That a seed proves to be who it should be: by the daemon's link, else by a handshake of our own."""
    from p2p import keyfile, probe  # noqa: PLC0415 - loads libp2p

    address, _, peer_id = seed.partition("/p2p/")
    key = patient.paths.key
    identity = keyfile.load(key, passphrase=patient.passphrase) if key.exists() else None
    if identity is not None and identity.peer_id == peer_id:
        return "is this node itself"
    if patient.running:
        peers = control.ask(patient.paths.control, "peers", seconds=ANSWER_SECONDS_MAX)
        if any(peer["peer_id"] == peer_id and peer["linked"] for peer in peers):
            return f"is linked as {peer_id}"
    with socket.create_connection(seeds.host_port(seed, "p2p.seeds"), DIAL_SECONDS_MAX):
        pass  # a closed port is said in the system's words
    me = identity or Identity.from_seed(os.urandom(32))
    spent = trio.run(probe.shake_hands, me, PeerId(peer_id), [address], swarm.key if swarm else None)
    return f"proves to be {peer_id} ({spent * 1000:.0f} ms)"


def _clock(patient: Patient) -> Iterator[Finding]:
    """adverts carry times: with a wrong clock a node's own are refused, and it refuses the others'"""
    if not patient.running:
        return
    skew = control.ask(patient.paths.control, "clock", seconds=ANSWER_SECONDS_MAX)
    if skew is None:
        return
    off_s, peers = abs(skew["offset_ms"]) / 1000, skew["peers"]
    text = (
        f"this clock is {off_s:.1f} s {'behind' if skew['offset_ms'] > 0 else 'ahead of'} the median of {peers} peers"
    )
    if abs(skew["offset_ms"]) <= CLOCK_COMFORTABLE_MS + skew["error_ms"]:
        yield Finding("ok", f"clock agrees with {peers} peer{'' if peers == 1 else 's'} ({skew['offset_ms']} ms off)")
    else:
        level: Level = "fail" if off_s * 1000 > CLOCK_SKEW_MS_MAX else "warn"
        yield Finding(level, text, (_clock.__doc__ or ""), "set the clock: timedatectl set-ntp true")


def _schema(patient: Patient) -> Iterator[Finding]:
    """a gateway refuses accounts of a newer RiOS, and upgrades those of an older one"""
    settings = patient.loaded.settings.gateway
    if not settings.database and not patient.paths.accounts.exists():
        return
    from gateway.db import migrate, session  # noqa: PLC0415 - loads SQLAlchemy

    database = session.open_database(settings.database, patient.paths.data)
    try:
        with database.read() as connection:
            schema = migrate.current_revision(connection)
    finally:
        database.close()
    what = f"accounts database {database.place}: schema {schema or 'not made yet'}"
    if schema == migrate.HEAD:
        yield Finding("ok", what)
    elif schema > migrate.HEAD:
        why, fix = f"this RiOS knows up to {migrate.HEAD}: its gateway will not start", "install the newer RiOS again"
        yield Finding("fail", what, why, fix)
    else:
        backup = "" if database.is_postgresql or not schema else " (a copy is kept beside it)"
        yield Finding("ok", f"{what}; the gateway brings it to {migrate.HEAD} when it starts{backup}")


def _runtime(patient: Patient) -> Iterator[Finding]:
    """experts run in ONNX Runtime"""
    from dmoe import runtime  # noqa: PLC0415 - loads ONNX Runtime

    options = runtime.RuntimeOptions(device=patient.loaded.settings.dmoe.device)  # type: ignore[arg-type]
    providers = ", ".join(options.providers())
    runtime.smoke(options)
    yield Finding("ok", f"ONNX Runtime computes ({providers})")


def _sandbox(patient: Patient) -> Iterator[Finding]:
    """what strangers made must reach neither files nor network nor keys"""
    from dmoe.cells import gvisor, sandbox  # noqa: PLC0415

    dmoe = patient.loaded.settings.dmoe
    if dmoe.sandbox == "off":
        why = "a fault in ONNX Runtime would open this node's keys to a stranger's shard"
        yield Finding("warn", "dmoe.sandbox is off: every shard runs in the node's process", why, 'sandbox = "auto"')
    lacks = sandbox.missing() or ("cells run on the CPU, dmoe.device is cuda" if dmoe.device == "cuda" else "")
    if lacks and dmoe.sandbox != "off":
        allowed = dmoe.allow_unsandboxed and dmoe.sandbox == "auto"
        why = "other publishers' shards run in the node's process" if allowed else "shards that need a cell are refused"
        yield Finding("warn", f"no cells: {lacks}", why, "run RiOS on Linux 5.13 or later, and let it use seccomp")
    if dmoe.gvisor and not gvisor.binary():
        why = "shards that need a cell are refused"
        yield Finding("warn", f"dmoe.gvisor is on, and there is no {gvisor.BINARY} in PATH", why, _GVISOR_FIX)
    if sandbox.missing():
        return
    asked = {
        kind: trial
        for kind, trial in walls.trials().items()
        if not (kind.startswith("cells") and (lacks or dmoe.sandbox == "off"))
    }
    with ThreadPoolExecutor(len(asked)) as threads:  # each mostly waits for an interpreter to start
        for kind, found in zip(asked, threads.map(lambda trial: trial(), asked.values()), strict=True):
            yield from _walls_of(kind, found)


def _walls_of(kind: str, found: "Sequence[Wall]") -> Iterator[Finding]:
    """One finding for the walls that are up, one for each that is missing."""
    up = ", ".join(wall.name for wall in found if wall.in_force)
    yield Finding("ok", f"{kind}: {up}")
    for wall in found:
        if not wall.in_force:
            level: Level = "ok" if wall.name in _EXTRA_WALLS else "warn"
            why = "one wall less around what strangers made"
            fix = _WALL_FIXES.get(wall.name, "")
            text = f"{kind}: no {wall.name}: {wall.why}"
            yield Finding(level, text, why if level == "warn" else "", fix if level == "warn" else "")


_EXTRA_WALLS = ("user", "cgroup", "empty root")
"""Good to have: what they bound is bounded by others too."""
_WALL_FIXES = {
    "landlock": "a kernel from 5.13 on, with landlock in the lsm= boot parameter",
    "namespaces": "allow user namespaces: sysctl user.max_user_namespaces, or the container's settings",
}
_GVISOR_FIX = "install gVisor (gvisor.dev/docs/user_guide/install), or set dmoe.gvisor = false"


def _models(patient: Patient) -> Iterator[Finding]:
    """altered shards give wrong answers and are refused when loaded"""
    from dmoe.store import ModelStore  # noqa: PLC0415 - only this check needs it

    if not patient.paths.models.exists():
        yield Finding("ok", "no models here yet")
        return
    store = ModelStore(patient.paths.models)
    for error in store.damaged.values():
        yield Finding("fail", error.message, "this model is not served and not answered with", error.hint)
    for manifest in store.manifests().values():
        try:
            held = local.verified_shards(store, manifest)
        except RiosError as error:
            yield Finding("fail", error.message, (_models.__doc__ or ""), error.hint)
        else:
            yield Finding("ok", f"{manifest.name}: {held} of {len(manifest.shards)} shards here, hashes right")


def _databases(patient: Patient) -> Iterator[Finding]:
    """a damaged database loses money"""
    for path, source in ((patient.paths.ledger, "a backup, or peers"), (patient.paths.accounts, "a backup")):
        if not path.exists():
            continue
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
                verdict = database.execute("PRAGMA quick_check").fetchone()[0]
        except sqlite3.Error as error:
            verdict = str(error)
        if verdict == "ok":
            yield Finding("ok", f"{path.name}: database intact")
        else:
            yield Finding("fail", f"{path}: {verdict}", "rows may be lost", f"move it away; restore it from {source}")


def _ledger(patient: Patient) -> Iterator[Finding]:
    """without its network's genesis and a right ledger a node neither pays nor is paid"""
    from ledger.verify import verify_file  # noqa: PLC0415 - only this check needs it

    genesis = founding.in_force(patient.loaded.settings, patient.paths)
    if genesis is None:
        fix = "rios init --keep-config --genesis FILE joins a network, --new-network starts one"
        yield Finding("warn", f"no genesis file {patient.paths.genesis}", "this node neither pays nor is paid", fix)
    elif not patient.paths.ledger.exists():
        yield Finding("ok", f"network {genesis.net.hex()}, no ledger yet")
    else:
        report = verify_file(patient.paths.ledger, genesis)
        if report.verified and report.sum_ok:
            yield Finding("ok", f"network {genesis.net.hex()}, {report.entries} ledger entries verified")
        else:
            why, fix = "balances here are not what the network says", "move the file away; peers send the ledger again"
            yield Finding("fail", f"{patient.paths.ledger}: {'; '.join(report.problems)}", why, fix)


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _versions,
    _key,
    _disk,
    _ports,
    _seeds,
    _clock,
    _runtime,
    _sandbox,
    _models,
    _databases,
    _schema,
    _ledger,
    _daemon,
    _reach,
)
