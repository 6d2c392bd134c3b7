"""``rios bench``: an operator measures their own machine. What each figure means stands in docs/benchmarks.md.

Owns: which model is measured, how figures are shown. Does not own: the measuring (``dmoe/measuring``).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from config.errors import ConfigError, RiosError
from config.vocabulary import MIB
from node import control, progress, threads
from node.cli import Context, Output
from node.table import table

if TYPE_CHECKING:
    from dmoe.core.manifest import Manifest, Quantisation
    from dmoe.runtime import RuntimeOptions
    from dmoe.store import ModelStore

Kind = Literal["dense", "sparse"]
_TRUNK = {"hidden": 512, "heads": 8, "kv_heads": 2, "vocab": 4096}
RANDOM: dict[Kind, dict[str, int]] = {
    "dense": {**_TRUNK, "layers": 12, "experts": 0, "intermediate": 1536},
    "sparse": {**_TRUNK, "layers": 4, "experts": 8, "intermediate": 1024},
}
SECONDS_MAX = 3600
BATCH_MAX = 1024
ROWS_MAX = 1 << 16
ANSWER_SECONDS_MAX = 2.0
"""How long a daemon may take for a word before it is thought not to run."""


def generate(context: Context) -> Output:
    """``rios bench generate``"""
    args = context.args
    batches = _numbers(args.batch, "--batch", BATCH_MAX)
    with _subject(context, "dense") as (manifest, store, options, data):
        from dmoe import measuring  # noqa: PLC0415

        routes = measuring.routes_here(manifest, store)
        if args.route:
            if args.route not in routes:
                known = ", ".join(routes) or "none: rios model fetch --whole brings the model here"
                raise ConfigError("usage", f"{manifest.name} cannot run by route {args.route} here", f"routes: {known}")
            routes = [args.route]
        with progress.bar("steps") as show:
            told = _counted(show, len(routes) * (1 + len(batches)))
            found = trio.run(_generation, manifest, store, options, routes, batches, args.seconds, told)
    data["routes"] = [asdict(each) for each in found]
    rows = [["ROUTE", "BATCH", "PREFILL T/S", "DECODE T/S", "PER SEQUENCE", "PASS P50", "PASS P99", "LOAD", "MEMORY"]]
    for each in found:
        rows.append(
            [
                each.route,
                str(each.batch),
                f"{each.prefill_tokens_per_s:.0f}",
                f"{each.decode_tokens_per_s:.1f}",
                f"{each.decode_tokens_per_s / each.batch:.1f}",
                f"{each.decode_ms_p50:.2f} ms",
                f"{each.decode_ms_p99:.2f} ms",
                f"{each.load_seconds:.1f} s",
                f"{each.memory_bytes / MIB:.0f} MiB",
            ]
        )
    return Output(data, f"{_head(data)}\n\n{table(rows)}")


async def _generation(
    manifest: "Manifest",
    store: "ModelStore",
    options: "RuntimeOptions",
    routes: Sequence[Any],
    batches: Sequence[int],
    seconds: float,
    told: Any,  # noqa: ANN401 - measuring.Told
) -> Any:  # noqa: ANN401 - a list of measuring.Generated
    from dmoe import measuring  # noqa: PLC0415

    return await measuring.generation(manifest, store, options, routes, batches, seconds=seconds, told=told)


def expert(context: Context) -> Output:
    """``rios bench expert``"""
    args = context.args
    counts = _numbers(args.rows, "--rows", ROWS_MAX)
    with _subject(context, "sparse") as (manifest, store, options, data):
        from dmoe import measuring  # noqa: PLC0415

        steps = 1 + len(counts) * len({1, options.thread_count})
        with progress.bar("steps") as show:
            told = _counted(show, steps)
            found = measuring.experts(manifest, store, options, counts, seconds=args.seconds, told=told)
    data["experts"] = [asdict(each) for each in found]
    rows = [["DEVICE", "THREADS", "ROWS", "ROWS/S", "CALL P50", "CALL P99", "GFLOP/S", "WEIGHTS READ"]]
    for each in found:
        rows.append(
            [
                each.device,
                str(each.threads),
                str(each.rows),
                f"{each.rows_per_s:.0f}",
                f"{each.us_p50:.0f} us",
                f"{each.us_p99:.0f} us",
                f"{each.gflop_per_s:.1f}",
                f"{each.weight_bytes_per_s / 1e9:.2f} GB/s",
            ]
        )
    return Output(data, f"{_head(data)}\n\n{table(rows)}")


def _counted(show: progress.Show, steps: int) -> Any:  # noqa: ANN401 - measuring.Told
    begun = 0

    def told(what: str) -> None:
        nonlocal begun
        show(begun, steps, what)
        begun += 1

    return told


@contextmanager
def _subject(
    context: Context, kind: Kind
) -> Iterator[tuple["Manifest", "ModelStore", "RuntimeOptions", dict[str, Any]]]:
    """The model that was named, the store's only one, or one with random weights; and the answer's head."""
    args = context.args
    settings = context.settings().settings.dmoe
    if not 1 <= args.seconds <= SECONDS_MAX:
        raise ConfigError("usage", f"--seconds {args.seconds} is not possible", f"from 1 to {SECONDS_MAX}")
    count = settings.threads if args.threads is None else args.threads
    if not 0 <= count <= 1024:
        raise ConfigError("usage", f"--threads {count} is not possible", "from 1 to 1024; 0: all cores")
    threads.bound(count)
    from dmoe import hardware  # noqa: PLC0415 - after the bound
    from dmoe.runtime import RuntimeOptions  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415

    options = RuntimeOptions(device=settings.device, threads=count)  # type: ignore[arg-type]
    store = ModelStore(context.paths().models)
    known = list(store.manifests().values())
    with tempfile.TemporaryDirectory(prefix="rios-bench-") as folder:
        if args.model:
            manifest = store.find(args.model)
        elif len(known) == 1:
            manifest = known[0]
        elif known:
            names = ", ".join(each.name for each in known)
            raise ConfigError("usage", "which model?", f"rios bench ... MODEL, one of: {names}")
        else:
            manifest, store = _random(Path(folder), kind, args.format, count)
        data: dict[str, Any] = {
            "model": manifest.name,
            "quantisation": manifest.quantisation,
            "is_random": store.root != context.paths().models,
            "cpu": hardware.cpu_name(),
            "cores": hardware.usable_cores(),
            "threads": options.thread_count,
            "seconds": args.seconds,
            "daemon_running": _is_running(context),
        }
        yield manifest, store, options, data


def _random(folder: Path, kind: Kind, format: "Quantisation", count: int) -> "tuple[Manifest, ModelStore]":
    """A model of about 100 MB as floats: too large for a core's cache, small enough to be made in seconds."""
    from dmoe.importer import build, sample  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415
    from p2p.core.identity import Identity  # noqa: PLC0415

    store = ModelStore(folder / "models")
    source = sample.write_sample(folder / f"random-{kind}", sample.Sizes(**RANDOM[kind]))
    with progress.bar("files") as show:
        manifest = build.import_folder(
            source, store, Identity.from_seed(bytes(32)), quantisation=format, progress=show, threads=count
        )
    return manifest, store


def _is_running(context: Context) -> bool:
    """Whether a daemon runs here: it shares the cores."""
    try:
        control.ask(context.paths().control, "health", seconds=ANSWER_SECONDS_MAX)
    except RiosError as error:
        return error.code != "not_running"
    return True


def _numbers(text: str, flag: str, most: int) -> list[int]:
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(part.isdecimal() and 1 <= int(part) <= most for part in numbers):
        raise ConfigError("usage", f"{flag} {text!r} is no list of numbers", f"e.g. 1,4,16; each from 1 to {most}")
    return [int(part) for part in numbers]


def _head(data: dict[str, Any]) -> str:
    lines = [f"{data['model']} ({data['quantisation']}) on {data['cpu']}, {data['threads']} of {data['cores']} cores"]
    if data["is_random"]:
        lines.append("random weights: there is no model here (rios model import bundled)")
    if data["daemon_running"]:
        lines.append("a node is running here and shares the cores: stop it for better figures")
    return "\n".join(lines)
