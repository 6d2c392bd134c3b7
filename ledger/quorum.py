"""Brings one signed object to a certificate: asks every witness at once until a quorum has voted.

Owns retries and the healing of gaps: a witness that lacks something first is brought up to date (``heal``) and asked
again. The same bytes are sent every time. When the committee changes meanwhile, the new one is asked: what the old one
voted for it knows from the handovers.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.certificate import Collector
from ledger.core.committee import EpochCommittee
from ledger.core.objects import SMALL_BYTES_MAX, Certificate, Signed, Vote, parse
from ledger.core.rules import check_freeze
from ledger.notes import Notes
from p2p.core import codec
from p2p.face import Network

VOTE_DEADLINE_MS = 5_000
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
VOTE_BYTES_MAX = SMALL_BYTES_MAX + 2048

Heal = Callable[[PeerId], Awaitable[Any]]


class Quorum:
    """Collects votes over the network."""

    def __init__(self, network: Network, book: Book, notes: Notes, heal: Heal) -> None:
        self._network = network
        self._book = book
        self._notes = notes
        self._heal = heal

    @property
    def committee(self) -> EpochCommittee:
        """Who decides now."""
        return self._book.state.committees.current

    def peer_of(self, witness: bytes, epoch: int) -> PeerId:
        """Where a witness is asked."""
        return self._notes.peer_of(epoch, witness)

    async def certify(
        self, signed: Signed, *, before: tuple[Certificate, ...] = (), timeout_s: float = 10.0
    ) -> Certificate:
        """The certificate of ``signed``, learned (durable, applied) before it is returned.

        Raises RemoteError ``unavailable`` when no quorum answers in time, or the rule that a quorum cannot be had for.
        """
        run = _Run(Collector(self._book.verifier, signed), before, self.committee)
        with trio.move_on_after(timeout_s):
            while run.final is None and not run.hopeless():
                run = _Run(Collector(self._book.verifier, signed), before, self.committee)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_epoch, run.committee.epoch, nursery.cancel_scope)
                    for witness in run.committee.keys:
                        nursery.start_soon(self._ask, run, witness, nursery.cancel_scope)
        if run.final is None:
            run.raise_failure(timeout_s)
        assert run.final is not None
        await self._book.learn([run.final], announce=True)
        return run.final

    async def _watch_epoch(self, epoch: int, done: trio.CancelScope) -> None:
        while self._book.state.committees.epoch == epoch:
            await self._book.wait_change()
        done.cancel()

    async def freezes(self, channel: bytes, payer: bytes, voucher: Signed | None) -> tuple[Signed, ...]:
        """A quorum's freezes of an expired channel, shown the payer's newest voucher.

        Raises RemoteError ``unavailable`` when too few witnesses answer.
        """
        committee = self.committee
        found: dict[bytes, Signed] = {}
        header: dict[str, Any] = {"channel": channel}
        if voucher is not None:
            header["voucher"] = codec.encode(voucher)

        async def ask(witness: bytes, done: trio.CancelScope) -> None:
            peer_id = self.peer_of(witness, committee.epoch)
            try:
                reply = await self._network.call(peer_id, "ledger.freeze", header, deadline_ms=VOTE_DEADLINE_MS)
                signed = codec.decode(Signed, _field(reply.header, "freeze"), bytes_max=VOTE_BYTES_MAX)
                freeze = check_freeze(self._book.state.committees, payer, signed, channel)
            except RiosError:
                return  # the others may be enough
            if (freeze.epoch, freeze.witness) == (committee.epoch, witness):
                found[witness] = signed
            if len(found) == committee.quorum:
                done.cancel()

        async with trio.open_nursery() as nursery:
            for witness in committee.keys:
                nursery.start_soon(ask, witness, nursery.cancel_scope)
        if len(found) < committee.quorum:
            raise RemoteError(
                "unavailable", f"{len(found)} of {committee.quorum} witnesses froze channel {channel.hex()[:16]}"
            )
        return tuple(found.values())[: committee.quorum]

    async def _ask(self, run: "_Run", witness: bytes, done: trio.CancelScope) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            peer_id = self.peer_of(witness, run.committee.epoch)
            try:
                await self._ask_once(run, peer_id)
                if run.final is not None:
                    done.cancel()
                return
            except RiosError as error:
                run.errors[peer_id] = error
                if error.code in ("integrity", "forbidden", "not_found", "invalid_request"):
                    run.refusals.add(peer_id)
                    if run.hopeless():
                        done.cancel()
                    return
            if run.errors[peer_id].code == "conflict":
                await self._try_heal(peer_id)
            await trio.sleep(pause_s)
            pause_s = min(RETRY_MAX_S, pause_s * 2)

    async def _try_heal(self, peer_id: PeerId) -> None:
        try:
            await self._heal(peer_id)
        except RiosError:
            return  # the next attempt shows whether it still matters

    async def _ask_once(self, run: "_Run", peer_id: PeerId) -> None:
        signed = run.collector.item.signed
        header: dict[str, Any] = {"object": codec.encode(signed)}
        if run.before:
            header["before"] = [certificates.encode(c) for c in run.before]
        reply = await self._network.call(peer_id, "ledger.submit", header, deadline_ms=VOTE_DEADLINE_MS)
        final, vote = reply.header.get("certificate"), reply.header.get("vote")
        if isinstance(final, bytes):
            certificate = certificates.decode(final)
            self._book.verifier.open(certificate)
            if parse(certificate.object).id != run.collector.item.id:
                raise IntegrityError(
                    "integrity",
                    "another entry of this account is final in the same place",
                    "is the same key used on two machines?",
                )
            run.final = certificate
        elif isinstance(vote, bytes):
            run.collector.add(codec.decode(Vote, vote, bytes_max=VOTE_BYTES_MAX))
            if not run.collector.missing:
                run.final = run.collector.certificate()
        else:
            raise RemoteError("protocol", f"{peer_id} answered neither with a vote nor a certificate", peer_id=peer_id)


def _field(header: Mapping[str, Any], name: str) -> bytes:
    value = header.get(name)
    if not isinstance(value, bytes):
        raise RemoteError("protocol", f"the answer lacks {name!r}")
    return value


class _Run:
    """One object on its way to a certificate of one committee."""

    def __init__(self, collector: Collector, before: tuple[Certificate, ...], committee: EpochCommittee) -> None:
        self.collector = collector
        self.before = before
        self.committee = committee
        self.final: Certificate | None = None
        self.errors: dict[PeerId, RiosError] = {}
        self.refusals: set[PeerId] = set()

    def hopeless(self) -> bool:
        """Whether more than f witnesses refused for good: no quorum can come."""
        return len(self.refusals) > self.committee.f

    def raise_failure(self, timeout_s: float) -> None:
        """Say why there is no certificate: the rule that forbids it, or what is missing and why."""
        for witness in self.refusals if self.hopeless() else ():
            error = self.errors[witness]
            raise RemoteError(error.code, f"witness {witness} refused: {error.message}", error.hint, peer_id=witness)
        reasons = "; ".join(f"{peer}: {error.message}" for peer, error in self.errors.items()) or "no answer"
        raise RemoteError(
            "unavailable",
            f"{self.collector.missing} of {self.committee.quorum} votes missing after {timeout_s:g} s ({reasons})"[
                :500
            ],
            "are enough witnesses running and reachable?",
        )
