"""One witness of the model: the real core (``ledger.core``), told what happens in some order.

Not a test. A witness is known by what happened to it; it is made anew from that whenever something more happens (its
objects need no copying then), once for every pair of a state (:mod:`tests.model.canon`) and an event.

Events, as tuples: ``("vote", name)``, ``("freeze",)``, ``("learn", name)`` a certificate, ``("receive", who, content)``
a handover of the epoch before, ``("restart",)`` from what was persisted.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from config.errors import IntegrityError
from ledger.core.errors import RuleError
from ledger.core.objects import Claim, Item, sign
from ledger.core.state import State
from ledger.core.witness import HANDED_OVER, Witness
from tests.model.canon import Canon
from tests.model.things import LATE_MS, Things

Event = tuple[Any, ...]


@dataclass
class Local:
    """A state of one witness."""

    number: int
    epoch: int
    history: tuple[Event, ...]
    phase: str
    gave: tuple[str, ...]
    """Names of what it voted for in its epoch."""
    froze: int | None
    learned: frozenset[str]
    handover: Canon
    """What it handed over, None before."""
    received: tuple[Canon, ...]
    restarts: int
    bad: str
    """The invariant that is broken inside it, empty if none."""
    after: dict[Event, "Local"] = field(default_factory=dict, repr=False)

    @property
    def idle(self) -> bool:
        """Whether nothing that it learns can change what it does any more."""
        return self.phase == HANDED_OVER


class _Live:
    """A witness in the flesh."""

    def __init__(self, things: Things, epoch: int) -> None:
        self.things = things
        self.epoch = epoch
        self.identity = things.honest[epoch][0]
        self.state = State(things.genesis)
        for name in things.base(epoch):
            self.state.add(things.items[name])
        self.gave: set[str] = set()
        self.froze: int | None = None
        self.learned: set[str] = set()
        self.received: list[Canon] = []
        self.bad = ""
        self.restarts = 0
        self.witness = Witness(self.identity, self.state, epoch)

    def happen(self, event: Event) -> None:
        """Raises IntegrityError where a rule forbids it."""
        getattr(self, f"_{event[0]}")(*event[1:])

    def _vote(self, name: str) -> None:
        item = self.things.items[name]
        if isinstance(item.object, Claim):
            self.witness.consider_claim(item)
        else:
            self.witness.consider_entry(item)
        assert self.witness.seal() is not None
        self.gave.add(name)

    def _freeze(self) -> None:
        frozen = self.witness.freeze(self.things.channel, LATE_MS)
        self.froze = self.things.total_of(frozen.signed)

    def _learn(self, name: str) -> None:
        item = self.things.items[name]
        self.learned.add(name)
        try:
            self.state.add(item)
            self.state.check_invariants()
        except IntegrityError as error:
            self.bad = error.message
            return
        self.bad = next(iter(self.state.broken.values()), "")
        self._saw(item)
        self.witness.forget_slot(item)
        self._advance()

    def _saw(self, item: Item) -> None:
        """As the adapter does it: whatever is final is known to the witness, too."""
        if isinstance(item.object, Claim):
            self.witness.saw_voucher(item.object.voucher, item.object.voucher_signature)

    def _receive(self, who: str, content: Canon) -> None:
        self.received.append((who, content))
        honest = [c for w, c in self.received if w == "honest"]
        identity = self.things.honest[0][len(honest) - 1] if who == "honest" else self.things.liar[0]
        body = self.things.contents[content]
        self.witness.receive(sign(identity, msgspec.structs.replace(body, witness=identity.public_key)))
        self._advance()

    def _advance(self) -> None:
        if self.witness.advance() is not None:
            self.witness.confirm_handover()

    def _restart(self) -> None:
        """From the disk: votes, freeze, where it stood (``ledger.voting`` restores in the same way)."""
        old, self.restarts = self.witness, self.restarts + 1
        self.witness = Witness(self.identity, self.state, self.epoch)
        for name in self.things.persisted(self.gave):
            item = self.things.items[name]
            if not isinstance(item.object, Claim):
                self.witness.restore_entry_vote(item)
            self._saw(item)
        for name in self.learned:
            self._saw(self.things.items[name])
        if self.froze is not None and self.things.persist_freezes:
            self.witness.restore_freeze(old._frozen[self.things.channel].signed)
        self.witness.restore_phase(old.phase, restored=False, handover=old.handover)
        self.witness.forget_final()

    # looking in

    def handover(self) -> Canon:
        """The content of what it handed over; kept so that it can be handed to others."""
        if self.witness.handover is None:
            return None
        body = self.things.open_handover(self.witness.handover)
        return self.things.keep(body)

    def canon(self) -> Canon:
        """Everything that decides what it will do, and what it has given to others."""
        canon = self.things.names.canon
        if self.witness._identity is None and not self.bad:  # it can do nothing any more: what it left is all
            return canon(self.gave), self.froze, self.handover(), self.restarts
        honest = Counter(content for who, content in self.received if who == "honest")
        parts = (self.witness, self.state, self.gave, self.froze, self.learned, honest, len(self.received))
        return (*map(canon, parts), self.handover(), self.restarts, self.bad)


class Locals:
    """Every state a witness was seen in, with what comes next."""

    def __init__(self, things: Things) -> None:
        self.things = things
        self.all: list[Local] = []
        self._known: dict[tuple[int, Canon], Local] = {}
        self._digests: dict[tuple[int, frozenset[str]], bytes] = {}
        self._last: tuple[Local | None, _Live | None] = (None, None)
        self.runs = 0

    def first(self, epoch: int) -> Local:
        """The state that a witness of an epoch begins in."""
        return self._keep(_Live(self.things, epoch), ())

    def after(self, local: Local, event: Event) -> Local:
        """The state after an event; the same one if a rule forbids it."""
        known = local.after.get(event)
        if known is None:
            known = local.after[event] = self._run(local, event)
        return known

    def _run(self, local: Local, event: Event) -> Local:
        self.runs += 1
        last, live = self._last
        if last is not local or live is None:
            live = _Live(self.things, local.epoch)
            for past in local.history:
                self._happen(live, past)
        self._happen(live, event)
        then = self._keep(live, (*local.history, event))
        self._last = (then, live)  # where the event changed nothing, the next one can begin here
        return then

    @staticmethod
    def _happen(live: _Live, event: Event) -> None:
        try:
            live.happen(event)
        except RuleError:
            return  # refused; what it saw all the same (a voucher) may have changed it

    def _keep(self, live: _Live, history: tuple[Event, ...]) -> Local:
        key = (live.epoch, live.canon())
        known = self._known.get(key)
        if known is None:
            self._check_digest(live)
            known = Local(
                len(self.all), live.epoch, history, live.witness.phase, tuple(sorted(live.gave)), live.froze,
                frozenset(live.learned), live.handover(), tuple(live.received), live.restarts, live.bad,
            )  # fmt: skip
            self._known[key] = known
            self.all.append(known)
        return known

    def _check_digest(self, live: _Live) -> None:
        if live.bad:
            return
        learned = (live.epoch, frozenset(live.learned))
        if self._digests.setdefault(learned, live.state.digest()) != live.state.digest():
            live.bad = f"I5: two states of {sorted(live.learned)}"
