"""``POST /v1/completions``"""

import secrets
import time
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from config.generation import Delta, Finished, PlaceLogprobs, PrivacyWish
from gateway.accounts import Principal
from gateway.endpoint import caller
from gateway.openai.choices import Answer, best
from gateway.openai.job import Order, Service
from gateway.openai.keyed import key_of, keyed_answer
from gateway.openai.logprobs import completion_logprobs, merged
from gateway.openai.remembered import memory_of
from gateway.openai.requests import CompletionBody, completion_request, prompts_of, read_prompt
from gateway.openai.stream import EventStream, event, rios_of, usage_of, whole_answer
from gateway.request import meter_of, privacy_of


async def completions(request: Request) -> Response:
    """Continue a prompt, streamed or at once."""
    service: Service = request.app.state.service
    principal = caller(request).principal
    body = await read_prompt(request, CompletionBody)
    order, shape = completion_order(body, principal, request.scope["state"]["request_id"], privacy_of(request))
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


def completion_order(
    body: CompletionBody, principal: Principal, request_id: str, privacy: PrivacyWish = ""
) -> tuple[Order, "CompletionShape"]:
    """What is asked, and how its answer is written. Raises ApiError."""
    prompts = prompts_of(body)
    order = Order(
        principal=principal,
        request=completion_request(body, prompts, request_id, privacy),
        endpoint="completions",
        choices=body.best_of or body.n or 1,
        others=tuple(prompts[1:]),
    )
    count = body.n or 1
    echo = Echo([one if isinstance(one, str) else None for one in prompts], count) if body.echo else None
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    shown = body.logprobs is not None and body.logprobs is not False
    shape = CompletionShape(
        body.model, echo=echo, include_usage=include_usage, each=order.choices, count=count, logprobs=shown
    )
    return order, shape


class Echo:
    """Its prompt before each answer: as it came, or of token ids (None in ``texts``) as the engine spells them out.

    Spelling goes on over pieces of a stream, which may end within a character."""

    def __init__(self, texts: Sequence[str | None], each: int) -> None:
        """``each``: answers that are shown to a prompt."""
        self._texts = texts
        self._each = each
        self._spellings: dict[int, IncrementalDecoder] = {}
        self._lengths: dict[int, int] = {}

    def opening(self, choice: int) -> str:
        """What is known before anything runs."""
        return self._text(choice) or ""

    def spelled(self, choice: int, places: Sequence[PlaceLogprobs]) -> str:
        """What the next tokens of the prompt add to it."""
        if self._text(choice) is not None or not places:
            return ""
        spelling = self._spellings.setdefault(choice, getincrementaldecoder("utf-8")("replace"))
        text = spelling.decode(b"".join(place.chosen.data for place in places))
        self._lengths[choice] = self._lengths.get(choice, 0) + len(text)
        return text

    def length(self, choice: int) -> int:
        """Characters of the prompt before the answer."""
        text = self._text(choice)
        return self._lengths.get(choice, 0) if text is None else len(text)

    def _text(self, choice: int) -> str | None:
        return self._texts[choice // self._each]


class CompletionShape:
    """Completion answers as JSON. ``echo`` is put before an answer; of ``each`` answers to a prompt the ``count`` best
    are shown."""

    def __init__(
        self, model: str, *, echo: Echo | None, include_usage: bool, each: int, count: int, logprobs: bool
    ) -> None:
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._echo = echo
        self._each = each
        self._count = count
        self._logprobs = logprobs
        self._include_usage = include_usage

    def opening(self, choice: int) -> bytes:
        """The prompt, if it is echoed."""
        text = self._echo.opening(choice) if self._echo else ""
        return self.piece(choice, Delta(text=text, tokens=())) if text else b""

    def piece(self, choice: int, delta: Delta) -> bytes:
        """A piece of text."""
        text = (self._echo.spelled(choice, delta.prompt_logprobs) if self._echo else "") + delta.text
        return event(self._chunk([_choice(choice, text, logprobs=self._places(choice, delta))]))

    def closing(self, choice: int, finished: Finished) -> bytes:
        """The finish reason."""
        return event({**self._chunk([_choice(choice, "", finished.reason)]), "rios": rios_of(finished)})

    def usage(self, finished: Finished) -> bytes:
        """The usage chunk if it was asked for."""
        return event({**self._chunk([]), "usage": usage_of(finished)}) if self._include_usage else b""

    def whole(self, answers: Sequence[Answer], finished: Finished) -> dict[str, Any]:
        """The answers at once."""
        groups = (answers[start : start + self._each] for start in range(0, len(answers), self._each))
        shown = [one for group in groups for one in (best(group, self._count) if self._each > self._count else group)]
        choices, echo = [], self._echo
        for choice, answer in enumerate(shown):
            prompt = echo.opening(choice) + echo.spelled(choice, answer.prompt_places) if echo else ""
            choices.append(_choice(choice, prompt + answer.text, answer.finished.reason, self._places(choice, answer)))
        return {**self._body(choices), "usage": usage_of(finished), "rios": rios_of(finished)}

    def _places(self, choice: int, said: Answer | Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        own, prompts = (
            (said.places, said.prompt_places) if isinstance(said, Answer) else (said.logprobs, said.prompt_logprobs)
        )
        return merged(
            completion_logprobs(prompts), completion_logprobs(own, self._echo.length(choice) if self._echo else 0)
        )

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
