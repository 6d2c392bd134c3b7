"""Geometry of the usage charts. Pure: numbers in, what the template draws out; nothing here knows SVG's syntax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log10

from gateway.billing.usage import DAY_MS, Sums
from gateway.dashboard import words


@dataclass(frozen=True, slots=True)
class Bar:
    """One day's bar: ``lower`` is what the prompt took, ``upper`` what the answer took, in the chart's units."""

    x: float
    width: float
    lower: float
    upper: float
    label: str
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars between 0 and ``height``; ``ticks`` are heights with their text."""

    width: float
    height: float
    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, str]]
    summary: str


def daily(rows: Sequence[Sums], first_day: int, days: int, *, width: float = 720, height: float = 180) -> Chart:
    """Tokens a day, a bar for each of ``days`` days from ``first_day`` on (days since 1970)."""
    known: Mapping[int, Sums] = {int(row.name): row for row in rows}
    top = _nice(max((row.prompt_tokens + row.completion_tokens for row in rows), default=0))
    step = width / days
    bars = []
    for number in range(days):
        row = known.get(first_day + number)
        prompt, answer = (row.prompt_tokens, row.completion_tokens) if row else (0, 0)
        date = words.day((first_day + number) * DAY_MS)
        title = f"{date}: {prompt:,} prompt and {answer:,} answer tokens in {row.requests if row else 0:,} requests"
        bars.append(
            Bar(
                x=number * step + step * 0.14,
                width=step * 0.72,
                lower=height * prompt / top,
                upper=height * answer / top,
                label=date.rsplit(" ", 1)[0],
                title=title,
            )
        )
    ticks = [(height * part, words.count(top * part)) for part in (0, 0.5, 1)]
    total = sum(row.prompt_tokens + row.completion_tokens for row in rows)
    return Chart(width, height, bars, ticks, f"{total:,} tokens in {days} days")


def _nice(most: int) -> int:
    """The next even number of people's: a top that the highest bar comes near to."""
    if most <= 10:
        return 10
    power = 10 ** int(log10(most))
    return next(int(power * factor) for factor in (1, 2, 3, 4, 6, 8, 10) if power * factor >= most)


def share(part: float, whole: float) -> float:
    """A percentage for a meter, 0 where there is no whole."""
    return min(100.0, ceil(1000 * part / whole) / 10) if whole else 0.0
