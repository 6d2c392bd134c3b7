"""Which walls are around what here: what runs now (``rios status``), and what a trial of each kind gets (``rios
doctor``).

Owns: the kinds, in the operator's words. Does not own: the walls (``dmoe/cells``).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from config.settings import DmoeSettings
    from dmoe.cells.home import Homes
    from dmoe.cells.sandbox import Wall
    from dmoe.runtime import RuntimeOptions
    from dmoe.store import ModelStore
    from node.daemon import Node


def kinds(node: "Node") -> dict[str, Any]:
    """The processes that run now by kind, JSON-able: how many, walls in force, walls missing and why."""
    texts, answers = node.models.text_walls(), [cell.walls for cell in node.homes.cells if cell.is_up]
    return {
        "shards": _kind([cell.walls for cell in node.cells.running()]),
        "answers": _kind(answers),
        "text": _kind(texts),
        "grammars": _kind(node.engine.compilers.walls()),
    }


def _kind(processes: "Iterable[tuple[Wall, ...]]") -> dict[str, Any]:
    found = list(processes)
    every = {wall.name: wall for walls in found for wall in sorted(walls, key=lambda wall: not wall.in_force)}
    return {
        "running": len(found),
        "walls": sorted(wall.name for wall in every.values() if wall.in_force),
        "missing": {wall.name: wall.why for wall in every.values() if not wall.in_force},
    }


def line(found: Mapping[str, Any]) -> str:
    """One line about what runs; empty if nothing does."""
    running = {name: kind for name, kind in found.items() if kind["running"]}
    if not running:
        return ""
    missing = {wall for kind in running.values() for wall in kind["missing"]}
    everywhere = set.intersection(*(set(kind["walls"]) for kind in running.values()))
    counts = ", ".join(f"{name} {kind['running']}" for name, kind in running.items())
    text = f"walled processes: {counts}; all with {', '.join(sorted(everywhere)) or 'no wall'}"
    return text + (f"; without {', '.join(sorted(missing))} (rios doctor says why)" if missing else "")


def homes_here(settings: "DmoeSettings", store: "ModelStore", options: "RuntimeOptions", own: str) -> "Homes":
    """Cells for models of others that a command answers with by itself, without a daemon."""
    from dmoe.cells.cells import Cells  # noqa: PLC0415 - loads ONNX Runtime
    from dmoe.cells.home import Homes  # noqa: PLC0415
    from dmoe.cells.link import Options  # noqa: PLC0415
    from dmoe.runtime import ExpertShard  # noqa: PLC0415
    from dmoe.stages.loading import load_stage  # noqa: PLC0415

    made = Options(
        threads=options.thread_count,
        kv_bytes_max=psutil.virtual_memory().total // 8,
        gvisor=settings.gvisor,
    )
    rule = Cells(
        store,
        lambda manifest, shard: ExpertShard(manifest, shard, store, options),
        lambda manifest, shard: load_stage(manifest, shard, store, options),
        own=own,
        mode=settings.sandbox,  # type: ignore[arg-type]
        allow_unsandboxed=settings.allow_unsandboxed,
        device=settings.device,
        options=made,
    )
    return Homes(rule, store, made)


def trials() -> dict[str, "Callable[[], tuple[Wall, ...]]"]:
    """A process of each kind, for a moment; each raises RiosError if it does not start."""
    from dmoe.cells import trial  # noqa: PLC0415 - loads ONNX Runtime

    return {
        "cells (shards, answers)": trial.walls,
        "text (tokenizers, templates)": trial.text_walls,
        "grammars": trial.grammar_walls,
        "imports": trial.import_walls,
    }
