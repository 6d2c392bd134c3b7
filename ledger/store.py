"""The ledger on disk: SQLite in WAL mode with ``synchronous=FULL`` and group commit.

Owns every table (``schema``). One writer connection, used by one thread at a time; one reader for look-ups. What is
committed survives power loss; what is not was never acknowledged.

Fails as: disk full -> LocalError ``disk_full``; damaged file -> IntegrityError with the file and what to do; another
network's or a newer file -> ConfigError.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from config.errors import ConfigError, IntegrityError, LocalError
from ledger import pruning
from ledger.core.checkpoint import is_of_committees
from ledger.core.objects import Certificate, Claim, Entry, Item, Signed, Vote, parse
from ledger.promises import Handed, Kept, Listed, Promises, Seated, Standing, add_row
from ledger.records import ChannelRow, Final, Frozen, Meta, Own, Proof, Record, Voted
from ledger.schema import MIGRATIONS, migrate
from ledger.shelf import Rows, Shelf

HEADERS_CACHED = 4096
BUSY_TIMEOUT_S = 10.0

_pack = msgspec.msgpack.Encoder().encode
unpack_proof = msgspec.msgpack.Decoder(list[tuple[int, int, bytes]]).decode


_ENTRY = "INSERT OR IGNORE INTO entries (account, seq, object_id, body, signature, epoch, proof, seen_ms) "
_ENTRY += "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ENTRIES_AT_ONCE = 50
# one step of SQLite for many rows: each step gives up the interpreter's lock and has to get it back
_ENTRIES = _ENTRY + ", (?, ?, ?, ?, ?, ?, ?, ?)" * (_ENTRIES_AT_ONCE - 1)
_CLAIM = "INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (channel) DO UPDATE SET "
_CLAIM += "cumulative = excluded.cumulative, body = excluded.body, signature = excluded.signature, "
_CLAIM += "epoch = excluded.epoch, proof = excluded.proof, seen_ms = excluded.seen_ms "
# an equal one: the first came before its channel, when nobody could check its signature
_CLAIM += "WHERE excluded.cumulative >= claims.cumulative"
_CLAIM_VOTE = "INSERT INTO claim_votes VALUES (?, ?, ?, ?) ON CONFLICT (channel) DO UPDATE SET "
_CLAIM_VOTE += "cumulative = excluded.cumulative, body = excluded.body, signature = excluded.signature "
_CLAIM_VOTE += "WHERE excluded.cumulative > claim_votes.cumulative"
_VOTE = "INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?, ?)"
_ACCOUNT = "INSERT INTO accounts (id, key) VALUES (?, ?)"
_HEADER = "INSERT INTO headers (id, body, signature) VALUES (?, ?, ?)"
_CHANNEL = f"INSERT OR REPLACE INTO channels VALUES ({', '.join('?' * 13)})"

_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _as_rios(error: sqlite3.Error, path: str) -> LocalError | IntegrityError:
    code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return LocalError("disk_full", f"no room to write {path}: {error}", "free some space and start again")
    if code in _CORRUPT or (not code and "malformed" in str(error)):
        return damaged(path, str(error))
    return LocalError("local", f"{path}: {error}", "check the folder's permissions and the disk")


def damaged(path: str, what: str) -> IntegrityError:
    """The error for a ledger file whose bytes are wrong."""
    return IntegrityError(
        "integrity",
        f"the ledger file {path} is damaged: {what}",
        "stop the node and run rios ledger repair: it keeps the file, takes what can be read, and the rest from peers",
    )


@contextmanager
def _mapped(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _as_rios(error, path) from error


class Store:
    """One ledger database."""

    def __init__(self, path: Path | str, net: bytes, *, read_only: bool = False) -> None:
        self.path = str(path)
        if read_only and not Path(path).exists():
            raise LocalError("not_found", f"there is no ledger at {self.path}", "start the node once: rios run")
        self._writer: sqlite3.Connection | None = None
        with _mapped(self.path), ExitStack() as opened:
            if not read_only:
                self._writer = opened.enter_context(closing(self._connect()))
            self._reader = opened.enter_context(closing(self._connect(read_only=True)))
            self.promises = Promises(self._query)
            self.shelf = Shelf(self._query)
            self._prepare(net)
            self._accounts: dict[bytes, int] = {}
            self._headers: dict[bytes, int] = {}
            self._read_headers: dict[int, tuple[bytes, bytes]] = {}
            self._load_ids()
            opened.pop_all()  # all is well: they stay open until close()

    def _connect(self, *, read_only: bool = False) -> sqlite3.Connection:
        if read_only:
            uri = f"{Path(self.path).absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S
            )
            return connection
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S, cached_statements=64
        )
        return connection

    def _prepare(self, net: bytes) -> None:
        """Settings, schema version, network."""
        if self._writer is not None:
            self._writer.execute("PRAGMA page_size = 8192")  # of a new file
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA wal_autocheckpoint = 4000")
            self._writer.execute("PRAGMA synchronous = FULL")
            migrate(self._writer, self.path)
            self._writer.execute("INSERT OR IGNORE INTO meta VALUES ('net', ?)", (net,))
        else:
            version = self._reader.execute("PRAGMA user_version").fetchone()[0]
            if version != len(MIGRATIONS):
                raise ConfigError(
                    "config",
                    f"{self.path} has schema version {version}, this program reads {len(MIGRATIONS)}",
                    "use the rios that wrote it",
                )
        row = self._reader.execute("SELECT value FROM meta WHERE key = 'net'").fetchone()
        if row is None or row[0] != net:
            raise ConfigError(
                "config",
                f"{self.path} belongs to network {row[0].hex() if row else '?'}, the genesis says {net.hex()}",
                "use the genesis file this ledger was made with, or another data folder",
            )

    def _load_ids(self) -> None:
        with _mapped(self.path):
            self._accounts = {key: row for row, key in self._reader.execute("SELECT id, key FROM accounts")}
            self._account_top = max(self._accounts.values(), default=0)
            self._headers = {}
            top = self._reader.execute("SELECT max(id) FROM headers").fetchone()[0]
            self._header_top = top or 0

    def close(self) -> None:
        """Close both connections."""
        self._reader.close()
        if self._writer is not None:
            self._writer.close()

    # writing

    def commit(self, records: Sequence[Record]) -> None:
        """Write records in one durable transaction: all or nothing."""
        assert self._writer is not None, "the store was opened read-only"
        rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        try:
            for record in records:
                if type(record) is Final:
                    self._final_row(record, rows)
                else:
                    self._other_row(record, rows)
            with _mapped(self.path):
                self._execute(self._writer, rows)
        except BaseException:
            self._load_ids()
            raise

    def prune(
        self, base: Rows, keep: Sequence[Item], frontier: Iterable[tuple[bytes, int]], open_channels: Iterable[bytes]
    ) -> int:
        """Start from a checkpoint (``base``) and delete what lies below (``pruning``); the bytes that became free."""
        assert self._writer is not None, "the store was opened read-only"
        writer, accounts = self._writer, self._accounts
        before = pruning.size_bytes(writer)
        with _mapped(self.path):
            spared = {(accounts[item.object.account], item.object.seq) for item in keep}
            cut = {accounts[key]: seq for key, seq in frontier if seq and key in accounts}
            pruning.prune(writer, base, cut, spared, {*open_channels}, accounts)
            self._headers.clear()
            self._read_headers.clear()
            writer.execute("VACUUM")
            return before - pruning.size_bytes(writer)

    def copy_rows(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Take in rows of another file of this version as they are (``salvage``); :meth:`reload` once all are there."""
        assert self._writer is not None, "the store was opened read-only"
        if rows:
            places = ", ".join("?" * len(rows[0]))
            with _mapped(self.path):
                self._execute(self._writer, {f"INSERT OR REPLACE INTO {table} VALUES ({places})": list(rows)})

    def reload(self) -> None:
        """Look at the numbers of accounts and headers anew."""
        self._load_ids()

    def count(self, table: str) -> int:
        """How many rows a table has."""
        return int(self._query(f"SELECT count(*) FROM {table}")[0][0])

    def _execute(self, writer: sqlite3.Connection, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        writer.execute("BEGIN IMMEDIATE")
        try:
            for sql, params in rows.items():
                whole = len(params) // _ENTRIES_AT_ONCE * _ENTRIES_AT_ONCE if sql is _ENTRY else 0
                for start in range(0, whole, _ENTRIES_AT_ONCE):
                    flat = tuple(chain.from_iterable(params[start : start + _ENTRIES_AT_ONCE]))
                    writer.execute(_ENTRIES, flat)
                writer.executemany(sql, params[whole:])
            writer.execute("COMMIT")
        except BaseException:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise

    def _other_row(self, record: Record, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        if type(record) is ChannelRow:
            r = record
            rows[_CHANNEL].append(
                (
                    *(r.side, r.channel, r.peer_id, r.voucher, r.signature, r.receipt_n, r.receipt_cumulative),
                    *(r.calls, r.kflop, r.kv_units, r.microcredits, r.nano, r.stopped),
                )
            )
        elif type(record) is Voted:
            self._vote_row(record.item, record.epoch, rows)
        elif type(record) is Own:
            rows["INSERT OR IGNORE INTO wallet VALUES (?, ?, ?)"].append(
                (record.seq, record.signed.body, record.signed.signature)
            )
        elif type(record) is Frozen:
            rows["INSERT OR IGNORE INTO freezes VALUES (?, ?, ?, ?)"].append(
                (record.epoch, record.channel, record.signed.body, record.signed.signature)
            )
        elif type(record) is Proof:
            a, b = record.a, record.b
            rows["INSERT OR IGNORE INTO proofs VALUES (?, ?, ?, ?, ?, ?)"].append(
                (record.account, record.seq, a.body, a.signature, b.body, b.signature)
            )
        elif type(record) is Rows:
            rows[record.sql] += record.params
        elif type(record) is Meta:
            rows["INSERT OR REPLACE INTO meta VALUES (?, ?)"].append((record.key, record.value))
        else:
            assert isinstance(record, Standing | Handed | Kept | Seated | Listed)
            add_row(record, rows)

    def _final_row(self, record: Final, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        item, certificate = record.item, record.certificate
        headers = self._headers
        parts = []
        for vote in certificate.votes:
            row = headers.get(vote.header) or self._header_id(vote, rows)
            parts.append((row, vote.index, b"".join(vote.path)))
        proof, signed, body = _pack(parts), item.signed, item.object
        if type(body) is Entry:
            account = self._accounts.get(body.account) or self._account_id(body.account, rows)
            # bytearray: sqlite3 sends every bytes object through its slow adapter look-up (a fifth of the insert)
            blobs = bytearray(item.id), bytearray(signed.body), bytearray(signed.signature)
            rows[_ENTRY].append((account, body.seq, *blobs, certificate.epoch, bytearray(proof), record.seen_ms))
        else:
            assert isinstance(body, Claim)
            key, cumulative = body.voucher.channel, body.voucher.cumulative
            rows[_CLAIM].append(
                (key, cumulative, signed.body, signed.signature, certificate.epoch, proof, record.seen_ms)
            )

    def _vote_row(self, item: Item, epoch: int, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        body, signed = item.object, item.signed
        if isinstance(body, Entry):
            account = self._account_id(body.account, rows)
            rows[_VOTE].append((epoch, account, body.seq, item.id, signed.body, signed.signature))
        else:
            voucher = body.voucher
            rows[_CLAIM_VOTE].append((voucher.channel, voucher.cumulative, signed.body, signed.signature))

    def _account_id(self, key: bytes, rows: dict[str, list[tuple[Any, ...]]]) -> int:
        row = self._accounts.get(key)
        if row is None:
            self._account_top += 1
            row = self._accounts[key] = self._account_top
            rows[_ACCOUNT].append((row, key))
        return row

    def _header_id(self, vote: Vote, rows: dict[str, list[tuple[Any, ...]]]) -> int:
        row = self._headers.get(vote.header)
        if row is None:
            if len(self._headers) >= 4096:
                self._headers.clear()
            self._header_top += 1
            row = self._headers[vote.header] = self._header_top
            rows[_HEADER].append((row, vote.header, vote.signature))
        return row

    # reading

    def _query(self, sql: str, params: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            with _mapped(self.path):
                return self._reader.execute(sql, params).fetchall()
        except OverflowError:
            return []  # SQLite's numbers have 63 bits: no row has one that does not fit

    def meta(self, key: str) -> bytes | None:
        """A named value."""
        rows = self._query("SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def items(self) -> Iterator[Item]:
        """Every final object, entries in the order they became known, then claims.

        Raises :class:`IntegrityError` where stored bytes are not what they were.
        """
        for item, _, _ in self.finals(proofs=False):
            yield item

    def finals(self, *, proofs: bool = True) -> Iterator[tuple[Item, Certificate | None, int]]:
        """Every final object with its certificate (if asked for) and when it was first seen (ms)."""
        with _mapped(self.path):
            entries = self._reader.execute(
                "SELECT body, signature, epoch, proof, seen_ms, object_id FROM entries ORDER BY id"
            )
            for body, signature, epoch, proof, seen_ms, object_id in entries:
                item = self._parse(body, signature)
                if item.id != object_id:
                    raise damaged(self.path, f"entry {object_id.hex()} has other bytes")
                yield item, self._certificate(item.signed, epoch, proof) if proofs else None, seen_ms
            claims = self._reader.execute("SELECT body, signature, epoch, proof, seen_ms FROM claims ORDER BY channel")
            for body, signature, epoch, proof, seen_ms in claims:
                item = self._parse(body, signature)
                yield item, self._certificate(item.signed, epoch, proof) if proofs else None, seen_ms

    def _parse(self, body: bytes, signature: bytes) -> Item:
        try:
            return parse(Signed(body, signature))
        except IntegrityError as error:
            raise damaged(self.path, error.message) from error

    def _certificate(self, signed: Signed, epoch: int, proof: bytes) -> Certificate:
        votes = []
        try:
            parts = unpack_proof(proof)
        except msgspec.DecodeError as error:
            raise damaged(self.path, f"a certificate cannot be read: {error}") from error
        for row, index, path in parts:
            header, header_signature = self._header(row)
            steps = tuple(path[i : i + 32] for i in range(0, len(path), 32))
            votes.append(Vote(header, header_signature, index, steps))
        return Certificate(signed, epoch, tuple(votes))

    def _header(self, row: int) -> tuple[bytes, bytes]:
        """A batch header and its signature; neighbours stand in the same few."""
        known = self._read_headers.get(row)
        if known is None:
            found = self._query("SELECT body, signature FROM headers WHERE id = ?", (row,))
            if not found:
                raise damaged(self.path, f"batch header {row} is missing")
            if len(self._read_headers) >= HEADERS_CACHED:
                self._read_headers.clear()
            known = self._read_headers[row] = found[0]
        return known

    def entry_certificate(self, account: bytes, seq: int) -> Certificate | None:
        """The certificate of the entry in a slot."""
        rows = self._query(
            "SELECT body, signature, epoch, proof FROM entries "
            "WHERE account = (SELECT id FROM accounts WHERE key = ?) AND seq = ?",
            (account, seq),
        )
        return self._certificate(Signed(rows[0][0], rows[0][1]), rows[0][2], rows[0][3]) if rows else None

    def entry_certificates(self, account: bytes, first: int, last: int, count: int) -> Iterator[Certificate]:
        """The certificates of an account's entries ``first..last`` that are here, in order, at most ``count``."""
        rows = self._query(
            "SELECT body, signature, epoch, proof FROM entries "
            "WHERE account = (SELECT id FROM accounts WHERE key = ?) AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
            (account, first, last, count),
        )
        for body, signature, epoch, proof in rows:
            yield self._certificate(Signed(body, signature), epoch, proof)

    def entry_items(self, account: bytes, first: int = 1, last: int = 1 << 62) -> Iterator[Item]:
        """An account's final entries that are here, in order."""
        for body, signature in self._query(
            "SELECT body, signature FROM entries "
            "WHERE account = (SELECT id FROM accounts WHERE key = ?) AND seq BETWEEN ? AND ? ORDER BY seq",
            (account, first, last),
        ):
            yield self._parse(body, signature)

    def committee_entries(self, root: bytes) -> list[Item]:
        """The entries of the root account that change committee or issuer, in order: they are never pruned."""
        return [
            item for item in self.entry_items(root) if isinstance(item.object, Entry) and is_of_committees(item.object)
        ]

    def claim_certificate(self, channel: bytes) -> Certificate | None:
        """The certificate of a channel's highest claim."""
        rows = self._query("SELECT body, signature, epoch, proof FROM claims WHERE channel = ?", (channel,))
        return self._certificate(Signed(rows[0][0], rows[0][1]), rows[0][2], rows[0][3]) if rows else None

    def entry_slot(self, object_id: bytes) -> tuple[bytes, int] | None:
        """Account and seq of an entry. Looks through the table: for people, not for the hot path."""
        sql = "SELECT key, seq FROM entries JOIN accounts ON accounts.id = entries.account WHERE object_id = ?"
        rows = self._query(sql, (object_id,))
        return (rows[0][0], rows[0][1]) if rows else None

    def entry_seen_ms(self, account: bytes, seq: int) -> int:
        """When the entry in a slot became known here."""
        sql = "SELECT seen_ms FROM entries WHERE account = (SELECT id FROM accounts WHERE key = ?) AND seq = ?"
        rows = self._query(sql, (account, seq))
        return int(rows[0][0]) if rows else 0

    def newest_entries(self, count: int, before: int | None) -> list[tuple[int, Item, Certificate, int]]:
        """Entries by when they became known, newest first: place, entry, certificate, when (ms). ``before``: only
        places below it."""
        sql = "SELECT id, body, signature, epoch, proof, seen_ms FROM entries WHERE id < ? ORDER BY id DESC LIMIT ?"
        found = []
        for place, body, signature, epoch, proof, seen_ms in self._query(
            sql, (1 << 62 if before is None else min(before, 1 << 62), count)
        ):
            item = self._parse(body, signature)
            found.append((place, item, self._certificate(item.signed, epoch, proof), seen_ms))
        return found

    def claims(self) -> Iterator[tuple[Item, Certificate, int]]:
        """Every channel's highest claim, its certificate, and when it was first seen (ms)."""
        for body, signature, epoch, proof, seen_ms in self._query(
            "SELECT body, signature, epoch, proof, seen_ms FROM claims ORDER BY channel"
        ):
            item = self._parse(body, signature)
            yield item, self._certificate(item.signed, epoch, proof), seen_ms

    def proofs(self, account: bytes) -> list[tuple[int, Signed, Signed]]:
        """Slots in which an account signed two entries, with both."""
        sql = "SELECT seq, body_a, signature_a, body_b, signature_b FROM proofs WHERE account = ? ORDER BY seq"
        return [(seq, Signed(a, sa), Signed(b, sb)) for seq, a, sa, b, sb in self._query(sql, (account,))]

    def headers(self) -> Iterator[Signed]:
        """Every signed batch header that certificates here stand on."""
        with _mapped(self.path):
            for body, signature in self._reader.execute("SELECT body, signature FROM headers ORDER BY id"):
                yield Signed(body, signature)

    def final_claims(self) -> list[Item]:
        """The highest final claim of every channel."""
        return [self._parse(*row) for row in self._query("SELECT body, signature FROM claims")]

    def newest_headers(self, after: int, count: int) -> list[tuple[int, Signed]]:
        """The headers of batches of votes that became known last, with their row numbers (above ``after``)."""
        rows = self._query(
            "SELECT id, body, signature FROM headers WHERE id > ? ORDER BY id DESC LIMIT ?", (after, count)
        )
        return [(row, Signed(body, signature)) for row, body, signature in rows]

    def handover_piece(self, epoch: int, witness: bytes, offset: int, size: int) -> tuple[int, bytes, bytes] | None:
        """A part of a handover's body, which may be large: the size of all of it, the part, the signature."""
        sql = "SELECT rowid, signature FROM handovers WHERE epoch = ? AND witness = ?"
        rows = self._query(sql, (epoch, witness))
        if not rows:
            return None
        with _mapped(self.path), self._reader.blobopen("handovers", "body", rows[0][0], readonly=True) as body:
            body.seek(min(offset, len(body)))
            return len(body), body.read(size), rows[0][1]

    def voted(self, epoch: int = 0) -> list[Item]:
        """Every vote for an entry this node gave as a witness of an epoch, and for a claim in any."""
        return [self._parse(signed.body, signed.signature) for signed in self.promises.votes(epoch)]

    def wallet(self) -> list[Signed]:
        """The own chain as it was signed, in order."""
        return [Signed(*row) for row in self._query("SELECT body, signature FROM wallet ORDER BY seq")]

    def last_own(self) -> int:
        """The seq of the newest entry of the own chain that was signed here (0: none)."""
        return int(self._query("SELECT coalesce(max(seq), 0) FROM wallet")[0][0])

    def channels(self, side: str) -> list[ChannelRow]:
        """The newest voucher of every channel of one side."""
        return self._channel_rows("side = ?", side)

    def channel(self, side: str, key: bytes) -> ChannelRow | None:
        """The newest voucher of one of them."""
        rows = self._channel_rows("side = ? AND channel = ?", side, key)
        return rows[0] if rows else None

    def _channel_rows(self, clause: str, *params: str | bytes) -> list[ChannelRow]:
        names = list(ChannelRow.__dataclass_fields__)
        rows = self._query(f"SELECT {', '.join(names)} FROM channels WHERE {clause}", params)
        return [ChannelRow(**dict(zip(names, row, strict=True))) for row in rows]

    def quick_check(self) -> None:
        """Let SQLite look over every page.

        Raises :class:`IntegrityError` if it finds damage.
        """
        found = [row[0] for row in self._query("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise damaged(self.path, str(found[0]))
