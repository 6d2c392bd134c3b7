"""Seeds behind names: dnsaddr and host names, against a real DNS server on loopback."""

from hashlib import sha256

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ConfigError, RemoteError
from config.settings import P2pSettings
from p2p import names as names_module
from p2p.core import dnsaddr
from p2p.core.dnsaddr import Expansion
from p2p.core.identity import Identity
from p2p.names import Names
from p2p.network import open_network
from tests.unit.p2p.dns_server import dns_server

A, B = (Identity.from_seed(letter * 32).peer_id for letter in (b"a", b"b"))


@pytest.fixture
async def dns():
    async with dns_server() as server:
        yield server


def txt(*addresses: str) -> list[str]:
    return [f'"dnsaddr={address}"' for address in addresses]


async def test_a_dnsaddr_leads_over_others_to_addresses(dns):
    dns.records = {
        ("_dnsaddr.example.org", "TXT"): [*txt("/dnsaddr/eu.example.org", f"/ip4/1.2.3.4/tcp/1/p2p/{A}"), '"v=spf1"'],
        ("_dnsaddr.eu.example.org", "TXT"): txt(
            f"/dns4/b.example.org/tcp/2/p2p/{B}",
            f"/ip4/1.2.3.4/udp/1/quic-v1/p2p/{B}",  # not ours
            "/ip4/1.2.3.4/tcp/9",  # nobody's
            "/dnsaddr/example.org",  # a loop
            "/dnsaddr/gone.example.org",
        ),
    }
    names = Names([dns.address])
    everything = [f"/ip4/1.2.3.4/tcp/1/p2p/{A}", f"/dns4/b.example.org/tcp/2/p2p/{B}"]
    assert await names.expand("/dnsaddr/example.org") == everything
    assert await names.expand(f"/dnsaddr/example.org/p2p/{B}") == everything[1:]
    asked = len(dns.asked)
    assert await names.expand("/dnsaddr/example.org") == everything
    assert len(dns.asked) == asked + 1, "only the name that failed is asked for again"


async def test_host_names_become_numbers(dns):
    dns.records = {
        ("b.example.org", "A"): ["1.2.3.4", "1.2.3.5"],
        ("b.example.org", "AAAA"): ["2001:db8::1"],
    }
    names = Names([dns.address])
    assert sorted(await names.numbers("/dns4/b.example.org/tcp/2")) == ["/ip4/1.2.3.4/tcp/2", "/ip4/1.2.3.5/tcp/2"]
    assert await names.numbers(f"/dns6/b.example.org/tcp/2/p2p/{A}") == ["/ip6/2001:db8::1/tcp/2"]
    assert len(await names.numbers("/dns/b.example.org/tcp/2")) == 3
    assert await names.numbers(f"/ip4/9.9.9.9/tcp/2/p2p/{A}") == ["/ip4/9.9.9.9/tcp/2"]
    assert "/ip4/127.0.0.1/tcp/5" in await Names().numbers("/dns4/localhost/tcp/5"), "the system's hosts file counts"


async def test_what_cannot_be_resolved_says_why(dns, monkeypatch):
    names = Names([dns.address])
    for ask in (names.expand("/dnsaddr/none.example.org"), names.numbers("/dns4/none.example.org/tcp/1")):
        with pytest.raises(RemoteError, match=r"none\.example\.org") as error:
            await ask
        assert error.value.hint
    monkeypatch.setattr(names_module, "DEADLINE_S", 0.3)
    dns.silent = True
    with trio.fail_after(3), pytest.raises(RemoteError):
        await names.expand("/dnsaddr/example.org")
    for wrong in ("nonsense", "1.2.3.4:0", "1.2.3.4:x", "example.org:53"):
        with pytest.raises(ConfigError, match="dns_servers"):
            Names([wrong])
    Names(["::1", "[::1]:53", "9.9.9.9"])


async def test_an_odd_record_costs_only_itself(dns, tmp_path, caplog):
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_network(Identity.from_seed(b"a" * 32), settings, data_dir=tmp_path / "a", version="1") as a:
        odd = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"  # another kind of key, which names no node of ours
        dns.records = {
            ("_dnsaddr.example.org", "TXT"): txt(f"/ip4/127.0.0.1/tcp/1/p2p/{odd}", f"/ip4/127.0.0.1/tcp/2/p2p/{odd}")
            + txt(a.addresses[0])
        }
        settings = P2pSettings(
            listen=("/ip4/127.0.0.1/tcp/0",), seeds=("/dnsaddr/example.org",), dns_servers=(dns.address,)
        )
        async with open_network(Identity.from_seed(b"b" * 32), settings, data_dir=tmp_path / "b", version="1") as b:
            with trio.fail_after(10):
                while a.peer_id not in b.peers():  # noqa: ASYNC110 - a link raises no event here
                    await trio.sleep(0.02)
    warnings = [record.message for record in caplog.records if "/dnsaddr/example.org" in record.message]
    assert len(warnings) == 1
    assert "2 unusable seeds" in warnings[0]
    assert odd in warnings[0]


@given(st.data())
def test_hostile_answers_come_to_an_end(data):
    seed = "/dnsaddr/a.b"
    names = [f"/dnsaddr/{letter}.b" for letter in "abcdefgh"]
    pieces = st.one_of(
        st.sampled_from(names),
        st.sampled_from([f"/ip4/1.1.1.1/tcp/{port}/p2p/{A}" for port in range(1, 200)]),
        st.text(max_size=30),
    )
    it, asked = Expansion(seed), 0
    while (ask := it.next()) is not None:
        asked += 1
        it.answered(ask[1], ask[2], [f"dnsaddr={text}" for text in data.draw(st.lists(pieces, max_size=40))])
    assert asked <= dnsaddr.NAMES_MAX
    assert len(it.found) <= dnsaddr.ADDRESSES_MAX
    assert len(set(it.found)) == len(it.found)


async def test_a_node_joins_through_a_name_that_comes_to_life_later(dns, tmp_path, monkeypatch):
    monkeypatch.setattr(names_module, "TTL_S", (0.0, 1.0))
    monkeypatch.setattr("p2p.mesh.SEED_RETRY_S", (0.2, 1.0))
    dns.ttl = 0

    def network(name: str, *seeds: str):
        settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=seeds, dns_servers=(dns.address,))
        identity = Identity.from_seed(sha256(name.encode()).digest())
        return open_network(identity, settings, data_dir=tmp_path / name, version="1")

    async with network("a") as a, network("b", "/dnsaddr/seeds.example.org") as b:
        with trio.fail_after(10):
            while len(dns.asked) < 2:  # noqa: ASYNC110 - it goes on trying
                await trio.sleep(0.02)
            port = a.addresses[0].split("/")[4]
            dns.records[("_dnsaddr.seeds.example.org", "TXT")] = txt(f"/dns4/a.example.org/tcp/{port}/p2p/{a.peer_id}")
            dns.records[("a.example.org", "A")] = ["127.0.0.1"]
            while a.peer_id not in b.peers():  # noqa: ASYNC110 - a link raises no event here
                await trio.sleep(0.02)
