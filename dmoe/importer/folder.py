"""Where a model comes from: a folder in Hugging Face layout, read lazily, tensor by tensor.

Owns: the folder's files, the bounds and types of its safetensors, and what its JSON files say about the text.
Does not own: what the numbers of ``config.json`` mean (``families``).

Invariants:
1. A file is mapped, never read whole; only the rows and columns that are asked for become arrays.
2. A header is untrusted: every tensor's type, shape and place are checked before it is touched.
3. Nothing of the folder is run, and no file outside it is opened because a file inside names it.

Fails with IntegrityError or LocalError naming the file and the tensor or key.
"""

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from config.vocabulary import MIB
from dmoe.core import tensorfile
from dmoe.core.linear import Linear
from dmoe.core.manifest import BLOCK, Quantisation
from dmoe.importer.blocks import mxfp4_layer
from dmoe.importer.files import DiskFiles, SourceFiles, hash_of, mapped, opened, size_of
from dmoe.importer.quantise import convert, float_layer, to_float
from dmoe.importer.tokenizer import ends_answer
from dmoe.textaside import AsideTokenizer

Array = NDArray[Any]

HEADER_BYTES_MAX = 100 * MIB
JSON_BYTES_MAX = 256 * MIB
Counter = Callable[[bytes, str], int]
"""A tokenizer file and a chat template: how many tokens there are."""
_ALL = slice(None)
_AGAIN = "the file is truncated, altered or of another kind; download it again"
_INDEX = "model.safetensors.index.json"
_BITS: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("F32", np.dtype("<u4")),
    "F16": ("F16", np.dtype("<u2")),
    "BF16": ("BF16", np.dtype("<u2")),
}
"""safetensors' name: ours, and an integer as wide, because numpy has no bfloat16."""
_KINDS = {name: kind for name, (_, kind) in _BITS.items()} | {"U8": np.dtype("u1")}
_ITEM_BYTES = {name: kind.itemsize for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    path: Path
    dtype: str
    bits: Array | None
    """The numbers' bits in the memory map; None for a type that is not supported."""
    shape: tuple[int, ...]


class FolderSource:
    """An open folder. ``config``: the content of ``config.json``. A tensor name may hold ``{e}``: one per expert."""

    def __init__(
        self,
        path: Path,
        files: SourceFiles | None = None,
        *,
        name: str = "",
        count_tokens: Counter | None = None,
    ) -> None:
        """``files``: the folder's, where they are open already; ``name``: its own, where it cannot be looked up.
        ``count_tokens``: see :func:`folder_text`."""
        self.path = path
        self.name = name or path.resolve().name
        self.files = files or DiskFiles(path)
        self.count_tokens = count_tokens or tokens_aside
        if not self.files.has("config.json"):
            raise LocalError("not_found", f"{path} has no config.json", "give a folder in Hugging Face layout")
        self.config: Mapping[str, Any] = _json(self.files, "config.json")
        self._files = _weight_files(self.files)
        self._maps: list[mmap.mmap] = []
        self._tensors: dict[str, _Tensor] = {}
        for file in self._files:
            data = _map(self.files, file)
            self._maps.append(data)
            for name, tensor in _tensors(path / file, data).items():
                if name in self._tensors:
                    raise IntegrityError(
                        "integrity", f"{path / file}: tensor {name[:80]} is in another file too", _AGAIN
                    )
                self._tensors[name] = tensor

    @property
    def size_bytes(self) -> int:
        """Of what :meth:`sha256` reads."""
        return sum(size_of(self.files, name) for name in self._hashed())

    def sha256(self, read: Callable[[int], None] = lambda count: None) -> str:
        """A hash over ``config.json`` and the weight files in order of their names, hex. ``read`` is called after every
        block with its bytes."""
        whole = sha256()
        for name in self._hashed():
            whole.update(hash_of(self.files, name, read).digest())
        return whole.hexdigest()

    def _hashed(self) -> list[str]:
        return ["config.json", *self._files]

    def release_pages(self) -> None:
        """Give back the memory of what was read so far; it is read again when touched."""
        for data in self._maps:
            data.madvise(mmap.MADV_DONTNEED)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        return self._tensor(name).shape

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        """A float vector. Raises IntegrityError if it is not one of that size."""
        dtype, bits = self._bits(name, (size,), (_ALL,))
        values = to_float(dtype, bits, size)
        if not np.isfinite(values).all():
            raise self._fault(name, "holds numbers that are not finite", _AGAIN)
        return values

    def linear(
        self, name: str, shape: tuple[int, int], quantisation: Quantisation, part: tuple[slice, slice] = (_ALL, _ALL)
    ) -> Linear:
        """A weight matrix of ``shape`` (rows, columns) in the wanted form, or only the rows and columns in ``part``."""
        return self._layer(name, shape, quantisation, part)

    def linear_of(
        self, name: str, index: int, shape: tuple[int, int, int], quantisation: Quantisation, rows: slice = _ALL
    ) -> Linear:
        """Rows of one expert's matrix of ``shape[1:]``: a tensor of its own, or part of one of ``shape``."""
        if "{e}" in name:
            return self.linear(name.replace("{e}", str(index)), shape[1:], quantisation, (rows, _ALL))
        return self._layer(name, shape, quantisation, (index, rows, _ALL))

    def names_of(self, name: str) -> tuple[str, ...]:
        """The tensors that hold ``name``: itself, or its MXFP4 blocks and their scales."""
        return (name,) if self.has(name) else (f"{name}_blocks", f"{name}_scales")

    def turned_of(
        self, name: str, index: int, shape: tuple[int, int, int], quantisation: Quantisation, rows: Array
    ) -> Linear:
        """Chosen rows of one expert's matrix of ``shape[1:]``, whose stack is transposed, or in MXFP4 and then not."""
        if self.has(name):
            count, height, width = shape
            # an index array beside a plain index puts its axis first: rows are the outputs then
            dtype, bits = self._bits(name, (count, width, height), (index, _ALL, rows))
            layer = float_layer(dtype, bits, len(rows), width)
        else:
            layer = self._mxfp4(name, index, shape, rows)
        if not layer.is_finite():
            raise self._fault(self.names_of(name)[-1], "holds numbers that are not finite", _AGAIN)
        return convert(layer, quantisation)

    def _mxfp4(self, name: str, index: int, shape: tuple[int, int, int], rows: Array) -> Linear:
        blocks, scales = self.names_of(name)
        grid = (*shape[:2], shape[2] // BLOCK)
        if shape[2] % BLOCK:
            raise self._fault(blocks, f"cannot hold rows of {shape[2]}: a block has {BLOCK} weights")
        packed = self._bytes(blocks, (*grid, BLOCK // 2))[index][rows]
        return mxfp4_layer(packed, self._bytes(scales, grid)[index][rows])

    def _bytes(self, name: str, shape: tuple[int, ...]) -> Array:
        tensor = self._tensor(name)
        if tensor.shape != shape or tensor.dtype != "U8" or tensor.bits is None:
            raise self._fault(name, f"is {tensor.dtype[:20]}{list(tensor.shape)}, expected U8{list(shape)}")
        return tensor.bits

    def _layer(
        self, name: str, shape: tuple[int, ...], quantisation: Quantisation, part: tuple[slice | int, ...]
    ) -> Linear:
        dtype, bits = self._bits(name, shape, part)
        layer = float_layer(dtype, bits, *bits.shape)
        if not layer.is_finite():
            raise self._fault(name, "holds numbers that are not finite", _AGAIN)
        return convert(layer, quantisation)

    def _bits(self, name: str, shape: tuple[int, ...], part: tuple[slice | int | Array, ...]) -> tuple[str, Array]:
        tensor = self._tensor(name)
        if tensor.shape != shape:
            raise self._fault(name, f"has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.bits is None or tensor.dtype not in _BITS:
            raise self._fault(name, f"is {tensor.dtype[:20]}, which is not supported", f"known: {', '.join(_BITS)}")
        return _BITS[tensor.dtype][0], np.ascontiguousarray(tensor.bits[part])

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise IntegrityError("integrity", f"{self.path} lacks tensor {name}", _AGAIN)
        return self._tensors[name]

    def _fault(self, name: str, what: str, hint: str = "") -> IntegrityError:
        return IntegrityError("integrity", f"{self._tensors[name].path}: tensor {name} {what}", hint)


@dataclass(frozen=True, slots=True)
class FolderText:
    """What a folder says about text: the tokenizer's bytes, the chat template, the ids that end an answer."""

    tokenizer: bytes
    chat_template: str
    stop_tokens: tuple[int, ...]


def tokens_aside(tokenizer_json: bytes, template: str) -> int:
    """How many tokens a tokenizer has; it and the chat template are read in a process aside. Raises IntegrityError."""
    with closing(AsideTokenizer(tokenizer_json, template)) as tokenizer:
        return tokenizer.vocabulary


def folder_text(files: SourceFiles, vocab: int, count_tokens: Counter = tokens_aside) -> FolderText:
    """Read and check the tokenizer's files. An empty ``chat_template.jinja`` says that a model has none on purpose.
    ``count_tokens`` reads tokenizer and template where that cannot harm.

    Raises IntegrityError for a tokenizer that cannot be used, does not fit ``vocab``, or has no template.
    """
    file = files.folder / "tokenizer.json"
    if not files.has("tokenizer.json"):
        raise IntegrityError("integrity", f"{files.folder} has no tokenizer.json", _tokenizer_hint(files))
    document, data = _json(files, "tokenizer.json"), _read(files, "tokenizer.json")
    options = _json(files, "tokenizer_config.json") if files.has("tokenizer_config.json") else {}
    template = _template(files, options)
    count = count_tokens(data, template)
    if count > vocab:
        raise IntegrityError("integrity", f"{file} has {count} tokens, the model only {vocab}", _AGAIN)
    return FolderText(data, template, _stop_tokens(files, document, vocab))


def _tokenizer_hint(files: SourceFiles) -> str:
    path = files.folder
    if files.has("tokenizer.model"):
        convert = f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        return (
            f"tokenizer.model is the older form: convert it where transformers is installed, with {convert}, "
            "or import a GGUF of the model"
        )
    return "models without one cannot be imported"


def _template(files: SourceFiles, options: Mapping[str, Any]) -> str:
    path, found = files.folder, options.get("chat_template")
    if files.has("chat_template.jinja"):
        try:
            found = _read(files, "chat_template.jinja").decode()
        except UnicodeDecodeError as error:
            raise IntegrityError("integrity", f"{path / 'chat_template.jinja'} is not UTF-8", _AGAIN) from error
    elif isinstance(found, list):  # several by name
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        hint = "put the template into chat_template.jinja beside it (an empty file for a model that cannot chat)"
        raise IntegrityError("integrity", f"{path / 'tokenizer_config.json'} has no chat_template", hint)
    lines = ""
    for key in ("bos_token", "eos_token"):
        token = options.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and key in found:
            lines += f"{{%- set {key} = {json.dumps(text)} +%}}"
    return lines + found


def _stop_tokens(files: SourceFiles, document: Mapping[str, Any], vocab: int) -> tuple[int, ...]:
    """The ids that the folder names, then control tokens that end an answer whatever the folder says."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _json(files, name).get("eos_token_id") if files.has(name) else None
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < vocab:
                raise IntegrityError(
                    "integrity", f"{files.folder / name}: eos_token_id {token!r} is outside the vocabulary"
                )
            ids.append(token)
    added = document.get("added_tokens") or []
    special = {str(token["content"]): token["id"] for token in added if token.get("special")}
    ids += sorted(number for text, number in special.items() if ends_answer(text, special))
    return tuple(dict.fromkeys(ids))


def _weight_files(files: SourceFiles) -> list[str]:
    """The safetensors files: those that the index names, or else all."""
    path = files.folder
    if files.has(_INDEX):
        index = _json(files, _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise IntegrityError("integrity", f"{path / _INDEX} has no weight_map of texts", _AGAIN)
        names = sorted(set(index.values()))
        for name in names:
            if Path(name).name != name:
                raise IntegrityError("integrity", f"{path / _INDEX} names {name[:80]!r}, not a file of its folder")
    else:
        names = [name for name in files.names() if name.endswith(".safetensors")]
    if not names:
        raise LocalError("not_found", f"{path} has no .safetensors file", "other weight formats cannot be imported")
    for name in names:
        if not files.has(name):
            raise LocalError("not_found", f"{path / name} is missing", f"{_INDEX} names it; download it")
    return names


def _read(files: SourceFiles, name: str) -> bytes:
    """A small file. Raises IntegrityError for one that is not plain or not small, LocalError."""
    with opened(files, name) as file:
        data = file.read(JSON_BYTES_MAX + 1)
    if len(data) > JSON_BYTES_MAX:
        raise IntegrityError("integrity", f"{files.folder / name} exceeds the limit of {JSON_BYTES_MAX} bytes")
    return data


def _json(files: SourceFiles, name: str) -> dict[str, Any]:
    path = files.folder / name
    try:
        value = json.loads(_read(files, name))
    except OSError as error:
        raise LocalError("local", f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError("integrity", f"{path} is not readable JSON: {error}", _AGAIN) from error
    if not isinstance(value, dict):
        raise IntegrityError("integrity", f"{path} is not a JSON object", _AGAIN)
    return value


def _map(files: SourceFiles, name: str) -> mmap.mmap:
    path = files.folder / name
    try:
        return mapped(files, name)
    except OSError as error:
        raise LocalError("local", f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise IntegrityError("integrity", f"{path} is not a whole safetensors file: {error}", _AGAIN) from error


def _tensors(path: Path, data: mmap.mmap) -> dict[str, _Tensor]:
    try:
        size = tensorfile.header_size(data[:8], len(data), HEADER_BYTES_MAX)
        entries = tensorfile.parse(data[8 : 8 + size], len(data) - 8 - size, _ITEM_BYTES)
        return {name: _tensor(path, entry, data, 8 + size) for name, entry in entries.items()}
    except ValueError as error:
        raise IntegrityError("integrity", f"{path} is not a whole safetensors file: {error}", _AGAIN) from error


def _tensor(path: Path, entry: tensorfile.Entry, data: mmap.mmap, start: int) -> _Tensor:
    if entry.dtype not in _KINDS:
        return _Tensor(path, entry.dtype, None, entry.shape)
    kind, count = _KINDS[entry.dtype], math.prod(entry.shape)
    bits = np.frombuffer(data, kind, count, start + entry.begin) if count else np.zeros(0, kind)
    return _Tensor(path, entry.dtype, bits.reshape(entry.shape), entry.shape)
