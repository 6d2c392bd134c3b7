"""The face of identity: signing up, signing in, going on, leaving, and changing what one signs in with.

Owns the order of things; ``proofs`` checks what people show. Invariants: whatever changes how somebody signs in asks
again for what they sign in with, and needs a session, not a key; what ends here is known here at once.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio

from config.errors import RequestError, RiosError
from gateway import audit
from gateway.accounts import Accounts, Principal, User, normal_email
from gateway.audit import Actor, actor_of
from gateway.errors import ApiError
from gateway.guard import Guard
from gateway.identity import factors, guesses, invites, people, sessions, tokens
from gateway.identity.browser import Home
from gateway.identity.factors import Enrolment
from gateway.identity.invites import Invite
from gateway.identity.oidc import Halfway, Oidc, Visitor
from gateway.identity.passwords import check_password, is_outdated
from gateway.identity.people import Link, Person
from gateway.identity.proofs import Guessed, Proofs, own_session
from gateway.identity.sessions import Client, Session
from gateway.identity.tokens import Tokens
from gateway.identity.vault import Vault
from gateway.metrics import Metrics
from gateway.till import Till

_security = logging.getLogger("rios.security")
_logger = logging.getLogger("rios.gateway")

_TIDY_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the operator decides."""

    sign_up: bool
    oidc_sign_up: bool
    session_seconds: int
    proxies: frozenset[str]
    """Addresses whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """A new session, or one that goes on: ``cookie`` for browsers, else the pair of tokens."""

    session_id: str
    user_id: str
    cookie: str = ""
    access_token: str = ""
    refresh_token: str = ""


class Identity:
    """The identity part of a running gateway."""

    def __init__(
        self,
        accounts: Accounts,
        till: Till,
        guard: Guard,
        metrics: Metrics,
        *,
        home: Home,
        vault: Vault,
        signer: Tokens,
        rules: Rules,
        oidc: Oidc | None,
    ) -> None:
        self.home = home
        self.tokens = signer
        self.rules = rules
        self.oidc = oidc
        self._accounts = accounts
        self._database = accounts.database
        self._till = till
        self._guard = guard
        self.vault = vault
        self._proofs = Proofs(accounts.database, till, vault, metrics)

    async def run(self) -> None:
        """Drop what is over, now and then. Ends when it is cancelled."""
        while True:
            # Gateways that were started together do not do it together.
            await trio.sleep(_TIDY_SECONDS * random.uniform(0.5, 1.5))
            try:
                for forget in (guesses.forget, invites.forget, sessions.forget, tokens.forget):
                    await self._till.in_thread(forget, self._database)
            except RiosError as error:
                _logger.warning("identity could not tidy up: %s", error)

    # --- signing in

    async def sign_in(
        self, email: str, password: str, code: str, client: Client, *, cookie: bool, replaces: str = ""
    ) -> SignedIn:
        """With a password, and a code where there is a second factor. ``replaces``: the browser's session until now.

        Raises ApiError ``unauthenticated`` (``totp_required``: only the code is missing), ``forbidden`` or
        ``rate_limited``.
        """
        account = email.strip().casefold()
        async with self._proofs.guess("password", client, account=account):
            person = await self._proofs.in_thread(people.by_email, account)
            await self._proofs.check_password(person, password, client)
            assert person is not None
            if person.disabled:
                raise ApiError("forbidden", "this user is disabled", "ask the operator")
            await self._proofs.check_code(person, code, client)
        await self._proofs.in_thread(guesses.know, client.address, account)
        await self._renew_hash(person, password)
        since = person.password_of_ms
        return await self._start(person.id, "password", client, cookie=cookie, replaces=replaces, password_of_ms=since)

    async def sign_up(self, email: str, password: str, name: str, client: Client) -> User:
        """A new user, if the settings allow it. Signing in comes after. Raises ApiError, RequestError ``conflict``."""
        if not self.rules.sign_up:
            raise ApiError("forbidden", "this gateway does not let people sign up", "ask its operator for an invite")
        email = normal_email(email)
        check_password(password, email, name)
        await self._proofs.in_thread(guesses.count, client.address)
        hashed = await self._proofs.passwords.hashed(password)
        user = await self._till.in_thread(self._create, name or email, email, hashed, client)
        _security.info("user %s signed up from %s", user.id, client.address)
        self._proofs.count("sign_up", "ok")
        return user

    def _create(self, name: str, email: str, hashed: str, client: Client) -> User:
        with self._accounts.adding_user(name, email) as (connection, user):
            self._accounts.insert_user(connection, user)
            people.put_password(connection, user.id, hashed)
            actor, detail = Actor(user.id, f"address {client.address}"), {"name": name, "role": user.role}
            audit.record(connection, actor, "user.created", user.id, detail=detail)
            return user

    async def refresh(self, token: str, client: Client) -> SignedIn:
        """The next pair of tokens for a refresh token. Raises ApiError ``unauthenticated``."""
        rotated = await self._proofs.in_thread(sessions.rotate, token)
        if rotated is not None and not rotated.reused:
            self._proofs.count("refresh", "ok")
            access = await self.tokens.issue(rotated.user_id, rotated.session_id)
            return SignedIn(
                session_id=rotated.session_id,
                user_id=rotated.user_id,
                access_token=access,
                refresh_token=rotated.token,
            )
        if rotated is not None:
            self._guard.forget(rotated.user_id)
            what = "a refresh token of user %s was used again, from %s: its session %s has ended"
            _security.warning(what, rotated.user_id, client.address, rotated.session_id)
            self._proofs.count("refresh", "reused")
        else:
            _security.info("refused a refresh token from %s", client.address)
            self._proofs.count("refresh", "refused")
        raise ApiError("unauthenticated", "this refresh token is not valid", "sign in again")

    async def sign_in_elsewhere(
        self, visitor: Visitor, client: Client, *, replaces: str = "", linker: Principal | None = None
    ) -> SignedIn | Person | None:
        """Somebody whom the other provider vouches for comes in, or has only the second factor to show (their Person,
        see :meth:`sign_in_halfway`); with ``linker`` they are linked to that user, and nobody signs in (None).

        Raises ApiError ``forbidden`` for who is unknown here while the settings make no users of them.
        """
        if linker is not None:
            who = actor_of(linker), linker.user_id
            await self._proofs.in_thread(people.link, *who, visitor.issuer, visitor.subject)
            _security.info("user %s linked an identity of %s", linker.user_id, visitor.issuer)
            return None
        person = await self._proofs.in_thread(people.by_link, visitor.issuer, visitor.subject)
        if person is not None and person.disabled:
            raise self._refused_elsewhere("this user is disabled", "ask the operator", client)
        if person is not None and person.has_second_factor:
            return person
        if person is not None:
            user_id = person.id
        elif self.rules.oidc_sign_up:
            user_id = await self._till.in_thread(self._create_visitor, visitor)
            _security.info("user %s came from %s", user_id, visitor.issuer)
        else:
            hint = "sign in with your password and link it, or ask the operator"
            raise self._refused_elsewhere("this identity is not linked to a user here", hint, client)
        link = visitor.issuer, visitor.subject
        return await self._start(user_id, "oidc", client, cookie=True, replaces=replaces, link=link)

    async def sign_in_halfway(self, came: Halfway, code: str, client: Client, *, replaces: str = "") -> SignedIn:
        """Whom the other provider vouched for shows the second factor. Raises ApiError."""
        link = came.issuer, came.subject
        async with self._proofs.guess("totp", client, account=came.user_id):
            person = await self._proofs.in_thread(people.by_link, *link)
            if person is None or person.id != came.user_id:
                raise self._unlinked(client)  # and no code is used up
            if person.disabled:
                raise self._refused_elsewhere("this user is disabled", "ask the operator", client)
            await self._proofs.check_code(person, code, client)
        return await self._start(person.id, "oidc", client, cookie=True, replaces=replaces, link=link)

    def _create_visitor(self, visitor: Visitor) -> str:
        # An address that is none, whatever the provider says of it, is no reason to turn its owner away.
        email = as_email(visitor.email or "")
        return people.create_linked(self._accounts, visitor.name, email, visitor.issuer, visitor.subject)

    def _refused_elsewhere(self, message: str, hint: str, client: Client) -> ApiError:
        _security.warning("refused a sign-in by another provider from %s: %s", client.address, message)
        self._proofs.count("oidc", "refused")
        return ApiError("forbidden", message, hint)

    def _unlinked(self, client: Client) -> ApiError:
        return self._refused_elsewhere("this identity is not linked to this user any more", "sign in again", client)

    async def sign_out(self, principal: Principal) -> None:
        """End the caller's session."""
        await self.end_session(principal, own_session(principal))

    # --- sessions

    async def sessions(self, principal: Principal) -> Sequence[Session]:
        """The caller's sessions."""
        return await self._proofs.in_thread(sessions.of_user, principal.user_id)

    async def end_session(self, principal: Principal, session_id: str) -> None:
        """End one of the caller's sessions. Raises ApiError ``not_found``."""
        who = actor_of(principal), principal.user_id
        if not await self._proofs.in_thread(sessions.revoke, *who, session_id):
            raise ApiError("not_found", "there is no such session", public_code="not_found")
        self._guard.forget(principal.user_id)

    # --- what one signs in with

    async def prove(self, principal: Principal, password: str, code: str, client: Client) -> None:
        """Raises ApiError if it is not the user of the session who asks: to be called before what they sign in with
        changes."""
        await self._proofs.prove_fully(principal, password, code, client)

    async def links(self, user_id: str) -> Sequence[Link]:
        """A user's identities at other providers. Raises ApiError ``not_found``."""
        await self._proofs.in_thread(people.by_id, user_id)
        return await self._proofs.in_thread(people.links_of, user_id)

    async def unlink(self, principal: Principal, user_id: str, link_id: str) -> None:
        """Take one of them away; what was signed in to with another provider ends, but for the caller's own session.

        Raises ApiError ``not_found``, RequestError ``conflict`` if nothing would be left to sign in with.
        """
        work = partial(people.unlink, keep_session=principal.session_id)
        if not await self._proofs.in_thread(work, actor_of(principal), user_id, link_id):
            raise ApiError("not_found", "there is no such identity", public_code="not_found")
        self._guard.forget(user_id)
        _security.info("user %s unlinked an identity of user %s", principal.user_id, user_id)

    async def change_password(
        self, principal: Principal, current: str, new: str, client: Client, code: str = ""
    ) -> None:
        """Replace the password; all other sessions of the user end."""
        person = await self._proofs.prove(principal, current, client)
        check_password(new, person.email or "", person.name, param="new_password")
        await self._proofs.prove_factor(principal, person, code, client)
        hashed = await self._proofs.passwords.hashed(new)

        def change() -> None:
            keep = principal.session_id
            people.set_password(self._database, actor_of(principal), person.id, hashed, keep_session=keep)

        await self._till.in_thread(change)
        self._guard.forget(person.id)
        _security.info("user %s changed their password from %s", person.id, client.address)

    async def enrol(self, principal: Principal, password: str, client: Client) -> Enrolment:
        """Begin to set a second factor up."""
        person = await self._proofs.prove(principal, password, client)
        return await self._proofs.in_thread(factors.enrol, self.vault, person.id, person.email or person.name)

    async def confirm(self, principal: Principal, code: str, client: Client) -> Sequence[str]:
        """Switch the second factor on; returns the recovery codes, shown once."""
        async with self._proofs.guess("totp", client, session=own_session(principal)):
            who = actor_of(principal), principal.user_id
            codes = await self._proofs.in_thread(factors.confirm, self.vault, *who, code)
            if codes is None:
                raise self._proofs.wrong_code(principal.user_id, client)
        _security.info("user %s switched a second factor on", principal.user_id)
        return codes

    async def disable_factor(self, principal: Principal, password: str, code: str, client: Client) -> None:
        """Switch the second factor off."""
        person = await self._proofs.prove_fully(principal, password, code, client)
        await self._proofs.in_thread(factors.remove, actor_of(principal), person.id)
        _security.info("user %s switched their second factor off", person.id)

    async def invite(self, principal: Principal, user_id: str) -> Invite:
        """Let somebody set the password of a user. Raises ApiError ``not_found``."""
        person = await self._proofs.in_thread(people.by_id, user_id)
        return await self._proofs.in_thread(invites.create, actor_of(principal), person.id)

    async def accept(self, token: str, password: str, client: Client) -> None:
        """Set the password that an invite is for. Raises ApiError ``unauthenticated``."""
        async with self._proofs.guess("invite", client):
            user_id = await self._proofs.in_thread(invites.find, token)
            if user_id is None:
                self._proofs.refused("invite", "an invite that does not work", client)
                raise Guessed(*invites.GONE)
            person = await self._proofs.in_thread(people.by_id, user_id)
            check_password(password, person.email or "", person.name)
        hashed, actor = await self._proofs.passwords.hashed(password), Actor(person.id, "invite")
        try:
            await self._proofs.in_thread(partial(people.set_password, invite=token), actor, person.id, hashed)
        except ApiError:
            self._proofs.refused("invite", f"an invite of user {person.id} that ended meanwhile", client)
            raise
        self._guard.forget(person.id)
        _security.info("user %s set a password by invite from %s", person.id, client.address)
        self._proofs.count("invite", "ok")

    async def _renew_hash(self, person: Person, password: str) -> None:
        old = person.password_hash
        if old is not None and is_outdated(old):
            await self._proofs.in_thread(
                people.renew_hash, person.id, old, await self._proofs.passwords.hashed(password)
            )

    async def _start(
        self,
        user_id: str,
        method: str,
        client: Client,
        *,
        cookie: bool,
        replaces: str,
        password_of_ms: int | None = None,
        link: tuple[str, str] | None = None,
    ) -> SignedIn:
        if replaces:
            self._guard.forget(await self._proofs.in_thread(sessions.revoke_cookie, replaces))
        begin = partial(sessions.start, self._database, user_id, method, client, cookie=cookie)
        made = await self._till.in_thread(
            partial(begin, seconds=self.rules.session_seconds, password_of_ms=password_of_ms, link=link)
        )
        if made is None and link is not None:
            raise self._unlinked(client)
        if made is None:
            raise ApiError("unauthenticated", "the password was changed in this moment", "sign in with the new one")
        session, carrier = made
        _security.info("user %s signed in (%s) from %s: session %s", user_id, method, client.address, session.id)
        self._proofs.count(method, "ok")
        if cookie:
            return SignedIn(session_id=session.id, user_id=user_id, cookie=carrier)
        access = await self.tokens.issue(user_id, session.id)
        return SignedIn(session_id=session.id, user_id=user_id, access_token=access, refresh_token=carrier)


def as_email(text: str) -> str | None:
    """The text as an e-mail address, or None if it is none."""
    try:
        return normal_email(text)
    except RequestError:
        return None
