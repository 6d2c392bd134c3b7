"""A cell for a moment: what is really in force on this machine, for ``rios doctor``."""

from dmoe.cells.cell import Cell, Counters
from dmoe.cells.link import Options
from dmoe.cells.sandbox import Wall


def walls() -> tuple[Wall, ...]:
    """Start an empty cell, take its word, end it: about half a second. Raises RiosError if it does not start."""
    cell = Cell("a trial", Options(), Counters())
    cell.start()
    try:
        cell.wait_up()
        return cell.walls
    finally:
        cell.close()
