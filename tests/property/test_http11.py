"""Whatever arrives: nothing is taken for a request that a second, stricter-written parser (h11) reads otherwise.

Two readers of one connection that disagree where a request ends let a client hide one request in another.
"""

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.reader import Bad, End, Head, Reader

LINES = [
    b"Host: x", b"Content-Length: 3", b"Content-Length: 03", b"Content-Length: 3, 3", b"Content-Length : 3",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: CHUNKED", b"Transfer-Encoding:\tchunked ",
    b"transfer-encoding: x",
    b"Transfer-Encoding: chunked, chunked", b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c", b"X: ", b"X",
    b": x", b" y: z", b"X: a\x0bb", b"X: \xff", b"Expect: 100-continue",
]  # fmt: skip
BODIES = [
    b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"3;x=y\r\nabc\r\n0\r\nT: u\r\n\r\n", b"3\nabc\n0\n\n",
    b"03\r\nabc\r\n0\r\n\r\n",
    b"3\r\nabcX\r\n0\r\n\r\n", b"-1\r\n", b"0\r\n\r\n", b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n",
]  # fmt: skip
STARTS = [
    b"GET /a HTTP/1.1",
    b"POST /a HTTP/1.1",
    b"POST /a HTTP/1.0",
    b"GET /a HTTP/1.1 ",
    b"POST /a",
]


def request_of(start: bytes, lines: list[bytes], end: bytes, body: bytes) -> bytes:
    return end.join([start, *lines]) + 2 * end + body


anything = st.builds(
    request_of,
    st.sampled_from(STARTS),
    st.lists(st.sampled_from(LINES), max_size=5),
    st.sampled_from([b"\r\n"] * 9 + [b"\n"]),
    st.sampled_from(BODIES),
)
WISHES = [b"Upgrade: h2c", b"Upgrade: websocket", b"Connection: upgrade", b"Connection: keep-alive, Upgrade, x",
          b"Proxy-Connection: upgrade", b"Connection: keep-alive", b"Upgrade: x"]  # fmt: skip
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: hidden\r\n\r\n"
BODIED = [
    (b"Content-Length: 3", b"abc"), (b"Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n"), (b"A: b", b""),
    (b"Content-Length: 0", b""), (b"Content-Length: %d" % len(HIDDEN), HIDDEN),
]  # fmt: skip
wishing = st.builds(
    lambda start, framed, wishes: request_of(start, [b"Host: x", framed[0], *wishes], b"\r\n", framed[1]),
    st.sampled_from(STARTS[:3]),
    st.sampled_from(BODIED),
    st.lists(st.sampled_from(WISHES), min_size=1, max_size=4),
)
"""Bodies behind the wish for another protocol, for which the parser stops."""
requests = anything | wishing
Parsed = list[tuple[str, bytes, bytes]]


def ours(parts: list[bytes]) -> Parsed:
    """Whole requests: method, target, body."""
    reader, found, body = Reader(), [], b""
    head: Head | None = None
    for part in parts:
        data = part
        while data:
            events, data = reader.read(data)
            for event in events:
                if isinstance(event, Bad):
                    return found
                if isinstance(event, Head):
                    head, body = event, b""
                    if head.is_websocket:
                        return found
                elif isinstance(event, End):
                    assert head is not None
                    found.append((head.method, head.target, body))
                    if not head.keeps:
                        return found
                else:
                    body += event
    return found


def theirs(data: bytes) -> Parsed:
    """The same, as h11 reads them."""
    connection, found = h11.Connection(h11.SERVER), []
    connection.receive_data(data)
    body, head = b"", None
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return found
        if isinstance(event, h11.Request):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            found.append((head.method.decode(), head.target, body))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return found
            connection.start_next_cycle()
        else:
            return found


@settings(max_examples=1500)
@given(st.lists(requests, min_size=1, max_size=3))
def test_no_request_is_read_that_another_parser_reads_otherwise(made: list[bytes]) -> None:
    data = b"".join(made)
    found = ours([data])
    assert found == theirs(data)[: len(found)]


@settings(max_examples=300)
@given(st.lists(requests, min_size=1, max_size=3), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_it_does_not_matter_how_it_is_cut(made: list[bytes], sizes: list[int]) -> None:
    data, parts, place = b"".join(made), [], 0
    while place < len(data):
        size = sizes[len(parts) % len(sizes)]
        parts.append(data[place : place + size])
        place += size
    assert ours(parts) == ours([data])
