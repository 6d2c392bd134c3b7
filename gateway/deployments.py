"""Deployments and whose they are: what users may ask of the swarm through the gateway.

The node keeps one deployment per model; the database only says which user made it. Invariants: a deployment made on
the command line, or by another node, belongs to nobody, so only who may touch everything may change it; a user cannot
cannot take over a deployment by deploying it again; what the swarm was told is noted, also if who asked for it leaves.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
import trio

from config.swarm import Deployment, DeploymentMode
from gateway import books
from gateway.audit import actor_of, record
from gateway.db.session import Database
from gateway.db.swarm import deployments
from gateway.endpoint import Caller
from gateway.errors import ApiError
from gateway.ports import Swarm

_CHANGE_SECONDS = 10.0

InThread = Callable[..., Awaitable[Mapping[str, str]]]


@dataclass(frozen=True, slots=True)
class Owned:
    """A deployment and its owner's user id; "" if no user made it."""

    deployment: Deployment
    owner: str


class Desk:
    """Deployments as users see and change them. ``in_thread`` runs blocking database calls."""

    def __init__(self, swarm: Swarm, database: Database, in_thread: InThread) -> None:
        self._swarm = swarm
        self._database = database
        self._in_thread = in_thread

    async def list(self) -> Sequence[Owned]:
        """All that the swarm serves or is to serve."""
        owners = await self._in_thread(_owners, self._database)
        return [Owned(each, _owner(each, owners)) for each in self._swarm.deployments()]

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
        for each in self._swarm.deployments():
            if model in (each.id, each.model) and each.deployed_here:
                raise ApiError("conflict", f"{model:.100} is deployed already", "change its replicas instead")
        with _to_its_end():
            made = await self._swarm.deploy(model, replicas, mode)
            detail = {"model": made.model, "replicas": made.replicas, "mode": made.mode}
            await self._note(caller, "deployment.created", made.id, caller.user_id, detail)
        return Owned(made, caller.user_id)

    async def scale(self, caller: Caller, model: str, replicas: int) -> Owned:
        """Change the replicas of a deployment. Raises ApiError."""
        found = await self._changeable(caller, model)
        with _to_its_end():
            scaled = await self._swarm.scale(found.deployment.id, replicas)
            await self._note(caller, "deployment.scaled", scaled.id, found.owner, {"replicas": replicas})
        return Owned(scaled, found.owner)

    async def delete(self, caller: Caller, model: str) -> None:
        """Take a deployment back. Raises ApiError."""
        found = await self._changeable(caller, model)
        with _to_its_end():
            await self._swarm.undeploy(found.deployment.id)
            await self._note(caller, "deployment.deleted", found.deployment.id, "", {"owner": found.owner})

    async def _note(self, caller: Caller, action: str, model_id: str, owner: str, detail: Mapping[str, object]) -> None:
        """Whose it is from now on, and that it was done. The swarm was told before: it is the one that can refuse."""
        actor = actor_of(caller.principal)

        def write() -> Mapping[str, str]:
            with self._database.write() as connection:
                _own(connection, model_id, owner)
                record(connection, actor, action, model_id, owner_id=owner, detail=detail)
            return {}

        await self._in_thread(write)

    async def _changeable(self, caller: Caller, model: str) -> Owned:
        found = await self.get(model)
        if not found.deployment.deployed_here:
            raise ApiError("conflict", "another node deployed this model", "only its operator can change that")
        if not caller.may_touch(found.owner):
            # everybody may see it, so saying that it is somebody else's gives nothing away
            raise ApiError("forbidden", "this deployment is not yours", "ask an admin")
        return found


@contextmanager
def _to_its_end() -> Iterator[None]:
    """A client that leaves does not end the block, in between the swarm and the note. Raises ApiError ``unavailable``
    if it takes too long."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _CHANGE_SECONDS) as scope:
        yield
    if scope.cancelled_caught:
        raise ApiError("unavailable", "the swarm did not answer in time", "see whether it was done, and try again")


def _owner(deployment: Deployment, owners: Mapping[str, str]) -> str:
    return owners.get(deployment.id, "") if deployment.deployed_here else ""


def _owners(database: Database) -> Mapping[str, str]:
    with database.read() as connection:
        rows = connection.execute(sa.select(deployments.c.model_id, deployments.c.user_id)).all()
    return {row.model_id: row.user_id for row in rows}


def _own(connection: sa.Connection, model_id: str, user_id: str) -> None:
    """What was left of an earlier deployment (taken back on the command line) is written over."""
    connection.execute(sa.delete(deployments).where(deployments.c.model_id == model_id))
    if user_id:
        row = {"model_id": model_id, "user_id": user_id, "created_at_ms": books.now_ms()}
        connection.execute(sa.insert(deployments), row)
