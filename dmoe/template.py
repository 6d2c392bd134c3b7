"""Chat templates: messages and tools in, the text of a prompt out.

Owns: the environment that templates of transformers expect. Does not own: which of that text may become control tokens
(``dmoe/text.py``).

Invariants:

1. A template runs in jinja's immutable sandbox and its output is bounded. It has no other limits on time or memory:
   those of others' models are rendered in a process that has (``dmoe/textaside.py``).

Fails with IntegrityError for a template that does not parse, RequestError for messages that it refuses.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.errors import IntegrityError, RequestError

PROMPT_CHARACTERS_MAX: Final = 8 << 20
"""Longest prompt rendered from a template; far above any context, it only stops a template that runs away."""


class Template:
    """A compiled chat template. ``source``: its text; ``knows_tools``: it writes tools into the prompt."""

    def __init__(self, source: str, bos: str, now: Callable[[], datetime] = datetime.now) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self.source = source
        self._bos = bos
        try:
            self._template = environment.from_string(source)
            self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise IntegrityError("integrity", f"the model's chat template does not parse: {error}", "") from error

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt. RequestError if the template raises or writes without end."""
        parts, size = [], 0
        try:
            for part in self._template.generate(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token="",
                tools=tools,
                documents=None,
            ):
                size += len(part)
                if size > PROMPT_CHARACTERS_MAX:
                    _refuse(f"the prompt is longer than {PROMPT_CHARACTERS_MAX} characters")
                parts.append(part)
        except jinja2.TemplateError as error:
            _refuse(f"the model's chat template refused the messages: {error.message or type(error).__name__}", error)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            _refuse(f"the model's chat template failed on these messages: {error}", error)
        return "".join(parts)


class Arguments(dict[str, Any]):
    """The arguments of a call for a template: most take a mapping, some write it as text."""

    @classmethod
    def of(cls, text: str) -> Any:  # noqa: ANN401 - JSON
        """From what a model wrote; as it is where that is no JSON object."""
        try:
            value = json.loads(text or "{}")
        except ValueError:
            return text
        return cls(value) if isinstance(value, dict) else text

    def __str__(self) -> str:
        return _tojson(self)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class _Generation(Extension):
    """``{% generation %}``, by which transformers marks the assistant's part for training: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    hint = "check the order and the roles of the messages, or send fewer"
    raise RequestError("invalid_request", message, hint) from cause


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: not escaped for HTML, unlike jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
