"""Hostile files of every kind, made on the spot. Each case names the rule that its refusal must name.

A case gets an empty folder, puts its file there and hands back what opens it, as a node or an import would. They are
run by ``runner.py`` in a process with limits, so that one that hangs or eats memory fails its test and nothing else.
"""

import json
import os
import shutil
import socket
import struct
from dataclasses import dataclass
from functools import cache, partial

import msgspec
import numpy as np

from config.generation import Constraint, Message
from dmoe import textaside
from dmoe.constraint import Constraints
from dmoe.core.manifest import Manifest
from dmoe.importer.build import Wishes, import_gguf, import_model
from dmoe.importer.files import DiskFiles
from dmoe.importer.folder import FolderSource, folder_text
from dmoe.importer.sources import GgufSource
from dmoe.shardfile import ShardFile
from dmoe.store import ModelStore
from dmoe.text import Tokenizer
from dmoe.textaside import AsideTokenizer
from tests.unit.dmoe.folder_kit import VOCAB, write_folder
from tests.unit.dmoe.model_kit import PUBLISHER, write_gguf
from tests.unit.dmoe.swarm_kit import make_manifest

textaside.CHAT_SECONDS = textaside.ENCODE_SECONDS = 1.0
textaside.OPEN_SECONDS = 20.0


@dataclass(frozen=True)
class Case:
    name: str
    rule: str
    """What its refusal says. Empty: it need not be refused, only harm nobody."""
    make: object


CASES: list[Case] = []


def case(rule, *names):
    """Register a maker; with names, one case for each, which the maker is called with."""

    def add(make):
        for name in names or ("",):
            title = f"{make.__name__}{f'[{name}]' if name else ''}"
            CASES.append(Case(title, rule, partial(make, name) if name else make))
        return make

    return add


def table(title, rows, make):
    """One case for each row: its name, what the maker is called with, and last the rule."""
    for name, (*given, rule) in rows.items():
        CASES.append(Case(f"{title}[{name}]", rule, partial(make, *given)))


# --- a shard's path


def stored(folder):
    """A store with one model, and the path of its first expert file."""
    write_gguf(folder / "tiny.gguf")
    store = ModelStore(folder / "store")
    manifest = import_gguf(folder / "tiny.gguf", store, PUBLISHER)
    shard = manifest.expert_shards()[0]
    return store, manifest, shard, store.path(manifest.model_id, shard.files[0])


def shard_path(kind, folder):
    store, manifest, shard, path = stored(folder)
    outside = folder / "outside"
    shutil.copy(path, outside)
    if kind == "linked_folder":
        moved = folder / "moved"
        path.parent.rename(moved)
        path.parent.symlink_to(moved)
    elif kind == "hard_link":
        os.link(path, folder / "other name")
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "longer":
        path.write_bytes(outside.read_bytes() + b"more")
    elif kind == "altered":
        path.write_bytes(outside.read_bytes()[:-1] + b"\xff")
    else:
        path.unlink()
        if kind == "symbolic_link":
            path.symlink_to(outside)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            os.chdir(path.parent)  # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
    return lambda: store.open_shard(manifest, shard)


PATHS = {
    "symbolic_link": "symbolic link",
    "linked_folder": "symbolic link",
    "hard_link": "hard links",
    "pipe": "is a pipe",
    "socket": "is a socket",
    "folder": "is a folder",
    "truncated": "truncated or altered",
    "longer": "truncated or altered",
    "altered": "its hash is wrong",
}
table("shard_path", {kind: (kind, rule) for kind, rule in PATHS.items()}, shard_path)


@case("symbolic link")
def manifest_is_a_link(folder):
    store, manifest, _, _ = stored(folder)
    path = store.root / manifest.model_id / "manifest.json"
    shutil.move(path, folder / "elsewhere.json")
    path.symlink_to(folder / "elsewhere.json")

    def read():
        raise next(iter(ModelStore(store.root).damaged.values()))

    return read


# --- a manifest


def signed(manifest, **changes):
    """The bytes of a manifest with these changes, signed by who made it."""
    fields = msgspec.to_builtins(manifest)
    for path, value in changes.items():
        target = fields
        *way, last = path.split("__")
        for step in way:
            target = target[int(step) if step.isdigit() else step]
        target[last] = value
    changed = msgspec.convert(fields, Manifest)
    return changed.sign(PUBLISHER).to_json()


def parse(data):
    return lambda: Manifest.parse(data)


NAMES = {
    "absolute": "/etc/passwd",
    "above": "../../outside",
    "inside and above": "a/../../b",
    "backslash": "a\\..\\b",
    "nul": "a\x00b",
    "capitals": "Trunk.bin",
    "overlong": "a" * 300,
    "empty": "",
    "hidden": ".bashrc",
    "a letter that looks like another": "\u0430.bin",
}


def manifest_path(path, folder):
    return parse(signed(make_manifest(), shards__0__files__0__path=path))


table("manifest_path", {name: (path, "is not a plain relative path") for name, path in NAMES.items()}, manifest_path)


@case("two files have one path", "its own name", "another shard's")
def manifest_path_twice(kind, folder):
    manifest = make_manifest()
    path = "manifest.json" if kind == "its own name" else manifest.shards[1].files[0].path
    return parse(signed(manifest, shards__0__files__0__path=path))


LIES = {
    "layers": ("architecture__layers", 10**9, "architecture.layers = 1000000000"),
    "experts": ("architecture__router__experts", 10**9, "router.experts = 1000000000"),
    "head_dim": ("architecture__head_dim", 0, "architecture.head_dim = 0"),
    "hidden": ("architecture__hidden", -1, "architecture.hidden = -1"),
    "vocab": ("architecture__vocab", 1 << 40, "architecture.vocab"),
    "context": ("architecture__context", 10**12, "architecture.context"),
    "top_k": ("architecture__router__top_k", 10**6, "router.top_k"),
    "terabytes": ("architecture__intermediate", 1 << 18, "weights that its architecture demands"),
    "vocabulary": ("architecture__vocab", 1 << 21, "weights that its architecture demands"),
    "memory": ("shards__0__ram_bytes", 1, "says it needs 1 of memory"),
    "file_size": ("shards__0__files__0__size_bytes", 1 << 60, "bytes"),
    "no_chunks": ("shards__0__files__0__chunks", [], "wrong chunk count"),
    "no_layers": ("shards__0__layers", [3, 2], "holds layers 3..2"),
    "far_layers": ("shards__0__layers", [0, 10**9], "of 4"),
    "stop_token": ("stop_tokens", [10**9], "outside the vocabulary"),
    "template": ("chat_template", "x" * (2 << 20), "chat template is longer"),
    "theta": ("architecture__rope_theta", 1e300, "rope_theta"),
}


def manifest_lies(path, value, folder):
    return parse(signed(make_manifest(), **{path: value}))


table("manifest_lies", LIES, manifest_lies)


@case("a rope over")
def manifest_with_an_endless_rope(folder):
    return parse(
        signed(make_manifest(), architecture__context=1 << 22, architecture__head_dim=1024, architecture__hidden=8)
    )


@case("MiB of key/value cache")
def manifest_whose_every_token_needs_gigabytes(folder):
    wide = {"heads": 1024, "kv_heads": 1024, "head_dim": 1024, "layers": 1024, "hidden": 1}
    return parse(signed(make_manifest(), **{f"architecture__{name}": value for name, value in wide.items()}))


@case("does not hold")
def manifest_signed_by_another(folder):
    data = signed(make_manifest())
    return parse(data.replace(b'"tiny"', b'"tinx"'))


@case("not in canonical encoding")
def manifest_with_a_key_twice(folder):
    data = signed(make_manifest())
    return parse(data[:-1] + b',"name":"other"}')


@case("manifest:")
def manifest_nested_deeply(folder):
    return parse(b'{"architecture":' * 100_000)


@case("exceed the limit")
def manifest_too_large(folder):
    return parse(b" " * (17 << 20))


@case("")
def manifest_with_very_many_shards(folder):
    """Its checks take no longer than its bytes do: 1024 layers of 32 groups, 512 stages."""
    manifest = make_manifest(top_k=2, experts_per_group=1)
    arch = msgspec.structs.replace(
        manifest.architecture,
        layers=1024,
        router=msgspec.structs.replace(manifest.architecture.router, experts=32),
    )
    one, trunk = manifest.shards[0], msgspec.structs.replace(manifest.trunk, layers=(0, 1023))
    shards = [
        msgspec.structs.replace(
            one,
            id=f"e{layer}-{group}",
            layers=(layer, layer),
            group=group,
            experts=(group,),
            files=(msgspec.structs.replace(one.files[0], path=f"e{layer}-{group}"),),
        )
        for layer in range(1024)
        for group in range(32)
    ]
    many = msgspec.structs.replace(
        manifest, architecture=arch, sum_groups=tuple((n,) for n in range(32)), shards=(*shards, trunk)
    )
    return parse(many.sign(PUBLISHER).to_json())


# --- a shard's bytes


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def shard_of(folder, header, data=b"\x00" * 16, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path = folder / "shard.safetensors"
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return lambda: ShardFile(path).check_numbers()


TWO = {"a": entry(), "b": entry(offsets=(16, 32))}
HEADERS = {
    "length prefix": (dict(header={"t": entry()}, size=(1 << 64) - 1), "is impossible"),
    "longer than the file": (dict(header={"t": entry()}, size=4096), "is impossible"),
    "nested": (dict(header=b"[" * 500_000), "nested too deeply"),
    "nested objects": (dict(header=b'{"a":' * 500_000), "nested too deeply"),
    "not an object": (dict(header=b"[1,2,3]"), "not an object"),
    "not unicode": (dict(header=b'{"\xff": 1}'), "not JSON"),
    "a key twice": (dict(header=b'{"t":{"dtype":"F32"},"t":1}'), "twice"),
    "overlap": (dict(header={"a": entry(), "b": entry(offsets=(8, 24))}, data=bytes(24)), "overlaps"),
    "the same bytes": (dict(header={"a": entry(), "b": entry()}), "overlaps"),
    "gap": (dict(header={"a": entry(), "b": entry(offsets=(24, 40))}, data=bytes(40)), "gap"),
    "outside": (dict(header={"t": entry(shape=(400,), offsets=(0, 1600))}), "outside the file"),
    "negative": (dict(header={"t": entry(offsets=(-16, 0))}), "impossible"),
    "backwards": (dict(header={"t": entry(offsets=(16, 0))}), "ends before it begins"),
    "overflow": (dict(header={"t": entry(shape=(1 << 44,) * 4)}), "does not fit its bytes"),
    "overflow to 0": (dict(header={"t": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))}), "does not fit its bytes"),
    "dimensions": (dict(header={"t": entry(shape=(1,) * 4000 + (4,))}), "dimensions"),
    "nothing": (dict(header={"t": entry(shape=(0, 4), offsets=(0, 0))}, data=b""), "impossible shape"),
    "scalar": (dict(header={"t": entry(shape=(), offsets=(0, 4))}, data=bytes(4)), "impossible shape"),
    "a float for a size": (dict(header={"t": entry(shape=(4.0,))}), "impossible"),
    "true for a size": (dict(header={"t": entry(shape=(True,), offsets=(0, 4))}, data=bytes(4)), "impossible"),
    "a number of 5000 digits": (dict(header=b'{"t":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "integer"),
    "unknown type": (dict(header={"t": entry(dtype="F8_E9M9")}), "not one of"),
    "more fields": (dict(header={"t": {**entry(), "exec": "rm"}}), "described wrongly"),
    "trailing bytes": (dict(header={"t": entry()}, data=bytes(17)), "belong to none"),
    "long name": (dict(header={"t" * 4000: entry()}), "1 to 512 characters"),
    "not finite": (dict(header={"t": entry()}, data=struct.pack("<4f", 1, 2, float("nan"), 4)), "not finite"),
    "infinite bf16": (dict(header={"t": entry("BF16", (8,))}, data=b"\x80\x7f" * 8), "not finite"),
    "infinite f16": (dict(header={"t": entry("F16", (8,))}, data=b"\x00\xfc" * 8), "not finite"),
    "subnormal": (
        dict(header={"t": entry(shape=(1024,), offsets=(0, 4096))}, data=b"\x01\x00\x00\x00" * 1024),
        "computing with them crawls",
    ),
    "unaligned": (
        dict(header={"a": entry("U8", (1,), (0, 1)), "b": entry(offsets=(1, 17))}, data=bytes(17)),
        "aligned",
    ),
}


table("shard_header", HEADERS, lambda options, folder: shard_of(folder, **options))


@case("more than")
def shard_header_with_very_many_tensors(folder):
    entries = ",".join(f'"{n}":0' for n in range(600_000))
    return shard_of(folder, b"{" + entries.encode() + b"}")


@case("is impossible")
def shard_without_bytes(folder):
    path = folder / "short"
    path.write_bytes(b"\x01")
    return lambda: ShardFile(path)


# --- GGUF


def text_of(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key_of(name, kind, value):
    return text_of(name) + struct.pack("<I", kind) + value


def tensor_of(name, shape=(32,), kind=0, offset=0):
    return text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_of(folder, keys=(), tensors=(), counts=None, data=bytes(4096), head=b"GGUF", version=3):
    path = folder / "model.gguf"
    counted = counts or (len(tensors), len(keys))
    body = head + struct.pack("<IQQ", version, *counted) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(body + bytes(-len(body) % 32) + data)
    return lambda: GgufSource(path)


_U8, _U32, _STRING, _ARRAY = 0, 4, 8, 9
NESTED = struct.pack("<IQ", _ARRAY, 1) * 20_000 + struct.pack("<IQB", _U8, 1, 0)
GGUFS = {
    "keys": (dict(counts=(0, 1 << 63)), "it counts"),
    "tensors": (dict(counts=((1 << 64) - 1, 0)), "it counts"),
    "fewer keys than counted": (dict(counts=(0, 60_000), data=b""), "a key's name has"),
    "magic": (dict(head=b"GGML"), "does not begin with GGUF"),
    "version": (dict(version=77), "version 77"),
    "nested arrays": (dict(keys=[key_of("k", _ARRAY, NESTED)]), "array of arrays"),
    "array length": (dict(keys=[key_of("k", _ARRAY, struct.pack("<IQ", _U8, 1 << 62))]), "elements"),
    "array of very many": (
        dict(keys=[key_of("k", _ARRAY, struct.pack("<IQ", _U8, 9 << 20) + bytes(9 << 20))]),
        "elements",
    ),
    "text length": (dict(keys=[key_of("k", _STRING, struct.pack("<Q", 1 << 62))]), "holds a text of"),
    "name length": (dict(keys=[struct.pack("<Q", 1 << 40)]), "name has"),
    "key twice": (dict(keys=[key_of("k", _U8, b"\1"), key_of("k", _U8, b"\2")]), "twice"),
    "unknown kind": (dict(keys=[key_of("k", 99, b"")]), "unknown type"),
    "alignment": (dict(keys=[key_of("general.alignment", _U32, struct.pack("<I", 0))]), "general.alignment = 0"),
    "tensor twice": (dict(tensors=[tensor_of("t"), tensor_of("t", offset=128)]), "twice"),
    "overlap": (dict(tensors=[tensor_of("a"), tensor_of("b", offset=96)]), "overlaps"),
    "unaligned": (dict(tensors=[tensor_of("a", offset=4)]), "not aligned"),
    "outside": (dict(tensors=[tensor_of("a", offset=1 << 40)]), "outside the file"),
    "shape": (dict(tensors=[tensor_of("a", (1 << 62, 4))]), "impossible shape"),
    "overflow to 0": (dict(tensors=[tensor_of("a", (1 << 32, 1 << 32))]), "impossible shape"),
    "nothing": (dict(tensors=[tensor_of("a", (0,))]), "impossible shape"),
    "dimensions": (dict(tensors=[tensor_of("a", (1,) * 200)]), "200 dimensions"),
    "unknown type": (dict(tensors=[tensor_of("a", kind=999)]), "unknown type"),
    "half a block": (dict(tensors=[tensor_of("a", (33,), kind=2)]), "do not fill"),
}


table("gguf", GGUFS, lambda options, folder: gguf_of(folder, **options))


@case("not a file")
def gguf_that_is_a_pipe(folder):
    os.mkfifo(folder / "model.gguf")
    return lambda: GgufSource(folder / "model.gguf")


def gguf_lies(key, value, folder):
    write_gguf(folder / "tiny.gguf", change={key: value})
    return lambda: import_gguf(folder / "tiny.gguf", ModelStore(folder / "store"), PUBLISHER)


METADATA = {
    "blocks": ("llama.block_count", 4_000_000_000, "architecture.layers"),
    "heads": ("llama.attention.head_count", 0, "architecture.heads"),
    "width": ("llama.feed_forward_length", 4_000_000_000, "architecture.intermediate"),
}
table("gguf_lies", METADATA, gguf_lies)


# --- a folder in Hugging Face layout


def importing(folder):
    return lambda: import_model(folder, ModelStore(folder.parent / "store"), PUBLISHER, Wishes())


def tiny(folder):
    return write_folder(folder / "tiny", "llama") or folder / "tiny"


def index_of(path, name):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))


@case("not a file of its folder", "../outside.safetensors", "/etc/passwd", "sub/../../x")
def folder_index_leaves_the_folder(name, folder):
    path = tiny(folder)
    index_of(path, name)
    return importing(path)


@case("symbolic link", "weights", "config", "tokenizer")
def folder_links_out(kind, folder):
    path = tiny(folder)
    name = {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[kind]
    found = next(path.glob("*.safetensors")) if kind == "weights" else path / name
    moved = folder / "outside"
    shutil.move(found, moved)
    found.symlink_to(moved)
    return importing(path)


UNPICKLED = "/tmp/rios-hostile-was-unpickled"


class Pickled:
    """Whoever unpickles it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, (UNPICKLED,)


@case("no .safetensors file")
def folder_with_a_pickle_only(folder):
    import pickle

    path = tiny(folder)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
    return importing(path)


@case("safetensors file")
def folder_whose_index_names_a_pickle(folder):
    import pickle

    path = tiny(folder)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()) + bytes(100))
    index_of(path, "pytorch_model.bin")
    return importing(path)


@case("is not readable JSON")
def folder_config_nested_deeply(folder):
    path = tiny(folder)
    (path / "config.json").write_bytes(b'{"a":' * 500_000)
    return lambda: FolderSource(path)


@case("architecture.layers")
def folder_config_that_lies(folder):
    path = tiny(folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9, "vocab_size": 10**12}))
    return importing(path)


# --- tokenizers and templates


def tokenizer_json(**changes):
    """A byte-level tokenizer."""
    letters = {chr(code): number for number, code in enumerate(range(33, 127))}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": letters, "merges": []},
    }
    return json.dumps({**document, **changes}).encode()


def chatting(template, tokenizer=None):
    def chat():
        made = AsideTokenizer(tokenizer or tokenizer_json(), template)
        try:
            made.chat([Message(role="user", content="hello there")])
        finally:
            made.close()

    return chat


ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
DOUBLING = (
    "{% set n = namespace(t='xxxxxxxx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
    "{{ n.t | length }}"
)
TEMPLATES = {
    "endless loops": (ENDLESS, "took longer than 1 s"),
    "endless text": (ENDLESS.replace("{% endfor %}", "xxxxxxxx{% endfor %}", 1), "longer than"),
    "range": ("{% for a in range(10**9) %}x{% endfor %}", "too big"),
    "huge text": ("{{ ('x' * 10**10) | length }}", "memory"),
    "doubling": (DOUBLING, "the model's tokenizer or chat template"),
    "padding": ("{{ 'x' | center(10**11) | length }}", "memory"),
    "power": ("{% set n = 9 %}{{ (n ** (n ** n)) % 7 }}", "took longer than 1 s"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "recursion": ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
    "import": ("{% import 'os' as os %}{{ os.system('id') }}", "loader"),
    "changing messages": ("{{ messages.append(1) }}", "unsafe"),
    "nested": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", ""),
    "many blocks": ("{% if 1 %}" * 20_000 + "{% endif %}" * 20_000, ""),
}
CASES += [
    Case(f"template[{name}]", rule, lambda folder, template=template: chatting(template))
    for name, (template, rule) in TEMPLATES.items()
]


def encoding(text, **changes):
    def encode():
        made = AsideTokenizer(tokenizer_json(**changes))
        try:
            made.encode(text)
        finally:
            made.close()

    return encode


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@case("was stopped")
def tokenizer_pattern_that_backtracks(folder):
    return encoding("a" * 40 + "!", pre_tokenizer=split_by("(a+)+$"))


@case("")
def tokenizer_pattern_that_looks_back(folder):
    return encoding("ab" * 20_000, normalizer={"type": "Replace", "pattern": {"Regex": "(.*)*x"}, "content": ""})


@case("stopped")
def tokenizer_growing_text(folder):
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 4096}
    return encoding("a", normalizer={"type": "Sequence", "normalizers": [grow] * 4})


@case("memory")
def tokenizer_with_an_id_beyond_all(folder):
    model = {"type": "BPE", "vocab": {"a": 0, "b": (1 << 32) - 1}, "merges": []}
    return lambda: AsideTokenizer(tokenizer_json(model=model))


@case("cannot be read")
def tokenizer_nested_deeply(folder):
    return lambda: AsideTokenizer(b'{"a":' * 200_000)


@case("cannot be read")
def tokenizer_with_merges_of_nothing(folder):
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [["zz", "yy"]] * 300_000}
    return lambda: AsideTokenizer(tokenizer_json(model=model))


@case("")
def tokenizer_with_very_many_control_tokens(folder):
    added = [
        {
            "id": 94 + n,
            "content": f"<|{n}|>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for n in range(100_000)
    ]
    return chatting("{{ messages[0].content * 1000 }}", tokenizer_json(added_tokens=added))


@case("tokens, the model only")
def tokenizer_of_another_model(folder):
    path = tiny(folder)
    return lambda: folder_text(DiskFiles(path), VOCAB // 2)


@case("took longer than 1 s")
def import_with_a_template_bomb_answers_nothing_but_an_error(folder):
    path = folder / "bomb.gguf"
    write_gguf(path, change={"tokenizer.chat_template": ENDLESS})
    store = ModelStore(folder / "store")
    manifest = import_gguf(path, store, PUBLISHER)
    return chatting(manifest.chat_template, store.read(manifest, manifest.tokenizer))


# --- what users ask for


def deep(schema, times):
    for _ in range(times):
        schema = {"type": "array", "items": schema}
    return schema


GRAMMARS = {
    "counted": ("regex", "((((a{1,500}){1,500}){1,500}){1,500})"),
    "doubling": ("regex", "(a|b)*a" + "(a|b)" * 400),
    "nested": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "alternatives": ("regex", "|".join(f"{n}.*{n}" for n in range(3000))),
    "schema nested": ("json", json.dumps(deep({"type": "string"}, 900))),
    "schema without end": ("json", json.dumps({"$ref": "#"})),
    "schema items": ("json", json.dumps({"type": "array", "items": {}, "minItems": 10**9})),
    "schema text": ("json", json.dumps({"type": "string", "minLength": 10**9})),
    "schema alternatives": (
        "json",
        json.dumps({"anyOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(60)]} for i in range(60)]}),
    ),
    "schema all of": (
        "json",
        json.dumps({"allOf": [{"anyOf": [{"pattern": f".*{i}.*"}, {"minLength": i}]} for i in range(24)]}),
    ),
    "schema remote": ("json", json.dumps({"$ref": "http://127.0.0.1:1/x"})),
    "schema pattern": ("json", json.dumps({"type": "string", "pattern": "^(a+)+(b+)+(.*x){50}$"})),
    "grammar ambiguous": ("grammar", 'start: a\na: a a | a a a | "x" | '),
    "grammar without end": ("grammar", "start: a\na: b\nb: a"),
    "grammar exponential": (
        "grammar",
        "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(40)) + '\na40: "x"',
    ),
    "choices": ("choice", json.dumps(["x" * 50 + str(n) for n in range(4096)])),
}


@cache
def constraints():
    """One process for all of them: what one does harms no other."""
    return Constraints(Tokenizer(tokenizer_json()), ())


def constraining(kind, text):
    def compile_it():
        state = constraints().compile_here(Constraint(kind=kind, text=text)).begin()
        for _ in range(3):
            scores = state.mask(np.zeros(94, np.float32))
            state.accept(int(np.argmax(scores)))

    return compile_it


CASES += [
    Case(f"grammar[{name}]", "", lambda folder, kind=kind, text=text: constraining(kind, text))
    for name, (kind, text) in GRAMMARS.items()
]
