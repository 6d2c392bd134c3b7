"""JSON that arrives in pieces: where a value ends, and what a call's envelope holds. Pure; a step per character.

Nothing is validated: a model's text is passed on as it is, only its brackets and quotes are followed.
"""

import json

_SPACE = " \t\n\r"
_ENDS_SCALAR = ",}]" + _SPACE


class JsonValue:
    """Follows one JSON value. ``done``: its last character has been seen."""

    __slots__ = ("_depth", "_escaped", "_in_string", "_scalar", "done", "started")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._scalar = False
        self.started = self.done = False

    def push(self, text: str) -> int:
        """How many characters at the beginning of ``text`` belong to the value, space before it included."""
        for index, character in enumerate(text):
            if self._scalar and character in _ENDS_SCALAR:
                self.done = True
                return index
            self._step(character)
            if self.done:
                return index + 1
        return len(text)

    def _step(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                self.done = self._depth == 0
            return
        if character in _SPACE and not self.started:
            return
        self.started = True
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        elif self._depth == 0:
            self._scalar = True


class Envelope:
    """Follows one ``{"name": ..., "arguments": ...}``, in any order and with any other keys. ``name`` is set once it is
    known; :meth:`take` gives the arguments as they come. ``broken``: this is no object."""

    __slots__ = ("_held", "_key", "_state", "_text", "_value", "broken", "done", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = self.broken = False
        self._state = "open"
        self._key = ""
        self._text = ""  # of the key or the value that is being read
        self._value = JsonValue()
        self._held = ""  # arguments that were not taken yet

    def push(self, text: str) -> str:
        """Take a piece; what is left of it behind the object (or where it broke, or behind the name)."""
        index, named = 0, self.name
        while index < len(text) and not (self.done or self.broken) and self.name is named:
            index += self._read(text[index:]) if self._state in ("key", "value") else self._mark(text[index])
        return text[index:]

    def take(self) -> str:
        """The arguments that came since the last call."""
        held, self._held = self._held, ""
        return held

    def _mark(self, character: str) -> int:
        """A character between keys and values."""
        if character in _SPACE or (character == "," and self._state == "next"):
            return 1
        if character == "{" and self._state == "open":
            self._state = "next"
        elif character == "}" and self._state == "next":
            self.done = True
        elif character == '"' and self._state == "next":
            self._begin("key")
            return 0
        elif character == ":" and self._state == "colon":
            self._begin("value")
        else:
            self.broken = True
            return 0
        return 1

    def _begin(self, state: str) -> None:
        self._state, self._value, self._text = state, JsonValue(), ""

    def _read(self, text: str) -> int:
        """A piece of a key or of a value. Arguments are passed on at once, unless they are a text that holds them."""
        count = self._value.push(text)
        piece = text[:count]
        if self._state == "value" and self._key in ("arguments", "parameters"):
            before, self._text = self._text, (self._text + piece).lstrip()
            if not self._text.startswith('"'):
                self._held += self._text[len(before) :]
        else:
            self._text += piece
        if self._value.done:
            self._end()
        return count

    def _end(self) -> None:
        if self._state == "key":
            self._key, self._state = _decoded(self._text), "colon"
            return
        self._state = "next"
        if self._key == "name":
            self.name = _decoded(self._text)
        elif self._key in ("arguments", "parameters") and self._text.startswith('"'):
            self._held += _decoded(self._text)


def _decoded(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        value = text.strip().strip('"')
    return value if isinstance(value, str) else json.dumps(value)
