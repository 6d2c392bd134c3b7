"""Tables as CSV (RFC 4180) that spreadsheets open without running anything. Pure.

A cell that begins like a formula gets an apostrophe before it, which spreadsheets take for "this is text"; numbers are
left alone.
"""

import csv
import io
from collections.abc import Iterable, Sequence

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def safe(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    if isinstance(cell, str) and cell.lstrip(" ").startswith(_FORMULA):
        return f"'{cell}"
    return "" if cell is None else cell


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A header and rows, lines ended by CRLF."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([safe(cell) for cell in row] for row in rows)
    return text.getvalue()
