"""Brings one signed object to a certificate: asks every witness at once until a quorum has voted.

Owns retries and the healing of gaps: a witness that lacks something first is brought up to date (``heal``) and asked
again. The same bytes are sent every time.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.certificate import Collector
from ledger.core.objects import SMALL_BYTES_MAX, Certificate, Signed, Vote, parse
from ledger.core.rules import check_freeze
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Network

VOTE_DEADLINE_MS = 5_000
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
VOTE_BYTES_MAX = SMALL_BYTES_MAX + 2048

Heal = Callable[[PeerId], Awaitable[Any]]


class Quorum:
    """Collects votes over the network."""

    def __init__(self, network: Network, book: Book, heal: Heal) -> None:
        self._network = network
        self._book = book
        self._heal = heal
        self.witnesses = tuple(peer_id_of(key) for key in book.genesis.witnesses)

    async def certify(
        self, signed: Signed, *, before: tuple[Certificate, ...] = (), timeout_s: float = 10.0
    ) -> Certificate:
        """The certificate of ``signed``, learned (durable, applied) before it is returned.

        Raises RemoteError ``unavailable`` when no quorum answers in time, or the rule that a quorum cannot be had for.
        """
        run = _Run(Collector(self._book.verifier, signed), before, len(self.witnesses))
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for witness in self.witnesses:
                    nursery.start_soon(self._ask, run, witness, nursery.cancel_scope)
        if run.final is None:
            run.raise_failure(self._book.genesis.quorum, timeout_s)
        assert run.final is not None
        await self._book.learn([run.final], announce=True)
        return run.final

    async def freezes(self, channel: bytes, payer: bytes, voucher: Signed | None) -> tuple[Signed, ...]:
        """A quorum's freezes of an expired channel, shown the payer's newest voucher.

        Raises RemoteError ``unavailable`` when too few witnesses answer.
        """
        found: dict[PeerId, Signed] = {}
        header: dict[str, Any] = {"channel": channel}
        if voucher is not None:
            header["voucher"] = codec.encode(voucher)
        for witness in self.witnesses:
            try:
                reply = await self._network.call(witness, "ledger.freeze", header, deadline_ms=VOTE_DEADLINE_MS)
                signed = codec.decode(Signed, _field(reply.header, "freeze"), bytes_max=VOTE_BYTES_MAX)
                check_freeze(self._book.state.committees, payer, signed, channel)
            except RiosError:
                continue  # the others may be enough
            found[witness] = signed
            if len(found) == self._book.genesis.quorum:
                return tuple(found.values())
        raise RemoteError(
            "unavailable", f"{len(found)} of {self._book.genesis.quorum} witnesses froze channel {channel.hex()[:16]}"
        )

    async def _ask(self, run: "_Run", witness: PeerId, done: trio.CancelScope) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            try:
                await self._ask_once(run, witness)
                if run.final is not None:
                    done.cancel()
                return
            except RiosError as error:
                run.errors[witness] = error
                if error.code in ("integrity", "forbidden", "not_found", "invalid_request"):
                    run.refusals.add(witness)
                    if run.hopeless(self._book.genesis.f):
                        done.cancel()
                    return
            if run.errors[witness].code == "conflict":
                await self._try_heal(witness)
            await trio.sleep(pause_s)
            pause_s = min(RETRY_MAX_S, pause_s * 2)

    async def _try_heal(self, witness: PeerId) -> None:
        try:
            await self._heal(witness)
        except RiosError:
            return  # the next attempt shows whether it still matters

    async def _ask_once(self, run: "_Run", witness: PeerId) -> None:
        signed = run.collector.item.signed
        header: dict[str, Any] = {"object": codec.encode(signed)}
        if run.before:
            header["before"] = [certificates.encode(c) for c in run.before]
        reply = await self._network.call(witness, "ledger.submit", header, deadline_ms=VOTE_DEADLINE_MS)
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
            raise RemoteError("protocol", f"{witness} answered neither with a vote nor a certificate", peer_id=witness)


def _field(header: Mapping[str, Any], name: str) -> bytes:
    value = header.get(name)
    if not isinstance(value, bytes):
        raise RemoteError("protocol", f"the answer lacks {name!r}")
    return value


class _Run:
    """One object on its way to a certificate."""

    def __init__(self, collector: Collector, before: tuple[Certificate, ...], n: int) -> None:
        self.collector = collector
        self.before = before
        self.n = n
        self.final: Certificate | None = None
        self.errors: dict[PeerId, RiosError] = {}
        self.refusals: set[PeerId] = set()

    def hopeless(self, f: int) -> bool:
        """Whether more than f witnesses refused for good: no quorum can come."""
        return len(self.refusals) > f

    def raise_failure(self, quorum: int, timeout_s: float) -> None:
        """Say why there is no certificate."""
        for witness in self.refusals:
            error = self.errors[witness]
            raise RemoteError(error.code, f"witness {witness} refused: {error.message}", error.hint, peer_id=witness)
        reasons = "; ".join(f"{peer}: {error.message}" for peer, error in self.errors.items()) or "no answer"
        raise RemoteError(
            "unavailable",
            f"{self.collector.missing} of {quorum} votes missing after {timeout_s:g} s ({reasons})"[:500],
            "are enough witnesses running and reachable?",
        )
