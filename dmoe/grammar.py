"""The structure library, llguidance: JSON schemas, regular expressions, choices and grammars over one model's tokens.

Owns: the library, the limits it works under, and what its refusals become. Does not own: the process in which it runs
(``dmoe/grammarwork``) and who asks (``dmoe/constraint``).

Invariants:

1. A constraint is checked as a whole before an answer begins: what cannot be read, is not supported or can never be
   satisfied is refused then.
2. Compiling and masking have bounds on text, symbols, states and steps.
3. Control tokens other than the model's stop tokens are never part of text that a constraint allows.

Fails with :class:`Refused`, which quotes what the library says.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

import llguidance

from config.generation import ConstraintKind
from dmoe.text import Tokenizer

CHOICES_MAX: Final = 4096
_MESSAGE_CHARACTERS_MAX = 300
_LIMITS: Final = llguidance.LLParserLimits(max_lexer_states=25_000, verbose_errors=False)
_SPACE = r"(\n[ \t]{0,32}| )?"
"""White space in JSON: a line break with its indentation, or one space. Were it free, small models would go on with it
for ever."""


class Refused(Exception):
    """A constraint cannot be kept; why."""


class Grammars:
    """The constraints over one model's tokens. Making it takes about 0.1 s per 50,000 of them."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Sequence[int]) -> None:
        vocabulary = _Vocabulary(tokenizer, tuple(stop_tokens))
        self.mask_bytes = 4 * (len(vocabulary.tokens) // 32 + 1)
        """A bit per token, and up to 32 more."""
        self._tokens = llguidance.LLTokenizer(vocabulary, eos_token=list(vocabulary.ends))  # type: ignore[arg-type]

    def compile(self, kind: ConstraintKind, text: str) -> "State":
        """Check a constraint and make it ready. Raises Refused."""
        try:
            matcher = llguidance.LLMatcher(self._tokens, _grammar(kind, text), log_level=0, limits=_LIMITS)
        except (ValueError, RecursionError) as error:
            raise Refused(_short(str(error))) from error
        state = State(matcher, self.mask_bytes)
        matcher.is_error() or matcher.compute_bitmask()  # the first mask finds what no text can satisfy
        if matcher.is_stopped() and not matcher.is_accepting():  # also after an error
            raise Refused(_short(matcher.get_error()))
        return state


class State:
    """Where one answer is in a constraint."""

    def __init__(self, matcher: llguidance.LLMatcher, mask_bytes: int) -> None:
        self._matcher = matcher
        self._mask_bytes = mask_bytes

    def copy(self) -> "State":
        """Another one that goes on from here."""
        return State(self._matcher.deep_copy(), self._mask_bytes)

    @property
    def done(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> bytes:
        """A bit per token that may come next, least significant first: ``mask_bytes``. Raises Refused."""
        bits = self._matcher.compute_bitmask()
        self._check()
        return bytes(bits).ljust(self._mask_bytes, b"\0")

    def accept(self, token: int) -> None:
        """The answer has one more token. Raises Refused."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise Refused(_short(self._matcher.get_error()))


class _Vocabulary:
    """A model's tokens as llguidance reads them. A model without stop tokens gets one that it does not have."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_tokens: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocabulary)]
        self.special_token_ids = sorted({*tokenizer.control_tokens.values(), *stop_tokens})
        self.ends = stop_tokens
        if not stop_tokens:
            self.ends = (len(self.tokens),)
            self.tokens.append(b"<end>")
            self.special_token_ids += self.ends
        self.eos_token_id = self.ends[0]

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode(errors="replace")
        return list(self._tokenizer.encode(plain, control=False, begin=False))


def _grammar(kind: ConstraintKind, text: str) -> str:
    match kind:
        case "json":
            schema = _object(text)
            return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE})
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        case "choice":
            return llguidance.LLMatcher.grammar_from_lark(_one_of(json.loads(text)))
        case "grammar":
            return llguidance.grammar_from("grammar", text)


def _object(text: str) -> str:
    schema: Any = json.loads(text)
    if isinstance(schema, bool):  # JSON Schema: true is anything, false nothing
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    return json.dumps(schema)


def _one_of(choices: object) -> str:
    if not isinstance(choices, list) or not 0 < len(choices) <= CHOICES_MAX:
        raise ValueError(f"give 1 to {CHOICES_MAX} texts")
    if not all(isinstance(each, str) and each for each in choices):
        raise ValueError("every choice is a text that is not empty")
    return "start: " + " | ".join(map(_quoted, choices))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _short(why: str) -> str:
    """The library's messages end in a listing of the grammar, which the caller has."""
    short = why.split("<non-verbose/>")[0].strip()
    if short in ("", "NoExtension", "NoExtensionBias"):
        short = "no text satisfies it"
    return short if len(short) <= _MESSAGE_CHARACTERS_MAX else short[:_MESSAGE_CHARACTERS_MAX] + " ..."
