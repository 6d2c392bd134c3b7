"""Adverts: the vectors another implementation could read, versions that understand each other, lies refused."""

import json
from pathlib import Path

import msgspec
import pytest

from p2p.core import addresses, advert, codec
from p2p.core.advert import Advert, BadAdvert, Gpu, Hardware, ModelOffer, open_advert, sign
from p2p.core.identity import Identity

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "advert.json").read_text())
ME = Identity.from_seed(bytes.fromhex(VECTORS["seed"]))
NOW = 1_700_000_000_000
FULL = Advert(
    peer_id=ME.peer_id,
    seq=NOW,
    expires_ms=NOW + 300_000,
    addresses=(f"/ip4/203.0.113.7/tcp/4701/p2p/{ME.peer_id}",),
    lane="/rios/lane/1.0.0",
    version="0.2.0",
    region="eu-west",
    hardware=Hardware("A CPU", 8, 64 << 30, (Gpu("A GPU", 24 << 30),), 50_000_000, 20_000_000_000),
    disk_bytes=50 << 30,
    offered_bytes=32 << 30,
    full=False,
    load=12,
    roles=("witness",),
    models=(ModelOffer("ab" * 32, b"\x05", 7, 1_000_000, 3),),
    net=b"\x01" * 32,
    paused=True,
    reach="public",
    relay=True,
    capabilities=("/rios/lane/1.0.0", "/rios/rpc/1.0.0"),
    coordinate=(-1500, 20_000, 300, 100),
)


def _signed(body: bytes) -> bytes:
    return codec.encode([body, ME.sign(advert.TAG, body)])


def test_this_version_s_vector_is_what_is_written_and_read():
    made = sign(ME, FULL)
    assert made.data.hex() == VECTORS["this"]
    assert open_advert(made.data, now_ms=NOW).advert == FULL


def test_the_next_version_s_advert_is_read():
    read = open_advert(bytes.fromhex(VECTORS["next"]), now_ms=NOW)
    assert read.advert == FULL
    assert read.data.hex() == VECTORS["next"], "it is passed on with what was appended"
    body = msgspec.msgpack.decode(msgspec.msgpack.decode(read.data)[0])
    assert len(body) > len(msgspec.structs.fields(Advert))
    assert len(body[7]) > len(msgspec.structs.fields(Hardware))
    assert len(body[13][0]) > len(msgspec.structs.fields(ModelOffer))


def test_the_version_before_is_read():
    read = open_advert(bytes.fromhex(VECTORS["before"]), now_ms=NOW).advert
    assert (read.region, read.load, read.models) == (FULL.region, FULL.load, FULL.models)
    assert (read.paused, read.reach, read.relay, read.capabilities, read.coordinate) == (False, "", False, (), ())


def test_addresses_of_a_later_kind_are_passed_over():
    later = ("/ip4/1.2.3.4/udp/1/quic-v1", "/ip4/1.2.3.4/tcp/443/wss", "/onion3/abc:1")
    made = sign(ME, msgspec.structs.replace(FULL, addresses=(*FULL.addresses, *later)))
    assert open_advert(made.data, now_ms=NOW).advert.addresses == (*FULL.addresses, *later)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"addresses": ("1.2.3.4:1",)}, "absurd"),
        ({"addresses": ("/ip4/1.2.3.4 /udp/1",)}, "absurd"),
        ({"addresses": ("/ip4/1.2.3.400/tcp/1",)}, "absurd"),
        ({"addresses": ("/ip4/1.2.3.4/tcp/0",)}, "absurd"),
        ({"addresses": (f"/ip4/1.2.3.4/tcp/1/p2p/{Identity.from_seed(b'o' * 32).peer_id}",)}, "absurd"),
        ({"addresses": ("/ip4/1.2.3.4/tcp/1",) * 17}, "malformed"),
        ({"region": "a\x1b[2J"}, "absurd"),
        ({"region": "x" * 257}, "malformed"),
        ({"models": FULL.models * 2}, "absurd"),
        ({"models": (ModelOffer("ab" * 32, b"\x05", 7, advert.PRICE_MAX + 1, 3),)}, "malformed"),
        ({"models": (ModelOffer("ab" * 32, b"\x05" * 8193, 7, 1, 3),)}, "malformed"),
        ({"models": (ModelOffer("ab", b"", 7, 1, 3),)}, "malformed"),
        ({"load": -1}, "malformed"),
        ({"coordinate": (1 << 40,)}, "malformed"),
        ({"reach": "x" * 17}, "malformed"),
        ({"expires_ms": NOW}, "expired"),
        ({"expires_ms": NOW + (48 << 22) * 1000}, "future"),
        ({"seq": NOW + 3600_000}, "future"),
    ],
)
def test_lies_are_refused_by_kind(change, kind):
    lie = sign(ME, msgspec.structs.replace(FULL, **change))
    with pytest.raises(BadAdvert) as refused:
        open_advert(lie.data, now_ms=NOW)
    assert refused.value.kind == kind
    assert refused.value.code == "integrity"


def test_bytes_that_were_not_signed_are_refused():
    data = bytearray(sign(ME, FULL).data)
    data[-1] ^= 1
    body = codec.encode(FULL)
    for bad, kind in (
        (bytes(data), "signature"),
        (_signed(body + b"\xc0"), "malformed"),  # more bytes after the record
        (_signed(b"\x90"), "malformed"),
        (_signed(codec.encode(list(msgspec.structs.astuple(FULL))[:2])), "malformed"),  # no default, so needed
        (_signed(b"\xdc\xff\xff" + b"\x91" * 60_000), "malformed"),
        (bytes(advert.ADVERT_BYTES_MAX + 1), "too_large"),
        (b"", "malformed"),
    ):
        with pytest.raises(BadAdvert) as refused:
            open_advert(bad, now_ms=NOW)
        assert refused.value.kind == kind


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/::1/tcp/65535",
        f"/dns4/seed.example.org/tcp/4701/p2p/{ME.peer_id}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{ME.peer_id}/p2p-circuit/p2p/{ME.peer_id}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{ME.peer_id}/p2p-circuit",
    ],
)
def test_tcp_addresses_direct_and_through_a_relay(text):
    parsed = addresses.parse(text)
    assert parsed is not None
    assert bool(parsed.relay) == ("p2p-circuit" in text)


def test_what_is_no_tcp_address():
    for text in (
        "",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp/1/p2p-circuit",
        "/ip4/::1/tcp/1",
        "/dns4//tcp/1",
        "/ip4/1.2.3.4/tcp/1/x",
        "/ip4/1.2.3.4/tcp/1\n",
        "/dns/a b/tcp/1",
        "/ip4/1.2.3.4/tcp/70000",
    ):
        assert addresses.parse(text) is None, text


def test_addresses_of_one_subnet():
    def of(text):
        return addresses.subnet(addresses.parse(text))

    assert of("/ip4/10.1.2.3/tcp/1") == of("/ip4/10.1.2.9/tcp/2") != of("/ip4/10.1.3.3/tcp/1")
    assert of("/ip6/2001:db8:1::1/tcp/1") == of("/ip6/2001:db8:1:2::/tcp/1") != of("/ip6/2001:db8:2::1/tcp/1")
