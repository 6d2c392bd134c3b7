"""A sequence through one stage, at a peer or here, as any other prompt would go: what audits and probes ask for.

Owns: those calls and what is kept of their answers. Does not own: who is asked and why (``audits``, ``probing``).

To the host it is an ordinary sequence: a ticket, the rows in pieces, paid for, the ticket closed. Nothing marks it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.core import stagecalls, stageevidence, wire
from dmoe.core.manifest import Manifest
from dmoe.core.stagecalls import OpenCall
from dmoe.core.stageevidence import StageEvidence
from dmoe.core.wire import FloatRows
from dmoe.ports import Quote
from dmoe.purse import Purse
from dmoe.stages.chain import Account, Chains, Link, Rows, StageError, Way
from dmoe.stages.host import StageHost
from dmoe.stages.loaded import LoadedStage
from dmoe.stages.loading import SpreadLayers
from dmoe.stages.sequence import Heard
from p2p.face import Network

log = logging.getLogger(__name__)

PIECE_ROWS = 256
SHOW_TIMEOUT_MS = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What a host made of a sequence: ``came, went f32[N, H]``, and what it signs for. ``synthetic``: nobody's
    prompt."""

    manifest: Manifest
    heard: Heard
    came: FloatRows
    went: FloatRows
    synthetic: bool = False

    @property
    def peer(self) -> PeerId:
        """Who answered."""
        return self.heard.link.peer

    def leaf(self) -> bytes:
        """What the receipt covers."""
        return self.heard.leaf(self.manifest.model_id)

    def evidence(self, proof: Any) -> bytes:  # noqa: ANN401 - a Proof of the ledger
        """Answer and signature in one."""
        part, dtype = self.heard.part, self.manifest.wire_dtype
        (came_shape, came), (went_shape, went) = (wire.encode(rows, dtype) for rows in (self.came, self.went))
        return stageevidence.write(
            StageEvidence(
                version=stageevidence.VERSION,
                worker=self.peer,
                model_id=bytes.fromhex(self.manifest.model_id),
                layers=self.heard.link.layers,
                part=(part.position, part.rows, part.outputs),
                device=self.heard.device,
                came=bytes(came),
                came_bf16=came_shape.get("bf16", b""),
                went=bytes(went),
                went_bf16=went_shape.get("bf16", b""),
                receipt=proof.receipt,
                signature=proof.signature,
                index=proof.index,
                path=proof.path,
            )
        )


class Asking:
    """Sends rows through single stages."""

    def __init__(self, network: Network, host: StageHost, chains: Chains, purse: Purse, timeout_ms: int) -> None:
        self._network, self._host, self._chains, self._purse = network, host, chains, purse
        self._timeout_ms = timeout_ms
        self.watch: Callable[[Heard, Manifest], None] = lambda heard, manifest: None
        """Told of what a host signs for, as soon as it is known: its receipt may come any moment."""

    def quote_of(self, peer: PeerId, manifest: Manifest) -> Quote:
        """What a peer asks now."""
        advert = self._network.directory.adverts().get(peer)
        offer = advert.offer(manifest.model_id) if advert is not None else None
        if offer is None:
            return Quote(0, 0, 0)
        return Quote(offer.quote, offer.microcredits_per_tflop, offer.microcredits_per_kv_unit)

    async def at(
        self, peer: PeerId, manifest: Manifest, stage: int, rows: FloatRows, *, synthetic: bool = False
    ) -> Answered:
        """``rows f32[N, H]``, as they travel, through a stage at a peer. Raises RiosError."""
        shard, quote = manifest.stages[stage], self.quote_of(peer, manifest)
        channel = self._purse.ready(peer, quote)
        if channel is None:
            channel = await self._purse.channel(peer, quote)
        link = Link(stage, peer, shard.layers, shard.flops_per_row, channel, quote)
        ticket = await self.ticket(link, manifest, len(rows))
        heard: list[Heard] = []
        bill = self._purse.bills.purpose("probe" if synthetic else "audit")

        def told(account: Account) -> None:
            heard.append(Heard(link, account.parts[0], account.device, account.said[0]))
            if heard[-1].end == len(rows):
                self.watch(heard[-1], manifest)

        way = Way(manifest.model_id, manifest.wire_dtype, manifest.architecture.hidden, (link,), forward=False)
        found = []
        try:
            for first in range(0, len(rows), PIECE_ROWS):
                piece = rows[first : first + PIECE_ROWS]
                part = Rows((ticket,), first, len(piece), len(piece), bill=bill)
                deadline = trio.current_time() + self._timeout_ms / 1000
                found.append(await self._chains.run(way, [part], piece, deadline, told))
        except StageError as failed:
            raise failed.error from failed
        finally:
            await self.close(peer, ticket)
        return Answered(manifest, heard[-1], rows, np.concatenate(found), synthetic)

    async def ticket(self, link: Link, manifest: Manifest, capacity: int, like: bytes = b"") -> bytes:
        """A ticket at a peer; of a cache that begins with all of ``like``'s first ``capacity`` positions."""
        asked = OpenCall(
            model_id=manifest.model_id,
            layers=link.layers,
            capacity=capacity,
            quote=link.quote.number,
            channel=link.channel,
            like=like,
            length=capacity if like else 0,
        )
        header = stagecalls.open_header(asked)
        reply = await self._network.call(link.peer, stagecalls.OPEN, header, deadline_ms=self._timeout_ms)
        ticket = reply.header.get("ticket")
        if not isinstance(ticket, bytes) or len(ticket) != stagecalls.TICKET_BYTES:
            raise RemoteError("protocol", f"{link.peer} gave a ticket that is none", peer_id=link.peer)
        return ticket

    async def close(self, peer: PeerId, ticket: bytes) -> None:
        """Free a cache there; what fails expires there."""
        with trio.move_on_after(1, shield=True):
            try:
                header = {"tickets": [ticket]}
                await self._network.call(peer, stagecalls.CLOSE, header, deadline_ms=1000)
            except RiosError as error:
                log.debug("closing a ticket at %s: %s", peer, error)

    async def shown(self, peer: PeerId, ticket: bytes, count: int, manifest: Manifest) -> FloatRows:
        """The first ``count`` rows that a peer sent for a ticket, ``f32[count, H]``. Raises RiosError."""
        found = []
        for first in range(0, count, stagecalls.SHOWN_ROWS_MAX):
            rows = min(count - first, stagecalls.SHOWN_ROWS_MAX)
            header = stagecalls.show_header(ticket, first, rows)
            reply = await self._network.call(peer, stagecalls.SHOW, header, deadline_ms=SHOW_TIMEOUT_MS)
            if len(reply.buffers) != 1:
                raise RemoteError("protocol", f"{peer} shows no rows", peer_id=peer)
            shown = wire.decode(reply.header, reply.buffers[0])
            if shown.shape != (rows, manifest.architecture.hidden):
                raise RemoteError("protocol", f"{peer} shows rows of shape {list(shown.shape)}", peer_id=peer)
            found.append(np.array(shown))
        return np.concatenate(found)

    async def here(self, manifest: Manifest, stage: int, rows: FloatRows) -> FloatRows | None:
        """The same by the stage that is served here, as it would travel; None if none is. Raises RiosError."""
        loaded = self._host.local(manifest.model_id, manifest.stages[stage].layers)
        return None if loaded is None else await self.through(loaded, manifest, rows)

    async def through(self, loaded: LoadedStage, manifest: Manifest, rows: FloatRows) -> FloatRows:
        """``rows f32[N, H]``, as they travel, through layers in this process, as they would travel. Their experts may
        be elsewhere: they are paid, and audited, as for any other answer. Raises RiosError."""
        if loaded.closed:
            raise RemoteError("not_found", f"{loaded.plan.shard_id} is not loaded here any more")
        ticket = await self._host.open(loaded, self._network.peer_id, len(rows))
        if isinstance(spread := loaded.segment, SpreadLayers):
            spread.charge(ticket.cache, self._purse.bills.purpose("audit"))
        found = []
        try:
            for first in range(0, len(rows), PIECE_ROWS):
                piece = rows[first : first + PIECE_ROWS]
                deadline = trio.current_time() + self._timeout_ms / 1000
                number = self._chains.number()
                job = await self._host.compute([ticket], [(first, len(piece))], piece, deadline, number)
                assert job.answer is not None
                found.append(wire.rounded(job.answer, manifest.wire_dtype))
        finally:
            self._host.close(ticket)
        return np.concatenate(found)
