"""``rios bench import``: how fast this machine imports a model, and with how much memory, measured now.

Nothing is kept: what it makes lies in a folder that ends with it.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import ConfigError
from node import progress, threads
from node.cli import Context, Output
from node.importing import find_source
from node.table import table

if TYPE_CHECKING:
    from dmoe.core.manifest import Quantisation

SAMPLE_MB = 500
SAMPLE_MB_MAX = 200_000
_KIB = 1 << 10


@dataclass(slots=True)
class Phases:
    """Seconds by what an import was doing, as its progress tells."""

    shown: progress.Show
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)
    _doing: str = "read headers"

    def show(self, done: int, total: int, what: str) -> None:
        """Called with progress; passes it on."""
        kind = "write shards" if "/" in what else what
        if kind != self._doing:
            self._add()
            self._doing = kind
        self.shown(done, total, what)

    def _add(self) -> None:
        now = time.perf_counter()
        self.seconds[self._doing] = self.seconds.get(self._doing, 0.0) + now - self._since
        self._since = now


def run(context: Context) -> Output:
    """``rios bench import``"""
    count = context.settings().settings.dmoe.threads
    threads.bound(count)
    args = context.args
    if not 1 <= args.mb <= SAMPLE_MB_MAX:
        raise ConfigError("usage", f"--mb {args.mb} is not within 1..{SAMPLE_MB_MAX}", f"the default is {SAMPLE_MB}")
    from dmoe.importer.scratch import scratch  # noqa: PLC0415

    models = context.paths().models
    disk = models if models.is_dir() else Path(tempfile.gettempdir())  # the disk that models are on, if there is one
    with progress.bar("bytes") as show, scratch(disk, 0) as folder:
        source = find_source(args.source, show).path if args.source else sample(folder, args.mb, show)
        data = measure(source, folder, args.format, count, show)
    return Output(data, _table(data))


def sample(folder: Path, size_mb: int, show: progress.Show) -> Path:
    """A random checkpoint of about this size."""
    from dmoe.importer.sample import sizes_of, write_sample  # noqa: PLC0415

    sizes = sizes_of(size_mb * 1_000_000)
    show(0, sizes.total_bytes, "random checkpoint")
    return write_sample(folder / "sample", sizes)


def measure(
    source: Path, folder: Path, quantisation: "Quantisation", count: int, show: progress.Show
) -> dict[str, Any]:
    """Import ``source`` into ``folder`` and say what it took."""
    from dmoe.importer.build import Wishes, import_model  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415
    from p2p.core.identity import Identity  # noqa: PLC0415

    store = ModelStore(folder / "models")
    before = _resident_bytes()
    phases = Phases(show)
    started = time.perf_counter()
    wishes = Wishes(quantisation=quantisation)
    manifest = import_model(source, store, Identity.from_seed(bytes(32)), wishes, progress=phases.show, threads=count)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    written = sum(file.size_bytes for file in manifest.files())
    layers = [sum(f.size_bytes for f in s.files) // (s.layers[1] - s.layers[0] + 1) for s in manifest.stages]
    return {
        "source_bytes": _size(source),
        "written_bytes": written,
        "layer_bytes": max(layers, default=0),
        "format": quantisation,
        "seconds": round(seconds, 2),
        "mb_per_s": round(_size(source) / 1e6 / seconds, 1),
        "peak_bytes": peak,
        "peak_above_start_bytes": max(0, peak - before),
        "phases_s": {name: round(spent, 2) for name, spent in phases.seconds.items()},
    }


def _table(data: dict[str, Any]) -> str:
    rows = [
        ["source", f"{data['source_bytes'] / 1e6:.0f} MB"],
        ["written", f"{data['written_bytes'] / 1e6:.0f} MB ({data['format']})"],
        ["speed", f"{data['mb_per_s']:.0f} MB/s of the source"],
        ["peak memory", f"{data['peak_bytes'] / 1e6:.0f} MB"],
        ["above start", f"{data['peak_above_start_bytes'] / 1e6:.0f} MB"],
        ["one layer", f"{data['layer_bytes'] / 1e6:.0f} MB"],
        *([name, f"{spent:.1f} s"] for name, spent in data["phases_s"].items()),
        ["in all", f"{data['seconds']:.1f} s"],
    ]
    return table([["import", "measured"], *rows])


def _size(path: Path) -> int:
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
