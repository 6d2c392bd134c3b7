"""How text is cut before byte-level BPE, by the names that GGUF files give (``tokenizer.ggml.pre``).

Owns: the table of names; the expressions are those of the original models' ``tokenizer.json``. Does not own: the rest
of a tokenizer (``tokenizer``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """``document``: for ``tokenizer.json``. ``ignore_merges``: a word that is a token is not built from its parts.
    ``composed``: text is brought into Unicode's form NFC. ``begins``: a sequence begins with the begin token, unless
    the file says otherwise."""

    document: _Json
    ignore_merges: bool = False
    composed: bool = False
    begins: bool = False


def byte_level(*, use_regex: bool) -> _Json:
    """Bytes as printable characters; with GPT-2's words or within those cut before."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: _Json) -> _Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _cuts(*expressions: str) -> _Json:
    """Each expression cuts the pieces that those before it left; what matches none stays a piece of its own."""
    steps = (
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in expressions
    )
    return _sequence(*steps, byte_level(use_regex=False))


def _words(digits: str, letters: str = r"\p{L}") -> str:
    """The cl100k-style pattern; llama 3 cuts digits in groups of up to three, qwen 2 one by one."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased_words(ending: str, digits: str) -> str:
    """The o200k-style pattern: a word is small letters behind capital ones, or capital letters."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _class(ranges: str) -> str:
    """A class of characters from their code points in hex."""
    return "[" + "".join("-".join(chr(int(code, 16)) for code in span.split("-")) for span in ranges.split()) + "]"


_CASED = _class("""
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1
3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d
a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f
104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
""")
"""DeepSeek's letters that have cases."""
_MARKS = _class("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_EAST = _class("800-9fa5 ac00-d7ff")
_KANA = _class("4e00-9fa5 3040-30ff")
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SINGLE_DIGITS: _Json = {"type": "Digits", "individual_digits": True}

_SMOLLM = PreTokenizer(_sequence(_SINGLE_DIGITS, byte_level(use_regex=True)))
_LLAMA3 = PreTokenizer(_cuts(_words(r"\p{N}{1,3}")), ignore_merges=True, begins=True)
_QWEN2 = PreTokenizer(_cuts(_words(r"\p{N}")), composed=True)
_O200K = PreTokenizer(_cuts(_cased_words(_ENDING, r"\p{N}{1,3}")))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(_cuts(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer(byte_level(use_regex=True)),
    "phi-2": PreTokenizer(byte_level(use_regex=True)),
    "olmo": PreTokenizer(byte_level(use_regex=True), composed=True),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "command-r": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": PreTokenizer(_LLAMA3.document),
    "smaug-bpe": PreTokenizer(_LLAMA3.document),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "qwen35": PreTokenizer(
        _cuts(_words(r"\p{N}", r"[\p{L}\p{M}]").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")), composed=True
    ),
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "tekken": PreTokenizer(_cuts(_cased_words("", r"\p{N}")), ignore_merges=True, begins=True),
    "deepseek-llm": PreTokenizer(_cuts(r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_MARKS}+", r"\s+$", rf"{_EAST}+", r"\p{N}")),
    "deepseek-coder": PreTokenizer(_cuts(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"{_EAST}+", r"\p{N}")),
    "deepseek-v3": PreTokenizer(
        _cuts(
            r"\p{N}{1,3}",
            rf"{_KANA}+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}
