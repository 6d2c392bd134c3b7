"""Write a file; hash it whole and by chunk on the way."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from dmoe.core.manifest import CHUNK_BYTES, ModelFile


def write_file(folder: Path, name: str, pieces: Iterable[bytes | memoryview]) -> ModelFile:
    """Write ``folder/name``. Raises OSError."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, chunks, size = sha256(), [], 0
    chunk, room = sha256(), CHUNK_BYTES
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            whole.update(piece)
            size += len(piece)
            start = 0
            while start < len(piece):
                taken = piece[start : start + room]
                chunk.update(taken)
                start += len(taken)
                room -= len(taken)
                if not room:
                    chunks.append(chunk.hexdigest())
                    chunk, room = sha256(), CHUNK_BYTES
    if room < CHUNK_BYTES:
        chunks.append(chunk.hexdigest())
    return ModelFile(path=name, sha256=whole.hexdigest(), size_bytes=size, chunks=tuple(chunks))
