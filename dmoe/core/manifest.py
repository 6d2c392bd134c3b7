"""What a model is made of: its architecture, its shards, their files and hashes, signed by its publisher.

Owns: the manifest's form, its canonical JSON, its id, its signature and every rule a manifest must keep.
Does not own: files on disk (``dmoe/store``) and graphs (``dmoe/graphs``, built from ``core/architecture``).

Invariants:
1. One manifest has one encoding: JSON with sorted keys and no spaces; anything else is refused.
2. ``model_id`` is the sha256 of that JSON without the signature, so a re-signed manifest keeps its id.
3. A parsed manifest is complete: every (layer with experts, sum group) has exactly one expert shard, and there is a
   trunk.
4. A file path is relative, plain and names one file, so that it can never leave its model's folder.
5. Stages are optional. Where there are any they hold every layer once, and they list files of the trunk and of the
   expert shards, never files of their own.
"""

import re
from bisect import bisect_left, bisect_right
from functools import cached_property
from hashlib import sha256
from typing import Literal, Self

import msgspec

from config.errors import IntegrityError
from config.vocabulary import MIB, ModelId, PeerId, ShardId
from dmoe.core.architecture import BLOCK as BLOCK
from dmoe.core.architecture import Architecture as Architecture
from dmoe.core.architecture import Router as Router
from dmoe.core.architecture import Struct as _Struct
from dmoe.core.variant import demand as _check
from p2p.core.identity import Identity, public_key_of, verify
from p2p.face import ContentFile

FORMAT = "rios-model/1"
SIGNATURE_TAG = b"rios/model/1\x00"
MANIFEST_BYTES_MAX = 16 * MIB
CHUNK_BYTES = MIB
TEMPLATE_CHARACTERS_MAX = 1 << 20
TOKENIZER_BYTES_MAX = 256 * MIB
WEIGHTS_PER_BYTE_MAX = 2
"""Of 4-bit weights; their scales come on top."""

_PATH = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
_HEX64 = re.compile(r"[0-9a-f]{64}")

Quantisation = Literal["source", "fp32", "fp16", "int8", "int4"]


class ModelFile(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file. ``chunks``: sha256 (hex) of every 1 MiB in order."""

    path: str
    sha256: str
    size_bytes: int
    chunks: tuple[str, ...]

    def content(self) -> ContentFile:
        """The same, as the network's blob service wants it."""
        return ContentFile(self.sha256, self.size_bytes, tuple(bytes.fromhex(chunk) for chunk in self.chunks))

    def check(self) -> None:
        """Raise IntegrityError unless path, size and hashes are well formed."""
        plain = _PATH.fullmatch(self.path) is not None and len(self.path) <= 200
        _check(plain, f"file path {self.path[:80]!r} is not a plain relative path")
        _check(0 < self.size_bytes <= 1 << 44, f"file {self.path} has {self.size_bytes} bytes")
        _check(len(self.chunks) == -(-self.size_bytes // CHUNK_BYTES), f"file {self.path} lists the wrong chunk count")
        hashes = (self.sha256, *self.chunks)
        _check(all(_HEX64.fullmatch(digest) for digest in hashes), f"file {self.path} has a malformed hash")


class Shard(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored, placed and served as one: a sum group of experts over some layers, whole layers (a stage), or the
    trunk."""

    id: ShardId
    kind: Literal["expert", "trunk", "stage"]
    layers: tuple[int, int]
    """First and last layer, both included."""
    group: int
    """Sum group; -1 for the trunk and for a stage."""
    experts: tuple[int, ...]
    files: tuple[ModelFile, ...]
    params: int
    flops_per_row: int
    """Of one layer: multiplications and additions that a row costs if it chose every expert of the group. Of a stage:
    of all its layers, attention's projections and as many experts as a row chooses."""
    ram_bytes: int
    """Without key/value caches."""
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.size_bytes for file in self.files)


class Source(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file the model was made from."""

    name: str
    sha256: str


class Golden(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logits after ``prompt`` for a few top ``tokens``, computed at import; a machine that differs by more than
    ``tolerance`` computes something else."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: tuple[float, ...]
    tolerance: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True, eq=True):
    """A model. ``sum_groups``: expert indices per group, ascending, the same for every layer."""

    format: str = FORMAT
    name: str
    licence: str
    source: Source
    architecture: Architecture
    quantisation: Quantisation
    wire_dtype: Literal["fp16", "fp32"] = "fp16"
    sum_groups: tuple[tuple[int, ...], ...]
    shards: tuple[Shard, ...]
    tokenizer: ModelFile
    chat_template: str
    stop_tokens: tuple[int, ...]
    golden: Golden
    publisher: PeerId
    signature: str = ""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """A manifest from its canonical JSON: form, rules and signature checked.

        Raises IntegrityError naming the fault.
        """
        _check(len(data) <= MANIFEST_BYTES_MAX, f"{len(data)} bytes exceed the limit of {MANIFEST_BYTES_MAX}")
        try:
            manifest = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise IntegrityError("integrity", f"manifest: {error}", "get the model again from its publisher") from error
        _check(manifest.to_json() == data, "not in canonical encoding")
        manifest.check()
        manifest.verify()
        return manifest

    def to_json(self) -> bytes:
        """The canonical bytes."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def is_quantised(self) -> bool:
        """Whether its weights are integers: machines of different kinds are further apart then."""
        return self.quantisation not in ("fp32", "fp16")

    @cached_property
    def _body(self) -> bytes:
        fields = msgspec.to_builtins(self)
        del fields["signature"]
        return msgspec.json.encode(fields, order="sorted")

    @cached_property
    def model_id(self) -> ModelId:
        """sha256 of the canonical JSON without the signature, 64 hex digits."""
        return ModelId(sha256(self._body).hexdigest())

    def sign(self, identity: Identity) -> Self:
        """This manifest signed by its publisher."""
        assert identity.peer_id == self.publisher, "only the publisher named in a manifest signs it"
        return msgspec.structs.replace(self, signature=identity.sign(SIGNATURE_TAG, self._body).hex())

    def verify(self) -> None:
        """Raise IntegrityError unless the publisher's signature holds."""
        try:
            signature = bytes.fromhex(self.signature)
        except ValueError:
            signature = b""
        valid = verify(public_key_of(self.publisher), SIGNATURE_TAG, self._body, signature)
        _check(valid, f"the signature of publisher {self.publisher} does not hold")

    @property
    def experts_per_layer(self) -> int:
        """How many experts a layer has."""
        return self.architecture.router.experts

    @cached_property
    def _sparse(self) -> tuple[int, ...]:
        return self.architecture.sparse_layers

    @cached_property
    def _expert_shards(self) -> dict[tuple[int, int], Shard]:
        found: dict[tuple[int, int], Shard] = {}
        for shard in self.shards:
            if shard.kind == "expert":
                for layer in self.layers_of(shard):
                    _check((layer, shard.group) not in found, f"two shards hold layer {layer} group {shard.group}")
                    found[layer, shard.group] = shard
        return found

    @cached_property
    def _shard_indices(self) -> dict[ShardId, int]:
        return {shard.id: index for index, shard in enumerate(self.shards)}

    @cached_property
    def trunk(self) -> Shard:
        """The trunk shard."""
        return next(shard for shard in self.shards if shard.kind == "trunk")

    def expert_shard(self, layer: int, group: int) -> Shard:
        """The shard that holds a sum group of a layer."""
        return self._expert_shards[layer, group]

    def expert_shards(self) -> tuple[Shard, ...]:
        """All expert shards, in manifest order."""
        return tuple(shard for shard in self.shards if shard.kind == "expert")

    @cached_property
    def stages(self) -> tuple[Shard, ...]:
        """The stages in the order of their layers; none if the model was imported without."""
        return tuple(sorted((shard for shard in self.shards if shard.kind == "stage"), key=lambda shard: shard.layers))

    def shard_index(self, shard_id: ShardId) -> int:
        """A shard's place in ``shards`` (adverts name shards by it). Raises IntegrityError for an unknown id."""
        _check(shard_id in self._shard_indices, f"no shard is called {shard_id[:80]!r}")
        return self._shard_indices[shard_id]

    def layers_of(self, shard: Shard) -> tuple[int, ...]:
        """The layers whose experts an expert shard holds: those of its span that have any."""
        first, last = shard.layers
        return self._sparse[bisect_left(self._sparse, first) : bisect_right(self._sparse, last)]

    def groups_of(self, shard: Shard) -> tuple[int, ...]:
        """The sum groups a shard holds; none for the trunk and for a stage."""
        return (shard.group,) if shard.kind == "expert" else ()

    @property
    def parts(self) -> tuple[Shard, ...]:
        """The shards that hold everything once: without stages, which list the others' files again."""
        return tuple(shard for shard in self.shards if shard.kind != "stage")

    def files(self) -> tuple[ModelFile, ...]:
        """Every file of the model once, the tokenizer's last."""
        return (*(file for shard in self.parts for file in shard.files), self.tokenizer)

    def check(self) -> None:
        """Raise IntegrityError unless the manifest is complete and consistent."""
        _check(self.format == FORMAT, f"format {self.format[:40]!r} is not {FORMAT!r}")
        _check(0 < len(self.name) <= 200, "the name is empty or longer than 200 characters")
        _check(_HEX64.fullmatch(self.source.sha256) is not None, "source.sha256 is malformed")
        self.architecture.check()
        _check(
            len(self.chat_template) <= TEMPLATE_CHARACTERS_MAX, "the chat template is longer than a million characters"
        )
        self._check_shards()
        _check(self.tokenizer.size_bytes <= TOKENIZER_BYTES_MAX, "the tokenizer is larger than 256 MiB")
        paths = [file.path for file in self.files()]
        for file in self.files():
            file.check()
        _check(len(set(paths)) == len(paths) and "manifest.json" not in paths, "two files have one path")
        if self.stages:
            self._check_stages()
        vocab = self.architecture.vocab
        golden = self.golden
        ids = (*self.stop_tokens, *golden.prompt, *golden.tokens)
        _check(all(0 <= token < vocab for token in ids), "a token id is outside the vocabulary")
        _check(
            len(golden.tokens) == len(golden.logits) and 0 < len(golden.prompt) <= 256, "golden logits are malformed"
        )

    def _check_shards(self) -> None:
        layers, experts = self.architecture.layers, self.experts_per_layer
        members = [expert for group in self.sum_groups for expert in group]
        _check(sorted(members) == list(range(experts)), "the sum groups do not hold every expert exactly once")
        _check(all(list(group) == sorted(group) and group for group in self.sum_groups), "a sum group is not ascending")
        _check(len(self._shard_indices) == len(self.shards) <= 1 << 16, "two shards have one id")
        for shard in self.shards:
            first, last = shard.layers
            _check(0 <= first <= last < layers, f"shard {shard.id[:80]} holds layers {first}..{last} of {layers}")
            _check(bool(shard.files), f"shard {shard.id[:80]} has no file")
            _check(
                min(shard.params, shard.flops_per_row, shard.ram_bytes) >= 0, f"shard {shard.id[:80]} counts below 0"
            )
            if shard.kind == "expert":
                _check(0 <= shard.group < len(self.sum_groups), f"shard {shard.id[:80]} names an unknown sum group")
                _check(bool(self.layers_of(shard)), f"shard {shard.id[:80]} spans layers without experts")
                _check(shard.experts == self.sum_groups[shard.group], f"shard {shard.id[:80]} lists the wrong experts")
        trunks = [shard for shard in self.shards if shard.kind == "trunk"]
        _check(len(trunks) == 1 and trunks[0].layers == (0, layers - 1), "there is not exactly one trunk")
        wanted = len(self._sparse) * len(self.sum_groups)
        _check(len(self._expert_shards) == wanted, "a layer lacks a sum group")
        for shard in self.parts:
            self._check_size(shard)

    def _check_size(self, shard: Shard) -> None:
        """The weights that the architecture demands fit the shard's files, and those the memory it says it needs."""
        arch, name, (first, last) = self.architecture, f"shard {shard.id[:80]}", shard.layers
        weights = 3 * arch.hidden * arch.intermediate * len(shard.experts) * len(self.layers_of(shard))
        if shard.kind == "trunk":
            weights = arch.vocab * arch.hidden + sum(map(arch.trunk_weights, range(first, last + 1)))
        fits = weights <= WEIGHTS_PER_BYTE_MAX * shard.size_bytes
        _check(fits, f"{name} has {shard.size_bytes} bytes for {weights} weights that its architecture demands")
        honest = shard.size_bytes <= 4 * shard.ram_bytes
        _check(honest, f"{name} has {shard.size_bytes} bytes and says it needs {shard.ram_bytes} of memory")

    def _check_stages(self) -> None:
        """Every layer in exactly one stage, and every stage made of the others' files."""
        next_layer, everything = 0, tuple(range(self.experts_per_layer))
        begun: dict[int, list[Shard]] = {}
        for shard in self.expert_shards():
            begun.setdefault(shard.layers[0], []).append(shard)
        trunk = {file.path: file for file in self.trunk.files}
        for stage in self.stages:
            name, (first, last) = f"stage {stage.id[:80]}", stage.layers
            _check(first == next_layer, f"{name} begins with layer {first}, not with {next_layer}")
            _check(stage.group == -1 and stage.experts == everything, f"{name} does not list every expert")
            next_layer = last + 1
            # one that began in an earlier stage and reaches into this one was found there
            inside = [shard for layer in range(first, last + 1) for shard in begun.get(layer, ())]
            whole = all(shard.layers[1] <= last for shard in inside)
            _check(whole, f"{name} ends within the layers of an expert shard")
            experts = {file.path: file for shard in inside for file in shard.files}
            listed = {file.path: file for file in stage.files}
            _check(len(listed) == len(stage.files), f"{name} lists a file twice")
            attention = {path: file for path, file in listed.items() if trunk.get(path) == file}
            _check(bool(attention), f"{name} lists no file of the trunk")
            _check(listed == {**experts, **attention}, f"{name} lists other files than its layers have")
        _check(next_layer == self.architecture.layers, f"no stage holds layer {next_layer}")
