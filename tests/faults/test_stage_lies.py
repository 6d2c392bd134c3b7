"""A stage's host that lies, between whole daemons: found out by an audit, proved, told to all, used no more."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from node.rig import NodeProcess, rios, wait_for
from tests.faults.rig import swarm_of, tell

LIAR = str(Path(__file__).with_name("lying_node.py"))
AT_ONCE = 4
"""So many answers are asked for at the same time: one after the other, all might be the honest host's."""


def test_21_a_stage_host_that_adds_one_percent_to_one_number(tmp_path: Path) -> None:
    audited = {"dmoe.audit_share": 1.0}
    prefixes = [(sys.executable, LIAR, "one:0.1")]
    with swarm_of(
        tmp_path, mode="stages", routes=("stages", "stages"), settings=audited, kind="F32", prefixes=prefixes
    ) as rig:
        (liar, honest), asks = rig.workers, rig.orchestrators[1]  # the first one has all files itself
        text, asked = rig.reference(route="stages"), 0

        def wrong() -> set[str]:
            peers = asks.ask("audit.list")["peers"]
            return {peer for peer, record in peers.items() if record["guilty"]}

        def found() -> bool:
            nonlocal asked
            asked += AT_ONCE
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(rig.answer, [asks] * AT_ONCE))
            return bool(wrong())

        wait_for(found, "the liar to be found out", 90)
        assert wrong() == {liar.peer_id}
        folder = asks.data / "evidence"
        wait_for(lambda: list(folder.glob("*.evidence")), "the evidence", 30)
        (file,) = folder.glob("*.evidence")
        told = rios(honest, "audit", "verify", str(file))  # with the files of a node that serves the stage
        assert told.startswith("guilty:")
        assert liar.peer_id in told
        before = _runs(liar)
        assert rig.ask(asks)[0] == text
        assert _runs(liar) == before, "it is not asked any more"
        assert _runs(honest)
        tell(
            f"one of two stage hosts adds 1 % to one number in a tenth of its runs; {asked} answers were asked for",
            "the right text from then on, and who lied: rios audit ls",
            "what was answered before the audit",
        )


def _runs(node: NodeProcess) -> int:
    return int(node.ask("status")["work"]["stages"]["runs"])
