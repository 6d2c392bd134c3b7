"""What a source was found to hold, before anything of it is written.

Owns: reading a source's family, architecture and text, and refusing what this family's graphs would leave out.
Does not own: how sources are opened (``sources``, ``folder``) or how a model is cut (``cut``).

Fails with IntegrityError naming the file and the tensor or key.
"""

import re
from dataclasses import dataclass

from config.errors import IntegrityError
from dmoe.core.manifest import Architecture
from dmoe.importer.architectures import Family, architecture_of, family_of
from dmoe.importer.families import hf_architecture_of, hf_family_of
from dmoe.importer.folder import FolderSource, FolderText, folder_text
from dmoe.importer.sources import GgufSource
from dmoe.importer.tokenizer import chat_template, stop_tokens, tokenizer_json

_NUMBER = re.compile(r"\.(\d{1,6})\.")
"""A layer's or an expert's number in a tensor's name."""


@dataclass(frozen=True, slots=True)
class Model:
    """A source and what it says about itself."""

    source: GgufSource | FolderSource
    family: Family
    architecture: Architecture
    name: str
    licence: str
    text: FolderText


def read_gguf(source: GgufSource) -> Model:
    """What a GGUF file holds."""
    metadata, family = source.metadata, family_of(source.metadata)[1]
    _check_tensors(source, family)
    vocab, _ = _matrix_shape(source, family.embedding)
    return Model(
        source=source,
        family=family,
        architecture=architecture_of(metadata, vocab, tied=not source.has(family.head)),
        name=str(metadata.get("general.basename") or metadata.get("general.name") or source.path.stem),
        licence=str(metadata.get("general.license", "unknown")),
        text=FolderText(tokenizer_json(metadata), chat_template(metadata), stop_tokens(metadata)),
    )


def read_folder(source: FolderSource) -> Model:
    """What a folder in Hugging Face layout holds."""
    family = hf_family_of(source.config)[1].tensors
    _check_tensors(source, family)
    vocab, _ = _matrix_shape(source, family.embedding)
    architecture = hf_architecture_of(source.config, vocab)
    _check_numbers(source, architecture)
    return Model(
        source=source,
        family=family,
        architecture=architecture,
        name=source.path.resolve().name,
        licence="unknown",
        text=folder_text(source.path, vocab),
    )


def _check_tensors(source: GgufSource | FolderSource, family: Family) -> None:
    """Refuse what this family's graphs would silently leave out."""
    patterns = [value for value in _names(family) if isinstance(value, str)]
    known = {pattern.replace("{l}", "").replace("{{e}}", "") for pattern in patterns}
    for name in source.names():
        if _NUMBER.sub("..", name) not in known:
            raise IntegrityError(
                "integrity", f"{source.path}: tensor {name[:80]!r} is not part of a supported model of this family"
            )


def _check_numbers(source: FolderSource, arch: Architecture) -> None:
    """Refuse layers and experts beyond those that the configuration counts."""
    most = (arch.layers, arch.router.experts)
    for name in source.names():
        if any(int(number) >= count for number, count in zip(_NUMBER.findall(name), most, strict=False)):
            raise IntegrityError("integrity", f"{source.path}: tensor {name[:80]!r} is beyond what config.json counts")


def _names(family: Family) -> list[object]:
    return [getattr(family, key) for key in family.__slots__]


def _matrix_shape(source: GgufSource | FolderSource, name: str) -> tuple[int, int]:
    shape = source.shape(name)
    if len(shape) != 2:
        raise IntegrityError("integrity", f"{source.path}: tensor {name} has shape {list(shape)}, not a matrix")
    return shape[0], shape[1]
