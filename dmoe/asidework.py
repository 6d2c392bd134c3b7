"""What the process beside a node does: read a stranger's tokenizer, render its chat template, encode text with it.

Started by ``dmoe/aside.py``: the arguments are its socket's descriptor, how much memory it may take (bytes, beside the
interpreter) and whether it must not run without walls. It ends with that socket.

Invariants:
1. The walls (``dmoe/cells/sandbox``) go up after the imports and before the first question: no file, no network, no
   other process, so much memory. What libraries load late was loaded by a rehearsal before.
2. Every question has an alarm whose default action ends the process, whatever library it is in.
"""

import json
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import msgspec

from config.errors import IntegrityError, LocalError, RequestError
from dmoe.cells import sandbox
from dmoe.text import Tokenizer


def main(arguments: Sequence[str]) -> None:
    """Answer questions until the other side is gone."""
    descriptor, memory_bytes, demanded = map(int, arguments)
    line = socket.socket(fileno=descriptor)
    rehearse()
    profile = sandbox.Profile(calls=("setitimer",), memory_bytes=memory_bytes, fixed=True, demanded=bool(demanded))
    try:
        walls = sandbox.enter([descriptor], profile)
    except LocalError as error:
        _send(line, msgspec.msgpack.encode({"error": error.message}))
        return
    _send(line, msgspec.msgpack.encode({"walls": [asdict(wall) for wall in walls]}))
    work = Work()
    while (question := _receive(line)) is not None:
        seconds, name, *values = msgspec.msgpack.decode(question)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _answer(work.questions[name], values)
        data = msgspec.msgpack.encode(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(line, data)


_VOCABULARY = {"a": 0, "b": 1, "ab": 2}
_REHEARSED = {
    "model": {"type": "BPE", "vocab": _VOCABULARY, "merges": ["a b"]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "added_tokens": [],
}
_REHEARSED_TEMPLATES = (
    "{{ strftime_now('%d %B %Y') }}{{ messages | tojson }}{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].nothing.at.all }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 1 // 0 }}",
    "{% for %}",
)


def rehearsed_json() -> bytes:
    """A small tokenizer file, our own."""
    return json.dumps(_REHEARSED).encode()


def rehearsed_tokenizer(template: str = "") -> Tokenizer:
    """The tokenizer of that file."""
    return Tokenizer(rehearsed_json(), template)


def rehearse() -> None:
    """Use everything once, failures too: libraries import, and the C library reads the time zone, when they are first
    used, and behind the walls they cannot."""
    for template in _REHEARSED_TEMPLATES:
        with suppress(IntegrityError, RequestError):
            tokenizer = rehearsed_tokenizer(template)
            tokenizer.chat_of([{"role": "user", "content": "ab"}], [])
    with suppress(IntegrityError):
        Tokenizer(b"{")


class Work:
    """The questions. The first one is ``open``."""

    def __init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        self.questions: Mapping[str, Callable[..., Any]] = {
            "open": self.open,
            "encode": self.encode,
            "chat": self.chat,
        }

    def open(self, tokenizer_json: bytes, template: str, bos: int | None) -> dict[str, Any]:
        """Read the tokenizer; what the other side needs of it."""
        self._tokenizer = Tokenizer(tokenizer_json, template, bos=bos)
        found = self._tokenizer.template
        return {**self._tokenizer.tables(), "knows_tools": found is not None and found.knows_tools}

    def encode(self, text: str, control: bool, begin: bool) -> tuple[int, ...]:
        """See :meth:`dmoe.text.Tokenizer.encode`."""
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, control=control, begin=begin)

    def chat(self, messages: list[Any], tools: list[Any]) -> tuple[int, ...]:
        """See :meth:`dmoe.text.Tokenizer.chat_of`."""
        assert self._tokenizer is not None
        return self._tokenizer.chat_of(messages, tools)


def _answer(work: Callable[..., Any], arguments: list[Any]) -> tuple[Any, ...]:
    try:
        return "done", work(*arguments)
    except RequestError as error:
        return "request", error.code, error.message, error.hint
    except IntegrityError as error:
        return "integrity", error.code, error.message, error.hint
    except MemoryError:
        return "memory", "integrity", "the model's tokenizer or chat template needs too much memory", ""
    except RecursionError:
        return "integrity", "integrity", "the model's tokenizer or chat template is nested too deeply", ""


def _send(line: socket.socket, data: bytes) -> None:
    line.sendall(len(data).to_bytes(8, "little") + data)


def _receive(line: socket.socket) -> bytes | None:
    head = _exactly(line, 8)
    return None if head is None else _exactly(line, int.from_bytes(head, "little"))


def _exactly(line: socket.socket, count: int) -> bytes | None:
    parts, missing = [], count
    while missing:
        part = line.recv(min(missing, 1 << 20))
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
