"""The command line of ``rios``: every command, its flags and its help. Nothing that a command needs is loaded here."""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from config.errors import ConfigError
from node import flags
from node.cli import Context, Output

_FORMATS = ("source", "fp32", "fp16", "int8", "int4")

Run = Callable[[Context], Output | int]


def _command(module: str, name: str) -> Run:
    """A command that loads its module only when it runs."""

    def run(context: Context) -> Output | int:
        command: Run = getattr(import_module(f"node.{module}"), name)
        return command(context)

    return run


def _local(name: str) -> Run:
    return _command("local", name)


def _online(name: str) -> Run:
    return _command("online", name)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - argparse's own
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> Any:  # noqa: ANN401 - never returns
        raise ConfigError("usage", message, f"see {self.prog} --help")


def _collecting() -> type[argparse.Action]:
    """Like ``append``, also across subcommands, where argparse would forget what stood before the subcommand."""
    collected: list[str] = []

    class Collect(argparse.Action):
        def __call__(self, _parser: Any, namespace: argparse.Namespace, value: Any, _option: Any = None) -> None:  # noqa: ANN401
            collected.append(value)
            setattr(namespace, self.dest, collected)

    return Collect


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON value")
    common.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="the node's config file")
    common.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action=_collecting(),
        default=argparse.SUPPRESS,
        help="override one setting",
    )
    parser = _Parser(
        prog="rios",
        parents=[common],
        description="Run large Mixture-of-Experts models together, on hardware you own.",
        epilog="Start here: rios demo. Then: rios init, rios run, rios status.",
    )
    top = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(group: Any, name: str, run: Run | None, help: str) -> argparse.ArgumentParser:  # noqa: ANN401
        made: argparse.ArgumentParser = group.add_parser(name, parents=[common], help=help, description=help)
        if run is not None:
            made.set_defaults(run=run)
        return made

    _node_commands(command, top)
    _swarm_commands(command, top)
    _model_commands(command, top)
    _deployment_commands(command, top)
    _bench_commands(command, top)
    _audit_commands(command, top)
    _ledger_commands(command, top)
    _gateway_commands(command, top)
    _billing_commands(command, top)
    return parser


Command = Callable[..., argparse.ArgumentParser]


def _node_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    init = command(
        top,
        "init",
        _command("init", "init"),
        "Write a config file with comments, make the node's key, find the hardware.",
    )
    init.add_argument("--seed", action="append", default=[], metavar="MULTIADDR", help="a node to join through")
    network = init.add_mutually_exclusive_group()
    network.add_argument("--genesis", metavar="FILE", help="the genesis file of the network to join")
    network.add_argument(
        "--new-network", action="store_true", help="start a network of one's own (this node is issuer and witness)"
    )
    init.add_argument("--gateway", action="store_true", help="switch the HTTP gateway on")
    file = init.add_mutually_exclusive_group()
    file.add_argument("--keep-config", action="store_true", help="use the config file that is there")
    file.add_argument("--force", action="store_true", help="replace config and genesis file (never the key)")
    run = command(top, "run", _local("run"), "Run the node until Ctrl-C or SIGTERM.")
    run.add_argument("--until-stdin-closes", action="store_true", help="also end when standard input closes")
    demo = command(top, "demo", _local("demo"), "A swarm of three processes answers a question and survives a death.")
    demo.add_argument("--once", action="store_true", help="end after the checks, also on a terminal")
    command(top, "status", _online("status"), "Node, Network, Work, Ledger at a glance.")
    peers = command(
        top, "peers", _online("peers"), "The peers this node knows: hardware, shards, prices, links, scores."
    )
    doors = peers.add_subparsers(metavar="COMMAND", required=False, parser_class=_Parser)
    command(doors, "bans", _online("peers_bans"), "Who is shut out, for how long and why; limits that were hit.")
    ban = command(doors, "ban", _online("peers_ban"), "Shut a peer, an address or a subnet out.")
    ban.add_argument("subject", metavar="PEER|ADDRESS", help="a peer id, an IP address, or a /24 (IPv6: /64, /56)")
    ban.add_argument("--minutes", type=int, default=1440, help="for how long (default: a day)")
    unban = command(doors, "unban", _online("peers_unban"), "Let one in again, with a clean score.")
    unban.add_argument("subject", metavar="PEER|ADDRESS", help="as shown by rios peers bans")
    pause = command(
        top, "pause", _online("pause"), "Take no new work; keep shards, links and place. Lasts over restarts."
    )
    pause.add_argument("--wait", action="store_true", help="return once the calls in flight are answered")
    command(top, "resume", _online("resume"), "Take work again.")
    chat = command(top, "chat", _command("asking", "chat"), "Ask a model; without a question: a conversation.")
    flags.chat(chat)
    embed = command(top, "embed", _command("asking", "embed"), "Turn texts into vectors (mean-pooled, of length 1).")
    flags.embed(embed)
    plan = command(
        top, "plan", _command("plan", "show"), "Which route an answer would take, who would serve it, and why."
    )
    plan.add_argument("model", help="its name or id")
    plan.add_argument("--prompt-tokens", type=int, default=256, help="length of the prompt (default: 256)")
    plan.add_argument("--answer-tokens", type=int, default=128, help="length of the answer (default: 128)")
    plan.add_argument("--batch", type=int, default=1, help="answers at the same time (default: 1)")
    flags.privacy(plan)
    config = command(top, "config", None, "Check, show and explain the settings.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    command(config, "check", _local("config_check"), "Read the config file and say whether it is right.")
    show = command(config, "show", _local("config_show"), "Print the settings in force.")
    show.add_argument("--origin", action="store_true", help="say where each value came from")
    command(config, "reference", _local("config_reference"), "Print the reference page of all settings (Markdown).")
    identity = command(top, "id", _local("id_show"), "Show, export or import the node's identity.")
    actions = identity.add_subparsers(metavar="COMMAND", required=False, parser_class=_Parser)
    command(actions, "show", _local("id_show"), "Print the peer id and the addresses.")
    export = command(actions, "export", _local("id_export"), "Write a copy of the key file (keep it secret).")
    export.add_argument("file")
    importing = command(actions, "import", _local("id_import"), "Use a key that was exported before.")
    importing.add_argument("file")
    importing.add_argument("--force", action="store_true", help="replace the key that is there")
    command(top, "doctor", _local("doctor"), "Check everything; say what is wrong, why it matters and the fix.")
    command(top, "health", _online("health"), "Exit 0 if the node works, 1 if it is impaired, 3 if not running.")
    command(top, "paths", _local("paths_show"), "Where this node keeps its files.")
    command(top, "version", _local("version"), "Versions of RiOS and of what it stands on.")


def _swarm_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    swarm = command(top, "swarm", None, "Private swarms: only who has the key can connect.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    as_init: dict[str, Any] = {"seed": [], "genesis": None, "new_network": False, "gateway": False, "keep_config": True}
    as_init["makes_config"] = True
    new = command(swarm, "new", _command("swarm", "new"), "Start a private swarm: make its key, and what init makes.")
    new.add_argument("--name", default="", help="a name for people")
    invite = command(swarm, "invite", _command("swarm", "invite"), "Print an invite for a new member. Keep it secret.")
    invite.add_argument(
        "--seed", action="append", default=[], metavar="MULTIADDR", help="one more node to join through"
    )
    join = command(swarm, "join", _command("swarm", "join"), "Join the private swarm of an invite.")
    join.add_argument("invite", help="the invite, or - to read it from standard input (out of the shell's history)")
    for made in (new, join):
        made.add_argument("--force", action="store_true", help="leave the swarm (and network) this node is in")
        made.set_defaults(**as_init)
    for verb, text in (
        ("allow", "Admit a peer; a list that did not exist begins with the members known now."),
        ("deny", "Do not admit a peer any more (the others need to do the same)."),
    ):
        made = command(swarm, verb, _command("swarm", verb), text)
        made.add_argument("peer", nargs="?" if verb == "allow" else None, default="", help="a peer id")
        if verb == "allow":
            made.add_argument("--everybody", action="store_true", help="do without a list: who has the key may come")
    command(swarm, "show", _command("swarm", "show"), "The swarm this node is in; never its key.")


def _model_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    model = command(top, "model", None, "Import, list, deploy and remove models.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    importing = command(
        model, "import", _command("importing", "model_import"), "Cut a model into signed shards and keep it here."
    )
    importing.add_argument(
        "source",
        help="a .gguf file, a folder of safetensors, hf:owner/name[@revision][:file.gguf] from a hub, "
        "or `bundled` for SmolLM2-135M-Instruct",
    )
    importing.add_argument("--name", default="", help="the model's name (default: from the source)")
    importing.add_argument("--licence", default="", help="the model's licence (default: what the source says)")
    for name, text in (
        ("experts-per-shard", "experts of a layer in one shard: these are the sum groups (default: a quarter)"),
        ("layers-per-shard", "layers in one file (default: up to 10)"),
        ("layers-per-stage", "layers of a stage, whole files of them (default: as in a file)"),
    ):
        importing.add_argument(f"--{name}", type=_count, default=0, metavar="N", help=text)
    importing.add_argument("--format", choices=_FORMATS, default="source", help="weight format")
    listing = command(model, "ls", _online("model_ls"), "Models known here, their shards and replicas.")
    listing.add_argument("model", nargs="?", default="", help="each shard of this one: replicas, health, queue")
    verify = command(model, "verify", _local("model_verify"), "Check every hash and the stored golden logits.")
    verify.add_argument("model")
    remove = command(model, "rm", _local("model_rm"), "Delete a model's files here.")
    remove.add_argument("model")
    fetch = command(model, "fetch", _online("model_fetch"), "Bring here what answering with a model needs.")
    fetch.add_argument("model", help="its name or id")
    fetch.add_argument("--whole", action="store_true", help="every shard, to answer without the swarm")
    _deployment_commands(command, model)


def _deployment_commands(command: Command, group: Any) -> None:  # noqa: ANN401
    """What changes how the swarm holds a model: below ``rios model`` and, being frequent, at the top as well."""
    deploy = command(group, "deploy", _online("model_deploy"), "Ask the swarm to hold a model.")
    deploy.add_argument("model")
    deploy.add_argument("--replicas", type=int, default=None)
    deploy.add_argument(
        "--mode",
        choices=("experts", "stages", "both"),
        default="experts",
        help="what nodes hold: groups of experts (a LAN), whole layers with their caches (a WAN), or both",
    )
    scale = command(group, "scale", _online("model_scale"), "Change the replicas of a deployment made here.")
    scale.add_argument("model")
    scale.add_argument("replicas", type=int)
    for made in (deploy, scale):
        made.add_argument("--wait", action="store_true", help="return once the swarm holds every replica")
    undeploy = command(group, "undeploy", _online("model_undeploy"), "Withdraw a deployment made here.")
    undeploy.add_argument("model")


def _bench_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    bench = command(top, "bench", None, "Measure this machine.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    generate = command(bench, "generate", _command("bench", "generate"), "Tokens per second, alone and in batches.")
    generate.add_argument("--batch", default="1,4,16", help="sequences at the same time (default: 1,4,16)")
    generate.add_argument("--route", default="", help="only this route (default: every one that is possible here)")
    expert = command(bench, "expert", _command("bench", "expert"), "Rows per second that experts compute here.")
    expert.add_argument("--rows", default="1,4,16,64,256", help="rows per call (default: 1,4,16,64,256)")
    for made in (generate, expert):
        made.add_argument("model", nargs="?", default="", help="its name or id (default: the only one, or a random)")
        made.add_argument(
            "--seconds", type=float, default=20.0, help="measure for so long, besides loading (default: 20)"
        )
        made.add_argument("--threads", type=int, default=None, help="compute threads (default: dmoe.threads)")
        made.add_argument(
            "--format", choices=("fp32", "fp16", "int8", "int4"), default="int8", help="weights of a random model"
        )
    importing = command(
        bench, "import", _command("bench_import", "run"), "Speed and memory of an import; nothing of it is kept."
    )
    importing.add_argument(
        "source", nargs="?", default="", help="as of rios model import (default: a random checkpoint)"
    )
    importing.add_argument("--mb", type=int, default=500, metavar="N", help="size of the random checkpoint")
    importing.add_argument("--format", choices=_FORMATS, default="source", help="weight format")


def _audit_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    audit = command(top, "audit", None, "Who answered wrongly, and the proof of it.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    command(audit, "ls", _command("audit", "ls"), "Audits by peer, and the evidence kept here.")
    verify = command(
        audit, "verify", _command("audit", "verify"), "Judge evidence with the shard on this disk: guilty, or not."
    )
    verify.add_argument("file", help="evidence, as rios audit ls names it")
    forgive = command(audit, "forgive", _command("audit", "forgive"), "Ask a peer again that answered wrongly.")
    forgive.add_argument("peer", help="a peer id")


def _ledger_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    ledger = command(top, "ledger", None, "Balances, statements, verification, payments.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )

    def sub(name: str, text: str, *, csv: bool = False, account: str = "") -> argparse.ArgumentParser:
        made = command(ledger, name, _command("ledger_commands", name), text)
        if csv:
            made.add_argument("--csv", action="store_true", help="comma-separated values")
        if account:
            made.add_argument("account", nargs="?", default="", help=account)
        return made

    sub("balance", "An account's balance (default: this node's).", account="a peer id")
    sub("statement", "What an account received and spent.", csv=True, account="a peer id (default: this node)")
    entry = sub("entry", "One entry or claim and its certificate, checked.")
    entry.add_argument(
        "entry", metavar="ID|ACCOUNT:SEQ", help="an id (of a channel: its highest claim), or peer id:number"
    )
    sub("verify", "Re-check every signature, certificate and invariant from genesis; print the digest.")
    sub("audit", "What is held against a peer here, with the proofs.").add_argument("peer", help="a peer id")
    sub("channels", "Payment channels: locked, promised, settled.", csv=True, account="a peer id (default: this node)")
    sub("settle", "Put the newest vouchers on the ledger now.")
    for name, text in (
        ("grant", "Create credits for an account (the network's issuer only)."),
        ("transfer", "Send credits to an account."),
    ):
        made = sub(name, text)
        made.add_argument("to", help="a peer id")
        made.add_argument("credits", help="credits, e.g. 12.5")
    repair = command(
        ledger, "repair", _command("repair", "repair"), "A new ledger file from the old one and peers; what was done."
    )
    repair.add_argument("--seconds", type=float, default=600.0, help="for peers (default: 600)")
    repair.add_argument("--force", action="store_true", help="also if nothing is wrong with the file")
    checkpoint = sub("checkpoint", "The newest checkpoint here: a state that a quorum of witnesses signed.")
    doing = checkpoint.add_mutually_exclusive_group()
    for flag, text in (
        ("new", "let the witnesses sign the state of now"),
        ("fetch", "take the newest one of the peers, checked against the own state"),
        ("prune", "drop what lies below it (not on an archive)"),
    ):
        doing.add_argument(f"--{flag}", dest="do", action="store_const", const=flag, default="", help=text)
    export = sub("export", "Every entry and claim with its certificate: JSON lines, or CSV.", csv=True)
    export.add_argument("--account", default="", metavar="PEER", help="only what this account signed")
    export.add_argument("--output", default="", metavar="FILE", help="a new file (default: standard output)")
    _committee_commands(command, ledger)


def _committee_commands(command: Command, ledger: Any) -> None:  # noqa: ANN401
    group = command(ledger, "genesis", None, "Networks.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    new = command(
        group, "new", _command("committee_commands", "genesis_new"), "Make a network's genesis file from public keys."
    )
    new.add_argument("file", metavar="FILE", help="a new file")
    new.add_argument("--issuer", required=True, metavar="PEER", help="who grants credits")
    new.add_argument("--root", required=True, metavar="PEER", help="who may propose other witnesses or another issuer")
    new.add_argument("--witness", required=True, action="append", metavar="PEER", help="3f + 1 times")
    new.add_argument("--f", type=int, default=0, help="how many witnesses may fail or lie (0: one witness, trusted)")
    for flag, text in (
        ("max-supply", "credits that can ever be granted"),
        ("min-amount", "least credits of a transfer"),
        ("min-lock", "least credits of a channel"),
        ("min-claim-step", "least credits by which a settlement rises"),
    ):
        new.add_argument(f"--{flag}", default="", metavar="CREDITS", help=text)
    new.add_argument("--force", action="store_true", help="replace the file")
    command(
        ledger, "epoch-key", _command("committee_commands", "epoch_key"), "Make a witness key for the next committee."
    )
    committee = command(
        ledger,
        "committee",
        _command("committee_commands", "committee"),
        "Who decides, epoch by epoch; with keys, change it (the root only).",
    )
    committee.add_argument("keys", nargs="*", metavar="KEY", help="the next committee's epoch keys")
    committee.add_argument("--f", type=int, default=0, help="how many of them may fail or lie")
    issuer = command(
        ledger, "issuer", _command("committee_commands", "issuer"), "Let another account grant (the root only)."
    )
    issuer.add_argument("issuer", metavar="PEER", help="the new issuer")
    for made in (committee, issuer):
        made.add_argument("--submit", action="store_true", help="sign it: enough operators have listed its entry")
    allow = command(
        ledger, "allow", _command("committee_commands", "allow"), "Let this node's witness vote for a change."
    )
    command(
        ledger,
        "trust-backup",
        _command("committee_commands", "trust_backup"),
        "Let the only witness of a network vote again after its ledger came from a backup (f = 0 only).",
    )
    allow.add_argument("entry", metavar="ID", help="the entry's id, as rios ledger committee or issuer prints it")


def _gateway_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    gateway = command(top, "gateway", None, "Users and API keys of the HTTP gateway.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    user = command(gateway, "user", None, "Users of the gateway.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    _user_commands(command, user)
    command(user, "ls", _local("user_ls"), "List users and balances.")
    credit = command(user, "credit", _local("user_credit"), "Add credits to a user's balance.")
    credit.add_argument("name")
    credit.add_argument("credits", help="credits, e.g. 12.5")
    command(
        gateway,
        "revoke-tokens",
        _command("user_commands", "revoke_tokens"),
        "Revoke the keys that access tokens are signed with; refreshing gives new ones.",
    )
    audit = command(gateway, "audit", None, "Who changed what.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    command(
        audit,
        "verify",
        _command("gateway_audit", "verify"),
        "Check the audit log's chain of hashes, and what of it was anchored on the ledger.",
    )
    key = command(gateway, "key", None, "API keys.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    create = command(key, "create", _local("key_create"), "Make an API key; the secret is shown once.")
    create.add_argument("--user", required=True, help="made if it does not exist")
    create.add_argument("--name", default="", help="a label")
    command(key, "ls", _local("key_ls"), "List keys.")
    command(key, "revoke", _local("key_revoke"), "Revoke a key.").add_argument("key_id")


def _billing_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    billing = command(top, "billing", None, "The money of the HTTP gateway.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    tie = "See that balances, charges, budgets, invoices and what the swarm was paid tie; exit 1 if not."
    found = command(billing, "reconcile", _command("billing_commands", "reconcile"), tie)
    found.add_argument(
        "--by", choices=("request", "user", "key", "model", "day"), help="charge, cost and margin of each"
    )
    found.add_argument("--days", type=_count, default=31, metavar="N", help="of --by: how far back (default: 31)")
    found.add_argument("--request", default="", metavar="ID", help="the channels and calls behind one usage row's cost")
    command(billing, "close", _command("billing_commands", "close"), "Make the invoices of months that are over.")


def _user_commands(command: Command, user: Any) -> None:  # noqa: ANN401
    """Users who sign in: see ``node/user_commands.py``."""
    roles = ("admin", "developer", "worker", "viewer")

    def named(name: str, help: str) -> argparse.ArgumentParser:
        made = command(user, name, _command("user_commands", name.replace("-", "_")), help)
        made.add_argument("name", help="the user's name or id" if name != "create" else None)
        return made

    create = named("create", "Make a user; with an e-mail address and a password, one who can sign in.")
    create.add_argument("--role", choices=roles, default="developer", help="what they may do (default: developer)")
    create.add_argument("--email", default=None, help="what they sign in with; asks for a password on a terminal")
    password = named("password", "Set a user's password; their sessions end.")
    for made in (create, password):
        made.add_argument("--password-file", default="", metavar="FILE", help="read it from there; - is standard input")
    named("role", "Change what a user may do.").add_argument("role", choices=roles)
    named("totp-reset", "Switch off the second factor of a user who lost it.")
    named("invite", "Print a one-time invite, with which a user sets a password.")
    named("sign-out", "End all sessions of a user.")
    named("disable", "Shut a user out: keys and sessions end.")
    named("enable", "Let a user in again.")


def _count(text: str) -> int:
    """A number of one or more."""
    if not text.isdecimal() or not text.isascii() or not 1 <= len(text) <= 6 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of one or more")
    return int(text)
