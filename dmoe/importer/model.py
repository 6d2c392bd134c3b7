"""What a source was found to hold, before anything of it is written.

Owns: reading a source's family, architecture and text. Does not own: how sources are opened (``sources``, ``folder``),
which tensors a model has (``tensors``) or how it is cut (``cut``).

Fails with IntegrityError naming the file and the tensor or key.
"""

from dataclasses import dataclass

from config.errors import IntegrityError
from dmoe.core.manifest import Architecture
from dmoe.importer.architectures import Family
from dmoe.importer.families import hf_architecture_of, hf_family_of, hf_layout_of
from dmoe.importer.folder import FolderSource, FolderText, folder_text
from dmoe.importer.gguffamilies import gguf_architecture_of, gguf_family_of
from dmoe.importer.sources import GgufSource
from dmoe.importer.tokenizer import chat_template, stop_tokens, tokenizer_json

_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Model:
    """A source and what it says about itself."""

    source: GgufSource | FolderSource
    family: Family
    architecture: Architecture
    name: str
    licence: str
    text: FolderText
    drafts: bool = False
    """The source may hold one layer more, which only drafts further tokens."""


def read_gguf(source: GgufSource) -> Model:
    """What a GGUF file holds."""
    metadata, family = source.metadata, gguf_family_of(source.metadata)[1].tensors
    vocab, _ = _matrix_shape(source, family.embedding)
    factors = source.vector(_ROPE_FACTORS, source.shape(_ROPE_FACTORS)[0]) if source.has(_ROPE_FACTORS) else None
    return Model(
        source=source,
        family=family,
        architecture=gguf_architecture_of(metadata, vocab, not source.has(family.head), factors),
        name=str(metadata.get("general.basename") or metadata.get("general.name") or source.path.stem),
        licence=str(metadata.get("general.license", "unknown")),
        text=FolderText(tokenizer_json(metadata), chat_template(metadata), stop_tokens(metadata)),
    )


def read_folder(source: FolderSource) -> Model:
    """What a folder in Hugging Face layout holds."""
    known = hf_family_of(source.config)[1]
    family = hf_layout_of(known, source.has)
    vocab, _ = _matrix_shape(source, family.embedding)
    architecture = hf_architecture_of(source.config, vocab)
    return Model(
        source=source,
        family=family,
        architecture=architecture,
        name=source.name,
        licence="unknown",
        text=folder_text(source.files, vocab, source.count_tokens),
        drafts=known.drafts,
    )


def _matrix_shape(source: GgufSource | FolderSource, name: str) -> tuple[int, int]:
    shape = source.shape(name)
    if len(shape) != 2:
        raise IntegrityError("integrity", f"{source.path}: tensor {name} has shape {list(shape)}, not a matrix")
    return shape[0], shape[1]
