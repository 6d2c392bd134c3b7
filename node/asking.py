"""``rios chat`` and ``rios embed``: asking a model, through the running daemon or, with ``--local``, in this process.

Owns flags to JSON, and how answers are shown. What that JSON asks for stands in ``node/answering.py``.
"""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import trio

from config.errors import EXIT_OK, ConfigError, RiosError
from node import control, threads
from node.cli import Context, Output


def chat(context: Context) -> Output | int:
    """``rios chat``"""
    question = _question(context)
    if question is not None:
        messages, echo = [{"role": "user", "content": question}], not context.as_json
        answer = _here(context, messages, echo=echo) if context.args.local else _stream(context, messages, echo=echo)
        return Output(answer, "") if context.as_json else EXIT_OK
    history: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)  # noqa: T201 - leave the prompt's line
            return EXIT_OK
        if question:
            asked = {"role": "user", "content": question}
            try:
                answer = _stream(context, [*history, asked], echo=True)
            except RiosError as error:
                if error.code == "not_running":
                    raise
                print(f"rios: {error}", file=sys.stderr)  # noqa: T201 - one failed question does not end a conversation
                continue
            history += [asked, {"role": "assistant", "content": answer["text"]}]


def _question(context: Context) -> str | None:
    """From the command line or a pipe; None where a conversation is wanted."""
    given = " ".join(context.args.question)
    try:
        if not given and not sys.stdin.isatty():
            given = sys.stdin.read()
        given.encode()
    except UnicodeError as error:
        raise ConfigError("usage", f"the question is not UTF-8: {error}", "rios chat takes text") from error
    if given.strip():
        return given.strip()
    if context.args.question or not sys.stdin.isatty() or context.as_json or context.args.local:
        raise ConfigError("usage", "no question", 'e.g. rios chat "What is the capital of France?"')
    return None


def _stream(context: Context, messages: list[dict[str, str]], *, echo: bool) -> Any:  # noqa: ANN401 - JSON
    asked = {"messages": messages, **chat_options(context)}
    for kind, value in control.request(context.paths().control, "chat", asked):
        if kind == "event" and echo:
            print(value["text"], end="", flush=True)  # noqa: T201 - the command's output
        if kind == "result":
            _show_end(value, echo=echo)
            return value
    raise RiosError("internal", "the node sent no answer")


def _here(context: Context, messages: list[dict[str, str]], *, echo: bool) -> Any:  # noqa: ANN401 - JSON
    """The same in this process."""
    asked = {"messages": messages, **chat_options(context), "route": _local_route(context)}
    threads.bound(context.settings().settings.dmoe.threads)

    async def run() -> Any:  # noqa: ANN401 - JSON
        from node import answering  # noqa: PLC0415

        async def send(event: Any) -> None:  # noqa: ANN401 - JSON
            if echo:
                print(event["text"], end="", flush=True)  # noqa: T201 - the command's output

        async with _engine(context, asked["route"]) as engine:
            return await answering.generate(engine, asked, send)

    answer = trio.run(run)
    _show_end(answer, echo=echo)
    return answer


def _show_end(answer: Any, *, echo: bool) -> None:  # noqa: ANN401 - JSON
    """What follows the text of an answer, for people."""
    if not echo:
        return
    print(flush=True)  # noqa: T201 - the command's output
    for place in answer.get("logprobs", ()):
        others = "  ".join(f"{each['text']!r} {each['logprob']:.3f}" for each in place["top"])
        print(f"{place['text']!r:16} {place['logprob']:8.3f}  {others}".rstrip(), file=sys.stderr)  # noqa: T201
    note = f"[{answer['completion_tokens']} tokens, {answer['tokens_per_s']:.1f} tokens/s]"
    print(note, file=sys.stderr)  # noqa: T201 - a note for people
    if answer.get("missing"):
        print(_degraded(answer["missing"]), file=sys.stderr)  # noqa: T201 - a note for people


def _degraded(missing: list[tuple[int, int]]) -> str:
    """What an answer did without."""
    named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"[degraded: nobody had {named}{more}; the other experts weighed more]"


def chat_options(context: Context) -> dict[str, Any]:
    """The sampling flags of ``rios chat`` as JSON."""
    args = context.args
    names = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "frequency_penalty", "seed", "stop")
    options = {
        name: getattr(args, name) for name in ("model", "route", "privacy", *names, "presence_penalty", "logprobs")
    }
    options["repetition_penalty"] = args.repetition_penalty
    options["logit_bias"] = [_bias(text) for text in args.logit_bias]
    options["constraint"] = _constraint(args)
    return options


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError as error:
        raise ConfigError("usage", f"--logit-bias {text!r} is not ID=NUMBER", "e.g. --logit-bias 42=-100") from error


def _constraint(args: Any) -> dict[str, str] | None:  # noqa: ANN401 - parsed flags
    if args.json_schema is not None:
        return {"kind": "json", "text": _file("--json-schema", args.json_schema), "where": args.json_schema}
    if args.grammar is not None:
        return {"kind": "grammar", "text": _file("--grammar", args.grammar), "where": args.grammar}
    if args.regex is not None:
        return {"kind": "regex", "text": args.regex, "where": "--regex"}
    if args.choice is not None:
        return {"kind": "choice", "text": json.dumps(args.choice), "where": "--choice"}
    return None


def _file(flag: str, name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("usage", f"{flag}: cannot read {name}: {error}", "give a text file") from error


def embed(context: Context) -> Output:
    """``rios embed``"""
    asked = {
        "texts": _texts(context),
        "model": context.args.model,
        "route": context.args.route,
        "privacy": context.args.privacy,
    }
    data = _vectors_here(context, asked) if context.args.local else _vectors(context, asked)
    return Output(data, "\n".join(" ".join(f"{value:.7g}" for value in vector) for vector in data["vectors"]))


def _texts(context: Context) -> list[str]:
    given: list[str] = list(context.args.text)
    try:
        if not given and not sys.stdin.isatty():
            given = [line for line in sys.stdin.read().splitlines() if line.strip()]
        "".join(given).encode()
    except UnicodeError as error:
        raise ConfigError("usage", f"the text is not UTF-8: {error}", "rios embed takes text") from error
    if not given:
        raise ConfigError("usage", "no text", 'e.g. rios embed "The capital of France"')
    return given


def _vectors(context: Context, asked: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    for kind, value in control.request(context.paths().control, "embed", asked):
        if kind == "result":
            return value
    raise RiosError("internal", "the node sent no vectors")


def _vectors_here(context: Context, asked: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    route = asked["route"] = _local_route(context)
    threads.bound(context.settings().settings.dmoe.threads)

    async def run() -> Any:  # noqa: ANN401 - JSON
        from node import answering  # noqa: PLC0415

        async with _engine(context, route) as engine:
            return await answering.vectors(engine, asked)

    return trio.run(run)


def _local_route(context: Context) -> str:
    route = context.args.route or ("local" if _is_sparse(context) else "fused")
    if route not in ("local", "fused", "stages"):  # stages: the same cuts and roundings, all in this process
        raise ConfigError("usage", "--local has no peers to call", "--route local, fused or stages")
    return str(route)


def _is_sparse(context: Context) -> bool:
    """Whether the model that is asked has no fused graph. One that is not here is complained of where it is used."""
    from dmoe.store import ModelStore  # noqa: PLC0415

    known = list(ModelStore(context.paths().models).manifests().values())
    asked = [each for each in known if context.args.model in ("", each.name, each.model_id)]
    return any(each.architecture.router.kind != "all" for each in asked[:1])


@asynccontextmanager
async def _engine(context: Context, route: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - an Engine
    """An engine in this process over the models in the store."""
    from dmoe.engine import Engine  # noqa: PLC0415
    from dmoe.models import StoredModels  # noqa: PLC0415
    from dmoe.passes import PassOptions  # noqa: PLC0415
    from dmoe.runtime import RuntimeOptions  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415
    from node.local import own_identity  # noqa: PLC0415
    from node.walls import homes_here  # noqa: PLC0415

    settings = context.settings().settings.dmoe
    options = RuntimeOptions(device=settings.device, threads=settings.threads)  # type: ignore[arg-type]
    identity, paths = own_identity(context)
    store, demanded = ModelStore(paths.models), settings.sandbox == "required"
    with closing(homes_here(settings, store, options, identity.peer_id)) as homes:
        engine = Engine(
            StoredModels(store, None, options, identity.peer_id, homes=homes, text_walls_demanded=demanded),
            passes=PassOptions(drafts_max=settings.drafts_max),
            default_route=route,
            walls_demanded=demanded,
        )
        async with engine.running():
            yield engine
