"""``POST /v1/embeddings``

A vector is the mean of a model's last hidden states, of length 1. What is paid for is the texts' tokens, as a prompt's;
a request that fails costs nothing, one whose client leaves neither.
"""

import base64
import struct
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from config.generation import Embedded, EmbeddingRequest, PrivacyWish
from gateway.accounts import Principal
from gateway.db.stamps import new_id
from gateway.endpoint import caller
from gateway.errors import invalid, unsupported
from gateway.limits import Meter
from gateway.money import EMBEDDED, FREE, Settlement
from gateway.openai.job import Embedding, Service, Size, admission
from gateway.openai.requests import RiosOptions, check_text, read_prompt, token_ids
from gateway.request import json_response, meter_of, privacy_of

_ENDPOINT = "embeddings"


class EmbeddingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/embeddings``"""

    model: Annotated[str, Meta(min_length=1, max_length=255)]
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    rios: RiosOptions | None = None


async def embeddings(request: Request) -> Response:
    """Turn texts into vectors."""
    body = await read_prompt(request, EmbeddingBody)
    who, request_id = caller(request).principal, request.scope["state"]["request_id"]
    meter = meter_of(request)
    return json_response(
        await embed(request.app.state.service, who, body, request_id, privacy_of(request), meter=meter)
    )


async def embed(
    service: Service,
    principal: Principal,
    body: EmbeddingBody,
    request_id: str,
    privacy: PrivacyWish,
    *,
    free: bool = False,
    batch: bool = False,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """The answer to a request, charged unless it is ``free``; with ``batch`` it lets others go first. Raises
    RiosError."""
    if body.dimensions is not None:
        raise unsupported("dimensions", "vectors have the model's own number of dimensions")
    bill = new_id()
    wanted = EmbeddingRequest(
        model=body.model,
        inputs=_inputs(body.input),
        request_id=request_id,
        route=body.rios.route if body.rios is not None else None,
        user=principal.account_id,
        privacy=privacy,
        bill=bill,
    )
    prices = FREE if free else None
    order = Embedding(principal=principal, request=wanted, endpoint=_ENDPOINT, prices=prices, meter=meter)
    prepared = await service.engine.prepare_embeddings(wanted)
    async with admission(service, order, Size(bill, prepared.prompt_tokens, 0)) as admitted:
        outcome = "failed"
        try:
            with service.turns.place(principal.user_id, batch=batch) as turn:
                await turn.come()
                found = await service.engine.embed(prepared)
            outcome = EMBEDDED
        finally:
            settlement = Settlement(
                reservation=admitted.ticket.reservation,
                prompt_tokens=prepared.prompt_tokens,
                completion_tokens=0,
                outcome=outcome,
            )
            if outcome == EMBEDDED:
                service.metrics.observe_tokens(prepared.prompt_tokens, 0)
                await service.till.settle(settlement)
            else:
                admitted.give_back(prepared.prompt_tokens)
                await service.till.settle_after_cancel(settlement)
    return _answer(body, found)


def _inputs(given: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """One text, one list of token ids, or a list of either."""
    if isinstance(given, str):
        return (check_text("input", given),)
    if not given:
        raise invalid("input", "input is empty")
    if isinstance(given[0], int):
        return (token_ids("input", given),)
    return tuple(
        check_text(f"input[{index}]", each) if isinstance(each, str) else token_ids(f"input[{index}]", each)
        for index, each in enumerate(given)
    )


def _answer(body: EmbeddingBody, found: Embedded) -> dict[str, Any]:
    spelled = _as_text if body.encoding_format == "base64" else _as_numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": spelled(vector)}
            for index, vector in enumerate(found.vectors)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
        "rios": {"route": found.route, "expert_rows": found.expert_rows},
    }


def _as_text(vector: bytes) -> str:
    """OpenAI's form: little-endian f32 in base64, which is what its clients ask for by default."""
    return base64.b64encode(vector).decode()


def _as_numbers(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
