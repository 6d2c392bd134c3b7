"""Progress bars on the terminal's stderr; nothing where there is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Show = Callable[[int, int, str], None]
"""``(done, total, what is going on)``; total 0: not known yet."""


@contextmanager
def bar(unit: Literal["bytes", "files", "replicas", "steps"]) -> Iterator[Show]:
    """A bar that goes when the block ends."""
    from rich import progress as rich  # noqa: PLC0415 - slow to load, and for few commands
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=True)
    amount: list[rich.ProgressColumn] = [rich.MofNCompleteColumn()]
    if unit == "bytes":
        amount = [rich.DownloadColumn(), rich.TransferSpeedColumn()]
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            shown.update(task, completed=done, total=total or None, description=what[:100])

        yield show


def counted(show: Show, total: int, what: str) -> Callable[[int], None]:
    """A function that is told of every further bit of work, and shows how much there is by now."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        show(min(done, total), total, what)

    return add
