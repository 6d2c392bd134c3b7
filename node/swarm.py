"""``rios swarm``: start a private swarm, invite to it, join it, show it, say whom this node admits.

Invariants: nothing is written before everything that was given is read and right; a key or a network is replaced only
with ``--force``, and the old swarm file stays beside the new one; only ``invite`` ever prints the key.
"""

import getpass
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from config import seeds
from config.errors import ConfigError, RiosError
from config.files import write_whole
from config.load import Loaded
from config.paths import Paths
from ledger.core import genesis as genesis_file
from ledger.core.genesis import GENESIS_BYTES_MAX, Genesis
from node import control, founding, local, membership
from node.cli import Context, Output
from node.init import init
from p2p import swarmfile
from p2p.core import invite as invites
from p2p.core.invite import INVITE_CHARS_MAX, NAME_CHARS_MAX, SEEDS_MAX, Invite, Swarm
from p2p.core.reach import PUBLIC

OWN_ADDRESSES_MAX = 8
MEMBERS_MAX = 4
"""Other members in an invite."""


def new(context: Context) -> Output:
    """``rios swarm new``"""
    paths, name = context.paths(), context.args.name
    if len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise ConfigError("usage", f"--name: at most {NAME_CHARS_MAX} printable characters", "e.g. --name home")
    membership.check_free(paths, None, force=context.args.force)
    local.require_stopped(paths, "is in its old swarm")
    made = swarmfile.make(name)
    context.args.new_network, context.args.force = not paths.genesis.exists(), False
    begun = init(context)
    _write(paths, made)
    text = [
        *_without_next(begun.text),
        f"swarm     {membership.describe(made)}, private (new)",
        f"swarmkey  {paths.swarm}; keep it secret: whoever has it can join",
        "next      rios run; then here: rios swarm invite; then on the others: rios swarm join -",
    ]
    return Output({**begun.data, **_public(made, paths)}, "\n".join(text))


def invite(context: Context) -> Output:
    """``rios swarm invite``"""
    loaded = context.settings()
    paths = context.paths(loaded)
    swarm = swarmfile.load(paths.swarm)
    if swarm is None:
        hint = (
            "rios swarm new starts a private one; to a public one people need a seed address and the genesis file only"
        )
        raise ConfigError("usage", "this node is in no private swarm: there is nothing to invite to", hint)
    genesis = founding.in_force(loaded.settings, paths)
    extra = [seeds.check(seed, "--seed") for seed in context.args.seed]
    listed = membership.seeds_of(loaded.settings.p2p, paths.config_file.parent, swarm)
    own = _own_addresses(context, loaded, paths)
    known = tuple(dict.fromkeys((*extra, *own, *listed)))[:SEEDS_MAX]
    if not known:
        hint = "start it first (rios run), or name an address it has: --seed /ip4/.../tcp/4701/p2p/12D3KooW..."
        raise ConfigError("usage", "no address of this node or of a seed is known: nobody could join through it", hint)
    text = invites.dumps(Invite(replace(swarm, seeds=known, allow=()), genesis.to_json().encode() if genesis else b""))
    ways = f"{len(known)} address{'' if len(known) == 1 else 'es'}"
    _note(f"an invite to the private swarm {membership.describe(swarm)}, through {ways}")
    _note("it contains the swarm's key: hand it over in secret; it does not expire. On the new node: rios swarm join -")
    if all("/ip4/127." in seed or "/ip6/::1/" in seed for seed in known):
        _note("beware: all its addresses are of this machine only; set p2p.listen or p2p.announce")
    return Output({"invite": text, "seeds": list(known), **_public(swarm, paths)}, text)


def join(context: Context) -> Output:
    """``rios swarm join``"""
    given = _given(context.args.invite)
    swarm, genesis = given.swarm, _genesis(given)
    for seed in swarm.seeds:
        seeds.check(seed, "the invite")
    loaded = context.settings()
    paths, force = context.paths(loaded), context.args.force
    here = membership.check_free(paths, swarm, force=force)
    if genesis is not None:
        _check_network(loaded, paths, genesis, force=force)
    local.require_stopped(paths, "is in its old swarm")
    context.args.force = False
    begun = init(context)
    if genesis is not None:
        founding.join(paths, genesis, force=force)
    again = here is not None and here.key == swarm.key
    _write(paths, replace(swarm, allow=here.allow) if here is not None and again else swarm)
    text = [line for line in _without_next(begun.text) if not line.startswith("network ")]
    text += [
        f"network   {genesis.net.hex()} ({genesis.tolerance})" if genesis else "network   none: nobody pays here",
        f"swarm     {membership.describe(swarm)}, private ({'was in it already' if again else 'joined'})",
        *(f"seed      {seed}" for seed in swarm.seeds),
        "next      rios run, then rios peers",
    ]
    data = {**begun.data, "network": genesis.net.hex() if genesis else None, "seeds": list(swarm.seeds)}
    return Output({**data, **_public(swarm, paths)}, "\n".join(text))


def allow(context: Context) -> Output:
    """``rios swarm allow``"""
    if bool(context.args.peer) == context.args.everybody:
        raise ConfigError("usage", "name one peer, or give --everybody", "e.g. rios swarm allow 12D3KooW...")
    return _change(context, peer=context.args.peer, everybody=context.args.everybody)


def deny(context: Context) -> Output:
    """``rios swarm deny``"""
    return _change(context, peer=context.args.peer, deny=True)


def _change(context: Context, **args: Any) -> Output:  # noqa: ANN401 - JSON
    data = control.ask(context.paths().control, "swarm.allow", args)
    who = f"{len(data['allow'])} peers and the seeds" if data["allow"] else "everybody who has the key"
    rows = [f"admitted: {who}", *(f"  {peer}" for peer in data["allow"])]
    return Output(data, "\n".join([*rows, *(f"hung up on {peer}" for peer in data["hung_up"])]))


def show(context: Context) -> Output:
    """``rios swarm show``"""
    loaded = context.settings()
    paths = context.paths(loaded)
    swarm = swarmfile.load(paths.swarm)
    listed_peers = (*loaded.settings.p2p.allow, *(swarm.allow if swarm else ()))
    listed = membership.seeds_of(loaded.settings.p2p, paths.config_file.parent, swarm)
    admitted = f"the seeds and {len(listed_peers)} listed peers" if listed_peers else "everybody"
    key_too = (", with the key" if listed_peers else " who has the key") if swarm else ""
    rows = [
        f"swarm   {membership.describe(swarm)}, private" if swarm else "swarm   public: it needs no key",
        f"admits  {admitted}{key_too}",
        *(f"seed    {seed}" for seed in listed),
    ]
    data = {"private": swarm is not None, "name": swarm.name if swarm else "", "id": swarm.id if swarm else ""}
    return Output({**data, "seeds": list(listed), "allow": list(listed_peers)}, "\n".join(rows))


def _public(swarm: Swarm, paths: Paths) -> dict[str, str]:
    """What may be printed of a swarm."""
    return {"swarm": swarm.id, "name": swarm.name, "file": str(paths.swarm)}


def _write(paths: Paths, swarm: Swarm) -> None:
    old = paths.swarm.read_text(errors="replace") if paths.swarm.exists() else ""
    swarmfile.save(paths.swarm, swarm)
    if old and old != paths.swarm.read_text():
        write_whole(paths.swarm.with_suffix(f".replaced-{int(time.time())}"), old)


def _without_next(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("next ")]


def _given(argument: str) -> Invite:
    if argument != "-":
        _note("the invite may stand in the shell's history now; `rios swarm join -` reads it from standard input")
        return invites.loads(argument)
    if sys.stdin.isatty():
        return invites.loads(getpass.getpass("invite (not shown): "))
    return invites.loads(sys.stdin.read(INVITE_CHARS_MAX + 1))


def _genesis(given: Invite) -> Genesis | None:
    if not given.genesis:
        return None
    try:
        return genesis_file.from_json(given.genesis[: GENESIS_BYTES_MAX + 1].decode())
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(
            "usage", f"the genesis in the invite is not right: {error}", "ask for a new invite"
        ) from error


def _check_network(loaded: Loaded, paths: Paths, genesis: Genesis, *, force: bool) -> None:
    founding.check_free(paths, genesis, force=force)
    if loaded.settings.ledger.genesis_file:
        named = founding.in_force(loaded.settings, paths)
        if named is not None and named.net != genesis.net:
            message = f"ledger.genesis_file = {loaded.settings.ledger.genesis_file!r} is another network's genesis"
            raise ConfigError("usage", message, f"take it out of {paths.config_file}; the invite brings the right one")


def _own_addresses(context: Context, loaded: Loaded, paths: Paths) -> list[str]:
    """Where this node can be dialled as far as it knows, and a few members that everybody can dial."""
    try:
        network = control.ask(paths.control, "status", seconds=local.ANSWER_SECONDS_MAX)["network"]
    except RiosError as error:
        if error.code != "not_running":
            raise
        identity, _ = local.own_identity(context)
        announced = loaded.settings.p2p.announce
        if not announced:
            _note("the node is not running: its own addresses are not known, and not in the invite")
        return [f"{address.partition('/p2p/')[0]}/p2p/{identity.peer_id}" for address in announced]
    members = [
        peer
        for peer in control.ask(paths.control, "peers", seconds=local.ANSWER_SECONDS_MAX)
        if peer["reach"] == PUBLIC and not peer["self"]
    ]
    if network["reach"] not in (PUBLIC, "") and not members:
        _note(f"beware: this node is {network['reach']}: {network['why']}; name a member that can be dialled: --seed")
    known = [_seeds_among(peer["addresses"])[:1] for peer in members[:MEMBERS_MAX]]
    return [*_seeds_among(network["addresses"]), *(address for each in known for address in each)]


def _seeds_among(addresses: Sequence[str]) -> list[str]:
    """Those that are dialled directly: a relayed address is no seed."""
    usable = []
    for address in addresses:
        try:
            usable.append(seeds.check(address, "p2p.announce"))
        except ConfigError:
            continue
    return usable[:OWN_ADDRESSES_MAX]


def _note(text: str) -> None:
    print(f"rios: {text}", file=sys.stderr)  # noqa: T201 - stdout holds the data only
