"""Answers and vectors for the command line: its JSON to requests, the engine's events to JSON.

Used by the running daemon and by ``--local``. The JSON of a request is made in ``node/asking.py``.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from config.errors import RequestError
from config.generation import (
    Constraint,
    Delta,
    EmbeddingRequest,
    Finished,
    GenerationRequest,
    Message,
    PlaceLogprobs,
    Sampling,
    TokenLogprob,
)
from node.control import Send

if TYPE_CHECKING:
    from node.daemon import Node

Args = Mapping[str, Any]


async def chat(node: "Node", args: Args, send: Send) -> Any:  # noqa: ANN401 - JSON
    """The command ``chat`` of the control socket."""
    return await generate(node.engine, args, send)


async def embed(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """The command ``embed`` of the control socket."""
    return await vectors(node.engine, args)


def request_of(args: Args, models: Sequence[str]) -> GenerationRequest:
    """A generation request from the chat command's JSON; ``models``: the ones known, for the default."""
    constraint = args.get("constraint")
    return GenerationRequest(
        model=_model(args, models),
        messages=tuple(Message(role=m["role"], content=m["content"]) for m in args["messages"]),
        sampling=Sampling(
            temperature=args.get("temperature", 1.0),
            top_k=args.get("top_k", 0),
            top_p=args.get("top_p", 1.0),
            min_p=args.get("min_p", 0.0),
            frequency_penalty=args.get("frequency_penalty", 0.0),
            presence_penalty=args.get("presence_penalty", 0.0),
            repetition_penalty=args.get("repetition_penalty", 1.0),
            logit_bias=tuple((token, bias) for token, bias in args.get("logit_bias", ())),
            seed=args.get("seed"),
            stop=tuple(args.get("stop", ())),
            max_tokens=args.get("max_tokens"),
            min_tokens=args.get("min_tokens", 0),
            logprobs=args.get("logprobs"),
            constraint=Constraint(**constraint) if constraint else None,
        ),
        route=args.get("route"),
        privacy=args.get("privacy") or "",
    )


def _model(args: Args, models: Sequence[str]) -> str:
    model: str = args.get("model") or (models[0] if len(models) == 1 else "")
    if not model:
        known = ", ".join(models) or "none; import or deploy one first: rios model --help"
        raise RequestError("invalid_request", "which model?", f"--model NAME, one of: {known}")
    return model


async def generate(engine: Any, args: Args, send: Send) -> Any:  # noqa: ANN401 - an Engine; JSON
    """Run one request; text goes to ``send`` as it comes, the whole is returned."""
    prepared = await engine.prepare(request_of(args, [model.name for model in engine.models()]))
    text: list[str] = []
    places: list[PlaceLogprobs] = []
    finished: Finished | None = None
    async with engine.stream(prepared) as events:
        async for event in events:
            if isinstance(event, Delta):
                places += event.logprobs
                if event.text:
                    text.append(event.text)
                    await send({"text": event.text})
            else:
                finished = event
    assert finished is not None
    steps = max(0, finished.completion_tokens - 1)
    rate = steps / finished.decode_seconds if finished.decode_seconds > 0 else 0.0
    answer = {
        "text": "".join(text),
        "tokens_per_s": round(rate, 2),
        **asdict(finished),
        "degraded": bool(finished.missing),
    }
    return answer if args.get("logprobs") is None else {**answer, "logprobs": [_place(place) for place in places]}


def _place(place: PlaceLogprobs) -> dict[str, Any]:
    return {**_token(place.chosen), "top": [_token(each) for each in place.top]}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "text": token.data.decode(errors="replace"), "logprob": token.logprob}


async def vectors(engine: Any, args: Args) -> Any:  # noqa: ANN401 - an Engine; JSON
    """The vectors of ``args["texts"]`` as numbers."""
    model = _model(args, [model.name for model in engine.models()])
    wanted = EmbeddingRequest(
        model=model, inputs=tuple(args["texts"]), route=args.get("route"), privacy=args.get("privacy") or ""
    )
    found = await engine.embed(await engine.prepare_embeddings(wanted))
    numbers = [list(struct.unpack(f"<{len(vector) // 4}f", vector)) for vector in found.vectors]
    return {
        "vectors": numbers,
        "prompt_tokens": found.prompt_tokens,
        "route": found.route,
        "expert_rows": found.expert_rows,
    }
