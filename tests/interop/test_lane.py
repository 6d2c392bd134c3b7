"""The direct lane from the other side: a client written from docs/protocol.md, with nothing of libp2p in it."""

from typing import Any

STRANGER = "12D3KooWPqT2nMDSiXUSx5D7fasaxhxKigVhcqfkKqrLghCq9jxz"


def test_a_javascript_client_of_the_direct_lane(start_js, start_node):
    a = start_node("a", [])
    js = start_js("js")
    at = {"peer": a.hello["peer_id"], "address": a.hello["address"]}

    def rpc(name: str, method: str, header: dict[str, Any], *buffers: str, bulk: bool = False) -> dict[str, Any]:
        return js.ask("lane_rpc", name=name, method=method, header=header, buffers=buffers, bulk=bulk, deadline_ms=5000)

    for aes, cipher in ((True, None), (False, "chacha20-poly1305")):
        name = f"aes {aes}"
        lane = js.ask("lane", name=name, aes=aes, **at)
        assert "failed" not in lane, lane
        assert lane["cipher"] == (cipher or lane["cipher"])
        for bulk in (False, True):
            echoed = rpc(name, "echo", {"n": 1}, "00ff", "bb" * 300_000, bulk=bulk)
            assert echoed["header"] == {"from": js.hello["peer_id"], "n": 1}
            assert [buffer["hex"] for buffer in echoed["buffers"]] == ["00ff", "bb" * 300_000]
        for _ in range(16):  # past the window of 4 MiB in both directions
            assert len(rpc(name, "echo", {}, "cc" * 600_000)["buffers"][0]["hex"]) == 1_200_000
        assert rpc(name, "no.such.method", {})["header"]["code"] == "not_found"

    # what a later version may send is skipped, what no version may send ends the lane, and only that
    js.ask("lane", name="strange", **at)
    assert js.ask("lane_record", name="strange", kind=200, bytes="00", wait_ms=300) == {"ended": None}
    assert js.ask("lane_record", name="strange", kind=50, bytes="00")["ended"]
    assert rpc("aes False", "echo", {"n": 2})["header"]["n"] == 2

    # somebody else than the peer that was meant; the key of a private swarm that the node is not in
    wrong = js.ask("lane", name="wrong", peer=STRANGER, address=a.hello["address"])
    assert "answered" in wrong["failed"]
    assert "failed" in js.ask("lane", name="wrong", psk="07" * 32, **at)


def test_a_javascript_client_in_a_private_swarm(start_js, start_node):
    key, other = "5e" * 32, "5f" * 32
    a = start_node("a", [], key)
    js = start_js("js")
    at = {"peer": a.hello["peer_id"], "address": a.hello["address"]}
    assert "cipher" in js.ask("lane", name="member", psk=key, **at)
    header = js.ask("lane_rpc", name="member", method="echo", header={"n": 1}, buffers=[], deadline_ms=5000)["header"]
    assert header == {"from": js.hello["peer_id"], "n": 1}
    for stranger in ({}, {"psk": other}):
        assert "closed by the peer" in js.ask("lane", name="stranger", **stranger, **at)["failed"]
    assert "failed" in js.ask("dial", address=a.hello["address"])  # /noise is not spoken there
