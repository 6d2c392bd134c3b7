"""What a client's bytes say in HTTP/1.1: heads, parts of bodies and their ends. Pure: bytes in, findings out.

The parser is llhttp by ``httptools``, strict as it comes; but it takes whatever follows a wish for another protocol for
that protocol's, so a body there is read by a second parser (:meth:`Reader.read`).

Invariants:
1. What is kept of a request before it is told is at most a head of ``HEAD_BYTES_MAX`` and what came in the same read.
   What else the parser takes in without a word (sizes of chunks, trailers) is bounded alike.
2. What is taken for a request, any other reader between here and the client takes for the same one, or for none: none
   hides in the body of another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httptools

HEAD_BYTES_MAX = 16 << 10
_LENGTH_DIGITS_MAX = 20
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
"""The parser knows more, other protocols' too."""
_REQUEST_LINE_MORE = 64
"""Of a request's first line, what is not its target."""


@dataclass(frozen=True, slots=True)
class Head:
    """Of a request. Header names are in lower case."""

    method: str
    target: bytes
    headers: Sequence[tuple[bytes, bytes]]
    version: str
    keeps: bool
    """Whether its client wants the connection to go on."""
    is_websocket: bool
    """Whether it asks for one, properly."""

    def value(self, wanted: bytes) -> bytes:
        """A header's, in lower case; all of them if it is there several times."""
        return b",".join(value for name, value in self.headers if name == wanted).lower()


@dataclass(frozen=True, slots=True)
class Bad:
    """What is no request."""

    status: int


class End:
    """Of a request."""


END = End()
Found = Head | bytes | End | Bad


class Reader:
    """Told by the parser; says what it found, in order: heads, parts of bodies, their ends, at last what is wrong."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._found: list[Found] = []
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._size = 0
        self._silent = 0
        """Bytes taken in since something was found."""
        self._in_head = False
        self._framing = b""
        """The headers that tell how long a body is that the parser does not see, as it stops for another protocol."""
        self._is_muted = False
        self._ended = False

    def read(self, data: bytes) -> tuple[list[Found], bytes]:
        """What is in there, and what follows a head that asks for another protocol."""
        if self._ended:
            return [], b""
        self._silent += len(data)
        rest = b""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            self._go_on()
        except httptools.HttpParserCallbackError as error:
            bad = error.__context__
            self._wrong(bad.status if isinstance(bad, _Refused) else 400)
        except httptools.HttpParserError:
            self._wrong(400)
        found, self._found = self._found, []
        if found:
            self._silent = 0
        elif self._silent > HEAD_BYTES_MAX + _REQUEST_LINE_MORE:
            self._wrong(431 if self._in_head else 400)
            found, self._found = self._found, []
        return found, rest

    def _go_on(self) -> None:
        """The parser has stopped behind a head: what follows is HTTP all the same, for who hears of no other protocol.
        It comes to another parser, which is told first how long the body is."""
        self._parser = httptools.HttpRequestParser(self)
        if self._framing:
            framing, self._framing = self._framing, b""
            self._is_muted = True
            try:
                self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
            except httptools.HttpParserError:
                self._wrong(400)

    def _wrong(self, status: int) -> None:
        self._ended = True
        self._found.append(Bad(status))

    # --- called by the parser

    def on_message_begin(self) -> None:
        if not self._is_muted:
            self._target, self._headers, self._size, self._in_head = b"", [], 0, True

    def on_url(self, part: bytes) -> None:
        if not self._is_muted:
            self._target += part
            self._count(len(part))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: nobody asks for one
        self._count(len(name) + len(value) + 4)
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._is_muted:
            self._is_muted = False
            return
        self._in_head = False
        parser = self._parser
        version, method = parser.get_http_version(), parser.get_method().decode("ascii")
        if version not in ("1.0", "1.1"):
            raise _Refused(505)
        if method not in _METHODS:
            raise _Refused(501)
        if not self._target.startswith(b"/") and (method, self._target) != ("OPTIONS", b"*"):
            raise _Refused(400)
        hosts, framing = 0, []
        for name, value in self._headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked":
                    raise _Refused(501)
                framing.append(b"%b: %b\r\n" % (name, value))
            elif name == b"content-length":
                if len(value) > _LENGTH_DIGITS_MAX:
                    raise _Refused(400)
                framing.append(b"%b: %b\r\n" % (name, value))
        if hosts > 1 or (not hosts and version == "1.1"):
            raise _Refused(400)
        stops = parser.should_upgrade()
        is_websocket = stops and not framing and method == "GET" and version == "1.1" and _is_websocket(self._headers)
        if stops:
            self._framing = b"".join(framing)
        keeps = version == "1.1" and parser.should_keep_alive()
        self._found.append(Head(method, self._target, self._headers, version, keeps, is_websocket))

    def on_body(self, part: bytes) -> None:
        self._found.append(part)

    def on_message_complete(self) -> None:
        if not self._framing:  # else its body comes now
            self._found.append(END)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > HEAD_BYTES_MAX:
            raise _Refused(431)


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _is_websocket(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    wishes = [value.lower() for name, value in headers if name == b"upgrade"]
    tokens = b",".join(value.lower() for name, value in headers if name == b"connection").split(b",")
    return wishes == [b"websocket"] and any(each.strip() == b"upgrade" for each in tokens)
