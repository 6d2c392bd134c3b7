"""Multiaddrs in the configuration, and seed lists: bootstrap multiaddrs, one a line.

Checks their shape only (standard library); dialling and resolving belong to ``p2p``.
"""

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from config.errors import ConfigError

_DNSADDR = re.compile(r"/dnsaddr/[A-Za-z0-9_.-]{1,200}(/p2p/[1-9A-HJ-NP-Za-km-z]{20,80})?", re.ASCII)
_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/\s]+)/tcp/(\d{1,5})(/p2p/[1-9A-HJ-NP-Za-km-z]{20,80})?", re.ASCII)


def _parsed(address: str) -> tuple[str, int, str] | None:
    """Host, port and ``/p2p/...`` of a TCP multiaddr, or None for anything else."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        return None
    try:
        if match[1] in ("ip4", "ip6"):
            (IPv4Address if match[1] == "ip4" else IPv6Address)(match[2])
    except ValueError:
        return None
    return match[2], int(match[3]), match[4] or ""


def host_port(address: str, where: str) -> tuple[str, int]:
    """Host and port of a TCP multiaddr, or :class:`ConfigError`."""
    parsed = _parsed(address)
    if parsed is None:
        raise ConfigError("config", f"{where}: {address!r} is not a TCP multiaddr", "e.g. /ip4/0.0.0.0/tcp/4701")
    return parsed[:2]


def check(seed: str, where: str) -> str:
    """The seed, or :class:`ConfigError` saying what a seed looks like."""
    parsed = _parsed(seed)
    if not is_name(seed) and (parsed is None or not parsed[2]):
        raise ConfigError(
            "config",
            f"{where}: {seed!r} is not a seed address",
            "e.g. /ip4/203.0.113.7/tcp/4701/p2p/12D3KooW..., as printed by `rios id` there, or /dnsaddr/example.org",
        )
    return seed


def is_name(seed: str) -> bool:
    """Whether it stands for other addresses, which DNS knows."""
    return _DNSADDR.fullmatch(seed) is not None


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
