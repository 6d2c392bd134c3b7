"""A peer of another make, written from docs/protocol.md over js-libp2p, meets real RiOS node processes."""

import time
from typing import Any

from node.rig import Swarm

MODEL = "5a" * 32
OTHER = "c3" * 32
STRANGER = "12D3KooWPqT2nMDSiXUSx5D7fasaxhxKigVhcqfkKqrLghCq9jxz"


def test_a_javascript_peer_is_a_member_of_the_swarm(start_js, start_node):
    a = start_node("a", [])
    b = start_node("b", [a.hello["address"]])
    assert a.hello["peer_id"] in b.ask("wait", peers=[a.hello["peer_id"]], seconds=20)["view"]
    js = start_js("js")
    assert js.hello["node"].startswith("v22.")
    peer_a, peer_b, peer_js = (process.hello["peer_id"] for process in (a, b, js))

    # connects by Noise and yamux, and pings
    met = js.ask("dial", address=a.hello["address"])
    assert met == {"peer": peer_a, "encryption": "/noise", "multiplexer": "/yamux/1.0.0"}
    expected = ["/rios/rpc/1.0.0", "/rios/rpc-bulk/1.0.0", "/ipfs/kad/1.0.0", "/meshsub/1.1.0", "/ipfs/ping/1.0.0"]
    assert js.ask("speaks", peer=peer_a, protocols=expected)["all"]
    assert js.ask_until("ms", 20, "ping", peer=peer_a)["ms"] >= 0

    # finds an advert and a provider of a model in the DHT, through a node that is neither
    seq = b.ask("offer", model=MODEL)["seq"]
    assert js.ask("dht_providers", model=MODEL)["providers"] == [peer_b]
    assert js.ask("dht_providers", model=MODEL, shard=0)["providers"] == [peer_b]
    assert js.ask("dht_advert", peer=peer_b)["advert"]["peer_id"] == peer_b  # perhaps an older one
    (advert,) = js.ask("find", peer=peer_a, model=MODEL, shard=0)["adverts"]
    assert advert["peer_id"] == peer_b
    assert advert["seq"] >= seq
    assert advert["models"] == [[MODEL, {"hex": "01"}, 1, 7, 9]]

    # is found there itself
    assert peer_a in js.ask("dht_provide", model=OTHER)["stored_at"]
    assert peer_a in js.ask("dht_put_own")["stored_at"]
    assert b.ask("find", digest=OTHER)["providers"] == [peer_js]

    # hears gossip and is heard
    assert js.ask("heard", peer=peer_b)["sender"] == peer_b
    assert b.ask("load", rows=500) == {}
    assert js.ask("load", peer=peer_b) == {"load": 500}
    assert js.ask("publish", region="from-javascript", announce=True)["recipients"]
    for node in (a, b):
        assert node.ask("region", peer=peer_js, region="from-javascript", seconds=20)["region"] == "from-javascript"
    answer = b.ask("call", peer=peer_js, method="echo", deadline_ms=10_000, size=100_000)
    assert answer == {"from": "javascript", "size": 100_000}


def test_a_javascript_peer_calls_and_is_refused_properly(start_js, start_node):
    a = start_node("a", [])
    js = start_js("js")
    peer_a = js.ask("dial", address=a.hello["address"])["peer"]

    def rpc(method: str, header: dict[str, Any], *buffers: str, deadline_ms: int = 5000) -> dict[str, Any]:
        return js.ask("rpc", peer=peer_a, method=method, header=header, buffers=buffers, deadline_ms=deadline_ms)

    echoed = rpc("echo", {"n": 7, "text": "ü"}, "00ff", "", "aa" * 70_000)
    assert echoed["header"] == {"from": js.hello["peer_id"], "n": 7, "text": "ü"}
    assert [buffer["hex"] for buffer in echoed["buffers"]] == ["00ff", "", "aa" * 70_000]
    exchanged = rpc("advert.exchange", {"known": {peer_a: 0, STRANGER: 5}})
    assert exchanged["header"] == {"want": [STRANGER]}
    assert exchanged["buffers"]
    assert js.ask("rpc_ping", peer=peer_a, number=77) == {"kind": "pong", "number": 77}

    # the trace is taken out of the header; a stream longer than its credit arrives whole
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert rpc("traced", {"tp": trace, "n": 1})["header"] == {"trace": trace, "fields": ["n"]}
    stream = js.ask("rpc_stream", peer=peer_a, method="count", header={"items": 100}, deadline_ms=5000)
    assert stream["numbers"] == list(range(100))
    assert stream["bytes"] == 100_000
    assert stream["end"]["header"] == {"total": 100}

    # refusals say why, by name
    assert rpc("no.such.method", {})["header"]["code"] == "not_found"
    assert rpc("advert.exchange", {"known": 3})["header"]["code"] == "protocol"
    assert rpc("blob.get", {"digest": "short"})["header"]["code"] == "protocol"
    assert rpc("crash", {})["header"]["code"] == "internal"
    assert rpc("slow", {}, deadline_ms=200)["header"]["code"] == "deadline"

    # nonsense costs its carrier, not the connection; repeated, it costs the door, for this peer only
    assert js.ask("nonsense", peer=peer_a, bytes="474554202f20485454502f312e300d0a0d0a" + "00" * 20)["ended"]
    assert rpc("echo", {"n": 8})["header"]["n"] == 8
    for nonsense in ("ff" * 20, "00000000" + "09" + "00" * 15):
        js.ask("nonsense", peer=peer_a, bytes=nonsense + "00" * 20)
    assert "header" not in rpc("echo", {"n": 9})
    other = start_js("other")
    assert other.ask("dial", address=a.hello["address"])["peer"] == peer_a
    answer = other.ask("rpc", peer=peer_a, method="echo", header={"n": 10}, buffers=[], deadline_ms=5000)
    assert answer["header"]["n"] == 10


def test_a_javascript_peer_reads_a_whole_daemon(start_js, tmp_path):
    with Swarm(tmp_path / "swarm") as swarm:
        node = swarm.add("one", {"ledger.witness": True, "node.region": "eu-north"}, ("--new-network",))
        swarm.start(node)
        js = start_js("js")
        peer = js.ask("dial", address=node.ask("status")["network"]["addresses"][0])["peer"]
        assert peer == node.peer_id

        def rpc(method: str, header: dict[str, Any]) -> dict[str, Any]:
            return js.ask("rpc", peer=peer, method=method, header=header, buffers=[], deadline_ms=5000)

        # its advert, signed, with what it measured on itself; the ledger network in it is the one it serves
        assert rpc("advert.exchange", {"known": {}})["kind"] == "response"
        advert = js.ask("taken", peer=peer)["advert"]
        assert advert["region"] == "eu-north"
        assert advert["hardware"][1] >= 1
        terms = rpc("ledger.terms", {})["header"]
        assert terms["net"] == advert["net"]
        assert rpc("ledger.buckets", {"net": "x"})["header"]["code"] == "conflict"
        assert abs(rpc("clock.read", {})["header"]["unix_ms"] - time.time() * 1000) < 60_000
        assert rpc("model.have", {"model": MODEL})["header"]["shards"] == {"hex": ""}
        assert rpc("model.manifest", {"model": MODEL})["header"]["code"] == "not_found"
        assert rpc("expert.run", {"model": MODEL})["header"]["code"] == "invalid_request"
