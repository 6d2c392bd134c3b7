"""Proving who one is: passwords and codes, each wrong one counted.

Invariants: a guess is counted before it is looked at and costs the same whoever it is for; what turns out not to be a
guess is taken back. A wrong e-mail address, a wrong password and no password are one answer; more is said only to who
knew the password. Every refusal is a line of the security log and a count, and neither holds what was typed.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from config.errors import RiosError
from gateway.accounts import Principal
from gateway.db.session import Database
from gateway.errors import ApiError
from gateway.identity import factors, guesses, people, sessions
from gateway.identity.passwords import Passwords
from gateway.identity.people import Person
from gateway.identity.sessions import Client
from gateway.identity.vault import Vault
from gateway.metrics import Metrics
from gateway.till import Till

T = TypeVar("T")

_FRESH_MS = 600_000
"""So new is the session of who, having no password, changes what they sign in with."""

_security = logging.getLogger("rios.security")


class Guessed(ApiError):
    """What was sent is wrong: it stays counted as a guess."""


class Proofs:
    """Checks what people prove themselves with."""

    def __init__(self, database: Database, till: Till, vault: Vault, metrics: Metrics) -> None:
        self.passwords = Passwords()
        self._database = database
        self._till = till
        self._vault = vault
        self._metrics = metrics

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """A blocking call on the database."""
        return await self._till.in_thread(function, self._database, *arguments)

    @asynccontextmanager
    async def guess(self, method: str, client: Client, *, account: str = "", session: str = "") -> AsyncIterator[None]:
        """What happens in the block counts as a guess, if it ends with :class:`Guessed` (or is cut off)."""
        try:
            counted = await self.in_thread(guesses.count, client.address, account, session)
        except ApiError:
            _security.warning("too many attempts (%s) from %s", method, client.address)
            self.count(method, "limited")
            raise
        try:
            yield
        except Guessed:
            raise
        except RiosError:
            await self.in_thread(guesses.take_back, counted)
            raise
        await self.in_thread(guesses.take_back, counted)

    async def prove(self, principal: Principal, password: str, client: Client) -> Person:
        """The caller, once they have shown that they know the password; without one, their session must be new. Counted
        by their session: guesses at signing in to the account, which are anybody's, do not stand in their way."""
        session = own_session(principal)
        person = await self.in_thread(people.by_id, principal.user_id)
        if person.password_hash is not None:
            async with self.guess("password", client, session=session):
                await self.check_password(person, password, client)
        elif await self.in_thread(sessions.age_ms, session) > _FRESH_MS:
            hint = "sign in again with the other provider, and do it then"
            message = "a user without a password must have signed in a moment ago for this"
            raise ApiError("unauthenticated", message, hint, public_code="sign_in_again")
        return person

    async def prove_fully(self, principal: Principal, password: str, code: str, client: Client) -> Person:
        """:meth:`prove`, and a code where there is a second factor."""
        person = await self.prove(principal, password, client)
        await self.prove_factor(principal, person, code, client)
        return person

    async def prove_factor(self, principal: Principal, person: Person, code: str, client: Client) -> None:
        """A code where there is a second factor: the last proof, as it works once."""
        if person.has_second_factor:
            async with self.guess("totp", client, session=principal.session_id):
                await self.check_code(person, code, client)

    async def check_password(self, person: Person | None, password: str, client: Client) -> None:
        """Raises :class:`Guessed` if it is not the one, or there is nobody."""
        stored = person.password_hash if person else None
        if not await self.passwords.matches(password, stored):
            self.refused("password", f"wrong password, user {person.id if person else 'unknown'}", client)
            raise Guessed("unauthenticated", "e-mail or password is wrong", public_code="invalid_credentials")

    async def check_code(self, person: Person, code: str, client: Client) -> None:
        """Raises ApiError if a code is missing, :class:`Guessed` if it is wrong; without a second factor, nothing."""
        if not person.has_second_factor:
            return
        if not code:
            hint = "send it as code"
            raise ApiError("unauthenticated", "this needs the second factor", hint, public_code="totp_required")
        if not await self.in_thread(factors.use, self._vault, person.id, code):
            raise self.wrong_code(person.id, client)

    def wrong_code(self, user_id: str, client: Client) -> ApiError:
        """The error for it, counted and logged."""
        self.refused("totp", f"wrong or used code, user {user_id}", client)
        hint = "wait for the next one"
        return Guessed("unauthenticated", "this code is wrong, or was used", hint, public_code="invalid_code")

    def refused(self, method: str, what: str, client: Client) -> None:
        """Count and log a refusal. ``what`` holds nothing that was typed."""
        _security.warning("refused (%s) from %s: %s", method, client.address, what)
        self.count(method, "refused")

    def count(self, method: str, result: str) -> None:
        """Few values of each, whatever clients send."""
        self._metrics.sign_ins.labels(method, result).inc()


def own_session(principal: Principal) -> str:
    """The session that the caller acts in. Raises ApiError ``forbidden`` for a key, or nobody."""
    if not principal.session_id:
        raise ApiError("forbidden", "this needs somebody who signed in, not an API key", "see POST /v1/auth/login")
    return principal.session_id
