"""How a restored wallet finds out what it had signed; sans-IO.

Owns rule 9 on the wallet's side. The wallet brings its copy of the ledger up to date with each witness, then asks it
for the entry it voted for in the next free slot. An entry that is shown is the one to complete; a new one may be signed
only when nobody can hold another: all 3f + 1 answered, or a change of the committee settled what was left open.

Invariants: only answers about the present slot by witnesses of the present epoch count, one per witness.
"""

from config.errors import IntegrityError
from ledger.core import quorums
from ledger.core.objects import Entry, Item, Signed, parse
from ledger.core.rules import check_entry_signature
from ledger.core.state import State


class Recovery:
    """The search for the next entry of ``account``."""

    def __init__(self, state: State, account: bytes, *, fresh: bool = False, began: int | None = None) -> None:
        self._state = state
        self.account = account
        self.fresh = fresh
        """Whether nothing says that this key was ever used: a quorum that never saw it is then enough."""
        self._epoch = state.committees.epoch
        self.began = began
        """An epoch that was the present one after the loss, to be kept across attempts: a quorum of it answered, so
        none of the next had begun. The own copy of the ledger may be older and proves nothing."""
        self._slot = self.slot
        self._silent: set[bytes] = set()
        self._shown: dict[bytes, Item] = {}

    @property
    def slot(self) -> int:
        """The seq to ask about: the first that is not final."""
        known = self._state.accounts.get(self.account)
        return known.seq + 1 if known is not None else 1

    def add(self, witness: bytes, epoch: int, seq: int, signed: Signed | None) -> None:
        """An answer: ``witness`` of ``epoch`` has nothing in slot ``seq``, or shows the entry it voted for there."""
        self._refresh()
        if epoch != self._epoch or seq != self._slot or witness not in self._state.committees.current.members:
            return
        item = self._own(signed) if signed is not None else None
        if item is not None:
            self._shown[witness] = item
        elif signed is None:
            self._silent.add(witness)
        if self.began is None and self.quorum_answered():
            self.began = self._epoch

    def _refresh(self) -> None:
        if (self._epoch, self._slot) != (self._state.committees.epoch, self.slot):
            self._epoch, self._slot = self._state.committees.epoch, self.slot
            self._silent.clear()
            self._shown.clear()

    def _own(self, signed: Signed) -> Item | None:
        """The entry, if the own key signed it for the slot in question: liars cannot make one up."""
        try:
            item = parse(signed)
            entry = item.object
            if not isinstance(entry, Entry) or (entry.account, entry.seq) != (self.account, self._slot):
                return None
            check_entry_signature(item, entry)
        except IntegrityError:
            return None
        return item if entry.net == self._state.committees.net else None

    @property
    def answers(self) -> int:
        """How many witnesses said that they have nothing."""
        return len(self._silent)

    def quorum_answered(self) -> bool:
        """Whether nothing is final in this slot but what was shown: an honest witness of every quorum answered."""
        self._refresh()
        return len(self._silent | self._shown.keys()) >= quorums.quorum_of(self._state.committees.current.f)

    def to_complete(self) -> Signed | None:
        """Rule 9: the entry that must be completed: of several, the one that most witnesses voted for."""
        self._refresh()
        ids = [item.id for item in self._shown.values()]
        best = max(self._shown.values(), key=lambda item: (ids.count(item.id), item.id), default=None)
        return best.signed if best is not None else None

    def may_sign_anew(self) -> bool:
        """Rule 9: nobody can hold another entry of this slot."""
        self._refresh()
        if self._shown:
            return False
        committee = self._state.committees.current
        settled = (self.began is not None and self._epoch > self.began) or (self.fresh and self._slot == 1)
        needed = quorums.quorum_of(committee.f) if settled else len(committee.keys)
        return len(self._silent) >= needed
