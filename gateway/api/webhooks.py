"""``/v1/webhooks``"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.audit import actor_of
from gateway.endpoint import Endpoint, caller, permitted
from gateway.errors import invalid
from gateway.jobs import webhooks
from gateway.jobs.addresses import URL_CHARACTERS_MAX, target_of
from gateway.jobs.courier import Courier
from gateway.jobs.webhooks import Delivery, Webhook
from gateway.listing import PAGING, page_of, shown
from gateway.openai.requests import read_body
from gateway.request import json_response

T = TypeVar("T")

Url = Annotated[str, Meta(min_length=1, max_length=URL_CHARACTERS_MAX)]
Kind = Annotated[str, Meta(pattern=r"^[a-z_]{1,24}\.([a-z_]{1,24}|\*)$")]
Kinds = Annotated[list[Kind], Meta(max_length=32)]


class NewWebhookBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``types``: kinds of events, e.g. ``batch.*``; none for all."""

    url: Url
    types: Kinds = []


class WebhookPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is left out stays."""

    url: Url | None = None
    types: Kinds | None = None
    enabled: bool | None = None


class WebhookObject(msgspec.Struct, kw_only=True):
    """A webhook. ``key_id``: it goes on as long as this key; null for one of a session. ``problem``: why it failed
    last, or nothing is sent. ``failing_since_ms``: since when nothing else happened."""

    object: Literal["webhook"] = "webhook"
    id: str
    user_id: str
    key_id: str | None
    url: str
    types: list[str]
    enabled: bool
    problem: str
    failing_since_ms: int | None
    created_at_ms: int


class NewWebhookObject(WebhookObject, kw_only=True):
    """A webhook with its ``secret``, which is shown this once."""

    secret: str


class WebhookList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[WebhookObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookDeleted(msgspec.Struct, kw_only=True):
    """A webhook that is no more."""

    object: Literal["webhook"] = "webhook"
    id: str
    deleted: bool = True


class DeliveryObject(msgspec.Struct, kw_only=True):
    """An event on its way. ``answered``: the status of the last answer, 0 for none."""

    object: Literal["webhook.delivery"] = "webhook.delivery"
    id: str
    webhook_id: str
    kind: str
    status: Literal["pending", "delivered", "dead"]
    attempts: int
    due_at_ms: int
    answered: int
    problem: str
    created_at_ms: int


class DeliveryList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[DeliveryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _fields(webhook: Webhook) -> dict[str, Any]:
    fields = asdict(webhook)
    return {"types": fields.pop("kinds").split(), **fields}


def _object(webhook: Webhook) -> WebhookObject:
    return WebhookObject(**_fields(webhook))


def _delivery(delivery: Delivery) -> DeliveryObject:
    return DeliveryObject(**asdict(delivery))


async def _run(request: Request, work: Callable[..., T], *arguments: object, **more: object) -> T:
    till = request.app.state.service.till
    done: T = await till.in_thread(partial(work, till.database, *arguments, **more))
    return done


def _name(request: Request) -> str:
    name: str = request.path_params["webhook"]
    return name


def _courier(request: Request) -> Courier:
    courier: Courier = request.app.state.site.courier
    return courier


async def list_webhooks(request: Request) -> Response:
    """Those within reach."""
    page = page_of(request)
    rows = await _run(request, webhooks.listed, caller(request).owner, limit=page.fetch, after=page.after)
    return json_response(shown([_object(row) for row in rows], page, lambda row: row.id))


async def create_webhook(request: Request) -> Response:
    """Make one."""
    who = caller(request)
    permitted(who.principal, webhooks.HEARS)  # it is another way to hear
    body = await read_body(request, NewWebhookBody)
    target_of(body.url, _courier(request).rules)
    make = partial(_run, request, webhooks.create, request.app.state.site.identity.vault, actor_of(who.principal))
    made, secret = await make(user_id=who.user_id, url=body.url, kinds=body.types, key_id=who.principal.key_id)
    return json_response(NewWebhookObject(**_fields(made), secret=secret), 201)


async def get_webhook(request: Request) -> Response:
    """One of them."""
    return json_response(_object(await _run(request, webhooks.get, _name(request), caller(request).owner)))


async def change_webhook(request: Request) -> Response:
    """Another address, other kinds, on or off."""
    who = caller(request)
    permitted(who.principal, webhooks.HEARS)
    body = await read_body(request, WebhookPatch)
    values: dict[str, object] = {}
    if body.url is not None:
        target_of(body.url, _courier(request).rules)
        values["url"] = body.url
    if body.types is not None:
        values["kinds"] = " ".join(body.types)
    if body.enabled is not None:
        values["enabled"] = body.enabled
    if not values:
        raise invalid(None, "name what shall change: url, types or enabled")
    change = partial(_run, request, webhooks.change, actor_of(who.principal), _name(request), who.owner)
    return json_response(_object(await change(values, key_id=who.principal.key_id)))


async def delete_webhook(request: Request) -> Response:
    """Forget one."""
    who, name = caller(request), _name(request)
    await _run(request, webhooks.delete, actor_of(who.principal), name, who.owner)
    return json_response(WebhookDeleted(id=name))


async def ping_webhook(request: Request) -> Response:
    """Send it a test."""
    made = await _run(request, webhooks.ping, _name(request), caller(request).owner)
    _courier(request).wake()
    return json_response(_delivery(made), 202)


async def list_deliveries(request: Request) -> Response:
    """What was sent to one, or waits."""
    page, who = page_of(request), caller(request)
    find = partial(_run, request, webhooks.list_deliveries, _name(request), who.owner)
    rows = await find(limit=page.fetch, after=page.after)
    return json_response(shown([_delivery(row) for row in rows], page, lambda row: row.id))


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/webhooks",
        handle=list_webhooks,
        needs="webhooks:read",
        summary="Webhooks, newest first",
        answer=WebhookList,
        parameters=PAGING,
    ),
    Endpoint(
        method="POST",
        path="/v1/webhooks",
        handle=create_webhook,
        needs="webhooks:write",
        summary="Make a webhook; its secret is shown this once",
        body=NewWebhookBody,
        answer=NewWebhookObject,
        status=201,
        secret=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/webhooks/{webhook}",
        handle=get_webhook,
        needs="webhooks:read",
        summary="A webhook",
        answer=WebhookObject,
    ),
    Endpoint(
        method="PATCH",
        path="/v1/webhooks/{webhook}",
        handle=change_webhook,
        needs="webhooks:write",
        summary="Change a webhook",
        body=WebhookPatch,
        answer=WebhookObject,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/webhooks/{webhook}",
        handle=delete_webhook,
        needs="webhooks:write",
        summary="Delete a webhook",
        answer=WebhookDeleted,
    ),
    Endpoint(
        method="POST",
        path="/v1/webhooks/{webhook}/ping",
        handle=ping_webhook,
        needs="webhooks:write",
        summary="Send a webhook a test",
        answer=DeliveryObject,
        status=202,
    ),
    Endpoint(
        method="GET",
        path="/v1/webhooks/{webhook}/deliveries",
        handle=list_deliveries,
        needs="webhooks:read",
        summary="What was sent to a webhook, or waits",
        answer=DeliveryList,
        parameters=PAGING,
    ),
)
