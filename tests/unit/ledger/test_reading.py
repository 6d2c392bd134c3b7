"""What a ledger's file says after a prune, in odd orders and to odd questions."""

import pytest

from config.errors import ConfigError
from ledger import reading
from ledger.core import checkpoint
from ledger.core.checkpoint import Proof, sign_checkpoint
from ledger.core.objects import Certificate, Committee, Entry, Grant, Op, TopUp, Transfer, parse, sign
from ledger.core.witness import Witness
from ledger.promises import Handed
from ledger.records import Final, Own, Voted
from ledger.store import Store
from p2p.core import codec
from tests.unit.ledger.ledger_kit import START_MS, Maker, identity

NEW = identity(900)


class Pruned:
    """A network whose second committee made a checkpoint, and the file of person 1, pruned below it."""

    def __init__(self, path) -> None:
        self.path, self.maker = path, Maker(4)
        m = self.maker
        m.entry(0, Grant(m.people[1].public_key, 100_000_000))  # root is issuer: its chain is more than committees
        self._change()
        self.own = self._final(1, Transfer(m.people[2].public_key, 5_000_000))
        self.store = Store(path, m.genesis.net)
        self.store.commit([*m.finals, Own(1, self.own.signed)])
        self._prune()
        self.later = self._final(1, Transfer(m.people[2].public_key, 6_000_000))
        self.store.commit([m.finals[-1], Own(2, self.later.signed)])

    def _change(self) -> None:
        m = self.maker
        root = m.people[0]
        signed = self.next_entry(0, Committee(1, (NEW.public_key,), 0))
        m.witnesses[0].listed.add(parse(signed).id)
        m._final(signed)
        handed = m.witnesses[0].advance()
        assert handed is not None
        self.witness = Witness(NEW, m.state, 1)
        self.witness.receive(handed.signed)
        self.witness.advance()
        assert root.public_key == m.genesis.root

    def next_entry(self, who: int, *ops: Op):
        person = self.maker.people[who]
        account = self.maker.state.account(person.public_key)
        return sign(person, Entry(self.maker.genesis.net, person.public_key, account.seq + 1, account.head, ops))

    def _final(self, who: int, *ops: Op):
        item = parse(self.next_entry(who, *ops))
        self.witness.consider_entry(item)
        certificate = Certificate(item.signed, 1, (self.witness.seal().votes[0],))
        self.maker.state.add(item)
        self.maker.finals.append(Final(item, certificate, START_MS + len(self.maker.finals)))
        return item

    def _prune(self) -> None:
        state, net = self.maker.state, self.maker.genesis.net
        pages = list(checkpoint.pages(state))
        summary = checkpoint.summarise(pages, state.committees, state.supply, state.applied)
        proof = Proof(summary, (sign_checkpoint(NEW, net, summary),))
        self.store.commit(self.store.shelf.keep(proof, [codec.encode(page) for page in pages]))
        self.store.prune(
            self.store.shelf.start_from(summary.state_root),
            self.store.committee_entries(self.maker.genesis.root),
            [(key, account.seq) for key, account in state.accounts.items()],
            state.channels,
        )

    def entry(self, name: str):
        return reading.entry(self.path, self.maker.genesis, name)


@pytest.fixture
def pruned(tmp_path):
    made = Pruned(tmp_path / "ledger.db")
    yield made
    made.store.close()


def test_certificates_and_witnesses_of_later_committees_are_known_after_a_prune(pruned):
    assert pruned.entry(pruned.later.id.hex())["certificate"]["valid"]
    assert reading.offences(pruned.path, pruned.maker.genesis, NEW.peer_id)["witness"]


def test_an_own_entry_below_the_checkpoint_is_final(pruned):
    me = pruned.maker.people[1]
    for name in (pruned.own.id.hex(), f"{me.peer_id}:1"):
        shown = pruned.entry(name)
        assert shown["state"] == "final, below the checkpoint"
        assert shown["certificate"] is None
    lost = sign(me, Entry(pruned.maker.genesis.net, me.public_key, 1, bytes(32), (Transfer(me.public_key, 7),)))
    pruned.store.commit([Voted(parse(lost), 1)])
    assert pruned.entry(parse(lost).id.hex())["state"] == "voted for, another one may be final below the checkpoint"


def test_what_was_voted_for_in_a_later_epoch_is_found(pruned):
    signed = pruned.next_entry(1, Transfer(NEW.public_key, 8))
    pruned.store.commit([Voted(parse(signed), 1)])
    assert pruned.entry(parse(signed).id.hex())["state"] == "voted for, no certificate yet"


def test_a_statement_has_what_was_learned_before_its_channel(tmp_path):
    m = Maker(3)
    me = m.people[1].public_key
    m.entry(0, Grant(me, 100_000_000))
    channel = m.open(1, 2, 50_000_000)
    m.entry(1, TopUp(channel, 20_000_000))
    grant, opened, topup = m.finals
    store = Store(tmp_path / "c.db", m.genesis.net)
    store.commit([topup, opened, grant])  # gossip brought them the other way round
    store.close()
    lines = reading.statement(tmp_path / "c.db", m.genesis, me)
    amounts = {line.kind: line.amount for line in lines}
    assert amounts == {"grant": 100_000_000, "open": -50_000_000, "topup": -20_000_000}
    assert lines[-1].balance == reading.balance_in(tmp_path / "c.db", m.genesis, me)["balance"] == 30_000_000


def test_numbers_beyond_any_chain_are_refused(tmp_path):
    m = Maker(2)
    store = Store(tmp_path / "o.db", m.genesis.net)
    for number in (str((1 << 62) + 1), "9999999999999999999"):
        with pytest.raises(ConfigError, match="not the number of an entry"):
            reading.entry(tmp_path / "o.db", m.genesis, f"{m.people[0].peer_id}:{number}")
    store.commit([Handed(0, bytes(32), sign(m.people[0], Entry(m.genesis.net, bytes(32), 1, bytes(32), ())))])
    assert store.handover_piece(0, bytes(32), 1 << 70, 1) is not None
    assert store.handover_piece(1 << 63, bytes(32), 0, 1) is None
    assert list(store.entry_certificates(bytes(32), 1 << 63, 1 << 64, 10)) == []
    assert store.newest_entries(1, 1 << 70) == []
    store.close()
