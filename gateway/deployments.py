"""Deployments and whose they are: what users may ask of the swarm through the gateway.

The node keeps one deployment per model; the database only says which user made it, and when it was changed here last: a
row of another time is of an earlier deployment, or of another gateway's. Invariants: a deployment made or changed on
the command line, or by another node, belongs to nobody, so only who may touch everything may change it; a user cannot
take over a deployment by deploying it again, nor at the same moment; what the swarm was told is noted, also if who
asked for it leaves, the swarm is slow in spreading it, or the database is away at that moment.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

import sqlalchemy as sa
import trio

from config.errors import RiosError
from config.swarm import Deployment, DeploymentMode
from gateway.audit import Actor, actor_of, record
from gateway.db.session import Database
from gateway.db.swarm import deployments
from gateway.endpoint import Caller
from gateway.errors import ApiError
from gateway.ports import Swarm

T = TypeVar("T")

_CHANGE_SECONDS = 10.0

_Noted = tuple[str, int]
"""Whose a deployment is, and its ``changed_ms`` then."""
InThread = Callable[..., Awaitable[Mapping[str, _Noted]]]


@dataclass(frozen=True, slots=True)
class Owned:
    """A deployment and its owner's user id; "" if no user made it."""

    deployment: Deployment
    owner: str


@dataclass(slots=True, eq=False)
class _Note:
    """What was done to a deployment, to be written once. ``owned`` None: it was taken back."""

    actor: Actor
    action: str
    model_id: str
    owned: Owned | None
    detail: Mapping[str, object]
    written: bool = False
    _writing: Lock = field(default_factory=Lock)
    """A try that nobody waits for any more may still be at it."""

    def write(self, database: Database) -> Mapping[str, _Noted]:
        """Whose the deployment is from now on, and that it was done. Blocking."""
        with self._writing:
            if not self.written:
                owner = self.owned.owner if self.owned else ""
                with database.write() as connection:
                    _own(connection, self.model_id, self.owned)
                    record(connection, self.actor, self.action, self.model_id, owner_id=owner, detail=self.detail)
                self.written = True
        return {}

    def noted(self) -> Mapping[str, _Noted]:
        """What the database is to say."""
        return {self.model_id: (self.owned.owner, self.owned.deployment.changed_ms)} if self.owned else {}


@dataclass(slots=True, eq=False)
class Changes:
    """Of a gateway: ``lock`` is held from looking at a deployment until its change is noted. One for all: a model has
    an id and a name."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    late: _Note | None = None
    """What the swarm has done and the database does not say yet. Nothing else is changed before it does."""


class Desk:
    """Deployments as users see and change them. ``in_thread`` runs blocking database calls."""

    def __init__(self, swarm: Swarm, database: Database, in_thread: InThread, changes: Changes) -> None:
        self._swarm = swarm
        self._database = database
        self._in_thread = in_thread
        self._changes = changes

    async def list(self) -> Sequence[Owned]:
        """All that the swarm serves or is to serve."""
        if self._changes.late is not None:
            with suppress(RiosError):  # who only looks need not wait until the database can write
                async with self._changes.lock:
                    await self._write_late()
        noted = await self._in_thread(_noted, self._database)
        if self._changes.late is not None:
            noted = {**noted, **self._changes.late.noted()}
        return [Owned(each, _owner(each, noted)) for each in self._swarm.deployments()]

    async def get(self, model: str) -> Owned:
        """By the model's id, or its name where one deployment alone has it. Raises ApiError ``not_found``."""
        known = await self.list()
        found = [each for each in known if each.deployment.id == model]
        found = found or [each for each in known if each.deployment.model == model]
        if len(found) != 1:
            what = "no deployment" if not found else "more than one deployment (say which by its id)"
            raise ApiError("not_found", f"there is {what} of {model!r:.100}", public_code="not_found")
        return found[0]

    async def create(self, caller: Caller, model: str, replicas: int | None, mode: DeploymentMode) -> Owned:
        """Deploy a model. Raises ApiError ``conflict`` if this node has deployed it already, or as
        :meth:`gateway.ports.Swarm.deploy`."""
        async with self._changes.lock:
            await self._write_late()
            if self._here(model):
                raise ApiError("conflict", f"{model:.100} is deployed already", "change its replicas instead")
            made = await _told(self._swarm.deploy(model, replicas, mode), lambda: self._here(model))
            detail = {"model": made.model, "replicas": made.replicas, "mode": made.mode}
            created = Owned(made, caller.user_id)
            await self._note(caller, "deployment.created", made.id, created, detail)
        return created

    async def scale(self, caller: Caller, model: str, replicas: int) -> Owned:
        """Change the replicas of a deployment. Raises ApiError."""
        async with self._changes.lock:
            await self._write_late()
            found = await self._changeable(caller, model)
            model_id, before = found.deployment.id, found.deployment.changed_ms
            scaled = await _told(self._swarm.scale(model_id, replicas), lambda: self._here(model_id, before))
            owned = Owned(scaled, found.owner)
            await self._note(caller, "deployment.scaled", model_id, owned, {"replicas": replicas})
        return owned

    async def delete(self, caller: Caller, model: str) -> None:
        """Take a deployment back. Raises ApiError."""
        async with self._changes.lock:
            await self._write_late()
            found = await self._changeable(caller, model)
            model_id = found.deployment.id
            await _told(self._swarm.undeploy(model_id), lambda: self._here(model_id) is None or None)
            await self._note(caller, "deployment.deleted", model_id, None, {"owner": found.owner})

    def _here(self, model: str, before: int = -1) -> Deployment | None:
        """This node's deployment of a model (id or name), if it was changed since."""
        for each in self._swarm.deployments():
            if model in (each.id, each.model) and each.deployed_here and each.changed_ms != before:
                return each
        return None

    async def _note(
        self, caller: Caller, action: str, model_id: str, owned: Owned | None, detail: Mapping[str, object]
    ) -> None:
        """The swarm was told before: it is the one that can refuse."""
        self._changes.late = _Note(actor_of(caller.principal), action, model_id, owned, detail)
        await self._write_late()

    async def _write_late(self) -> None:
        """Note what is not noted yet. Raises RiosError, and it is tried again before anything else is changed."""
        late = self._changes.late
        if late is None:
            return
        with _shielded() as scope:
            try:
                await self._in_thread(late.write, self._database)
            except sa.exc.IntegrityError:
                self._changes.late = None  # no later try ends otherwise, and nothing could be changed any more
                raise
            self._changes.late = None
        if scope.cancelled_caught:
            raise ApiError("unavailable", "the accounts database did not answer in time", "try again later")

    async def _changeable(self, caller: Caller, model: str) -> Owned:
        found = await self.get(model)
        if not found.deployment.deployed_here:
            raise ApiError("conflict", "another node deployed this model", "only its operator can change that")
        if not caller.may_touch(found.owner):
            # everybody may see it, so saying that it is somebody else's gives nothing away
            raise ApiError("forbidden", "this deployment is not yours", "ask an admin")
        return found


def _shielded() -> trio.CancelScope:
    """A client that leaves does not end the block, in between the swarm and the note; taking too long does."""
    return trio.CancelScope(shield=True, deadline=trio.current_time() + _CHANGE_SECONDS)


async def _told(change: Awaitable[T], look: Callable[[], T | None]) -> T:
    """Have the swarm change something. Raises ApiError ``unavailable`` if that takes too long and was not done: what
    is slow may be the spreading, after which nothing is to do, so ``look`` says what has come of it."""
    with _shielded():
        return await change
    found = look()
    if found is None:
        raise ApiError("unavailable", "the swarm did not answer in time", "try again later")
    return found


def _owner(deployment: Deployment, noted: Mapping[str, _Noted]) -> str:
    user_id, changed_ms = noted.get(deployment.id, ("", 0))
    return user_id if deployment.deployed_here and deployment.changed_ms == changed_ms else ""


def _noted(database: Database) -> Mapping[str, _Noted]:
    with database.read() as connection:
        rows = connection.execute(sa.select(deployments)).all()
    return {row.model_id: (row.user_id, row.created_at_ms) for row in rows}


def _own(connection: sa.Connection, model_id: str, owned: Owned | None) -> None:
    """What was left of an earlier deployment (taken back on the command line) is written over."""
    connection.execute(sa.delete(deployments).where(deployments.c.model_id == model_id))
    if owned is not None and owned.owner:
        row = {"model_id": model_id, "user_id": owned.owner, "created_at_ms": owned.deployment.changed_ms}
        connection.execute(sa.insert(deployments), row)
