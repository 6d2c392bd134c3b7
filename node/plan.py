"""``rios plan MODEL``: which route the running node would take for a request, who would serve what, and why."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from config.errors import ConfigError
from config.settings import chosen_route
from config.vocabulary import format_credits
from dmoe.core.plan import Candidate, Plan
from dmoe.core.spans import Ask, Span
from node import control
from node.cli import Context, Output
from node.control import Send
from node.table import table

if TYPE_CHECKING:
    from node.daemon import Node

TOKENS_MAX = 1 << 22
BATCH_MAX = 1 << 12
PEERS_SHOWN_MAX = 4


def ask_of(args: Mapping[str, Any]) -> Ask:
    """The class of requests that is asked about. Raises ConfigError for an impossible one."""
    sizes = {
        "prompt_tokens": (args.get("prompt_tokens", 256), TOKENS_MAX),
        "answer_tokens": (args.get("answer_tokens", 128), TOKENS_MAX),
        "batch": (args.get("batch", 1), BATCH_MAX),
    }
    for name, (value, most) in sizes.items():
        if type(value) is not int or not 1 <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise ConfigError("usage", f"{flag} {value} is not possible", f"a whole number from 1 to {most}")
    return Ask(**{name: value for name, (value, _) in sizes.items()})


async def answer(node: "Node", args: Mapping[str, Any], _send: Send) -> Any:  # noqa: ANN401 - JSON
    """The control command: a plan made now."""
    manifest = node.store.find(str(args.get("model", "")))
    rule = node.planner.wishes.privacy.tightened(args.get("privacy") or "")
    made = node.planner.plan(manifest, ask_of(args), rule)
    return {
        "name": manifest.name,
        "peer_id": node.identity.peer_id,
        "route": chosen_route(node.settings.dmoe),
        "privacy": rule.described(),
        **described(made),
    }


def described(made: Plan) -> dict[str, Any]:
    """A plan as JSON: times in microseconds, money in microcredits."""
    return {
        "ask": {
            "prompt_tokens": made.ask.prompt_tokens,
            "answer_tokens": made.ask.answer_tokens,
            "batch": made.ask.batch,
        },
        "chosen": made.chosen.kind if made.chosen else None,
        "candidates": [_candidate(each) for each in made.candidates],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    if not candidate.is_possible:
        return {"route": candidate.kind, "possible": False, "reason": candidate.why_not}
    return {
        "route": candidate.kind,
        "possible": True,
        "reason": candidate.reason,
        "bottleneck": candidate.bottleneck,
        "first_token_us": round(candidate.first_token_us),
        "token_us": round(candidate.token_us),
        "answer_us": round(candidate.answer_us),
        "microcredits_per_million_tokens": round(candidate.microcredits_per_million),
        "spans": [_span(span) for span in candidate.spans],
    }


def _span(span: Span) -> dict[str, Any]:
    return {
        "layers": [span.first, span.last],
        "where": span.where,
        "peers": list(span.peers),
        "round_trip_us": round(span.round_trip_us),
        "service_us": round(span.service_us),
        "queue_us": round(span.queue_us),
        "other_us": round(span.other_us),
        "microcredits_per_tflop": span.microcredits_per_tflop,
    }


def show(context: Context) -> Output:
    """``rios plan``"""
    args = context.args
    wanted = {"prompt_tokens": args.prompt_tokens, "answer_tokens": args.answer_tokens, "batch": args.batch}
    asked = {"model": args.model, "privacy": args.privacy, **wanted}
    ask_of(wanted)
    data = control.ask(context.paths().control, "plan", asked)
    return Output(data, rendered(data))


def rendered(data: Mapping[str, Any]) -> str:
    """The plan for people."""
    asked, possible = data["ask"], [each for each in data["candidates"] if each["possible"]]
    head = (
        f"{data['name']}: a prompt of {asked['prompt_tokens']} tokens, an answer of {asked['answer_tokens']}, "
        f"batch {asked['batch']}; dmoe.route = {data['route']}"
    )
    routes = [["ROUTE", "FIRST TOKEN", "PER TOKEN", "TOKENS/S", "CREDITS/MTOKEN", "WHY"]]
    routes += [_route_row(each, each["route"] == data["chosen"]) for each in data["candidates"]]
    spans = [["ROUTE", "LAYERS", "WHERE", "WHO", "ROUND TRIPS", "SERVICE", "QUEUE", "CALLS, LINK", "CREDITS/TFLOP"]]
    spans += [_span_row(each["route"], span, data["peer_id"]) for each in possible for span in each["spans"]]
    rule = [f"privacy: {data['privacy']}"] if data["privacy"] else []
    lines = [head, *rule, "", table(routes)]
    if possible:
        lines += ["", "Where the time of one pass goes, as expected:", table(spans)]
    if data["chosen"] is None:
        lines += ["", "No route is possible now."]
    return "\n".join(lines)


def _route_row(each: Mapping[str, Any], is_chosen: bool) -> list[str]:
    if not each["possible"]:
        return [each["route"], "-", "-", "-", "-", f"impossible: {each['reason']}"]
    token_us = max(1, each["token_us"])
    return [
        each["route"],
        _time(each["first_token_us"]),
        _time(token_us),
        f"{1e6 / token_us:.1f}",
        format_credits(each["microcredits_per_million_tokens"]),
        f"chosen: {each['reason']}, limited by {each['bottleneck']}" if is_chosen else each["reason"],
    ]


def _span_row(route: str, span: Mapping[str, Any], me: str) -> list[str]:
    where = {"here": "here", "experts": "attention here", "stage": "stage"}[span["where"]]
    return [
        route,
        "{}-{}".format(*span["layers"]),
        where,
        _who(span["peers"], me),
        _time(span["round_trip_us"]),
        _time(span["service_us"]),
        _time(span["queue_us"]),
        _time(span["other_us"]),
        format_credits(span["microcredits_per_tflop"]),
    ]


def _who(peers: Sequence[str], me: str) -> str:
    named = ["this node" if peer == me else peer[:16] for peer in peers[:PEERS_SHOWN_MAX]]
    more = len(peers) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _time(us: float) -> str:
    return (
        f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us / 1000:.1f} ms" if us >= 100 else "0" if us < 1 else f"{us:.0f} us"
    )
