"""How ``make test`` shares the test files among worker processes (pytest-xdist).

Many tests wait for processes and lines, others compute: side by side they take little longer than the longer half. The
unit that is shared is a file (:data:`TOGETHER`: a folder), so that what a file's tests share is started once. The order
of files is fixed; who takes the next one depends on who is free.

Invariants:
1. Every test that was collected runs once, in its file's order.
2. The churn begins first: it takes minutes and leaves most of the machine alone.
3. Files that start processes are spread over the others and none is among the last: neither do two of them wait for
   each other's processors all the time, nor does one worker wait for the other in the end.
"""

from collections.abc import Sequence

import pytest
from xdist.scheduler import LoadScopeScheduling

FIRST = "soak"
PROCESSES = frozenset(("e2e", "faults", "netns", "interop", "hostile"))
TOGETHER = ("tests/interop",)
"""Folders whose files share what may be prepared by one process only."""
LEAD = 0.85
"""The files with processes lie within this first part of the others."""


class Files(LoadScopeScheduling):
    """Gives out files in the order of the collection."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)  # type: ignore[arg-type]

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def scope_of(nodeid: str) -> str:
    """The file of a test, or the folder whose files belong together."""
    file = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)


def spread(nodeids: Sequence[str]) -> list[int]:
    """The order in which tests are given out, as indices."""
    files: dict[str, list[int]] = {}
    for index, nodeid in enumerate(nodeids):
        files.setdefault(scope_of(nodeid), []).append(index)
    kinds = {scope: scope.removeprefix("tests/").partition("/")[0] for scope in files}
    first = [scope for scope in files if kinds[scope] == FIRST]
    busy = [scope for scope in files if kinds[scope] in PROCESSES]
    calm = [scope for scope in files if scope not in first and scope not in busy]
    places = {scope: LEAD * number / max(1, len(busy)) for number, scope in enumerate(busy)}
    places |= {scope: number / max(1, len(calm)) for number, scope in enumerate(calm)}
    ordered = [*first, *sorted((*busy, *calm), key=places.__getitem__)]
    return [index for scope in ordered for index in files[scope]]
