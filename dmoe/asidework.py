"""What the process beside a node does: read a stranger's tokenizer, render its chat template, encode text with it.

Started by ``dmoe/aside.py`` as ``python -m dmoe.asidework MEMORY_BYTES`` with a socket as its input; ends with it.

Invariants:
1. Limits are set after the imports and before the first question: memory, no core, no file to write, few descriptors.
2. Every question has an alarm whose default action ends the process, whatever library it is in.
"""

import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from config.errors import IntegrityError, RequestError
from dmoe.text import Tokenizer

_DESCRIPTORS_MAX = 16


def main() -> None:
    """Answer questions until the other side is gone."""
    line = socket.socket(fileno=0)
    limit(int(sys.argv[1]))
    _send(line, b"")
    work = Work()
    while (question := _receive(line)) is not None:
        seconds, name, *arguments = msgspec.msgpack.decode(question)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _answer(work.questions[name], arguments)
        data = msgspec.msgpack.encode(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(line, data)


def limit(memory_bytes: int) -> None:
    """So much memory more than now, and nothing that is not needed."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: now + memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _DESCRIPTORS_MAX,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


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


if __name__ == "__main__":
    main()
