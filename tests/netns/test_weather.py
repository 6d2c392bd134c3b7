"""Bad lines between real nodes: a partition, delay with loss, heavy loss. What they cost is printed (``-s``)."""

import time

from rig import Node


def until(ready, seconds: float) -> float:
    """Seconds until it was so; fails after ``seconds``."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.1)
    return time.monotonic() - started


def test_a_partition_heals(rig):
    a = Node(rig.host("a"), "a")
    b, c = Node(rig.host("b"), "b", [a.seed]), Node(rig.host("c"), "c", [a.seed])
    everybody = {node.peer_id for node in (a, b, c)}

    def view(node: Node) -> set[str]:
        return set(node.ask("view")["view"])

    until(lambda: all(view(node) == everybody for node in (a, b, c)), 20)
    until(lambda: not b.call(c)["errors"], 20)

    rig.part([a.host, b.host], [c.host])
    lost = b.call(c, deadline_ms=3000)
    assert lost["errors"]
    assert lost["seconds"][0] < 4
    parted_s = until(lambda: view(a) == everybody - {c.peer_id} and view(c) == {c.peer_id}, 30)
    assert not b.call(a)["errors"]  # this side goes on

    rig.heal()
    views_s = until(lambda: all(view(node) == everybody for node in (a, b, c)), 60)
    calls_s = until(lambda: not b.call(c)["errors"] and not c.call(b)["errors"], 30)
    print(
        f"\npartition: noticed in {parted_s:.1f} s, views whole {views_s:.1f} s after it ended, calls {calls_s:.1f} s"
    )


def test_200_ms_and_5_percent_loss_every_call_succeeds(rig):
    hosts = [rig.host("a"), rig.host("b")]
    with rig.slow_line(hosts, delay_ms=100, loss_percent=5) as (first, second):
        a = Node(hosts[0], "a", listen=[f"/ip4/{first}/tcp/4701"])
        b = Node(hosts[1], "b", [f"/ip4/{first}/tcp/4701/p2p/{a.peer_id}"], listen=[f"/ip4/{second}/tcp/4701"])
        until(lambda: a.peer_id in b.ask("look")["peers"], 40)
        seconds = []
        for caller, called in ((b, a), (a, b)):
            caller.tell("call", peer=called.peer_id, size=16 << 10, count=20, deadline_ms=10_000)
        for caller in (b, a):
            done = caller.hear()
            assert done["errors"] == []
            seconds += done["seconds"]
    seconds.sort()
    assert seconds[-1] < 10
    assert seconds[0] > 0.19  # the line is as slow as it should be
    print(
        f"\n16 KiB over 200 ms, 5 % loss: p50 {seconds[20]:.2f} s, p90 {seconds[36]:.2f} s, worst {seconds[-1]:.2f} s"
    )


def test_heavy_loss_calls_end_by_their_deadline_and_the_link_recovers(rig):
    hosts = [rig.host("a"), rig.host("b")]
    a = Node(hosts[0], "a")
    b = Node(hosts[1], "b", [a.seed])
    until(lambda: not b.call(a)["errors"], 20)
    for host in hosts:
        host.lose(30)
    done = b.call(a, size=16 << 10, count=8, deadline_ms=2000)
    assert max(done["seconds"]) < 2.5
    assert all(error.split(":")[0] in ("deadline", "unavailable") for error in done["errors"])
    for host in hosts:
        host.lose(0)
    back_s = until(lambda: not b.call(a, deadline_ms=2000)["errors"], 60)
    after = b.call(a, size=16 << 10, count=20)
    assert after["errors"] == []
    print(f"\n30 % loss: {8 - len(done['errors'])} of 8 calls succeeded; {back_s:.1f} s after it ended calls are back")
