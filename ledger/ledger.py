"""The package's face: one node's ledger, started and stopped as a whole.

Everything is joined here and nowhere else: book, wallet, witness (if the genesis or a committee since names a key of
this node and the setting says so), replication, metering.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from config.errors import ConfigError
from config.settings import LedgerSettings
from ledger import reading
from ledger.book import Book
from ledger.buying import Buying
from ledger.checkpoints import Checkpoints
from ledger.core.genesis import Genesis
from ledger.core.objects import Committee, Grant, Issuer, Item, Transfer, id_of
from ledger.keys import EpochKeys
from ledger.lineage import UNSEEN, Lineage
from ledger.mark import Mark
from ledger.meter import Meter
from ledger.notes import Notes
from ledger.quorum import Quorum
from ledger.recovering import Recovering
from ledger.replicate import Replicator
from ledger.seats import Seats
from ledger.selling import Selling
from ledger.shelf import shown
from ledger.statement import Line
from ledger.store import Store
from ledger.verify import Report, verify_file
from ledger.voting import Voting
from ledger.wallet import Wallet
from ledger.writer import Writer
from p2p.core.identity import Identity, peer_id_of
from p2p.face import Network

T = TypeVar("T")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Ledger:
    """A running ledger; made by :func:`open_ledger`."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        genesis: Genesis,
        path: Path | str,
        settings: LedgerSettings,
        *,
        payout: bytes | None,
        in_thread: bool,
        now_ms: Callable[[], int],
        epoch_keys: EpochKeys | None,
    ) -> None:
        assert network.identity.public_key == identity.public_key
        self.genesis = genesis
        self.path = Path(path)
        self._identity = identity
        self._in_thread = in_thread
        self._store = Store(path, genesis.net)
        self._writer = Writer(self._store, in_thread=in_thread)
        self.book = Book(genesis, self._store, self._writer, now_ms)
        self.replicator = Replicator(network, self.book, settings.sync_seconds)
        self.book.announcer = self.replicator.announce
        self.notes = Notes(network, self.book, settings.sync_seconds)
        self._keys = epoch_keys or EpochKeys(identity)
        seen = self._keys.public_keys() if epoch_keys else {identity.public_key, UNSEEN}
        self._lineage = Lineage(self._store, Mark(path), seen)
        heal = self.replicator.sync_with
        quorum = Quorum(network, self.book, self.notes, heal)
        recovering = Recovering(network, self.book, quorum, self._lineage, heal)
        self.wallet = Wallet(identity, self.book, quorum, self._lineage, recovering)
        self.seats = Seats(network, self.book, self.notes, self._keys, self._lineage, active=settings.witness)
        self.voting = self._make_voting(network, settings)
        self.checkpoints = Checkpoints(
            network,
            self.book,
            self.notes,
            self.seats,
            heal,
            archive=settings.archive,
            every=settings.checkpoint_entries if settings.witness else 0,
            in_thread=in_thread,
        )
        self.replicator.before_round = self.checkpoints.before_round
        self.seller = Selling(network, self.book, quorum, heal, settings, payout or identity.public_key, self.notes)
        self.buyer = Buying(network, self.book, self.wallet, quorum, settings)
        self._meter = Meter(self.seller, self.buyer)
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    def _make_voting(self, network: Network, settings: LedgerSettings) -> Voting | None:
        if not settings.witness:
            return None
        named = {key for committee in self.book.state.committees.epochs for key in committee.keys}
        if not self._keys.epoch_keys() and self._identity.public_key not in named:
            raise ConfigError(
                "config",
                f"ledger.witness is on, but neither the genesis nor a committee since names {self._identity.peer_id}",
                "turn ledger.witness off, use the genesis that names this node, or make a key for the next committee: "
                "rios ledger epoch-key",
            )
        return Voting(network, self.book, self.seats, self.notes, self._lineage)

    async def _run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.replicator.run)
                    nursery.start_soon(self.notes.run)
                    nursery.start_soon(self.seats.run)
                    nursery.start_soon(self.wallet.run)
                    nursery.start_soon(self._meter.run)
                    nursery.start_soon(self.checkpoints.run)
                    task_status.started()
        finally:
            self._lineage.close()
            self._store.close()
            self._ended.set()

    async def aclose(self) -> None:
        """Stop every task and close the database. Vouchers, votes and the chain are durable at any moment."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._ended.wait()

    # looking in

    @property
    def net(self) -> bytes:
        """The network's id (16 bytes)."""
        return self.genesis.net

    @property
    def account(self) -> bytes:
        """This node's account."""
        return self._identity.public_key

    @property
    def is_restored(self) -> bool:
        """Whether this database is, or may be, older than what this node promised: the wallet asks first."""
        return bool(self._lineage.wallet_unsure)

    def balance(self, account: bytes | None = None) -> int:
        """Free microcredits of an account (this node's by default)."""
        return self.book.state.balance(account or self.account)

    def channels(self) -> list[dict[str, Any]]:
        """Every channel this node pays or is paid on."""
        return self._meter.channels()

    async def statement(self, account: bytes | None = None) -> list[Line]:
        """Everything that moved an account's free balance."""
        return await self._in_worker(partial(reading.statement, self.path, self.genesis, account or self.account))

    async def entry(self, name: str) -> dict[str, Any]:
        """One object with its certificate; see :func:`ledger.reading.entry`."""
        return await self._in_worker(partial(reading.entry, self.path, self.genesis, name))

    async def newest(self, count: int, before: int | None = None) -> list[dict[str, Any]]:
        """The entries that became known last; see :func:`ledger.reading.newest`."""
        return await self._in_worker(partial(reading.newest, self.path, self.genesis, count, before))

    async def offences(self, peer_id: str) -> dict[str, Any]:
        """What is held against a peer here; see :func:`ledger.reading.offences`."""
        return await self._in_worker(partial(reading.offences, self.path, self.genesis, peer_id))

    async def channels_of(self, account: bytes) -> list[dict[str, Any]]:
        """Any account's channels as the ledger has them."""
        return await self._in_worker(partial(reading.channels, self.path, self.genesis, account))

    async def verify(self) -> Report:
        """Check every signature, certificate and invariant of what is on disk."""
        return await self._in_worker(partial(verify_file, self.path, self.genesis))

    @staticmethod
    def verify_file(path: Path | str, genesis: Genesis) -> Report:
        """The same for a file, also with the daemon stopped."""
        return verify_file(path, genesis)

    async def _in_worker(self, work: Callable[[], T]) -> T:
        await self._writer.flush()  # what was seen in memory is then on disk as well
        return await trio.to_thread.run_sync(work) if self._in_thread else work()

    def statistics(self) -> dict[str, Any]:
        """Numbers for status and metrics, JSON-able."""
        state = self.book.state
        witness = None
        if self.voting is not None:
            seat = self.voting.witness
            witness = {
                "votes": self.voting.votes,
                "equivocations": len(self.notes.offenders),
                "phase": seat.phase if seat is not None else "no seat",
                "restored": seat is not None and seat.is_restored(),
            }
        return {
            "net": self.net.hex(),
            "tolerance": self.book.state.committees.current.tolerance,
            "epoch": state.committees.epoch,
            "offenders": [peer_id_of(account) for account in sorted(self.notes.offenders)],
            "balance": self.balance(),
            "entries": state.applied,
            "accounts": len(state.accounts),
            "channels": len(state.channels),
            "supply": state.supply,
            "waiting": state.waiting(),
            "refused": self.book.refused,
            "commits": self._writer.commits,
            "pending_entry": self.wallet.pending,
            "sync_rounds": self.replicator.rounds,
            "sync_failed": self.replicator.failed_rounds,
            "receipts": self.seller.receipts,
            "vouchers": self.buyer.vouchers,
            "stopped_channels": [c for c in self.channels() if c["stopped"]],
            "witness": witness,
        }

    # doing

    async def grant(self, to: bytes, amount: int) -> Item:
        """Give out new credits (the issuer only). Raises RequestError ``forbidden`` for others."""
        return await self.wallet.append([Grant(to, amount)])

    async def transfer(self, to: bytes, amount: int) -> Item:
        """Send credits of this node's account."""
        return await self.wallet.append([Transfer(to, amount)])

    def change_id(self, op: Committee | Issuer) -> bytes:
        """The id of the entry that :meth:`change` would sign now, for the operators of the witnesses to list."""
        return id_of(self.wallet.preview([op]))

    async def change(self, op: Committee | Issuer, *, timeout_s: float = 30.0) -> Item:
        """Change the committee or the issuer (the root only), once enough operators have listed it.

        Raises RequestError ``forbidden`` for others, RemoteError ``unavailable`` while too few have: the entry stays
        under way, and nothing else of this account is final before it.
        """
        return await self.wallet.append([op], timeout_s=timeout_s)

    async def allow(self, entry_id: bytes) -> None:
        """List a change that this node's witness may vote for."""
        await self.seats.allow(entry_id)

    async def trust_backup(self) -> None:
        """Let the only witness of a network (f = 0) vote again though its database came from a backup."""
        await self.seats.trust_again()

    def new_epoch_key(self) -> bytes:
        """Make a key for a committee to come; its public part."""
        return bytes(self._keys.create().public_key)

    def checkpoint(self) -> dict[str, Any]:
        """The newest checkpoint on this disk, and the one below which nothing is kept, JSON-able."""
        shelf = self._store.shelf
        return {"newest": shown(shelf.newest()), "base": shown(shelf.base()), "entries": self.book.state.applied}

    async def settle_all(self) -> int:
        """Put every voucher this node holds on the ledger now; microcredits that were paid out."""
        return await self.seller.settle_all()


async def open_ledger(
    network: Network,
    identity: Identity,
    genesis: Genesis,
    path: Path | str,
    settings: LedgerSettings,
    *,
    nursery: trio.Nursery,
    payout: bytes | None = None,
    in_thread: bool = True,
    now_ms: Callable[[], int] = _now_ms,
    epoch_keys: EpochKeys | None = None,
) -> Ledger:
    """Start a node's ledger in ``nursery``; it continues with the chains, votes and vouchers found at ``path``.

    ``payout`` is the account that is paid for this node's work (its own by default); ``epoch_keys`` are the keys it
    may vote with (by default its identity, and what the others may have promised counts as forgotten if anything was).
    Raises ConfigError, LocalError or IntegrityError when the file cannot be used.
    """
    make = partial(
        Ledger,
        network,
        identity,
        genesis,
        path,
        settings,
        payout=payout,
        in_thread=in_thread,
        now_ms=now_ms,
        epoch_keys=epoch_keys,
    )
    ledger = make()
    await nursery.start(ledger._run)
    return ledger


__all__ = ["Ledger", "Line", "Report", "open_ledger"]
