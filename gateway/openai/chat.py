"""``POST /v1/chat/completions``"""

import secrets
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from config.generation import Finished
from gateway.openai.job import Order, Service
from gateway.openai.requests import ChatBody, chat_request, read_body
from gateway.openai.stream import EventStream, event, rios_of, usage_of, whole_answer
from gateway.request import identify


async def chat(request: Request) -> Response:
    """Answer a conversation, streamed or at once."""
    service: Service = request.app.state.service
    principal = await identify(request)
    body = await read_body(request, ChatBody)
    generation = chat_request(body, request.scope["state"]["request_id"])
    order = Order(principal=principal, request=generation, endpoint="chat.completions")
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    shape = ChatShape(body.model, include_usage=include_usage)
    if body.stream:
        return EventStream(service, order, shape)
    return await whole_answer(service, order, shape)


class ChatShape:
    """Chat answers as JSON."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage
        # Every piece is the same but for its text, so it is encoded once.
        marker = "\x00"
        encoded = event(self._chunk({"content": marker}))
        self._before, self._after = encoded.split(msgspec.json.encode(marker))

    def opening(self) -> bytes:
        """The role delta."""
        return event(self._chunk({"role": "assistant", "content": ""}))

    def piece(self, text: str) -> bytes:
        """A content delta."""
        return self._before + msgspec.json.encode(text) + self._after

    def closing(self, finished: Finished) -> bytes:
        """The empty delta with the finish reason, and the usage chunk if it was asked for."""
        last = self._chunk({}, finished.reason)
        last["rios"] = rios_of(finished)
        if not self._include_usage:
            return event(last)
        usage = {**self._chunk({}), "choices": [], "usage": usage_of(finished)}
        return event(last) + event(usage)

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [choice],
            "usage": usage_of(finished),
            "rios": rios_of(finished),
        }

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        }
        if self._include_usage:
            chunk["usage"] = None
        return chunk
