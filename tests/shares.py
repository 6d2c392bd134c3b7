"""How ``make test`` shares the test files among worker processes (pytest-xdist).

Many tests wait for processes and lines, others compute: side by side they take little longer than the longer half. The
unit that is shared is a file (:data:`TOGETHER`: a folder), so that what a file's tests share is started once. The order
of files is fixed; who takes the next one depends on who is free.

Invariants:
1. Every test that was collected runs once, in its file's order.
2. Of files that start processes :data:`AT_ONCE` are under way, as long as there are any, and no more: they wait for
   each other's processors otherwise, and have deadlines of the real clock. The last files are short and have none, so
   that no worker waits for another in the end; where only files with processes are left, workers end.
3. A test that ends its worker has failed and is not run again; what is left of its file is.
"""

from collections.abc import Iterable, Sequence

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

PROCESSES = frozenset(("soak", "e2e", "faults", "netns", "interop", "hostile"))
TOGETHER = ("tests/interop",)
"""Folders whose files share what may be prepared by one process only."""
AT_ONCE = 2
"""So many files with processes are under way at the same time, however many workers there are."""


class Files(LoadScopeScheduling):
    """Gives out files in the order of the collection."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)  # type: ignore[arg-type]

    def _assign_work_unit(self, node: WorkerController) -> None:
        at_processes = [
            other
            for other, work in self.assigned_work.items()
            if other is not node
            and any(kind_of(scope) in PROCESSES and not all(tests.values()) for scope, tests in work.items())
        ]
        scope = next_scope(self.workqueue, len(at_processes))
        if scope is None:
            node.shutdown()
            return
        self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)
        # a worker keeps its last test until it hears of a next one, or that there is none
        if not self.workqueue:
            node.shutdown()
        elif self._pending_of(self.assigned_work[node]) == 1:
            self._assign_work_unit(node)

    def remove_node(self, node: WorkerController) -> str | None:
        workload = self.assigned_work.pop(node)
        lost = next((name for tests in workload.values() for name, done in tests.items() if not done), None)
        if lost is None:
            return None
        workload[scope_of(lost)][lost] = True
        self.workqueue.update({scope: tests for scope, tests in workload.items() if not all(tests.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return lost

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def scope_of(nodeid: str) -> str:
    """The file of a test, or the folder whose files belong together."""
    file = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)


def kind_of(scope: str) -> str:
    """The folder below ``tests`` in which it stands."""
    return scope.removeprefix("tests/").partition("/")[0]


def next_scope(waiting: Iterable[str], at_processes: int) -> str | None:
    """What a worker gets next while so many others are at files that start processes; None: it is not needed."""
    enough = at_processes >= AT_ONCE
    fitting = (scope for scope in waiting if not (enough and kind_of(scope) in PROCESSES))
    return next(fitting, None)


def spread(nodeids: Sequence[str]) -> list[int]:
    """The order in which tests are given out, as indices."""
    files: dict[str, list[int]] = {}
    for index, nodeid in enumerate(nodeids):
        files.setdefault(scope_of(nodeid), []).append(index)
    busy = [scope for scope in files if kind_of(scope) in PROCESSES]
    ordered = dict.fromkeys((*busy, *files))
    return [index for scope in ordered for index in files[scope]]
