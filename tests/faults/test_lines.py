"""Bad lines under whole daemons in network namespaces: partition, one-way partition, 30 % loss, 200 ms.

One orchestrator and two workers, each on a host of its own, two replicas of every shard. (What bad lines do to links
alone stands in ``tests/netns/test_weather.py``.)
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Place, Rig, swarm_of, tell
from tests.netns.rig import Host, missing
from tests.netns.rig import Rig as Internet

TOKENS = 300
FAULT_AFTER = 10
SECONDS_MAX = 30.0
PACKETS = 5
"""So many were lost at least: the fault was felt."""
ANSWERS_MAX = 12
"""Answers asked for until a fault was felt enough."""


class Lines:
    """The swarm, its hosts and the answer without any fault."""

    def __init__(self, internet: Internet, hosts: list[Host], rig: Rig) -> None:
        self.internet = internet
        self.hosts = hosts
        self.rig = rig
        self.text = rig.reference(TOKENS)

    def ask(self, fault: object = None) -> tuple[str, float]:
        """An answer during which ``fault`` happens, and its seconds."""
        began = time.monotonic()
        text, _ = self.rig.ask(
            tokens=TOKENS, on_piece=lambda count: fault() if fault and count == FAULT_AFTER else None
        )
        return text, time.monotonic() - began

    def used_again(self, number: int) -> float:
        """Seconds until a worker computes for answers again."""
        worker, began = self.rig.workers[number], time.monotonic()
        before = self.rig.rows(worker)
        while self.rig.rows(worker) <= before:
            assert self.ask()[0] == self.text
            assert time.monotonic() - began < 60, f"{worker.name} is not used again"
        return time.monotonic() - began


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lines]:
    if why_not := missing():
        pytest.skip(why_not)
    with Internet() as internet:
        hosts = [internet.host(name) for name in ("o", "v", "w")]
        places = [Place(("ip", "netns", "exec", host.namespace), host.address) for host in hosts]
        with swarm_of(tmp_path_factory.mktemp("lines"), places=places) as rig:
            yield Lines(internet, hosts, rig)


def test_6_a_partition_in_the_middle_of_an_answer_and_its_end(lines: Lines) -> None:
    orchestrator, parted, other = lines.hosts
    try:
        text, seconds = lines.ask(lambda: lines.internet.part([parted], [orchestrator, other]))
        assert text == lines.text
        assert seconds < SECONDS_MAX
        assert lines.ask()[0] == lines.text, "the rest of the swarm goes on"
        dropped, _ = lines.internet.counted()
        assert dropped >= PACKETS
    finally:
        lines.internet.heal()
    back_s = lines.used_again(0)
    money = lines.rig.check_money()
    tell(
        f"one of two workers parted from everybody in the middle of an answer, {dropped} packets dropped",
        f"the same text after {seconds:.1f} s; the worker used again {back_s:.1f} s later; {money['paid']} paid",
    )


@pytest.mark.parametrize("silent", ["worker", "orchestrator"])
def test_7_a_one_way_partition(lines: Lines, silent: str) -> None:
    orchestrator, worker, _ = lines.hosts
    internet, other = lines.internet, lines.rig.workers[1]
    pair = ([worker], [orchestrator]) if silent == "worker" else ([orchestrator], [worker])
    lines.used_again(0)
    before = lines.rig.rows(other)
    try:
        text, seconds = lines.ask(lambda: internet.mute(*pair))
        assert text == lines.text
        assert seconds < SECONDS_MAX
        assert lines.rig.rows(other) - before > TOKENS, "it did the work of both"
        for _ in range(ANSWERS_MAX):
            dropped, passed = internet.counted()
            if dropped >= PACKETS and passed >= PACKETS:
                break
            assert lines.ask()[0] == lines.text
        assert dropped >= PACKETS, "what was said in vain"
        assert passed >= PACKETS, "the other way was open"
    finally:
        internet.heal()
    back_s = lines.used_again(0)
    money = lines.rig.check_money()
    tell(
        f"{dropped} packets from the {silent} did not arrive at the other, {passed} the other way did",
        f"the same text after {seconds:.1f} s; the worker used again {back_s:.1f} s after the end; "
        f"{money['paid']} paid",
    )


def test_8_thirty_percent_loss_at_one_worker(lines: Lines) -> None:
    host, worker, slowest = lines.hosts[1], lines.rig.workers[0], 0.0
    lines.used_again(0)
    before = lines.rig.rows(worker)
    lost = computed = answers = 0
    try:
        text, slowest = lines.ask(lambda: host.lose(30))
        assert text == lines.text
        while answers < ANSWERS_MAX and (lost < 4 * PACKETS or not computed or answers < 2):
            text, seconds = lines.ask()
            assert text == lines.text
            slowest, answers = max(slowest, seconds), answers + 1
            lost, computed = host.lost(), lines.rig.rows(worker) - before
        assert slowest < SECONDS_MAX
        assert lost >= 4 * PACKETS
        assert computed, "it was called in spite of it"
    finally:
        host.lose(0)
    back_s = lines.used_again(0)
    money = lines.rig.check_money()
    tell(
        f"30 % of the packets to one of two workers are lost: {lost} in {answers + 1} answers, {computed} rows there",
        f"the same text, after {slowest:.1f} s at most; the worker used again {back_s:.1f} s after the end; "
        f"{money['paid']} paid",
    )


def test_9_two_hundred_milliseconds_to_everybody(tmp_path: Path) -> None:
    if why_not := missing():
        pytest.skip(why_not)
    with Internet() as internet:
        hosts = [internet.host(name) for name in ("o", "v")]
        with internet.slow_line(hosts, delay_ms=100, loss_percent=0) as addresses:
            places = [
                Place(("ip", "netns", "exec", host.namespace), address)
                for host, address in zip(hosts, addresses, strict=True)
            ]
            with swarm_of(tmp_path, workers=1, replicas=1, places=places) as rig:
                began = time.monotonic()
                text, _ = rig.ask(tokens=10)
                seconds = time.monotonic() - began
                assert rig.reference(80).startswith(text)
                assert rig.rows(rig.workers[0]) > 0
                assert seconds > 0.6, "the prompt alone takes three layers' round trips"
                money = rig.check_money()
    tell(
        "200 ms round trip to the only worker, three layers of experts there",
        f"the same 10 tokens in {seconds:.1f} s; {money['paid']} microcredits paid",
    )
