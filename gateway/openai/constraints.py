"""What an answer must look like: OpenAI's ``response_format``, and vLLM's names for the forms that OpenAI has not.

``structured_outputs`` is vLLM's present name, ``guided_json`` and so on are its former ones. A schema is always kept,
so ``strict`` asks for nothing more.
"""

from typing import Any

import msgspec

from config.generation import Constraint
from gateway.errors import invalid, unsupported

_OBJECT = '{"type":"object"}'


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's extension: exactly one of its fields."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def constraint_of(body: Any) -> Constraint | None:  # noqa: ANN401 - a SharedBody
    """The one constraint of a request. Raises ApiError for two."""
    found = [
        each
        for each in (
            _response_format(body.response_format),
            *_structured("structured_outputs.", body.structured_outputs or StructuredOutputs()),
            *_structured("guided_", _guided(body)),
        )
        if each is not None
    ]
    if len(found) > 1:
        raise invalid(found[1].where, f"{found[0].where} and {found[1].where} exclude each other; send one of them")
    return found[0] if found else None


def _guided(body: Any) -> StructuredOutputs:  # noqa: ANN401 - a SharedBody
    return StructuredOutputs(
        json=body.guided_json, regex=body.guided_regex, choice=body.guided_choice, grammar=body.guided_grammar
    )


def _structured(where: str, given: StructuredOutputs) -> list[Constraint | None]:
    json = None if given.json is None else _schema(f"{where}json", given.json)
    choice = None
    if given.choice is not None:
        choice = Constraint(kind="choice", text=msgspec.json.encode(given.choice).decode(), where=f"{where}choice")
    return [
        json,
        None if given.regex is None else Constraint(kind="regex", text=given.regex, where=f"{where}regex"),
        choice,
        None if given.grammar is None else Constraint(kind="grammar", text=given.grammar, where=f"{where}grammar"),
        Constraint(kind="json", text=_OBJECT, where=f"{where}json_object") if given.json_object else None,
    ]


def _response_format(given: object) -> Constraint | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise invalid("response_format", "response_format must be an object with a type")
    match given["type"]:
        case "text":
            return None
        case "json_object":
            return Constraint(kind="json", text=_OBJECT, where="response_format")
        case "json_schema":
            described = given.get("json_schema")
            if not isinstance(described, dict) or "schema" not in described:
                raise invalid("response_format.json_schema", "response_format.json_schema needs a schema")
            return _schema("response_format.json_schema.schema", described["schema"])
    raise unsupported("response_format", f"it takes text, json_object and json_schema, not {given['type']!r:.60}")


def _schema(where: str, schema: object) -> Constraint:
    """A schema as an object, or (vLLM) as text that holds one."""
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Constraint(kind="json", text=text, where=where)
