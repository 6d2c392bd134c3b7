"""``rios model import``: from a source that somebody names to a model in the store."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import ConfigError, LocalError
from config.paths import cache_dir
from node import progress, threads
from node.cli import Context, Output
from node.local import own_identity

SOURCES = "a .gguf file, a folder of safetensors, hf:owner/name[@revision][:file.gguf], or `bundled`"


@dataclass(frozen=True, slots=True)
class Source:
    """Files that are here; empty ``name`` and ``origin`` are the files' own."""

    path: Path
    name: str = ""
    origin: str = ""


def find_source(text: str, show: progress.Show) -> Source:
    """What ``text`` names, fetched if it is elsewhere. Raises LocalError or RemoteError naming what is missing."""
    check_source(text)
    cache = cache_dir(os.environ, Path.home())
    if text == "bundled":
        from dmoe.importer import bundled  # noqa: PLC0415

        path = bundled.fetch_bundled(cache)
        return Source(path, path.name.partition(".")[0])
    if text.startswith("hf:"):
        from dmoe.importer import hub  # noqa: PLC0415 - slow to load

        wanted = hub.parse(text)
        path = hub.fetch(wanted, cache, show, lambda said: print(said, file=sys.stderr))  # noqa: T201
        return Source(path, wanted.name if path.is_dir() else path.stem, str(wanted))
    return Source(Path(text))


def check_source(text: str) -> None:
    """Complain at once of what cannot be a source: before a key is asked for, or anything fetched."""
    if not text:
        raise ConfigError("usage", "no source", f"give {SOURCES}")
    if text != "bundled" and not text.startswith("hf:") and not Path(text).exists():
        raise LocalError("not_found", f"there is no file or folder {text}", f"give {SOURCES}")


def model_import(context: Context) -> Output:
    """``rios model import``"""
    dmoe = context.settings().settings.dmoe
    count = dmoe.threads
    threads.bound(count)
    from dmoe.importer.build import Wishes  # noqa: PLC0415
    from dmoe.importer.cut import Sizes  # noqa: PLC0415
    from dmoe.importer.walled import import_walled  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415

    args = context.args
    check_source(args.source)
    identity, paths = own_identity(context)
    store = ModelStore(paths.models)
    sizes = Sizes(
        experts_per_shard=args.experts_per_shard,
        layers_per_shard=args.layers_per_shard,
        layers_per_stage=args.layers_per_stage,
    )
    with progress.bar("bytes") as show:
        source = find_source(args.source, show)
        wishes = Wishes(
            name=args.name or source.name,
            licence=args.licence,
            origin=source.origin,
            quantisation=args.format,
            sizes=sizes,
        )
        manifest = import_walled(
            source.path, store, identity, wishes, progress=show, threads=count, demanded=dmoe.sandbox == "required"
        )
    data: dict[str, Any] = {
        "model_id": manifest.model_id,
        "name": manifest.name,
        "licence": manifest.licence,
        "shards": len(manifest.shards),
        "stages": len(manifest.stages),
        "params": sum(shard.params for shard in manifest.shards if shard.kind != "stage"),
        "bytes": sum(file.size_bytes for file in manifest.files()),
        "quantisation": manifest.quantisation,
    }
    lines = [
        manifest.name,
        f"  id      {manifest.model_id}",
        f"  shards  {data['shards']}, {data['bytes'] / 1e6:.0f} MB",
        f"  next    rios model deploy {manifest.name}",
    ]
    return Output(data, "\n".join(lines))
