"""SentencePiece vocabularies in GGUF files (``tokenizer.ggml.model = llama``) as a ``tokenizer.json``.

Owns: merges from scores, byte fallback, spaces as U+2581. Does not own: byte-level BPE (``tokenizer``).

SentencePiece joins the two neighbours whose whole has the best score, again and again (github.com/google/sentencepiece,
``bpe_model.cc``). That is BPE whose merges are ranked by the score of what they make.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from config.errors import IntegrityError

_Json = dict[str, Any]

SPACE = "▁"
PIECE_CHARACTERS_MAX = 512
"""Longer tokens are no pieces that merges build: the work grows with the square."""
_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # gguf.TokenType


def pieces_model(metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]) -> _Json:
    """The ``model`` part. Raises IntegrityError if scores are missing or text could not be expressed."""
    vocabulary = {text: number for number, text in enumerate(tokens)}
    unknown = [text for text, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    held = sum(kind == _BYTE for kind in types)
    if held not in (0, 256) or not (held or unknown):
        raise IntegrityError(
            "integrity",
            f"tokenizer.ggml.token_type counts {held} bytes and {len(unknown)} unknown tokens",
            "without a token for every byte, or one for what is unknown, text could not be expressed",
        )
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown[0] if unknown else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": held == 256,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": _merges(tokens, types, _scores(metadata, len(tokens))),
    }


def pieces_text(metadata: Mapping[str, object]) -> tuple[_Json, _Json]:
    """The ``normalizer`` and the ``decoder``."""
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    back: list[_Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "normalizers": steps}, {"type": "Sequence", "decoders": back}


def _scores(metadata: Mapping[str, object], count: int) -> Sequence[float]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list | tuple) or len(scores) != count or not all(type(s) in (int, float) for s in scores):
        raise IntegrityError(
            "integrity", f"tokenizer.ggml.scores is not a list of {count} numbers", "the file is damaged"
        )
    return scores


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Every way to make a piece of two others, best score first; ties by the lower ids of the parts."""
    pieces = {text: number for number, text in enumerate(tokens) if types[number] == _NORMAL}
    found = []
    for text, number in pieces.items():
        if len(text) > PIECE_CHARACTERS_MAX:
            continue
        for cut in range(1, len(text)):
            left, right = pieces.get(text[:cut]), pieces.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], number, left, right))
    return [[tokens[left], tokens[right]] for _, _, left, right in sorted(found)]
