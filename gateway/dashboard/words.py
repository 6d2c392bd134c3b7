"""Numbers, times and ids as people read them. Pure; the templates' filters."""

from datetime import UTC, datetime

from config.vocabulary import format_credits

NOTHING = "\N{EN DASH}"
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def credits(microcredits: int) -> str:
    """Credits with as many decimals as say something: ``1,204.50``, ``0.000312``."""
    whole = abs(microcredits) / 1_000_000
    if microcredits == 0 or whole >= 1:
        return f"{microcredits / 1_000_000:,.2f}"
    text = f"{microcredits / 1_000_000:.6f}".rstrip("0")
    return text


def exact_credits(microcredits: int) -> str:
    """To the microcredit."""
    return format_credits(microcredits)


def size(count: int) -> str:
    """Bytes: ``7.9 GB``."""
    value = float(count)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes everything")


def count(number: float) -> str:
    """``1,234`` up to a hundred thousand, ``1.2M`` above."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e5, "K")):
        if abs(number) >= limit:
            unit = {"K": 1e3}.get(suffix, limit)
            return f"{number / unit:.1f}{suffix}"
    return f"{number:,.0f}"


def ago(then_ms: int | None, now_ms: int) -> str:
    """``just now``, ``12 s ago``, ``3 h ago``, ``12 Nov 2026``."""
    if not then_ms:
        return NOTHING
    seconds = (now_ms - then_ms) // 1000
    if seconds < 5:
        return "just now"
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h"), (86400 * 14, 86400, "d")):
        if seconds < limit:
            return f"{seconds // unit} {name} ago"
    return day(then_ms)


def day(then_ms: int) -> str:
    """``12 Nov 2026`` (UTC)."""
    return f"{datetime.fromtimestamp(then_ms / 1000, UTC):%d %b %Y}".lstrip("0")


def moment(then_ms: int | None) -> str:
    """``2026-11-12 08:15:04`` (UTC)."""
    return f"{datetime.fromtimestamp(then_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}" if then_ms else NOTHING


def short(identifier: str, head: int = 6, tail: int = 6) -> str:
    """The beginning and end of a long id."""
    return identifier if len(identifier) <= head + tail + 1 else f"{identifier[:head]}…{identifier[-tail:]}"


def flops(kflop_per_s: int) -> str:
    """``12.4 GFLOP/s``."""
    value = kflop_per_s * 1e3
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.1f} GFLOP/s"


FILTERS = {
    "credits": credits,
    "exact_credits": exact_credits,
    "size": size,
    "count": count,
    "ago": ago,
    "day": day,
    "moment": moment,
    "short": short,
    "flops": flops,
}
