"""Numbers, times and charts as people read them."""

import pytest

from gateway.billing.usage import DAY_MS, Sums
from gateway.dashboard import charts, words


@pytest.mark.parametrize(
    ("microcredits", "text"),
    [
        (0, "0.00"),
        (1, "0.000001"),
        (340, "0.00034"),
        (1_500_000, "1.50"),
        (-2_000_000, "-2.00"),
        (10**13, "10,000,000.00"),
    ],
)
def test_credits(microcredits: int, text: str) -> None:
    assert words.credits(microcredits) == text


def test_times() -> None:
    now = 1_795_949_070_000
    ages = (1, 42, 3 * 60, 5 * 3600, 3 * 86400)
    assert [words.ago(now - age * 1000, now) for age in ages] == [
        "just now",
        "42 s ago",
        "3 min ago",
        "5 h ago",
        "3 d ago",
    ]
    assert words.ago(now - 40 * DAY_MS, now) == "20 Oct 2026"
    assert words.ago(None, now) == words.NOTHING
    assert words.moment(now) == "2026-11-29 10:44:30"


def test_sizes_and_counts() -> None:
    assert [words.size(n) for n in (0, 999, 1500, 34_000_000_000)] == ["0 B", "999 B", "1.5 KB", "34.0 GB"]
    assert [words.count(n) for n in (0, 1234, 167_900, 2_500_000)] == ["0", "1,234", "167.9K", "2.5M"]
    assert words.short("12D3KooWabcdefgh", 0, 4) == "…efgh"


def test_a_chart_has_a_bar_for_each_day_and_none_is_higher_than_it() -> None:
    rows = [
        Sums(name="100", requests=1, prompt_tokens=30, completion_tokens=10, microcredits=5),
        Sums(name="102", requests=2, prompt_tokens=400, completion_tokens=23, microcredits=9),
    ]
    chart = charts.daily(rows, 100, 3)
    assert [(bar.lower > 0, bar.upper > 0) for bar in chart.bars] == [(True, True), (False, False), (True, True)]
    assert all(bar.lower + bar.upper <= chart.height for bar in chart.bars)
    assert [text for _, text in chart.ticks] == ["0", "300", "600"]
    assert "463 tokens" in chart.summary
    assert charts.daily([], 100, 7).summary == "0 tokens in 7 days"


def test_shares() -> None:
    assert (charts.share(1, 3), charts.share(0, 0), charts.share(5, 5)) == (33.4, 0.0, 100.0)
