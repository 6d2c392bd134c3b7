"""One POST to a webhook: resolve, check every address, connect to one of just these, and believe nothing that comes.

Invariants: the address that is connected to was checked, so a name that changes its mind in between (DNS rebinding)
gains nothing; the certificate is checked against the name; redirects are not followed; time and answer are bounded.
"""

import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence

import h11
import trio

from config.errors import RemoteError
from gateway.jobs.addresses import Rules, Target, forbidden

SECONDS_MAX = 15.0
ANSWER_BYTES_MAX = 16 << 10
"""Of head and body; more is not read."""
_RECEIVE_BYTES = 4096

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name, as the system knows them."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


async def post(
    target: Target, body: bytes, headers: Mapping[str, str], rules: Rules, resolving: Resolve = resolve
) -> int:
    """The status of the answer. Raises RemoteError, with the reason, if there is none; ApiError for an address that
    may not be reached."""
    why = f"no answer within {SECONDS_MAX:.0f} s"
    with trio.move_on_after(SECONDS_MAX):
        try:
            return await _post(target, body, headers, rules, resolving)
        except socket.gaierror as error:
            why = f"the name {target.host} cannot be resolved: {error.strerror}"
        except ssl.SSLError as error:
            why = f"TLS failed: {error.reason or error}"
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            why = f"TLS failed: {cause.reason or cause}" if isinstance(cause, ssl.SSLError) else "the connection broke"
        except h11.RemoteProtocolError as error:
            why = f"this is no HTTP: {error}"
        except OSError as error:
            why = f"cannot connect: {error.strerror or error}"
    raise RemoteError("unavailable", why, peer_id="")


async def _post(target: Target, body: bytes, headers: Mapping[str, str], rules: Rules, resolving: Resolve) -> int:
    addresses = await resolving(target.host, target.port)
    for address in addresses:
        if not rules.is_allowed(address):
            raise forbidden(address)
    if not addresses:
        raise OSError("the name has no address")
    async with await _connect(addresses, target.port) as plain:
        stream: trio.abc.Stream = plain
        if target.secure:
            context = ssl.create_default_context()
            stream = trio.SSLStream(plain, context, server_hostname=target.host, https_compatible=True)
        try:
            return await _exchange(stream, target, body, headers)
        finally:
            await trio.aclose_forcefully(stream)


async def _connect(addresses: Sequence[str], port: int) -> trio.SocketStream:
    failure: OSError | None = None
    for address in addresses[:4]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        plain = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            with trio.fail_after(SECONDS_MAX / 3):
                await plain.connect((address, port))
            return trio.SocketStream(plain)
        except trio.TooSlowError:
            plain.close()
            failure = OSError("the address does not answer")
        except OSError as error:
            plain.close()
            failure = error
        except BaseException:
            plain.close()
            raise
    assert failure is not None
    raise failure


async def _exchange(stream: trio.abc.Stream, target: Target, body: bytes, headers: Mapping[str, str]) -> int:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=ANSWER_BYTES_MAX)
    fields = [("host", target.authority), ("content-length", str(len(body))), ("connection", "close")]
    request = h11.Request(method="POST", target=target.path, headers=[*fields, *headers.items()])
    parts = [connection.send(each) for each in (request, h11.Data(data=body), h11.EndOfMessage())]
    await stream.send_all(b"".join(part or b"" for part in parts))
    received = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is h11.NEED_DATA:
            data = await stream.receive_some(_RECEIVE_BYTES)
            received += len(data)
            if received > ANSWER_BYTES_MAX:
                raise OSError("the answer's head is too long")
            connection.receive_data(bytes(data))
        elif not isinstance(event, h11.InformationalResponse):
            raise OSError("the connection was closed without an answer")
