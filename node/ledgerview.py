"""The node's ledger as the gateway's :class:`gateway.ports.LedgerView` wants it. Reads only."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from config.accountbook import (
    LedgerBalance,
    LedgerChannel,
    LedgerCommittee,
    LedgerEntry,
    LedgerSummary,
    LedgerWitness,
    StatementLine,
)
from config.errors import ConfigError, IntegrityError
from ledger import reading
from ledger.ledger import Ledger
from p2p.core.identity import peer_id_of, public_key_of


class NodeLedger:
    """Looks into a running ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def account(self) -> str:
        """See the port."""
        return peer_id_of(self._ledger.account)

    def balance(self, account: str = "") -> LedgerBalance:
        """See the port."""
        return LedgerBalance(**reading.balance(self._ledger.book.state, self._key(account)))

    def summary(self) -> LedgerSummary:
        """See the port."""
        state, committees = self._ledger.book.state, self._ledger.book.state.committees
        return LedgerSummary(
            net=self._ledger.net.hex(),
            account=self.account(),
            entries=state.applied,
            accounts=len(state.accounts),
            channels=sum(channel.closed_at is None for channel in state.channels.values()),
            supply=state.supply,
            waiting=state.waiting(),
            epoch=committees.epoch,
            tolerance=committees.current.tolerance,
            pending=self._ledger.wallet.pending,
        )

    def committee(self) -> LedgerCommittee:
        """See the port."""
        current = self._ledger.book.state.committees.current
        witnesses = []
        for key in current.keys:
            node = self._ledger.notes.peer_of(current.epoch, key) or ""
            witnesses.append(LedgerWitness(key=peer_id_of(key), node=node, is_self=node == self.account()))
        return LedgerCommittee(
            epoch=current.epoch, f=current.f, quorum=current.quorum, tolerance=current.tolerance, witnesses=witnesses
        )

    async def statement(self, account: str = "") -> Sequence[StatementLine]:
        """See the port."""
        lines = await self._ledger.statement(self._key(account))
        return [StatementLine(place=place, **asdict(line)) for place, line in enumerate(lines, 1)]

    async def entries(self, *, limit: int, before: int | None) -> Sequence[LedgerEntry]:
        """See the port."""
        names = LedgerEntry.__dataclass_fields__
        rows = await self._ledger.newest(limit, before)
        return [LedgerEntry(**{name: row[name] for name in names}) for row in rows]

    async def entry(self, name: str) -> Mapping[str, Any]:
        """See the port."""
        return await self._ledger.entry(name)

    async def channels(self, account: str = "") -> Sequence[LedgerChannel]:
        """See the port."""
        names = LedgerChannel.__dataclass_fields__
        rows = await self._ledger.channels_of(self._key(account))
        return [LedgerChannel(**{name: row[name] for name in names}) for row in rows]

    def _key(self, account: str) -> bytes:
        if not account:
            return self._ledger.account
        try:
            return public_key_of(account)
        except IntegrityError as error:
            raise ConfigError("usage", f"account: {error.message}", "e.g. 12D3KooW..., as rios id prints it") from error
