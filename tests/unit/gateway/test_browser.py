"""What a browser's request shows, and whether another site is behind it."""

import pytest
from starlette.requests import Request

from gateway.address import client_address, neighbourhood
from gateway.identity.browser import Credentials, Home, csrf_of, has_csrf, local_path

HOST = "gateway.example:8080"


def request(headers: list[tuple[str, str]], *, scheme: str = "http", peer: str = "192.0.2.1") -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": "POST", "scheme": scheme, "headers": raw, "client": (peer, 1)}
    return Request(scope)


@pytest.mark.parametrize(
    ("shown", "foreign"),
    [
        ({}, False),
        ({"origin": f"http://{HOST}"}, False),
        ({"origin": f"https://{HOST.upper()}"}, False),
        ({"origin": "https://public.example"}, False),
        ({"origin": "http://gateway.example"}, True),
        ({"origin": f"http://{HOST}.evil.example"}, True),
        ({"origin": f"http://evil.example/{HOST}"}, True),
        ({"origin": f"http://user@{HOST}"}, True),
        ({"origin": "null"}, True),
        ({"origin": "file://"}, True),
        ({"origin": "x"}, True),
        ({"site": "same-origin", "origin": "http://behind-a-proxy"}, False),
        ({"site": "none"}, False),
        ({"site": "same-site"}, True),
        ({"site": "cross-site", "origin": f"http://{HOST}"}, True),
        ({"site": "anything"}, True),
    ],
)
def test_whether_another_site_is_behind_it(shown: dict[str, str], foreign: bool) -> None:
    home = Home("https://public.example")
    assert home.is_foreign(Credentials(host=HOST, **shown)) is foreign


def test_without_a_name_of_its_own_nothing_is_like_nothing() -> None:
    for origin in ("null", "file://", "://", "x"):
        assert Home().is_foreign(Credentials(host="", origin=origin))


@pytest.mark.parametrize(
    ("host", "rebindable"),
    [
        ("127.0.0.1:8080", False),
        ("[::1]:8080", False),
        ("10.1.2.3", False),
        ("localhost", False),
        ("a.localhost:80", False),
        ("public.example", False),
        ("evil.example", True),
        ("localhost.evil.example", True),
        ("127.0.0.1.evil.example", True),
        ("", True),
        ("[::", True),
        ("2130706433", True),
    ],
)
def test_names_that_somebody_else_can_point_here(host: str, rebindable: bool) -> None:
    home = Home("https://public.example")
    for more in ({}, {"origin": "http://x"}, {"site": "same-origin"}):
        assert home.is_rebindable(Credentials(host=host, **more)) is rebindable


def test_what_a_request_shows() -> None:
    sent = request(
        [("host", HOST), ("cookie", "a=b; rios_session=s; c=d"), ("authorization", "one"), ("authorization", "two")]
    )
    shown = Home().credentials_of(sent)
    assert (shown.host, shown.session, shown.authorization, shown.method) == (HOST, "s", "one", "POST")
    assert not shown.is_safe
    over_tls = request([("cookie", "rios_session=planted; __Host-rios_session=s")], scheme="https")
    assert Home().credentials_of(over_tls).session == "s"
    assert Home("https://x").credentials_of(request([("cookie", "rios_session=planted")])).session == ""


def test_the_csrf_token_is_the_sessions() -> None:
    for token, good in ((csrf_of("s"), True), (csrf_of("t"), False), ("", False), ("\xff", False)):
        assert has_csrf(Credentials(session="s", csrf=token)) is good
    assert "s" * 20 not in csrf_of("s" * 20)


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("/a/b?c=d#e", "/a/b?c=d#e"),
        *((bad, "/") for bad in ("", "a", "//evil", "https://evil", "/\\evil", "\\\\evil", "/a\nb", "/\x00", "/ä")),
    ],
)
def test_where_a_sign_in_may_lead(wanted: str, path: str) -> None:
    assert local_path(wanted) == path


PROXIES = {"192.0.2.1", "192.0.2.2"}


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("198.51.100.7", [], "198.51.100.7"),
        ("198.51.100.7", ["203.0.113.1"], "198.51.100.7"),
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["203.0.113.1"], "203.0.113.1"),
        ("192.0.2.1", ["6.6.6.6, 203.0.113.1, 192.0.2.2"], "203.0.113.1"),
        ("192.0.2.1", ["6.6.6.6", "203.0.113.1"], "203.0.113.1"),
        ("192.0.2.1", ["203.0.113.1, made up"], "192.0.2.1"),
        ("192.0.2.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("192.0.2.1", ["192.0.2.1, 192.0.2.2"], "192.0.2.1"),
    ],
)
def test_addresses_through_proxies(peer: str, forwarded: list[str], address: str) -> None:
    sent = request([("x-forwarded-for", value) for value in forwarded], peer=peer)
    assert client_address(sent, PROXIES) == address


def test_an_ipv6_client_has_a_whole_network() -> None:
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:1") != neighbourhood("2001:db8:0:1::1")
    assert neighbourhood("192.0.2.1") != neighbourhood("192.0.2.2")
    assert neighbourhood("::ffff:192.0.2.1") != neighbourhood("::ffff:192.0.2.2")
    assert neighbourhood("unix") == "unix"
