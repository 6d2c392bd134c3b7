"""A worker that computes wrong results, and receipts that are forged, replayed or doubled, against whole daemons."""

import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from config.errors import RiosError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from ledger.core.objects import Receipt, Voucher, sign
from node.rig import NodeProcess, rios, wait_for
from p2p import keyfile
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.network import PeerNetwork, open_network
from tests.faults.rig import Rig, swarm_of, tell

LIAR = str(Path(__file__).with_name("lying_node.py"))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    # at first without audits: a liar that was found out would never be asked again
    with swarm_of(tmp_path_factory.mktemp("lies"), settings={"dmoe.audit_share": 0.0}) as made:
        yield made


def restart(rig: Rig, node: NodeProcess, *prefix: str) -> None:
    node.stop()
    node.prefix = prefix
    rig.start(node)


def test_21_a_worker_that_answers_zeros_or_almost_the_truth(rig: Rig) -> None:
    """The liar is the only replica here, and nobody audits, so that what it does can be seen."""
    liar, other = rig.workers
    text = rig.reference()
    seen = []
    other.stop()
    for lie in ("zeros:1", "one:0.05"):
        restart(rig, liar, sys.executable, LIAR, lie)
        rig.wait_replicas(1)
        said = rig.answer()
        computed = rig.rows(liar)
        assert computed > 0, "it served"
        seen.append(f"{lie}: {'an error' if not said else 'the right text' if said == text else 'another text'}")
        if lie == "zeros:1":
            assert said != text
    restart(rig, liar)
    rig.start(other)
    rig.wait_replicas()
    assert rig.ask()[0] == text
    rig.check_money()
    tell(f"the only worker lies: {liar.name}", "; ".join(seen) + "; the right text again once it is honest")


def test_22_receipts_and_vouchers_forged_replayed_and_doubled(rig: Rig, tmp_path: Path) -> None:
    rig.ask()
    rig.check_money()
    _wait_at_rest(rig)
    before, promised = rig.check_money(), rig._channels([rig.first], "buy")
    refused, answered = trio.run(_attack, rig, tmp_path)
    assert rig._channels([rig.first], "buy") == promised, "no voucher is worth more than before"
    assert rig.check_money() == before
    assert rig.ask()[0] == rig.reference()
    tell(
        f"{refused + answered} vouchers, receipts and claims: forged, replayed, doubled, for other channels",
        f"the same text afterwards; {refused} were refused, {answered} old ones answered with what is held",
        "nothing; not a microcredit moved",
    )


def _wait_at_rest(rig: Rig) -> None:
    """Until the receipts of the last calls are here, and what they make the first node lock and promise: nothing of
    that changes for two seconds."""
    looks: list[list[Any]] = []

    def is_at_rest() -> bool:
        looks.append(rig._channels([rig.first], "buy"))
        return len(looks) > 20 and all(look == looks[-1] for look in looks[-21:])

    wait_for(is_at_rest, "the last receipts", 60)


def test_21_a_liar_among_the_honest_is_proved_wrong_and_asked_no_more(rig: Rig) -> None:
    liar, other = rig.workers
    node, text, wrong, asked = rig.first, rig.reference(), 0, 0
    restart(rig, liar, sys.executable, LIAR, "one:0.3")
    node.stop()
    node.start({"RIOS_DMOE_AUDIT_SHARE": "0.5"})
    node.wait_started()
    rig.wait_replicas()

    def records() -> dict[str, Any]:
        return dict(json.loads(rios(node, "audit", "ls", "--json")))

    def is_exposed() -> bool:
        nonlocal wrong, asked
        wrong, asked = wrong + (rig.answer() != text), asked + 1
        return bool(records()["evidence"])

    wait_for(is_exposed, "the liar to be proved wrong", 60)
    listed = records()
    assert listed["peers"][liar.peer_id]["guilty"] > 0
    assert not listed["peers"].get(other.peer_id, {"guilty": 0})["guilty"]
    assert "guilty" in rios(other, "audit", "verify", listed["evidence"][0]), "whoever has the shard sees it"
    rig.ask()
    before = rig.rows(liar)
    assert [rig.ask()[0] for _ in range(3)] == [text] * 3
    assert rig.rows(liar) == before, "it is asked no more"
    node.stop()
    node.start({"RIOS_DMOE_AUDIT_SHARE": "0.5"})
    node.wait_started()
    assert records()["peers"][liar.peer_id]["guilty"] > 0, "it is remembered"
    rios(node, "audit", "forgive", liar.peer_id)
    for each in (node, other):  # those who saw the proof may have shut it out as well
        with suppress(RiosError):
            rios(each, "peers", "unban", liar.peer_id)
    restart(rig, liar)
    restart(rig, node)
    rig.wait_replicas()
    assert rig.ask()[0] == text
    tell(
        f"one of two workers gets one element 1 % wrong in 30 % of its calls: {liar.name}",
        f"{wrong} wrong of the {asked} answers until it was proved wrong; from then on the right ones, without it",
    )


def held(node: NodeProcess, query: str) -> list[tuple[Any, ...]]:
    """Rows of a node's ledger, read beside it."""
    with closing(sqlite3.connect(f"file:{node.data / 'ledger.db'}?mode=ro", uri=True)) as db:
        return list(db.execute(query))


async def _attack(rig: Rig, folder: Path) -> tuple[int, int]:
    """A thief, and a worker's own key in wrong hands; how many attempts were refused, how many answered."""
    payer, (worker, other) = rig.first, rig.workers
    net = bytes.fromhex(payer.ask("status")["ledger"]["net"])
    query = "SELECT channel, voucher, signature, receipt_n, receipt_cumulative, calls, kflop FROM channels"
    channel, voucher, signature, n, cumulative, calls, kflop = held(worker, f"{query} WHERE side = 'sell'")[0]
    thief, own = Identity.from_seed(b"thief".ljust(32)), keyfile.load(worker.data / "identity.key")
    leaf = bytes(32)

    def promise(who: Identity, amount: int, key: bytes = channel) -> dict[str, Any]:
        signed = sign(who, Voucher(net, key, n + 1, amount, leaf))
        return {"channel": channel, "certificates": [], "voucher": codec.encode(signed)}

    def receipt(who: Identity, amount: int, number: int = n, of: bytes = net) -> dict[str, Any]:
        body = Receipt(of, channel, number, amount, calls, kflop, 0, leaf)
        return {"receipt": codec.encode(sign(who, body))}

    replayed = {"channel": channel, "certificates": [], "voucher": codec.encode([voucher, signature])}
    claims = [codec.encode([body, sealed]) for body, sealed in held(payer, "SELECT body, signature FROM claims")]
    entries = [codec.encode([body, sealed]) for body, sealed in held(payer, "SELECT body, signature FROM entries")]
    assert claims
    attempts: list[tuple[Identity, NodeProcess, str, dict[str, Any]]] = [
        (thief, worker, "ledger.channel", promise(thief, cumulative + 1_000_000)),
        (thief, worker, "ledger.channel", promise(thief, cumulative + 1, key=leaf)),
        (thief, worker, "ledger.channel", {**replayed, "voucher": b"junk"}),
        (thief, worker, "ledger.channel", replayed),
        (thief, other, "ledger.channel", replayed),
        (thief, payer, "ledger.receipt", receipt(thief, cumulative + 1_000_000)),
        (thief, payer, "ledger.receipt", receipt(own, cumulative + 1)),
        (own, payer, "ledger.receipt", receipt(thief, cumulative + 1)),
        (own, payer, "ledger.receipt", receipt(own, cumulative + 1, of=bytes(16))),
        *[(own, payer, "ledger.receipt", receipt(own, cumulative))] * 2,  # one that was paid, twice
        (own, payer, "ledger.receipt", receipt(own, max(0, cumulative - 1), number=max(0, n - 1))),
        *[(thief, payer, "ledger.submit", {"object": each}) for each in (*claims, *entries) for _ in range(2)],
        *[(thief, payer, "ledger.submit", {"object": each[:-1] + bytes([each[-1] ^ 1])}) for each in claims],
    ]
    refused = 0
    try:
        for who in (thief, own):
            if who is own:
                worker.stop()  # its key is used by somebody else now
            async with _opened(rig, who, folder / who.peer_id) as network:
                refused += await _tried(network, [attempt for attempt in attempts if attempt[0] is who])
    finally:
        await trio.to_thread.run_sync(rig.start, worker)
    return refused, len(attempts) - refused


def _opened(rig: Rig, who: Identity, folder: Path) -> Any:
    seeds = tuple(node.status["network"]["addresses"][0] for node in (*rig.orchestrators, *rig.workers))
    folder.mkdir()
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=seeds, mdns="off")
    return open_network(who, settings, data_dir=folder, version="0")


async def _tried(network: PeerNetwork, attempts: list[tuple[Identity, NodeProcess, str, dict[str, Any]]]) -> int:
    refused = 0
    for _, target, method, header in attempts:
        try:
            await network.call(PeerId(target.peer_id), method, header, deadline_ms=10_000)
        except RiosError as error:
            if error.code in ("internal", "deadline"):
                raise
            refused += 1
    return refused
