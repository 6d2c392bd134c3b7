"""Brings manifests and files of models here from peers that hold them.

Owns: RPCs ``model.manifest``, ``model.have`` and ``model.prove``, the search for providers. Does not own: which shards
are wanted (``hosting``), chunks on their way (``p2p.face.Blobs``), files on disk (``store``).

Who holds a file is asked, not guessed: a publisher has all files of its model though it serves few of them. A node that
is fetching a shard itself says so and gives what it has of it, so a new model does not come from its publisher alone.

Invariants:
1. A manifest is taken only if its id, its signature and its publisher are right.
2. A file gets its name only after its hash was verified; a shard counts only when all of its files are here.
3. Adverts are claims. Whether a peer has a shard's bytes can be proved to anybody who has them too: it hashes a chunk
   of his choice together with his nonce and its own peer id, so that nobody can pass the question on.
"""

import logging
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import trio

from config.errors import IntegrityError, LocalError, RemoteError, RequestError, RiosError
from config.vocabulary import ModelId, PeerId
from dmoe.core.deployment import is_allowed
from dmoe.core.manifest import Manifest, ModelFile, Shard
from dmoe.refused import Refused
from p2p.core.advert import bitmap
from p2p.face import Call, Network, Reply

log = logging.getLogger(__name__)

MANIFEST_METHOD = "model.manifest"
HAVE_METHOD = "model.have"
PROVE_METHOD = "model.prove"
ASK_DEADLINE_MS = 5_000
PROVE_DEADLINE_MS = 2_000
MANIFEST_DEADLINE_MS = 30_000
NONCE_BYTES = 16
_PROOF_TAG = b"rios/possession/1\0"
ASKED_MAX = 64
"""Most peers asked for one model."""


class Models(Protocol):
    """What is needed of :class:`dmoe.store.ModelStore`."""

    root: Path
    refused: Refused

    def manifests(self) -> Mapping[ModelId, Manifest]: ...
    def path(self, model_id: str, file: ModelFile) -> Path: ...
    def add_manifest(self, manifest: Manifest) -> None: ...
    def has_shard(self, model_id: str, shard_id: str) -> bool: ...
    def verify_shard(self, model_id: str, shard_id: str) -> None: ...
    def verify_file(self, model_id: str, file: ModelFile) -> None: ...
    def remove_shard(self, model_id: str, shard_id: str, kept: Collection[str] = ()) -> None: ...
    def read_chunk(self, digest: bytes) -> bytes | None: ...
    def disk_bytes(self) -> int: ...


class Fetcher:
    """Asks peers for manifests and files, and answers when they ask."""

    def __init__(self, network: Network, store: Models, allowed: Collection[str]) -> None:
        self._network = network
        self._store = store
        self._allowed = allowed
        self._holders: dict[str, dict[PeerId, tuple[bytes, bytes]]] = {}
        """Model -> peer -> bitmaps of the shards it has, and of those that it is fetching."""
        self._coming: Counter[tuple[str, int]] = Counter()
        self._proving = trio.CapacityLimiter(1)
        self._parsing = trio.CapacityLimiter(1)
        network.serve(MANIFEST_METHOD, self._manifest)
        network.serve(HAVE_METHOD, self._have)
        network.serve(PROVE_METHOD, self._prove)
        network.blobs.offer(store)

    async def manifest(self, model_id: str, likely: Sequence[PeerId]) -> Manifest:
        """The manifest with this id, from disk or from a peer. Raises RemoteError ``unavailable`` if nobody has it,
        RequestError ``forbidden`` if its publisher is not allowed here."""
        known = self._store.manifests().get(ModelId(model_id))
        if known is not None:
            return known
        reason = "no peer is connected"
        for peer in self._askable(model_id, likely):
            header = {"model": model_id}
            try:
                reply = await self._network.call(peer, MANIFEST_METHOD, header, deadline_ms=MANIFEST_DEADLINE_MS)
                # in a thread: one of 16 MiB takes seconds, and it is a stranger who chose its size
                manifest = await trio.to_thread.run_sync(self._checked, model_id, peer, reply, limiter=self._parsing)
            except RiosError as error:
                if error.code == "forbidden" and not isinstance(error, RemoteError):
                    raise  # this node's own verdict; a peer that says so only does not give it
                reason = error.message
                continue
            await trio.to_thread.run_sync(self._store.add_manifest, manifest)
            return manifest
        raise RemoteError("unavailable", f"no peer gave the manifest of model {model_id[:12]}: {reason}")

    def _checked(self, model_id: str, peer: PeerId, reply: Reply) -> Manifest:
        if len(reply.buffers) != 1:
            raise RemoteError("protocol", f"{peer} answered with {len(reply.buffers)} buffers", peer_id=peer)
        with self._store.refused.counting("manifest"):
            manifest = Manifest.parse(bytes(reply.buffers[0]))
            if manifest.model_id != model_id:
                raise IntegrityError("integrity", f"{peer} gave another manifest than model {model_id[:12]}")
        if not is_allowed(manifest.publisher, self._network.peer_id, self._allowed):
            raise RequestError(
                "forbidden",
                f"model {manifest.name} ({model_id[:12]}) is published by {manifest.publisher}",
                "add this peer id to dmoe.publishers to take its models",
            )
        return manifest

    async def files(
        self,
        manifest: Manifest,
        files: Sequence[ModelFile],
        shard: Shard,
        likely: Sequence[PeerId],
        progress: Callable[[int], None],
    ) -> None:
        """Bring files of a shard here, from every peer that says it holds the shard. Raises RemoteError
        ``unavailable`` or LocalError ``disk_full`` naming file and shard."""
        index = manifest.shard_index(shard.id)
        await self._find_holders(manifest.model_id, likely)

        def providers() -> Sequence[PeerId]:
            # a peer that started to serve it meanwhile says so in its advert
            adverts = self._network.directory.adverts().items()
            serving = {p for p, advert in adverts if (o := advert.offer(manifest.model_id)) and o.holds(index)}
            said = self._holders.get(manifest.model_id, {}).items()
            holding = {p for p, (held, coming) in said if _has(held, index) or _has(coming, index)}
            return sorted((serving | holding) - {self._network.peer_id})

        key = (manifest.model_id, index)
        self._coming[key] += 1
        try:
            for file in files:
                await self._file(manifest, shard, file, providers, progress)
        finally:
            self._coming[key] -= 1
            self._coming += Counter()  # forget zeros

    async def _file(
        self,
        manifest: Manifest,
        shard: Shard,
        file: ModelFile,
        providers: Callable[[], Sequence[PeerId]],
        progress: Callable[[int], None],
    ) -> None:
        target = self._store.path(manifest.model_id, file)
        try:
            await trio.to_thread.run_sync(_prepare, target, file.size_bytes)
            await self._network.blobs.fetch(file.content(), target, providers, progress)
        except RiosError as error:
            error.message = f"{manifest.name}, shard {shard.id}, file {file.path}: {error.message}"
            raise

    async def _find_holders(self, model_id: str, likely: Sequence[PeerId]) -> None:
        holders: dict[PeerId, tuple[bytes, bytes]] = {}

        async def ask(peer: PeerId) -> None:
            try:
                reply = await self._network.call(peer, HAVE_METHOD, {"model": model_id}, deadline_ms=ASK_DEADLINE_MS)
            except RiosError as error:
                log.debug("what %s holds of %s: %s", peer, model_id[:12], error)
                return
            held, coming = reply.header.get("shards"), reply.header.get("coming", b"")
            if isinstance(held, bytes) and isinstance(coming, bytes) and (held or coming):
                holders[peer] = held, coming

        async with trio.open_nursery() as nursery:
            for peer in self._askable(model_id, likely):
                nursery.start_soon(ask, peer)
        self._holders[model_id] = holders

    def _askable(self, model_id: str, likely: Sequence[PeerId]) -> list[PeerId]:
        """Peers in the order in which they may know: the likely ones, those who serve it, those connected."""
        adverts = self._network.directory.adverts()
        serving = [peer for peer, advert in adverts.items() if advert.offer(model_id) is not None]
        order = dict.fromkeys((*likely, *serving, *self._network.peers(), *adverts))
        order.pop(self._network.peer_id, None)
        return list(order)[:ASKED_MAX]

    async def proves(self, peer: PeerId, shard: Shard) -> bool:
        """Whether a peer has a shard that is here too, as far as one random chunk of it shows."""
        chunks = [chunk for file in shard.files for chunk in file.chunks]
        digest, nonce = bytes.fromhex(secrets.choice(chunks)), secrets.token_bytes(NONCE_BYTES)
        chunk = await trio.to_thread.run_sync(self._store.read_chunk, digest)
        if chunk is None:
            return False
        header = {"digest": digest, "nonce": nonce}
        try:
            reply = await self._network.call(peer, PROVE_METHOD, header, deadline_ms=PROVE_DEADLINE_MS)
        except RiosError as error:
            log.debug("%s does not prove that it has shard %s: %s", peer, shard.id, error)
            return False
        return reply.header.get("proof") == _proof(nonce, peer, chunk)

    # --- answers to others

    async def _prove(self, call: Call) -> Reply:
        digest, nonce = call.header.get("digest"), call.header.get("nonce")
        if not isinstance(digest, bytes) or not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
            raise RequestError("invalid_request", f"{PROVE_METHOD}: a digest and a nonce are needed")
        async with self._proving:
            chunk = await trio.to_thread.run_sync(self._store.read_chunk, digest)
        if chunk is None:
            raise RequestError("not_found", "this node does not have the chunk")
        return Reply({"proof": _proof(nonce, self._network.peer_id, chunk)})

    async def _manifest(self, call: Call) -> Reply:
        manifest = self._store.manifests().get(_model_of(call))
        if manifest is None:
            raise RequestError("not_found", "this node does not know the model")
        return Reply({}, (manifest.to_json(),))

    async def _have(self, call: Call) -> Reply:
        manifest = self._store.manifests().get(_model_of(call))
        held = await trio.to_thread.run_sync(self._held, manifest) if manifest else b""
        coming = {index for model_id, index in self._coming if manifest and model_id == manifest.model_id}
        return Reply({"shards": held, "coming": bitmap(coming)})

    def _held(self, manifest: Manifest) -> bytes:
        """Shards whose files have the right size here: whoever fetches verifies every chunk anyway."""
        whole = set()
        for index, shard in enumerate(manifest.shards):
            paths = ((self._store.path(manifest.model_id, file), file.size_bytes) for file in shard.files)
            if all(path.is_file() and path.stat().st_size == size for path, size in paths):
                whole.add(index)
        return bitmap(whole)


def _proof(nonce: bytes, peer: PeerId, chunk: bytes) -> bytes:
    return sha256(_PROOF_TAG + nonce + peer.encode() + chunk).digest()


def _model_of(call: Call) -> ModelId:
    model_id = call.header.get("model")
    if not isinstance(model_id, str) or len(model_id) != 64:
        raise RequestError("invalid_request", f"{call.method}: model must be an id of 64 hex digits")
    return ModelId(model_id)


def _has(held: bytes, index: int) -> bool:
    byte, bit = divmod(index, 8)
    return byte < len(held) and bool(held[byte] >> bit & 1)


def _prepare(target: Path, size_bytes: int) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise LocalError("local", f"{target.parent}: {error.strerror}", "check the data folder") from error
    if free < size_bytes:
        raise LocalError(
            "disk_full", f"{size_bytes} bytes are needed in {target.parent}, {free} are free", "free some space"
        )
