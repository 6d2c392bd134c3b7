"""Reference vectors: what another implementation has to produce and to refuse, byte for byte.

``python tests/unit/ledger/test_vectors.py`` writes the file anew (a change of it is a change of the protocol).
"""

import json
from pathlib import Path

import pytest

from config.errors import IntegrityError
from ledger.core import certificate as certificates
from ledger.core.certificate import Collector, Verifier
from ledger.core.genesis import Genesis, from_json
from ledger.core.objects import (
    NO_HEAD,
    Claim,
    Committee,
    Entry,
    Grant,
    Open,
    Receipt,
    Reclaim,
    Seat,
    Signed,
    TopUp,
    Transfer,
    Voucher,
    channel_id,
    parse,
    sign,
)
from ledger.core.state import State
from ledger.core.witness import Witness
from p2p.core.identity import Identity

FILE = Path(__file__).parents[2] / "vectors" / "ledger.json"
NAMES = ("issuer", "payer", "worker", "cold", "w0", "w1", "w2", "w3", "v0", "v1", "v2", "v3")
SEEDS = {name: bytes([n]) * 32 for n, name in enumerate(NAMES)}
WHO = {name: Identity.from_seed(seed) for name, seed in SEEDS.items()}


def produce() -> dict:
    """All vectors."""
    issuer, payer, worker, cold = (WHO[n] for n in ("issuer", "payer", "worker", "cold"))
    committee = [WHO[f"w{n}"] for n in range(4)]
    genesis = Genesis(
        issuer=issuer.public_key, root=issuer.public_key, witnesses=tuple(w.public_key for w in committee), f=1
    )
    state = State(genesis)
    verifier = Verifier(genesis, state.committees)
    witnesses = [Witness(w, state) for w in committee]
    steps = []

    def final(name: str, signed: Signed) -> bytes:
        collector = Collector(verifier, signed)
        for witness in witnesses[:3]:
            consider = witness.consider_entry if isinstance(collector.item.object, Entry) else witness.consider_claim
            consider(collector.item)
            collector.add(witness.seal().votes[0])
        certificate = certificates.encode(collector.certificate())
        assert state.add(collector.item)
        steps.append(
            {
                "name": name,
                "body": signed.body.hex(),
                "id": collector.item.id.hex(),
                "signature": signed.signature.hex(),
                "certificate": certificate.hex(),
                "state_digest": state.digest().hex(),
            }
        )
        return collector.item.id

    def entry(who: Identity, *ops) -> Signed:
        account = state.account(who.public_key)
        return sign(who, Entry(genesis.net, who.public_key, account.seq + 1, account.head, ops))

    final("grant", entry(issuer, Grant(payer.public_key, 20_000_000), Grant(cold.public_key, 1)))
    final("transfer", entry(payer, Transfer(worker.public_key, 7)))
    opened = final("open", entry(payer, Open(worker.public_key, cold.public_key, 5_000_000, 1_000)))
    channel = channel_id(opened, 0)
    final("topup", entry(payer, TopUp(channel, 1_000_000)))
    voucher = Voucher(genesis.net, channel, 1, 250_000, bytes(32))
    promise = sign(payer, voucher)
    final("claim", sign(worker, Claim(payer.public_key, 2, 0, voucher, promise.signature)))
    freezes = tuple(witness.freeze(channel, 1_000).signed for witness in witnesses[:3])
    receipt = sign(worker, Receipt(genesis.net, channel, 1, 250_000, 32, 250_000_000, 0, bytes(32)))
    good = entry(payer, Reclaim(channel, 250_000, freezes))
    final("reclaim", good)
    lock = entry(payer, Transfer(cold.public_key, 9))
    witnesses[0].consider_entry(parse(lock))
    witnesses[0].seal()
    successors = [WHO[f"v{n}"] for n in range(4)]
    change = entry(issuer, Committee(1, tuple(v.public_key for v in successors), 1))
    for witness in witnesses:
        witness.listed.add(parse(change).id)
    final("committee", change)
    handovers = [effect.signed for effect in (witness.advance() for witness in witnesses[:3]) if effect is not None]
    witnesses = [Witness(v, state, 1) for v in successors]
    for witness in witnesses:
        for handover in handovers:
            witness.receive(handover)
        witness.advance()
    final("transfer that one old witness had voted for", lock)
    seat = sign(successors[0], Seat(genesis.net, 1, successors[0].public_key, worker.public_key))
    wide = entry(payer, Transfer(worker.public_key, 1))
    return {
        "seeds": {name: seed.hex() for name, seed in SEEDS.items()},
        "genesis": json.loads(genesis.to_json()),
        "genesis_bytes": genesis.canonical().hex(),
        "net": genesis.net.hex(),
        "channel": channel.hex(),
        "receipt": {"body": receipt.body.hex(), "signature": receipt.signature.hex()},
        "voucher": {"body": promise.body.hex(), "signature": promise.signature.hex()},
        "freezes": [{"body": f.body.hex(), "signature": f.signature.hex()} for f in freezes],
        "handovers": [{"body": h.body.hex(), "signature": h.signature.hex()} for h in handovers],
        "seat": {"body": seat.body.hex(), "signature": seat.signature.hex()},
        "steps": steps,
        "refused": {
            "amount 1 in three bytes": (wide.body[:-1] + b"\xcd\x00\x01").hex(),
            "a trailing byte": (wide.body + b"\xc0").hex(),
            "a missing field": ("95" + wide.body.hex()[2:]),
            "amount above 2**62": sign(
                payer, Entry(genesis.net, payer.public_key, 1, NO_HEAD, (Transfer(cold.public_key, (1 << 62) + 1),))
            ).body.hex(),
        },
    }


def test_the_code_produces_exactly_the_vectors():
    assert json.loads(FILE.read_text()) == produce()


def test_the_vectors_alone_lead_to_the_same_state():
    vectors = json.loads(FILE.read_text())
    genesis = from_json(json.dumps(vectors["genesis"]))
    assert genesis.net.hex() == vectors["net"]
    state = State(genesis)
    verifier = Verifier(genesis, state.committees)
    for step in vectors["steps"]:
        item = verifier.open(certificates.decode(bytes.fromhex(step["certificate"])))
        assert item.id.hex() == step["id"]
        assert state.add(item)
        assert state.digest().hex() == step["state_digest"]
    state.check_invariants()


@pytest.mark.parametrize("what", sorted(json.loads(FILE.read_text())["refused"]) if FILE.exists() else [])
def test_malformed_bodies_are_refused(what):
    body = bytes.fromhex(json.loads(FILE.read_text())["refused"][what])
    with pytest.raises(IntegrityError):
        parse(Signed(body, bytes(64)))


if __name__ == "__main__":
    FILE.write_text(json.dumps(produce(), indent=1) + "\n")
