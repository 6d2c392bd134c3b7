"""``POST /v1/completions``"""

import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from config.generation import Finished
from gateway.openai.job import Order, Service
from gateway.openai.requests import CompletionBody, completion_request, read_body
from gateway.openai.stream import EventStream, event, rios_of, usage_of, whole_answer
from gateway.request import identify


async def completions(request: Request) -> Response:
    """Continue a prompt, streamed or at once."""
    service: Service = request.app.state.service
    principal = await identify(request)
    body = await read_body(request, CompletionBody)
    generation = completion_request(body, request.scope["state"]["request_id"])
    order = Order(principal=principal, request=generation, endpoint="completions")
    echo = generation.prompt if body.echo and isinstance(generation.prompt, str) else ""
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    shape = CompletionShape(body.model, echo=echo, include_usage=include_usage)
    if body.stream:
        return EventStream(service, order, shape)
    return await whole_answer(service, order, shape)


class CompletionShape:
    """Completion answers as JSON. ``echo`` is put before the answer."""

    def __init__(self, model: str, *, echo: str, include_usage: bool) -> None:
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._echo = echo
        self._include_usage = include_usage

    def opening(self) -> bytes:
        """The prompt, if it is echoed."""
        return self.piece(self._echo) if self._echo else b""

    def piece(self, text: str) -> bytes:
        """A piece of text."""
        chunk = self._body(text, None)
        if self._include_usage:
            chunk["usage"] = None
        return event(chunk)

    def closing(self, finished: Finished) -> bytes:
        """The finish reason, and the usage chunk if it was asked for."""
        last = {**self._body("", finished.reason), "rios": rios_of(finished)}
        if not self._include_usage:
            return event(last)
        last["usage"] = None
        return event(last) + event({**self._body("", None), "choices": [], "usage": usage_of(finished)})

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """The answer at once."""
        body = self._body(self._echo + text, finished.reason)
        return {**body, "usage": usage_of(finished), "rios": rios_of(finished)}

    def _body(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
        }
