"""Log probabilities as OpenAI's API writes them (API reference: chat ``choices[].logprobs``, completions ``logprobs``).

They are of the model's own distribution, before temperature, filters, penalties and bias. Every token that was
generated has one, so also those whose text was held back as part of a stop string.
"""

from collections.abc import Sequence
from typing import Any

from config.generation import PlaceLogprobs, TokenLogprob


def chat_logprobs(places: Sequence[PlaceLogprobs]) -> dict[str, Any] | None:
    """The chat form: one entry per token, each with its bytes. None where they were not asked for."""
    if not places:
        return None
    content = [{**_entry(place.chosen), "top_logprobs": [_entry(each) for each in place.top]} for place in places]
    return {"content": content, "refusal": None}


def completion_logprobs(places: Sequence[PlaceLogprobs], start: int = 0) -> dict[str, Any] | None:
    """The completions form: parallel lists. ``top_logprobs`` always has the chosen token too, so up to one more; a
    prompt's first token has neither. ``start``: how many characters stand before the places' own text."""
    if not places:
        return None
    return {
        "tokens": [_name(place.chosen) for place in places],
        "token_logprobs": [place.chosen.logprob for place in places],
        "top_logprobs": [_by_name(place) for place in places],
        "text_offset": [start + place.offset for place in places],
    }


def _entry(token: TokenLogprob) -> dict[str, Any]:
    text = token.data.decode(errors="replace")
    return {"token": text, "logprob": token.logprob, "bytes": list(token.data)}


def _by_name(place: PlaceLogprobs) -> dict[str, float] | None:
    """Tokens of the same name share an entry, the likeliest one's."""
    found: dict[str, float] = {}
    for token in (*place.top, place.chosen):
        if token.logprob is not None:
            found.setdefault(_name(token), token.logprob)
    return found or None


def merged(first: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, Any] | None:
    """The completions form of two stretches of text, one behind the other."""
    if first is None or then is None:
        return first or then
    return {name: first[name] + then[name] for name in first}


def _name(token: TokenLogprob) -> str:
    """The token's text, or its bytes spelled out where they are part of a character."""
    try:
        return token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
