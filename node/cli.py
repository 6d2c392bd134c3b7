"""The ``rios`` command: output, signals and exit codes. Which commands there are stands in ``commands``, what they do
in ``local`` (works on files), ``online`` (asks the running daemon) and others.

Data goes to stdout, everything else to stderr. ``--json`` prints one JSON value. Exit codes: 0 ok, 1 failed, 2 usage
or configuration, 3 not running; 130 after Ctrl-C. No traceback is shown unless ``RIOS_TRACEBACK`` is set.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from config import paths as places
from config.errors import EXIT_FAILED, EXIT_OK, ConfigError, LocalError, RiosError, exit_code
from config.load import Loaded, load
from config.paths import Paths

VERSION = "0.3.0"
EXIT_INTERRUPTED = 130
"""What shells expect after Ctrl-C."""


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
        """The settings in force. A config file that was named must exist, but for a command that makes it."""
        named = bool(getattr(self.args, "config", None) or os.environ.get("RIOS_CONFIG"))
        required = named and not getattr(self.args, "makes_config", False)
        return load(self.config_file, os.environ, self.flags, required=required)

    @property
    def flags(self) -> Sequence[str]:
        """Every ``--set``."""
        return getattr(self.args, "set", None) or ()

    @property
    def as_json(self) -> bool:
        """Whether one JSON value is wanted on stdout."""
        return getattr(self.args, "json", False)

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


def parse_credits(text: str) -> int:
    """``12.5`` credits as microcredits. Raises :class:`ConfigError` for anything else."""
    whole, _, part = text.partition(".")
    if (
        not whole.isdecimal()
        or not text.isascii()
        or (part and not part.isdecimal())
        or len(part) > 6
        or len(whole) > 12
    ):
        raise ConfigError("usage", f"{text!r} is not an amount of credits", "digits with at most 6 decimals, e.g. 12.5")
    return int(whole) * 1_000_000 + int(part.ljust(6, "0") or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal still gets the rest of the answer
    from node.commands import build_parser

    try:
        args = build_parser().parse_args(argv)
        with _all_ends_are_ctrl_c():
            result = args.run(Context(args))
        if not isinstance(result, Output):
            return int(result)
        print(json.dumps(result.data, separators=(",", ":"), default=str) if as_json else result.text, flush=True)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:  # noqa: BLE001 - the operator gets a message
        return _complain(error, as_json=as_json)
    return result.code


@contextlib.contextmanager
def _all_ends_are_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal unwind like Ctrl-C, so that whatever ends a command, it tidies up first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # started in the background: SIGINT is ignored
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(raised: BaseException, *, as_json: bool) -> int:
    """Say what went wrong: on stderr for people, with ``as_json`` as one value on stdout too."""
    cause = root_cause(raised)
    if os.environ.get("RIOS_TRACEBACK"):
        traceback.print_exception(raised)
    if isinstance(cause, BrokenPipeError):
        _drop_stdout()
        return EXIT_FAILED
    error = _explained(cause)
    if as_json:
        with contextlib.suppress(OSError):
            value = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
            print(json.dumps(value), flush=True)
    print(f"rios: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    if isinstance(cause, OSError):
        _drop_stdout()
    return EXIT_INTERRUPTED if isinstance(cause, KeyboardInterrupt) else exit_code(error.code)


def root_cause(error: BaseException) -> BaseException:
    """What to blame inside nested exception groups: Ctrl-C, else an error with a code, else the first one."""
    causes = list(_leaves(error))
    for kind in (KeyboardInterrupt, RiosError, OSError):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    return causes[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _explained(cause: BaseException) -> RiosError:
    if isinstance(cause, RiosError):
        return cause
    if isinstance(cause, KeyboardInterrupt):
        return RiosError("cancelled", "interrupted")
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f": {cause.filename}" if cause.filename else ""
        return LocalError("disk_full", f"the disk is full{where}", "free some space and try again")
    if isinstance(cause, OSError):
        where = f": {cause.filename}" if cause.filename else ""
        return LocalError("local", f"{cause.strerror or cause}{where}")
    if isinstance(cause, MemoryError):
        return LocalError("local", "there is not enough memory for this", "free some memory and try again")
    text = f"a fault in rios itself: {type(cause).__name__}: {cause}"
    return RiosError("internal", text, "please report it with what RIOS_TRACEBACK=1 shows in addition")


def _drop_stdout() -> None:
    """Nothing can be written there any more: keep the interpreter from trying again, loudly, when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
