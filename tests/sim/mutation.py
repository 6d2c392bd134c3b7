"""Breaks the program on purpose: one function's source is edited and its code swapped, for as long as a run lasts.

Swapping ``__code__`` reaches every module that imported the function by name. An edit whose old text is not found
exactly once is an error, so that a mutant cannot silently stop being one when the code moves on.
"""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any


@dataclass(frozen=True)
class Edit:
    """``where`` is ``module:function`` or ``module:Class.method``; ``old`` becomes ``new`` in it."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One way to break the protocol. ``directed`` names the test that catches what seeds seldom do; ``simulated`` is
    false where no seed can get there (metering, which runs idle in the simulation)."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    directed: str = ""
    simulated: bool = True


def _find(where: str) -> FunctionType:
    module_name, path = where.split(":")
    found: Any = import_module(module_name)
    *owners, name = path.split(".")
    for part in owners:
        found = getattr(found, part)
    found = inspect.getattr_static(found, name)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    found = getattr(found, "__wrapped__", found)
    assert isinstance(found, FunctionType), f"{where} is not a function"
    return found


def _edited(edits: list[Edit], function: FunctionType) -> CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if source.count(edit.old) != 1:
            raise ValueError(f"{edit.where}: {edit.old!r} stands in it {source.count(edit.old)} times, once is needed")
        source = source.replace(edit.old, edit.new)
    source = "from __future__ import annotations\n" + source
    scope: dict[str, Any] = dict(function.__globals__)
    exec(compile(source, inspect.getsourcefile(function) or "?", "exec"), scope)
    made = scope[function.__name__]
    made = made.fget if isinstance(made, property) else made
    made = made.__func__ if isinstance(made, staticmethod | classmethod) else made
    made = getattr(made, "__wrapped__", made)
    return made.__code__  # type: ignore[no-any-return]


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Within it, the program is broken."""
    with ExitStack() as undo:
        for where in dict.fromkeys(edit.where for edit in mutant.edits):
            function = _find(where)
            code = _edited([edit for edit in mutant.edits if edit.where == where], function)
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = code
        yield
