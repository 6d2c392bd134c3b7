"""A stranger's tokenizer and chat template: what runs code or regular expressions of theirs runs in a process aside.

Owns: which half of a :class:`dmoe.text.Tokenizer` is where, and the limits. Tables of bytes, by which answers are
decoded token by token, are here; encoding and templates are there. Blocking: encode in a thread (``is_quick`` is
false).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from config.errors import IntegrityError
from config.generation import Message, Tool
from config.vocabulary import MIB
from dmoe.aside import Aside
from dmoe.cells.sandbox import Wall
from dmoe.text import Tokenizer, check_unicode, plain_messages, plain_tools

MEMORY_BYTES = 1536 * MIB
"""Beside the interpreter. A vocabulary of 256,000 takes a quarter of it while it is read."""
OPEN_SECONDS = 60.0
CHAT_SECONDS = 5.0
ENCODE_SECONDS = 5.0
CHARACTERS_PER_SECOND = 100_000
"""A tenth of what an ordinary tokenizer encodes on a slow machine."""


@dataclass(slots=True)
class _Known:
    """A chat template that is rendered elsewhere."""

    source: str
    knows_tools: bool


class AsideTokenizer(Tokenizer):
    """The tokenizer of a model that others made. Raises IntegrityError where it exceeds its limits."""

    is_quick = False

    def __init__(
        self,
        tokenizer_json: bytes,
        chat_template: str = "",
        *,
        bos: int | None = None,
        demanded: bool = False,
        stopped: Callable[[IntegrityError], None] = lambda error: None,
    ) -> None:
        # it answers one question at a time: those who wait for a slow template hold no thread meanwhile
        self.limiter = trio.CapacityLimiter(1)
        self.source = tokenizer_json
        about = "the model's tokenizer or chat template"
        setup = ("open", tokenizer_json, chat_template, bos)
        self._aside = Aside(about, setup, OPEN_SECONDS, memory_bytes=MEMORY_BYTES, demanded=demanded, stopped=stopped)
        tables = self._aside.start()
        self._use(tables, _Known(chat_template, tables["knows_tools"]) if chat_template else None)

    @property
    def walls(self) -> tuple[Wall, ...]:
        """What is in force around the process."""
        return self._aside.walls

    def encode(self, text: str, *, control: bool = True, begin: bool = True) -> tuple[int, ...]:
        """See :class:`dmoe.text.Tokenizer`."""
        seconds = ENCODE_SECONDS + len(text) / CHARACTERS_PER_SECOND
        return tuple(self._aside.ask(("encode", _sendable(text), control, begin), seconds))

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """See :class:`dmoe.text.Tokenizer`."""
        plain, described = plain_messages(messages), plain_tools(tools)
        size = len(_sendable(json.dumps([plain, described], ensure_ascii=False)))
        seconds = CHAT_SECONDS + 2 * size / CHARACTERS_PER_SECOND
        return tuple(self._aside.ask(("chat", plain, described), seconds))

    def close(self) -> None:
        """End the process; a later question starts another one."""
        self._aside.close()


def _sendable(text: str) -> str:
    """Text that is Unicode. Raises RequestError."""
    check_unicode(text)
    return text
