"""Calls of functions in an answer, found while it arrives. Pure: text in, text and pieces of calls out.

Owns: telling calls from text. Does not own: how a family writes them (``dmoe/core/toolformats.py``), ids of calls.

Invariants:

1. However the text is cut into pieces, the same text and calls come out (cut into pieces differently).
2. Text that may be the beginning of a call is held back until that is clear; white space before a call is dropped.
3. What is no call after all is text again, whole. A call whose arguments break off keeps what there was of them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from config.generation import ToolDelta
from dmoe.core.jsonscan import Envelope, JsonValue
from dmoe.core.toolformats import HARMONY_MARKS, NAME, ToolFormat

_NAME_CHARACTERS_MAX = 256
_HEADER_CHARACTERS_MAX = 512


@dataclass(slots=True)
class Found:
    """What came out of a piece of the answer, in order of each kind."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolDelta, ...] = ()

    def add(self, *calls: ToolDelta) -> None:
        """Append pieces of calls, those that say something."""
        self.calls += tuple(each for each in calls if each.name or each.arguments)


class Parser(Protocol):
    """A reader of one answer. ``called``: a call was found."""

    called: bool

    def push(self, text: str) -> Found:
        """Take a piece of the answer."""

    def finish(self) -> Found:
        """The answer has ended."""


def parser_of(kind: ToolFormat, names: frozenset[str], new_id: Callable[[], str]) -> Parser:
    """A reader for answers in a format, to a request with functions of these names."""
    return HarmonyParser(new_id) if kind.channels else ToolParser(kind, names, new_id)


class ToolParser:
    """The reader for formats without channels."""

    def __init__(self, kind: ToolFormat, names: frozenset[str], new_id: Callable[[], str]) -> None:
        self.called = False
        self._kind = kind
        self._names = names
        self._new_id = new_id
        self._head = kind.head.partition(NAME)[0].partition("{")[0].rstrip()
        self._state = self._start if kind.bare else self._text
        self._buffer = ""
        self._raw = ""  # of the call that is being read
        self._named = False  # its name is known
        self._count = 0
        self._envelope = Envelope()
        self._value = JsonValue()

    def push(self, text: str) -> Found:
        """See :class:`Parser`."""
        self._buffer += text
        found = Found()
        while self._state(found):
            pass
        return found

    def finish(self) -> Found:
        """See :class:`Parser`."""
        found = self.push("")
        if self._state in (self._name, self._enveloped) and not self._named:
            found.text += self._raw
        elif self._state in (self._text, self._start):
            found.text += self._buffer
        self._buffer = self._raw = ""
        return found

    # Each state reads from the buffer, and says whether another round may find more.

    def _start(self, found: Found) -> bool:
        """Nothing but space so far."""
        begun = self._buffer.lstrip()
        if not begun:
            return False
        if begun[0] == "{":
            return self._begin(0, "")
        self._state = self._text
        return True

    def _text(self, found: Found) -> bool:
        places = [(place, mark) for mark in self._kind.marks if (place := self._buffer.find(mark)) >= 0]
        if not places:
            keep = _held(self._buffer, self._kind.marks)
            found.text += self._buffer[: len(self._buffer) - keep]
            self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        place, mark = min(places)
        found.text += self._buffer[:place].rstrip()
        if mark == self._head:
            return self._begin(place, mark)
        self._buffer = self._buffer[place + len(mark) :]
        self._state = self._between
        return True

    def _begin(self, place: int, mark: str) -> bool:
        """A call begins with ``mark`` at ``place``."""
        self._buffer = self._buffer[place + len(mark) :]
        self._raw, self._named = mark, False
        self._envelope, self._value = Envelope(), JsonValue()
        self._state = self._name if self._kind.name_end else self._enveloped
        return True

    def _between(self, found: Found) -> bool:
        """Behind a call, or behind what opens a list of them."""
        begun = self._buffer = self._buffer.lstrip()
        for mark in self._kind.between:
            if begun.startswith(mark):
                self._buffer = begun[len(mark) :]
                return True
        if self._head and begun.startswith(self._head):
            return self._begin(0, self._head)
        if not self._head and begun.startswith("{"):
            return self._begin(0, "")
        if any(mark.startswith(begun) for mark in (*self._kind.between, self._head, *self._kind.marks)):
            return False  # perhaps the beginning of one, or nothing yet
        self._state = self._text
        return True

    def _name(self, found: Found) -> bool:
        longest = _NAME_CHARACTERS_MAX + len(self._kind.name_end)
        name, mark, rest = self._buffer.partition(self._kind.name_end)
        if len(name) > _NAME_CHARACTERS_MAX and len(self._buffer) >= longest:
            return self._no_call(found, self._head)
        if not mark:
            self._raw = self._head + self._buffer
            return False
        self._buffer = rest
        self._named = True
        self._call(found, name.partition("[CALL_ID]")[0].strip())
        self._state = self._arguments
        return True

    def _arguments(self, found: Found) -> bool:
        before = self._value.started
        count = self._value.push(self._buffer)
        piece, self._buffer = self._buffer[:count], self._buffer[count:]
        self._more(found, piece if before else piece.lstrip())
        if self._value.done:
            self._state = self._between
        return self._value.done

    def _enveloped(self, found: Found) -> bool:
        envelope, piece = self._envelope, self._buffer
        self._buffer = envelope.push(piece)
        if not self._named:
            self._raw += piece[: len(piece) - len(self._buffer)]
            if envelope.name is not None and not (self._kind.bare and envelope.name not in self._names):
                self._named = True
                self._call(found, envelope.name)
            elif envelope.name is not None or envelope.broken or envelope.done:
                return self._no_call(found, self._raw)
        if self._named:
            self._more(found, envelope.take())
        if envelope.broken:  # in the middle of a call: what follows is text
            self._state = self._text
        elif envelope.done:
            self._state = self._between
        return envelope.broken or envelope.done or bool(self._buffer)

    def _no_call(self, found: Found, raw: str) -> bool:
        """What was read of it was text; what follows is read anew."""
        found.text += raw
        self._raw = ""
        self._state = self._text
        return True

    def _call(self, found: Found, name: str) -> None:
        self.called = True
        found.add(ToolDelta(index=self._count, id=self._new_id(), name=name))
        self._count += 1

    def _more(self, found: Found, arguments: str) -> None:
        found.add(ToolDelta(index=self._count - 1, arguments=arguments))


_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser:
    """The reader for gpt-oss: messages of a header and a body. ``analysis`` is reasoning, a message to
    ``functions.NAME`` a call, all else is text. An answer without any header is text."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.called = False
        self._new_id = new_id
        self._buffer = ""
        self._in_header = True
        self._kind = ""  # no header yet
        self._count = 0

    def push(self, text: str) -> Found:
        """See :class:`Parser`."""
        self._buffer += text
        found = Found()
        while self._header(found) if self._in_header else self._body(found):
            pass
        return found

    def finish(self) -> Found:
        """See :class:`Parser`."""
        found = self.push("")
        if not self._in_header or (self._kind == "" and not self._buffer.startswith("<|")):
            self._say(found, self._buffer)
        self._buffer = ""
        return found

    def _header(self, found: Found) -> bool:
        header, mark, rest = self._buffer.partition("<|message|>")
        if mark:
            self._open(found, header)
            self._buffer, self._in_header = rest, False
            return True
        begun = header.lstrip()
        if len(begun) > _HEADER_CHARACTERS_MAX or not any(
            begun.startswith(sign) or sign.startswith(begun) for sign in (*HARMONY_MARKS, "to=", "assistant")
        ):
            self._kind, self._in_header = "text", False
            return True
        return False

    def _open(self, found: Found, header: str) -> None:
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient:
            self._kind, self.called = "call", True
            found.add(ToolDelta(index=self._count, id=self._new_id(), name=recipient[1]))
            self._count += 1
        else:
            self._kind = "reasoning" if channel and channel[1] == "analysis" else "text"

    def _body(self, found: Found) -> bool:
        places = [(place, mark) for mark in HARMONY_MARKS if (place := self._buffer.find(mark)) >= 0]
        if not places:
            keep = _begun(self._buffer, HARMONY_MARKS)
            self._say(found, self._buffer[: len(self._buffer) - keep])
            self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        place, mark = min(places)
        self._say(found, self._buffer[:place])
        rest = self._buffer[place + len(mark) :]
        self._buffer = mark + rest if mark == "<|channel|>" else rest
        self._in_header = True
        return True

    def _say(self, found: Found, piece: str) -> None:
        if self._kind == "call":
            found.add(ToolDelta(index=self._count - 1, arguments=piece))
        elif self._kind == "reasoning":
            found.reasoning += piece
        else:
            found.text += piece


def _held(text: str, marks: tuple[str, ...]) -> int:
    """How much of the end of ``text`` waits: the beginning of a mark, and the white space before it."""
    shown = text[: len(text) - _begun(text, marks)]
    return len(text) - len(shown.rstrip())


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """The length of the longest end of ``text`` that is the beginning of a mark."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0
