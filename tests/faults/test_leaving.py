"""A host that is told to stop: what it has taken it answers, nothing more is taken, no call is lost.

A publisher, an orchestrator (route stages), one host, and a caller of this test's own. A node
that left without draining would cut these calls off; nobody else could answer them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from config.errors import RiosError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from dmoe.core import calls, wire
from node.rig import NodeProcess
from p2p.core.identity import Identity
from p2p.face import Reply
from p2p.network import open_network
from tests.faults.rig import LEAVING, Rig, swarm_of, tell

CALL_SECONDS = "0.8"
"""Less than a node that leaves waits for its calls."""
HIDDEN = 128


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("leaving")
    # the test's own caller has no money, and nobody else calls
    settings = {"ledger.microcredits_per_tflop": 0, "dmoe.audit_share": 0.0}
    with swarm_of(
        folder, workers=1, replicas=1, mode="both", routes=("experts", "stages"), settings=settings, layers_per_shard=3
    ) as made:
        yield made


def leaving(rig: Rig, kind: str) -> NodeProcess:
    """The host, started so that it hears SIGTERM in the middle of its first call of a kind; everything is there."""
    (host,) = rig.workers
    host.stop()
    host.prefix = (*LEAVING, kind, "1", "TERM", CALL_SECONDS)
    rig.start(host)
    rig.wait_replicas()
    return host


def left(host: NodeProcess) -> bool:
    """Whether it ends in order."""
    assert host.process is not None
    return host.process.wait(10) == 0 and "leaving anyway" not in host.log_tail(50)


def test_a_stage_that_runs_is_answered_before_its_host_leaves(rig: Rig) -> None:
    host = leaving(rig, "stages")
    text, details = rig.ask(rig.orchestrators[1], tokens=1)
    assert set(details["serving"]) == {host.peer_id}
    assert left(host)
    assert text == rig.reference(1, "stages")
    assert details["retries"] == 0
    tell("SIGTERM for the only host of the stage that is running", "the right answer, without a second try")


def test_an_expert_call_in_flight_is_answered_and_the_next_refused(rig: Rig, tmp_path: Path) -> None:
    host = leaving(rig, "experts")
    answered, refused = trio.run(_call_while_it_leaves, rig, host, tmp_path)
    assert left(host)
    assert answered.header["shape"] == [1, HIDDEN]
    assert refused
    tell("SIGTERM for the only host of experts with a call in flight", f"the answer to it; then: {refused}")


async def _call_while_it_leaves(rig: Rig, host: NodeProcess, folder: Path) -> tuple[Reply, str]:
    shape, buffer = wire.encode(np.ones((1, HIDDEN), np.float32))
    header = {"model": rig.model, "layer": 0, "groups": [0], "quote": 0, "channel": b"", **shape}
    settings = P2pSettings(
        listen=("/ip4/127.0.0.1/tcp/0",), seeds=(host.status["network"]["addresses"][0],), mdns="off"
    )
    answered: list[Reply] = []
    refused = ""
    async with open_network(Identity.from_seed(b"c" * 32), settings, data_dir=folder, version="0") as network:

        async def call() -> Reply:
            return await network.call(PeerId(host.peer_id), calls.METHOD, header, [buffer], deadline_ms=20_000)

        async def first() -> None:
            answered.append(await call())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.sleep(0.4)
            try:
                await call()
            except RiosError as error:
                refused = error.message
        await trio.to_thread.run_sync(left, host)  # before this network ends
    return answered[0], refused
