"""``POST /v1/completions``"""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from config.generation import Delta, Finished
from gateway.openai.choices import Answer, best
from gateway.openai.job import Order, Service
from gateway.openai.keyed import key_of, keyed_answer
from gateway.openai.logprobs import completion_logprobs, merged
from gateway.openai.requests import CompletionBody, completion_request, read_body
from gateway.openai.stream import EventStream, event, rios_of, usage_of, whole_answer
from gateway.request import identify, privacy_of


async def completions(request: Request) -> Response:
    """Continue a prompt, streamed or at once."""
    service: Service = request.app.state.service
    principal = await identify(request)
    body = await read_body(request, CompletionBody)
    generation = completion_request(body, request.scope["state"]["request_id"], privacy_of(request))
    order = Order(principal=principal, request=generation, endpoint="completions", choices=body.best_of or body.n or 1)
    echo = generation.prompt if body.echo and isinstance(generation.prompt, str) else ""
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    shown = body.logprobs is not None and body.logprobs is not False
    shape = CompletionShape(body.model, echo=echo, include_usage=include_usage, count=body.n or 1, logprobs=shown)
    key = key_of(request)
    if key:
        return await keyed_answer(service, order, shape, key, body, streamed=bool(body.stream))
    if body.stream:
        return EventStream(service, order, shape)
    return await whole_answer(service, order, shape)


class CompletionShape:
    """Completion answers as JSON. ``echo`` is put before the answer; the ``count`` best of the answers are shown."""

    def __init__(self, model: str, *, echo: str, include_usage: bool, count: int, logprobs: bool) -> None:
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._echo = echo
        self._count = count
        self._logprobs = logprobs
        self._include_usage = include_usage

    def opening(self, choice: int) -> bytes:
        """The prompt, if it is echoed."""
        return self.piece(choice, Delta(text=self._echo, tokens=())) if self._echo else b""

    def piece(self, choice: int, delta: Delta) -> bytes:
        """A piece of text."""
        return event(self._chunk([_choice(choice, delta.text, logprobs=self._places(delta))]))

    def closing(self, choice: int, finished: Finished) -> bytes:
        """The finish reason."""
        return event({**self._chunk([_choice(choice, "", finished.reason)]), "rios": rios_of(finished)})

    def usage(self, finished: Finished) -> bytes:
        """The usage chunk if it was asked for."""
        return event({**self._chunk([]), "usage": usage_of(finished)}) if self._include_usage else b""

    def whole(self, answers: Sequence[Answer], finished: Finished) -> dict[str, Any]:
        """The answers at once."""
        shown = best(answers, self._count) if len(answers) > self._count else answers
        choices = [
            _choice(choice, self._echo + answer.text, answer.finished.reason, self._places(answer))
            for choice, answer in enumerate(shown)
        ]
        return {**self._body(choices), "usage": usage_of(finished), "rios": rios_of(finished)}

    def _places(self, said: Answer | Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        own, prompts = (
            (said.places, said.prompt_places) if isinstance(said, Answer) else (said.logprobs, said.prompt_logprobs)
        )
        return merged(completion_logprobs(prompts), completion_logprobs(own, len(self._echo)))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body(choices)
        if self._include_usage:
            body["usage"] = None
        return body

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def _choice(
    choice: int, text: str, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
