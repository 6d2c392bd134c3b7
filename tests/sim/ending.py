"""What must be true when everything has healed: I5 and I6, and that the books on every disk say the same."""

from typing import TYPE_CHECKING

import trio

from ledger.core.objects import Entry, Grant, parse
from ledger.core.state import State
from ledger.lineage import FOUND
from tests.sim.model import Violation
from tests.sim.node import facts

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

EPOCH_MS = 1_800_000_000_000


async def settle(world: "World") -> None:
    """Wait until nothing is left to do; :class:`Violation` I5 or I6 if that never comes."""
    end = trio.current_time() + world.plan.calm_s
    while (why := _unsettled(world)) and trio.current_time() < end:  # noqa: ASYNC110
        await trio.sleep(1.0)
    if why:
        raise Violation(*why)
    _check_end(world)


def _unsettled(world: "World") -> tuple[str, str] | None:
    """What is not as it must be in the end."""
    for node in world.honest():
        if not node.up:
            return "I6", f"{node.name} is down"
    for person in world.people:
        if _excused(world, person.node) or _wedged(person.node):
            continue
        if person.node.ledger.wallet.pending:
            return "I6", f"{person.node.name} waits for its entry: {facts(person.node)}"
        for key, _ in person.own_channels():
            return "I6", f"{person.node.name} cannot reclaim channel {key.hex()[:8]}"
    if not world.root.done:
        return "I6", f"epoch {world.epoch} of {world.plan.changes}"
    if any(crook.hidden for crook in world.crooks):
        return "I5", "certificates are still hidden"
    if len({node.ledger.book.state.digest() for node in world.honest()}) > 1:
        return "I5", f"digests differ: {[facts(node) for node in world.honest()]}"
    return next((why for pair in world.pairs if (why := pair.trouble())), None)


def _excused(world: "World", node: "Node") -> bool:
    """A wallet from a backup may wait for the next committee if some witness of this one is silent (rule 9)."""
    silent = any(w.liar or w.name in world.faults.restored_nodes for w in world.root.members[-1].values())
    return silent and node.ledger._lineage.wallet_unsure == FOUND and node.name in world.faults.restored_nodes


def _wedged(node: "Node") -> bool:
    """An issuer that was replaced while a grant of its was under way may be stuck there: decision 30's price."""
    committees, pending = node.ledger.book.state.committees, node.ledger.wallet._pending
    replaced = node.identity.public_key in committees.issuers and committees.issuer != node.identity.public_key
    entry = parse(pending).object if pending is not None else None
    return replaced and isinstance(entry, Entry) and any(isinstance(op, Grant) for op in entry.ops)


def _check_end(world: "World") -> None:
    """Books, stores and the model agree."""
    for node in world.honest():
        state = node.ledger.book.state
        state.check_invariants()
        if state.waiting() or state.broken:
            raise Violation("I5", f"objects wait or are broken: {facts(node)}")
        items = list(node.ledger.book.store.items())
        world.random.shuffle(items)
        again = State(world.genesis)
        for item in items:
            again.add(item)
        if again.digest() != state.digest():
            raise Violation("I5", f"what {node.name} stored gives another digest in another order")
    _check_workers(world)


def _check_workers(world: "World") -> None:
    """Nobody loses a voucher that it could have claimed in quiet times."""
    for person in world.people:
        for key, held in person.held.items():
            channel = person.node.ledger.book.state.channels[key]
            healed = EPOCH_MS + int((world.began_s + world.plan.chaos_s) * 1000)
            quiet = channel.expiry_ms - world.plan.skew_ms - 6000 > max(healed, held.at_ms)
            if quiet and channel.paid < held.voucher.cumulative - world.genesis.min_claim_step:
                raise Violation(
                    "I6", f"{person.node.name} got {channel.paid} of {held.voucher.cumulative} on {key.hex()[:8]}"
                )
