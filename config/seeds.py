"""Seed lists: bootstrap multiaddrs, one a line.

Checks their shape only (standard library); dialling and resolving belong to ``p2p``.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from config.errors import ConfigError

_SEED = re.compile(r"^/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/\d{1,5}/p2p/[1-9A-HJ-NP-Za-km-z]{20,80}$")


def check(seed: str, where: str) -> str:
    """The seed, or :class:`ConfigError` saying what a seed looks like."""
    if not _SEED.match(seed):
        raise ConfigError(
            "config",
            f"{where}: {seed!r} is not a seed address",
            "e.g. /ip4/203.0.113.7/tcp/4701/p2p/12D3KooW..., as printed by `rios id` on that node",
        )
    return seed


def read_file(path: Path) -> tuple[str, ...]:
    """The seeds in a file: one a line, ``#`` starts a comment, order kept, duplicates dropped."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", f"cannot read the seed list {path}: {error}", "check p2p.seeds_file") from error
    lines = ((number, line.split("#", 1)[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    return tuple(dict.fromkeys(check(line, f"{path} line {number}") for number, line in lines if line))


def collect(seeds: Iterable[str], file: str, beside: Path) -> tuple[str, ...]:
    """All seeds of a node: those in its config, then those in its seed-list file (relative to the config file)."""
    own = [check(seed, "p2p.seeds") for seed in seeds]
    listed = read_file(beside / Path(file).expanduser()) if file else ()
    return tuple(dict.fromkeys((*own, *listed)))
