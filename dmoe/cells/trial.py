"""A walled process of each kind for a moment: what is really in force on this machine, for ``rios doctor``.

All are blocking, take about half a second, and raise RiosError if the process does not start.
"""

from contextlib import closing

from dmoe.asidework import rehearsed_json
from dmoe.cells.cell import Cell, Counters
from dmoe.cells.link import Options
from dmoe.cells.sandbox import Wall


def walls(options: Options | None = None) -> tuple[Wall, ...]:
    """Of an empty cell."""
    cell = Cell("a trial", options or Options(), Counters())
    cell.start()
    try:
        cell.wait_up()
        return cell.walls
    finally:
        cell.close()


def text_walls() -> tuple[Wall, ...]:
    """Of a process for tokenizers and chat templates, with a tokenizer of our own."""
    from dmoe.textaside import AsideTokenizer  # noqa: PLC0415 - the doctor's daemon-less checks load little

    with closing(AsideTokenizer(rehearsed_json())) as made:
        return made.walls


def grammar_walls() -> tuple[Wall, ...]:
    """Of a process for users' grammars."""
    from dmoe.constraint import Constraints  # noqa: PLC0415
    from dmoe.text import Tokenizer  # noqa: PLC0415

    with closing(Constraints(Tokenizer(rehearsed_json()), ())) as made:
        return made.walls


def import_walls() -> tuple[Wall, ...]:
    """Of a process for imports, which gets no file."""
    from dmoe.importer.walled import trial  # noqa: PLC0415

    return trial()
