"""``POST /v1/chat/completions``"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from config.generation import Delta, Finished, PrivacyWish
from gateway.accounts import Principal
from gateway.endpoint import caller
from gateway.openai.choices import Answer
from gateway.openai.job import Order, Service
from gateway.openai.keyed import key_of, keyed_answer
from gateway.openai.logprobs import chat_logprobs
from gateway.openai.remembered import memory_of
from gateway.openai.requests import ChatBody, chat_request, read_prompt
from gateway.openai.stream import EventStream, event, rios_of, usage_of, whole_answer
from gateway.openai.tools import call_deltas, whole_calls
from gateway.request import meter_of, privacy_of


async def chat(request: Request) -> Response:
    """Answer a conversation, streamed or at once."""
    service: Service = request.app.state.service
    principal = caller(request).principal
    body = await read_prompt(request, ChatBody)
    order, shape = chat_order(body, principal, request.scope["state"]["request_id"], privacy_of(request))
    order = replace(order, meter=meter_of(request))
    key = key_of(request)
    if key:
        return await keyed_answer(service, order, shape, key, body, streamed=bool(body.stream))
    memory = memory_of(request, service, order, body)
    known = memory.answer() if memory is not None else None
    if known is not None:
        return known
    if body.stream:
        return EventStream(service, order, shape, memory)
    return await whole_answer(service, order, shape, memory)


def chat_order(
    body: ChatBody, principal: Principal, request_id: str, privacy: PrivacyWish = ""
) -> tuple[Order, "ChatShape"]:
    """What is asked, and how its answer is written. Raises ApiError."""
    generation = chat_request(body, request_id, privacy)
    order = Order(principal=principal, request=generation, endpoint="chat.completions", choices=body.n or 1)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return order, ChatShape(body.model, include_usage=include_usage)


class ChatShape:
    """Chat answers as JSON."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def opening(self, choice: int) -> bytes:
        """The role delta."""
        return event(self._chunk(choice, {"role": "assistant", "content": ""}))

    def piece(self, choice: int, delta: Delta) -> bytes:
        """A content delta."""
        if delta.logprobs or delta.tool_calls or delta.reasoning:
            return event(self._chunk(choice, _parts(delta), logprobs=chat_logprobs(delta.logprobs)))
        before, after = self._frames.get(choice) or self._frame(choice)
        return before + msgspec.json.encode(delta.text) + after

    def closing(self, choice: int, finished: Finished) -> bytes:
        """The empty delta with the finish reason."""
        return event({**self._chunk(choice, {}, finished.reason), "rios": rios_of(finished)})

    def usage(self, finished: Finished) -> bytes:
        """The usage chunk if it was asked for."""
        if not self._include_usage:
            return b""
        return event({**self._chunk(0, {}), "choices": [], "usage": usage_of(finished)})

    def whole(self, answers: Sequence[Answer], finished: Finished) -> dict[str, Any]:
        """The answers at once."""
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(choice, answer) for choice, answer in enumerate(answers)],
            "usage": usage_of(finished),
            "rios": rios_of(finished),
        }

    def _choice(self, choice: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": choice,
            "message": _message(answer),
            "logprobs": chat_logprobs(answer.places),
            "finish_reason": answer.finished.reason,
        }

    def _frame(self, choice: int) -> tuple[bytes, bytes]:
        """What stands around the text of a piece: the same for all pieces of an answer, so it is encoded once."""
        marker = "\x00"
        before, after = event(self._chunk(choice, {"content": marker})).split(msgspec.json.encode(marker))
        self._frames[choice] = before, after
        return before, after

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}],
        }
        if self._include_usage:
            chunk["usage"] = None
        return chunk


def _parts(delta: Delta) -> dict[str, Any]:
    """What a piece adds to the message. ``reasoning_content`` is the name that other servers use."""
    parts: dict[str, Any] = {}
    if delta.tool_calls:
        parts["tool_calls"] = call_deltas(delta.tool_calls)
    if delta.reasoning:
        parts["reasoning_content"] = delta.reasoning
    if delta.text or not parts:
        parts["content"] = delta.text
    return parts


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = whole_calls(answer.calls)
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    return message
