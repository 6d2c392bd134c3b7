"""Nodes behind real NAT (masquerade, nothing unasked comes in): found out, reached, by which way. Figures: ``-s``."""

import shutil
import time

import pytest
from rig import Node, Rig
from test_weather import until


def standing(node: Node) -> dict:
    return node.ask("look")["standing"]


def reach(node: Node) -> str:
    return standing(node)["reach"]


def relaying(node: Node) -> dict:
    return node.ask("look")["statistics"]["reachability"]["relay"]


def figures(caller: Node, called: Node) -> str:
    """Median ms of calls of three sizes."""
    found = []
    for size in (128, 64 << 10, 256 << 10):
        done = caller.call(called, size=size, count=20)
        assert done["errors"] == []
        found.append(f"{sorted(done['seconds'])[10] * 1000:.2f}")
    return " / ".join(found) + " ms at 128 B / 64 KiB / 256 KiB"


def behind(rig: Rig, name: str, relay: Node, *, random_ports: bool = False, **settings: object) -> Node:
    """A node behind a router of its own."""
    router = rig.router(f"n{name}", random_ports=random_ports)
    return Node(rig.behind(router, name), name, [relay.seed], **settings)


def test_a_public_caller_reaches_a_node_behind_nat_by_reversal(rig):
    relay = Node(rig.host("r"), "r")
    hidden = behind(rig, "p", relay, peers_max=1, upnp=False)  # has a link to the relay, and dials nobody else
    until(lambda: reach(relay) == "public", 20)
    took_s = until(lambda: reach(hidden) == "relayed", 30)
    told = standing(hidden)
    assert "could not dial it" in told["why"]
    assert f"forward TCP port 4701 to {hidden.host.address}" in told["fix"]
    assert all("/p2p-circuit/" in address for address in told["advertised"])  # none that cannot be dialled

    caller = Node(rig.host("c"), "c", [relay.seed])
    until(lambda: reach(caller) == "public", 20)
    until(lambda: hidden.peer_id in caller.ask("view")["view"], 20)
    first = caller.call(hidden)
    assert first["errors"] == []
    after = relaying(relay)
    assert after["reversed"] >= 1
    assert after["passed_bytes"] == 0  # the relay only said hello
    # who cannot be dialled stands in nobody's routing table, but is linked
    until(lambda: relay.ask("look")["statistics"]["dht_peers"] == 1, 10)
    assert set(relay.ask("look")["peers"]) == {hidden.peer_id, caller.peer_id}
    first_ms = first["seconds"][0] * 1000
    print(f"\nreversal: relayed after {took_s:.1f} s, first call {first_ms:.0f} ms, then {figures(caller, hidden)}")


def test_two_nodes_behind_nat_meet_at_a_relay_and_survive_it(rig):
    generous = {"relay_bytes_per_second_max": 1 << 30}  # what is measured is the splice, not the limit
    relays = [Node(rig.host("r"), "r", **generous)]
    relays.append(Node(rig.host("s"), "s", [relays[0].seed], **generous))
    # a router that changes ports cannot be passed by hole punching: the splice stays
    hidden = behind(rig, "p", relays[0], upnp=False, random_ports=True)
    caller = behind(rig, "c", relays[0], upnp=False)
    until(lambda: all(len(relaying(node)["relays"]) == 2 for node in (hidden, caller)), 60)
    until(lambda: hidden.peer_id in caller.ask("view")["view"], 20)
    first = caller.call(hidden)
    assert first["errors"] == []
    line = figures(caller, hidden)
    assert caller.call(hidden)["link"]["relay"]
    passed = [relaying(node)["passed_bytes"] for node in relays]
    assert sum(passed) > 20 * 2 * (256 << 10)
    print(f"\nsplice: first call {first['seconds'][0] * 1000:.0f} ms, then {line}")

    used = relays[passed.index(max(passed))]
    used.process.kill()
    back_s = until(lambda: not caller.call(hidden, deadline_ms=3000)["errors"], 40)
    other = relays[1 - relays.index(used)]
    assert relaying(hidden)["relays"] == [other.peer_id]
    print(f"splice: {back_s:.1f} s after the relay was killed, calls go through the other one")


def test_two_nodes_behind_nat_open_a_direct_way(rig):
    relay = Node(rig.host("r"), "r")
    hidden, caller = behind(rig, "p", relay, upnp=False), behind(rig, "c", relay, upnp=False)
    until(lambda: all(reach(node) == "relayed" for node in (hidden, caller)), 40)
    until(lambda: hidden.peer_id in caller.ask("view")["view"], 20)
    started = time.monotonic()
    assert caller.call(hidden)["errors"] == []
    until(lambda: caller.call(hidden)["link"]["relay"] == "", 30)
    took_s = time.monotonic() - started
    before = relaying(relay)["passed_bytes"]
    line = figures(caller, hidden)
    assert relaying(relay)["passed_bytes"] - before < 64 << 10  # the calls go directly
    assert caller.ask("look")["statistics"]["reachability"]["holes_punched"] == 1
    print(f"\nhole punched {took_s:.1f} s after the first call; then {line}")


@pytest.mark.skipif(shutil.which("miniupnpd") is None, reason="miniupnpd is missing (apt-get install miniupnpd)")
def test_upnp_makes_a_node_behind_nat_public(rig):
    relay = Node(rig.host("r"), "r")
    router = rig.router("n")
    host = rig.behind(router, "p")
    rig.give_upnp(router)
    hidden = Node(host, "p", [relay.seed])
    took_s = until(lambda: reach(hidden) == "public", 40)
    assert standing(hidden)["advertised"] == [f"/ip4/{router.address}/tcp/4701/p2p/{hidden.peer_id}"]
    caller = Node(rig.host("c"), "c", [f"/ip4/{router.address}/tcp/4701/p2p/{hidden.peer_id}"])
    until(lambda: not caller.call(hidden)["errors"], 20)
    hidden.process.stdin.close()
    hidden.process.wait(10)
    assert "4701" not in router.run("nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd")
    print(f"\nUPnP: public {took_s:.1f} s after the start; the mapping is taken back at the end")
