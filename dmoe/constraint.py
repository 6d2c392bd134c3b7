"""Constraints by llguidance: JSON schemas, regular expressions, choices and grammars over one model's tokens.

Owns: the library, the limits it works under, and what its refusals become. Does not own: what a mask does to logits
(``dmoe/core/constraint.py``).

Invariants:

1. A constraint is checked as a whole before an answer begins: what cannot be read, is not supported or can never be
   satisfied is refused then.
2. Compiling and masking have bounds on text, symbols, states and steps, so a hostile grammar costs a bounded time (in a
   thread) and about 100 MB at most. The library is memory-safe and refuses deep nesting; it gets no cell of its own.
3. Control tokens other than the model's stop tokens are never part of text that a constraint allows.

Fails with RequestError ``invalid_request`` that quotes what the library says.
"""

import json
from collections.abc import Collection
from typing import Any, Final

import llguidance
import numpy as np
import trio

from config import generation
from config.errors import RequestError
from dmoe.core.constraint import FloatRow, masked
from dmoe.text import Tokenizer

CHARACTERS_MAX: Final = 256 << 10
COMPILE_SECONDS_MAX: Final = 10.0
COMPILES_MAX: Final = 4
"""At once: those that were given up run on for a while, and must not take the threads that passes need."""
CHOICES_MAX: Final = 4096
_MESSAGE_CHARACTERS_MAX = 300
_LIMITS: Final = llguidance.LLParserLimits(max_lexer_states=25_000, verbose_errors=False)
_SPACE = r"(\n[ \t]{0,32}| )?"
"""White space in JSON: a line break with its indentation, or one space. Were it free, small models would go on with it
for ever."""
_NAMES: Final = {"json": "JSON schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}


class Constraints:
    """The constraints of one model. Make it in a thread: it takes about 0.1 s per 50,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Collection[int]) -> None:
        vocabulary = _Vocabulary(tokenizer, tuple(stop_tokens))
        self._tokens = llguidance.LLTokenizer(vocabulary, eos_token=list(vocabulary.ends))  # type: ignore[arg-type]
        self._vocabulary = tokenizer.vocabulary
        self._threads = trio.CapacityLimiter(COMPILES_MAX)

    async def compile(self, wanted: generation.Constraint) -> "Compiled":
        """Check a constraint and make it ready. Raises RequestError."""
        with trio.move_on_after(COMPILE_SECONDS_MAX):
            return await trio.to_thread.run_sync(
                self.compile_here, wanted, abandon_on_cancel=True, limiter=self._threads
            )
        raise _refused(wanted, f"reading it takes longer than {COMPILE_SECONDS_MAX:g} s")

    def compile_here(self, wanted: generation.Constraint) -> "Compiled":
        """The same in this thread."""
        if len(wanted.text) > CHARACTERS_MAX:
            raise _refused(wanted, f"it has {len(wanted.text)} characters, at most {CHARACTERS_MAX} are read")
        matcher = llguidance.LLMatcher(self._tokens, _grammar(wanted), log_level=0, limits=_LIMITS)
        matcher.is_error() or matcher.compute_bitmask()  # the first mask finds what no text can satisfy
        if matcher.is_stopped() and not matcher.is_accepting():  # also after an error
            raise _refused(wanted, matcher.get_error())
        return Compiled(matcher, wanted, self._vocabulary)


class Compilers:
    """The constraints of the models in use, each made once."""

    def __init__(self, models_max: int = 8) -> None:
        self._models_max = models_max
        self._known: dict[str, Constraints] = {}
        self._lock = trio.Lock()

    async def compile(
        self, wanted: generation.Constraint, model: str, tokenizer: Tokenizer, stop_tokens: Collection[int]
    ) -> "Compiled":
        """A constraint over the tokens of the model with this id. Raises RequestError."""
        async with self._lock:
            if model not in self._known:
                if len(self._known) == self._models_max:
                    del self._known[next(iter(self._known))]
                self._known[model] = await trio.to_thread.run_sync(Constraints, tokenizer, stop_tokens)
            found = self._known[model]
        return await found.compile(wanted)


class Compiled:
    """A constraint that was checked; every answer gets a state of its own."""

    def __init__(self, matcher: llguidance.LLMatcher, wanted: generation.Constraint, vocabulary: int) -> None:
        self._matcher = matcher
        self._wanted = wanted
        self._vocabulary = vocabulary

    def begin(self) -> "Constrained":
        """The state of a new answer."""
        return Constrained(self._matcher.deep_copy(), self._wanted, self._vocabulary)


class Constrained:
    """The state of one answer (:class:`dmoe.core.constraint.Constraint`). A mask takes about 10 microseconds, and the
    library's limits keep the worst one near 30 ms, so masks are made on the event loop."""

    def __init__(self, matcher: llguidance.LLMatcher, wanted: generation.Constraint, vocabulary: int) -> None:
        self._matcher = matcher
        self._wanted = wanted
        self._vocabulary = vocabulary

    @property
    def done(self) -> bool:
        """See the Protocol."""
        return self._matcher.is_stopped()

    def mask(self, logits: FloatRow) -> FloatRow:
        """See the Protocol."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocabulary].view(np.bool_)
        if not allowed.any():
            raise _refused(self._wanted, "no token of this model continues the answer")
        return masked(logits, allowed)

    def accept(self, token: int) -> None:
        """See the Protocol."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._wanted, self._matcher.get_error())


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


def _grammar(wanted: generation.Constraint) -> str:
    try:
        match wanted.kind:
            case "json":
                return llguidance.LLMatcher.grammar_from_json_schema(
                    _object(wanted.text), overrides={"whitespace_pattern": _SPACE}
                )
            case "regex":
                return llguidance.LLMatcher.grammar_from_regex(wanted.text)
            case "choice":
                return llguidance.LLMatcher.grammar_from_lark(_one_of(json.loads(wanted.text)))
            case "grammar":
                return llguidance.grammar_from("grammar", wanted.text)
    except (ValueError, RecursionError) as error:
        raise _refused(wanted, str(error)) from error


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


def _refused(wanted: generation.Constraint, why: str) -> RequestError:
    """The library's messages end in a listing of the grammar, which the caller has."""
    short = why.split("<non-verbose/>")[0].strip()
    if short in ("", "NoExtension", "NoExtensionBias"):
        short = "no text satisfies it"
    if len(short) > _MESSAGE_CHARACTERS_MAX:
        short = short[:_MESSAGE_CHARACTERS_MAX] + " ..."
    name = _NAMES[wanted.kind]
    where = f"{wanted.where}: " if wanted.where else ""
    message = f"{where}the {name} cannot be used: {short}"
    return RequestError("invalid_request", message, f"change the {name}", param=wanted.where or None)
