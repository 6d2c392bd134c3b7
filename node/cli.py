"""The ``rios`` command: parsing, output and exit codes. What commands do stands in ``local`` (works on files) and
``online`` (asks the running daemon).

Data goes to stdout, everything else to stderr. ``--json`` prints one JSON value. Exit codes: 0 ok, 1 failed, 2 usage
or configuration, 3 not running.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import paths as places
from config.errors import EXIT_OK, ConfigError, LocalError, RiosError, exit_code
from config.load import Loaded, load
from config.paths import Paths

VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class Context:
    """What every command gets: the parsed arguments and, on demand, settings and paths."""

    args: argparse.Namespace

    @property
    def config_file(self) -> Path:
        """The config file, which may not exist yet."""
        given = getattr(self.args, "config", None)
        return Path(given).absolute() if given else places.config_file(os.environ, Path.home())

    def settings(self) -> Loaded:
        """The settings in force."""
        if getattr(self.args, "config", None) and not self.config_file.exists():
            raise ConfigError("config", f"there is no config file {self.config_file}", "make one: rios init")
        return load(self.config_file, os.environ, getattr(self.args, "set", None) or ())

    def paths(self, loaded: Loaded | None = None) -> Paths:
        """The node's paths."""
        settings = (loaded or self.settings()).settings
        beside = self.config_file.parent
        return Paths(self.config_file, places.data_dir(settings.node.data_dir, os.environ, Path.home(), beside=beside))

    def passphrase(self) -> str:
        """The key's passphrase from the environment; empty if there is none."""
        if file := os.environ.get("RIOS_PASSPHRASE_FILE"):
            try:
                return Path(file).read_text().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError("config", f"cannot read RIOS_PASSPHRASE_FILE {file}: {error}") from error
        return os.environ.get("RIOS_PASSPHRASE", "")


@dataclass(frozen=True, slots=True)
class Output:
    """A command's result: JSON for machines, text for people."""

    data: Any
    text: str
    code: int = EXIT_OK


Run = Callable[[Context], Output | int]


def _local(name: str) -> Run:
    def run(context: Context) -> Output | int:
        from node import local

        command: Run = getattr(local, name)
        return command(context)

    return run


def _online(name: str) -> Run:
    def run(context: Context) -> Output | int:
        from node import online

        command: Run = getattr(online, name)
        return command(context)

    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # noqa: ANN401 - never returns
        raise ConfigError("usage", message, f"see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON value")
    common.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="the node's config file")
    common.add_argument(
        "--set", metavar="SECTION.KEY=VALUE", action="append", default=argparse.SUPPRESS, help="override one setting"
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
    _model_commands(command, top)
    _ledger_commands(command, top)
    _gateway_commands(command, top)
    return parser


Command = Callable[..., argparse.ArgumentParser]


def _node_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    init = command(top, "init", _local("init"), "Write a config file with comments, make the node's key, measure it.")
    init.add_argument("--seed", action="append", default=[], metavar="MULTIADDR", help="a node to join through")
    init.add_argument("--genesis", metavar="FILE", help="the genesis file of the network to join")
    init.add_argument("--new-network", action="store_true", help="start a network of one's own (this node is issuer)")
    init.add_argument("--gateway", action="store_true", help="switch the HTTP gateway on")
    init.add_argument("--keep-config", action="store_true", help="use the config file that is there")
    init.add_argument("--force", action="store_true", help="replace the config file (never the key)")
    run = command(top, "run", _local("run"), "Run the node until Ctrl-C or SIGTERM.")
    run.add_argument("--until-stdin-closes", action="store_true", help="also end when standard input closes")
    demo = command(top, "demo", _local("demo"), "A swarm of three processes answers a question and survives a death.")
    demo.add_argument("--once", action="store_true", help="end after the checks, also on a terminal")
    command(top, "status", _online("status"), "Node, Network, Work, Ledger at a glance.")
    command(top, "peers", _online("peers"), "The peers this node knows: hardware, shards, prices, links.")
    chat = command(top, "chat", _online("chat"), "Ask a model; without a question: a conversation.")
    chat.add_argument("question", nargs="*", help="the question (else read from the terminal)")
    chat.add_argument("--model", default="", help="model name or id (default: the only one)")
    chat.add_argument("--local", action="store_true", help="no daemon, no network: load the model into this process")
    chat.add_argument("--route", choices=("experts", "local", "fused"), help="where the experts run")
    chat.add_argument("--max-tokens", type=int, default=None)
    chat.add_argument("--min-tokens", type=int, default=0)
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--top-k", type=int, default=0)
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--seed", type=int, default=None)
    chat.add_argument("--stop", action="append", default=[])
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


def _model_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    model = command(top, "model", None, "Import, list, deploy and remove models.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    importing = command(model, "import", _local("model_import"), "Cut a GGUF file into signed shards.")
    importing.add_argument("source", help="a .gguf file, or `bundled` for SmolLM2-135M-Instruct")
    importing.add_argument("--name", default="", help="the model's name (default: from the file)")
    importing.add_argument("--format", choices=("source", "fp32", "int8"), default="source", help="weight format")
    command(model, "ls", _online("model_ls"), "Models known here, their shards and replicas.")
    verify = command(model, "verify", _local("model_verify"), "Check every hash and the stored golden logits.")
    verify.add_argument("model")
    remove = command(model, "rm", _local("model_rm"), "Delete a model's files here.")
    remove.add_argument("model")
    deploy = command(model, "deploy", _online("model_deploy"), "Ask the swarm to hold a model.")
    deploy.add_argument("model")
    deploy.add_argument("--replicas", type=int, default=None)
    undeploy = command(model, "undeploy", _online("model_undeploy"), "Withdraw a deployment made here.")
    undeploy.add_argument("model")


def _ledger_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    ledger = command(top, "ledger", None, "Balances, statements, verification, payments.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    balance = command(ledger, "balance", _online("ledger_balance"), "An account's balance (default: this node's).")
    balance.add_argument("account", nargs="?", default="", help="a peer id")
    statement = command(ledger, "statement", _online("ledger_statement"), "What an account received and spent.")
    statement.add_argument("account", nargs="?", default="", help="a peer id")
    command(ledger, "verify", _online("ledger_verify"), "Re-check every signature and every invariant from genesis.")
    command(ledger, "channels", _online("ledger_channels"), "Payment channels: locked, promised, settled.")
    command(ledger, "settle", _online("ledger_settle"), "Put the newest vouchers on the ledger now.")
    for name, text in (
        ("grant", "Create credits for an account (the network's issuer only)."),
        ("transfer", "Send credits to an account."),
    ):
        made = command(ledger, name, _online(f"ledger_{name}"), text)
        made.add_argument("to", help="a peer id")
        made.add_argument("credits", help="credits, e.g. 12.5")


def _gateway_commands(command: Command, top: Any) -> None:  # noqa: ANN401
    gateway = command(top, "gateway", None, "Users and API keys of the HTTP gateway.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    user = command(gateway, "user", None, "Users of the gateway.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    command(user, "create", _local("user_create"), "Make a user.").add_argument("name")
    command(user, "ls", _local("user_ls"), "List users and balances.")
    credit = command(user, "credit", _local("user_credit"), "Add credits to a user's balance.")
    credit.add_argument("name")
    credit.add_argument("credits", help="credits, e.g. 12.5")
    key = command(gateway, "key", None, "API keys.").add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )
    create = command(key, "create", _local("key_create"), "Make an API key; the secret is shown once.")
    create.add_argument("--user", required=True, help="made if it does not exist")
    create.add_argument("--name", default="", help="a label")
    command(key, "ls", _local("key_ls"), "List keys.")
    command(key, "revoke", _local("key_revoke"), "Revoke a key.").add_argument("key_id")


def parse_credits(text: str) -> int:
    """``12.5`` credits as microcredits. Raises :class:`ConfigError` for anything else."""
    whole, _, part = text.partition(".")
    if not whole.isdigit() or (part and not part.isdigit()) or len(part) > 6 or len(whole) > 12:
        raise ConfigError("usage", f"{text!r} is not an amount of credits", "digits with at most 6 decimals, e.g. 12.5")
    return int(whole) * 1_000_000 + int(part.ljust(6, "0") or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        args = build_parser().parse_args(argv)
        result = args.run(Context(args))
    except RiosError as error:
        return _complain(error, as_json=as_json)
    except BrokenPipeError:
        return 1
    except OSError as error:
        return _complain(_from_os(error), as_json=as_json)
    except KeyboardInterrupt:
        return 130
    if not isinstance(result, Output):
        return int(result)
    print(json.dumps(result.data, separators=(",", ":"), default=str) if as_json else result.text)
    return result.code


def _from_os(error: OSError) -> RiosError:
    import errno

    if error.errno == errno.ENOSPC:
        return LocalError("disk_full", f"the disk is full: {error.filename or error}", "free some space and try again")
    return LocalError("local", f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))


def _complain(error: RiosError, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}))
    print(f"rios: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    return exit_code(error.code)
