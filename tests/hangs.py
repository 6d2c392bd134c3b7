"""What a test that ran into its time limit was doing: the limit falls into trio's loop and leaves it unfinished."""

import gc
import signal
import warnings
from collections.abc import Iterator

import trio
from trio._core import _run as run  # there is no public way to forget a run


def take_down() -> str:
    """The tasks of a run that was left, as a tree with their stacks; the next test may begin a run of its own."""
    root = trio.lowlevel.current_root_task()
    text = "\n".join(_lines(root, "")) if root else ""
    vars(run.GLOBAL_RUN_CONTEXT).clear()
    signal.set_wakeup_fd(-1)
    del root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trio's word on the run that is left
        gc.collect()
    return text


def _lines(task: trio.lowlevel.Task, indent: str) -> Iterator[str]:
    yield f"{indent}{task.name}"
    for frame, number in task.iter_await_frames():
        if "/trio/_core/" not in frame.f_code.co_filename:
            yield f"{indent}  | {frame.f_code.co_filename}:{number} {frame.f_code.co_name}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _lines(child, indent + "    ")
