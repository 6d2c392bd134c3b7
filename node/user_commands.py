"""``rios gateway user ...``: users of the HTTP gateway and what they sign in with, whether gateways run or not."""

import getpass
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from config.errors import ConfigError, RequestError
from node.cli import Context, Output
from node.local import open_books

_FILE_BYTES_MAX = 4096


def create(context: Context) -> Output:
    """``rios gateway user create``"""
    from gateway import audit  # noqa: PLC0415 - loads SQLAlchemy, as all of these
    from gateway.identity import passwords, people  # noqa: PLC0415

    args = context.args
    password = _password(context) if args.email or args.password_file else ""
    if password and not args.email:
        raise ConfigError("usage", "a password needs an e-mail address to sign in with", "add --email ADDRESS")
    if password:
        passwords.check_password(password, args.name, args.email)
    with open_books(context) as accounts:
        hashed = passwords.hash_password(password) if password else ""
        with accounts.adding_user(args.name, args.email) as (connection, plain):
            user = accounts.insert_user(connection, replace(plain, role=args.role))
            if hashed:
                people.put_password(connection, user.id, hashed)
            detail = {"name": user.name, "role": user.role}
            audit.record(connection, audit.OPERATOR, "user.created", user.id, owner_id=user.id, detail=detail)
    how = "can sign in" if password else "has no password; let them set one: rios gateway user invite NAME"
    note = f"user {user.name} ({user.id}), {user.role}" + (f", {how}" if user.email else "")
    return Output({**asdict(user), "has_password": bool(password)}, note)


def password(context: Context) -> Output:
    """``rios gateway user password``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.identity import passwords, people  # noqa: PLC0415

    with open_books(context) as accounts:
        user = accounts.find_user(context.args.name)
        if user.email is None:
            raise RequestError("invalid_request", f"{user.name} has no e-mail address to sign in with")
        text = _password(context)
        if not text:
            raise ConfigError("usage", "there is no password", "give one with --password-file, or on a terminal")
        passwords.check_password(text, user.name, user.email)
        people.set_password(accounts.database, OPERATOR, user.id, passwords.hash_password(text))
    return Output(
        {"user_id": user.id}, f"{user.name} has a new password; all sessions ended, and links to another provider"
    )


def role(context: Context) -> Output:
    """``rios gateway user role``"""
    return _change(context, f"is {context.args.role} now; gateways follow within seconds", role=context.args.role)


def totp_reset(context: Context) -> Output:
    """``rios gateway user totp-reset``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.identity import factors  # noqa: PLC0415

    with open_books(context) as accounts:
        user = accounts.find_user(context.args.name)
        removed = factors.remove(accounts.database, OPERATOR, user.id)
    text = f"{user.name} signs in without a second factor now" if removed else f"{user.name} had no second factor"
    return Output({"user_id": user.id, "removed": removed}, text)


def invite(context: Context) -> Output:
    """``rios gateway user invite``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.identity import invites  # noqa: PLC0415

    with open_books(context) as accounts:
        user = accounts.find_user(context.args.name)
        if user.email is None:
            raise RequestError("invalid_request", f"{user.name} has no e-mail address to sign in with")
        made = invites.create(accounts.database, OPERATOR, user.id)
    data = {"user_id": user.id, "token": made.token, "expires_at_ms": made.expires_at_ms}
    return Output(data, f"{made.token}\n  works once, for three days: POST /v1/auth/accept with token and password")


def sign_out(context: Context) -> Output:
    """``rios gateway user sign-out``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.identity import sessions  # noqa: PLC0415

    with open_books(context) as accounts:
        user = accounts.find_user(context.args.name)
        with accounts.database.write() as connection:
            ended = sessions.revoke_all(connection, OPERATOR, user.id)
    return Output({"user_id": user.id, "ended": ended}, f"ended {ended} sessions of {user.name}")


def revoke_tokens(context: Context) -> Output:
    """``rios gateway revoke-tokens``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.identity import tokens  # noqa: PLC0415

    with open_books(context) as accounts:
        revoked = tokens.revoke_keys(accounts.database, OPERATOR)
    text = f"revoked {revoked} signing keys; access tokens end within seconds, and refreshing gives new ones"
    return Output({"revoked": revoked}, text)


def disable(context: Context) -> Output:
    """``rios gateway user disable``"""
    return _change(context, "is shut out, keys and sessions ended; gateways follow within seconds", disabled=True)


def enable(context: Context) -> Output:
    """``rios gateway user enable``"""
    return _change(context, "may come in again", disabled=False)


def _change(context: Context, what: str, **changes: Any) -> Output:  # noqa: ANN401 - fields of UserChange
    from gateway import managing  # noqa: PLC0415
    from gateway.audit import OPERATOR  # noqa: PLC0415

    with open_books(context) as accounts:
        user = accounts.find_user(context.args.name)
        managing.change_user(accounts, OPERATOR, user.id, None, managing.UserChange(**changes))
    return Output({"user_id": user.id, **changes}, f"{user.name} {what}")


def _password(context: Context) -> str:
    """From the file that was named, or asked for twice on a terminal; empty if there is neither."""
    file = context.args.password_file
    if file == "-":
        return _line(sys.stdin.read(_FILE_BYTES_MAX))
    if file:
        try:
            return _line(Path(file).read_text("utf-8")[:_FILE_BYTES_MAX])
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("usage", f"cannot read the password file {file}: {error}") from error
    if not sys.stdin.isatty():
        return ""
    first = getpass.getpass("password (not shown; empty: none): ")
    if first and getpass.getpass("again: ") != first:
        raise ConfigError("usage", "the two passwords differ", "try again")
    return first


def _line(text: str) -> str:
    line, _, more = text.partition("\n")
    if more.strip():
        raise ConfigError("usage", "a password is one line, and there are more", "write only the password there")
    return line.rstrip("\r")
