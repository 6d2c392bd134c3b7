"""Webhooks connect to checked addresses, and to no others, whatever names resolve to."""

from random import Random

import pytest
import trio

from config.errors import ConfigError, RiosError
from gateway.jobs import posting
from gateway.jobs.addresses import Rules, rules_of, target_of
from gateway.jobs.webhooks import BACKOFF_MS_MAX, BACKOFF_MS_MIN, backoff_ms, signed

FORBIDDEN = (
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1"),
    *("169.254.169.254", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255"),
    *("240.0.0.1", "192.0.2.1", "203.0.113.9", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254"),
    *("ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::127.0.0.1", "64:ff9b::a00:1"),
    *("64:ff9b:1::1", "::127.0.0.1", "2002:7f00:1::", "2001:0:1::1", "fec0::1", "2001:db8::1", "100::1", "localhost"),
    *("", "0x7f.1", "2130706433", "127.1"),
)
PUBLIC = ("8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", FORBIDDEN)
def test_places_that_only_the_gateway_can_reach_are_refused(address: str) -> None:
    assert not Rules().is_allowed(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_places_are_allowed(address: str) -> None:
    assert Rules().is_allowed(address)


def test_an_operator_allows_networks() -> None:
    rules = rules_of(("10.1.0.0/16", "fd00::/8"), http=False)
    assert rules.is_allowed("10.1.2.3")
    assert rules.is_allowed("::ffff:10.1.2.3")
    assert rules.is_allowed("fd00::5")
    assert not rules.is_allowed("10.2.0.1")
    with pytest.raises(ConfigError, match="webhook_allow_networks"):
        rules_of(("10.1.0.1/16",), http=False)


def test_a_target_is_taken_apart() -> None:
    target = target_of("https://Example.com:8443/a/b?c=d#e", Rules())
    assert (target.host, target.port, target.path, target.authority) == (
        *("example.com", 8443, "/a/b?c=d", "example.com:8443"),
    )


async def test_a_name_that_changes_its_mind_gains_nothing() -> None:
    """DNS rebinding: the address that was checked is the one that is connected to; one bad address spoils all."""
    hit: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        hit.append(await stream.receive_some())

    asked: list[str] = []
    answers = [["8.8.8.8", "127.0.0.1"], ["127.0.0.1"], ["::ffff:127.0.0.1"]]

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers.pop(0)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        rules = Rules(http=True)
        target = target_of(f"http://rebind.example:{port}/", rules)
        for count in (1, 2, 3):
            with pytest.raises(RiosError, match="not a public address"):
                await posting.post(target, b"{}", {}, rules, resolve)
            assert len(asked) == count, "a name is resolved once for each try"
        nursery.cancel_scope.cancel()
    assert not hit


async def test_what_answers_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posting, "SECONDS_MAX", 0.5)
    said: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(said[0])
        await trio.sleep(2)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    rules = rules_of(("127.0.0.0/8",), http=True)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        target = target_of(f"http://hook.example:{listeners[0].socket.getsockname()[1]}/", rules)
        for answer, why in (
            (b"\x00\x01\x02 what\r\n\r\n", "no HTTP"),
            (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 40_000, "too long|no HTTP"),
            (b"HTTP/1.1 200", "no answer"),
            (b"HTTP/1.1 100 Continue\r\n\r\n" * 2000, "too long"),
        ):
            said[:] = [answer]
            with pytest.raises(RiosError, match=why):
                await posting.post(target, b"{}", {}, rules, resolve)
        said[:] = [b"HTTP/1.1 301 Moved\r\nlocation: http://127.0.0.1/\r\n\r\n"]
        assert await posting.post(target, b"{}", {}, rules, resolve) == 301
        nursery.cancel_scope.cancel()


def test_backoff_doubles_up_to_its_cap() -> None:
    waits = [backoff_ms(attempts, Random(1)) for attempts in range(1, 30)]
    assert BACKOFF_MS_MIN // 2 <= waits[0] <= BACKOFF_MS_MIN
    assert BACKOFF_MS_MAX // 2 <= waits[-1] <= BACKOFF_MS_MAX


def test_signatures_are_those_of_standard_webhooks() -> None:
    """The example of the specification's own libraries."""
    import base64

    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    headers = signed("msg_p5jXN8AQM9LWM0D4loKWxJek", body, secret, 1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
