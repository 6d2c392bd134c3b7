"""GGUF metadata to a tokenizer that needs no GGUF: ``tokenizer.json`` for the ``tokenizers`` library.

Owns: the translation of byte-level BPE vocabularies, special tokens, the chat template. Does not own: how text is cut
before (``pretokenizers``), SentencePiece vocabularies (``pieces``), encoding and decoding (``dmoe/text.py``).

Invariants:

1. Token ids are the indices of ``tokenizer.ggml.tokens``; nothing is renumbered.
2. The output depends on the metadata alone and is canonical (sorted keys, no spaces), so its hash is stable.
3. A kind of tokenizer that is not known exactly is refused by name, never approximated.

Fails with IntegrityError ``integrity`` that names the metadata key at fault.
"""

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from config.errors import IntegrityError
from dmoe.importer.pieces import pieces_model, pieces_text
from dmoe.importer.pretokenizers import PRE_TOKENIZERS

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType

_Json = dict[str, Any]


_END_TEXTS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "</s>",
    }
)
"""Control tokens that end an answer whatever the metadata calls them (files often name only one of theirs)."""


def tokenizer_json(metadata: Mapping[str, object]) -> bytes:
    """The bytes of a ``tokenizer.json`` equal to the tokenizer that GGUF ``metadata`` describes.

    ``metadata`` maps GGUF keys to plain values (``str``, ``int``, ``bool``, ``list``). Raises IntegrityError.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise IntegrityError(
            "integrity",
            f"unsupported tokenizer: tokenizer.ggml.model is {kind!r}",
            'byte-level BPE ("gpt2") and SentencePiece ("llama") can be imported',
        )
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise IntegrityError("integrity", "tokenizer.ggml.tokens holds the same token twice", "the file is damaged")
    types = _token_types(metadata, len(tokens))
    parts = _byte_pairs(metadata, tokens) if kind == "gpt2" else _pieces(metadata, tokens, types)
    document = parts | {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
    }
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _byte_pairs(metadata: Mapping[str, object], tokens: Sequence[str]) -> _Json:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise IntegrityError("integrity", f"unsupported tokenizer: tokenizer.ggml.pre is {pre!r}", f"known: {known}")
    vocabulary = {text: number for number, text in enumerate(tokens)}
    cut = PRE_TOKENIZERS[pre]
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {
        "normalizer": {"type": "NFC"} if cut.composed else None,
        "pre_tokenizer": cut.document,
        "post_processor": _begin(metadata, tokens, cut.begins) or plain,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.ignore_merges,
            "vocab": vocabulary,
            "merges": _merges(_texts(metadata, "tokenizer.ggml.merges"), vocabulary),
        },
    }


def _pieces(metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]) -> _Json:
    normalizer, decoder = pieces_text(metadata)
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": _begin(metadata, tokens, True),
        "decoder": decoder,
        "model": pieces_model(metadata, tokens, types),
    }


def stop_tokens(metadata: Mapping[str, object]) -> tuple[int, ...]:
    """Ids that end an answer, the file's end-of-sequence token first, then the rest ascending."""
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    types = _token_types(metadata, len(tokens))
    eos = _token_id(metadata, "tokenizer.ggml.eos_token_id", len(tokens))
    named = [
        _token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in ("eot", "eom", "end_of_turn")
    ]
    vocabulary = frozenset(tokens)
    found = {number for number in named if number is not None}
    found |= {
        number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _CONTROL and ends_answer(text, vocabulary)
    }
    first = () if eos is None else (eos,)
    return (*first, *sorted(found - set(first)))


def bos_token(metadata: Mapping[str, object]) -> int | None:
    """The id of the token that begins a sequence, or None if the file names none."""
    return _token_id(metadata, "tokenizer.ggml.bos_token_id", len(_texts(metadata, "tokenizer.ggml.tokens")))


def chat_template(metadata: Mapping[str, object]) -> str:
    """The file's jinja chat template, with its ``bos_token`` and ``eos_token`` filled in; empty if there is none.

    Setting the two at the top makes the template complete in itself: whoever renders it needs no other metadata.
    """
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise IntegrityError("integrity", "tokenizer.chat_template is not text", "the file is damaged")
    if not template:
        return ""
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    lines = ""
    for name in ("bos", "eos"):
        number = _token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens))
        if number is not None and f"{name}_token" in template:
            lines += f"{{%- set {name}_token = {json.dumps(tokens[number])} +%}}"
    return lines + template


def ends_answer(text: str, vocabulary: Container[str]) -> bool:
    """Whether a control token of this text ends an answer in a model with this vocabulary. gpt-oss ends each of an
    answer's messages, its thoughts too, with ``<|end|>``, and the last one otherwise."""
    return text in _END_TEXTS and not (text == "<|end|>" and "<|return|>" in vocabulary)


def _texts(metadata: Mapping[str, object], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise IntegrityError("integrity", f"{key} is missing or not a list of texts", "the file is damaged")
    return value


def _token_types(metadata: Mapping[str, object], count: int) -> Sequence[int]:
    value = metadata.get("tokenizer.ggml.token_type")
    if value is None:
        return (1,) * count
    if not isinstance(value, (list, tuple)) or len(value) != count or not all(isinstance(kind, int) for kind in value):
        raise IntegrityError(
            "integrity", f"tokenizer.ggml.token_type is not a list of {count} numbers", "the file is damaged"
        )
    return value


def _token_id(metadata: Mapping[str, object], key: str, count: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < count:
        raise IntegrityError("integrity", f"{key} is {value!r}, outside the vocabulary of {count}", "")
    return value


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[_Json]:
    return [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _merges(merges: Sequence[str], vocabulary: Mapping[str, int]) -> list[list[str]]:
    pairs = []
    for number, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise IntegrityError(
                "integrity", f"tokenizer.ggml.merges[{number}] ({merge!r}) does not fit the vocabulary", ""
            )
        pairs.append([left, right])
    return pairs


def _begin(metadata: Mapping[str, object], tokens: Sequence[str], by_default: bool) -> _Json | None:
    """Puts the begin token in front where the model was trained so."""
    bos = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", by_default):
        return None
    begin = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }
