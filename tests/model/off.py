"""Rules of the ledger that the explorer can switch off, each to show that the model would notice.

Not a test. Each names the scope in which its counterexample is found.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from ledger.core import handover, quorums
from ledger.core.witness import HANDED_OVER, STOPPED, VOTING, Witness
from tests.model.things import Things

Switch = Callable[[ExitStack], Any]


@dataclass(frozen=True)
class Rule:
    """A rule, how it is switched off, and where that shows."""

    scope: str
    told: str
    switch_off: Switch


def _patch(target: Any, name: str, value: Any) -> Switch:
    return lambda stack: stack.enter_context(patch.object(target, name, value))


def _keep_key(witness: Witness) -> None:
    witness.phase = HANDED_OVER


def _freeze_after_handover(stack: ExitStack) -> None:
    stack.enter_context(patch.object(Witness, "may_freeze", lambda witness: witness.phase in _STARTED))
    stack.enter_context(patch.object(Witness, "confirm_handover", _keep_key))


def _vote_after_handover(stack: ExitStack) -> None:
    stack.enter_context(patch.object(Witness, "may_vote", lambda witness: witness.phase in _STARTED))
    stack.enter_context(patch.object(Witness, "confirm_handover", _keep_key))


def _forget(what: str) -> Switch:
    return _patch(Things, what, False)


_STARTED = (VOTING, STOPPED, HANDED_OVER)

RULES = {
    "distinct": Rule("slot", "a quorum counts distinct witnesses (rule 1)", _patch(quorums, "distinct", list)),
    "quorum": Rule("slot", "a quorum is 2f + 1, not f + 1 (rule 1)", _patch(quorums, "quorum_of", lambda f: f + 1)),
    "votes-durable": Rule("slot", "votes are on disk before they are sent (rule 2)", _forget("persist_votes")),
    "freezes-durable": Rule(
        "channel", "freezes are on disk before they are sent (rule 5)", _forget("persist_freezes")
    ),
    "stop-voting": Rule("slot-change", "no vote after the stop (rule 6)", _vote_after_handover),
    "stop-freezing": Rule("channel-change", "no freeze after the stop (rule 6)", _freeze_after_handover),
    "locks": Rule(
        "slot-change", "a slot that may be decided is locked (rule 8)", _patch(Witness, "locked_to", lambda w, slot: {})
    ),
    "frontier": Rule(
        "slot-change", "a handover counts once its frontier is applied (rule 7)",
        _patch(handover, "is_reached", lambda arriving: True),
    ),
    "ban": Rule(
        "channel-change",
        "a freeze that may be whole bans claims (rule 8)",
        _patch(Witness, "is_banned", lambda witness, channel: False),
    ),
    "counting-locks": Rule(
        "slot-change", "m - 2f reports hold, not m - 2f + 1 (rule 8)",
        _patch(quorums, "survives", lambda reports, received, f: reports >= max(1, received - 2 * f + 1)),
    ),
    "counting-freezes": Rule(
        "channel-change", "m - 2f reports hold, not m - 2f + 1 (rule 8)",
        _patch(quorums, "survives", lambda reports, received, f: reports >= max(1, received - 2 * f + 1)),
    ),
    "counting-lifts": Rule(
        "channel-live", "what fewer than m - 2f report is dropped (rule 8)",
        _patch(quorums, "survives", lambda reports, received, f: reports > 0),
    ),
}  # fmt: skip
