"""Runs one document: bounded, with the caller's own rights, and with errors in GraphQL's shape.

Blocking: runs in a thread. Fails never: what is wrong stands in ``errors``; a bug is logged and called ``internal``.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import trio
from graphql import (
    ExecutionResult,
    GraphQLEnumType,
    GraphQLError,
    GraphQLObjectType,
    GraphQLResolveInfo,
    GraphQLScalarType,
    GraphQLSchema,
    OperationType,
    build_schema,
    execute_sync,
    get_operation_ast,
    parse,
    validate,
)

from config.errors import RiosError
from gateway.endpoint import Caller, permitted
from gateway.errors import error_object
from gateway.graphql import limits
from gateway.graphql.fields import PARTS, Asked, Field

_BASE = "scalar Int64 type Query"
_ERRORS_MAX = 20
_SNAKE = re.compile(r"(?<=[a-z0-9])[A-Z]")
_logger = logging.getLogger("rios.gateway")


def answer(asked: Asked, text: str, variables: Mapping[str, Any], operation: str | None) -> dict[str, Any]:
    """The answer's ``data`` and ``errors``."""
    try:
        return _shown(_run(asked, text, variables, operation))
    except GraphQLError as error:
        return {"errors": [_error(error)]}


def _run(asked: Asked, text: str, variables: Mapping[str, Any], operation: str | None) -> ExecutionResult:
    schema, lookups, lists, sizes = _schema()
    try:
        document = parse(text, max_tokens=limits.TOKENS_MAX)
        limits.check(document, variables, lookups=lookups, lists=lists, sizes=sizes)
        problems = validate(schema, document, max_errors=5)
    except RecursionError:
        raise GraphQLError("this is nested too deeply") from None
    if problems:
        return ExecutionResult(None, problems)
    chosen = get_operation_ast(document, operation)
    if chosen is not None and chosen.operation is not OperationType.QUERY:
        raise GraphQLError("only queries are answered here: change things with the routes under /v1")
    return execute_sync(
        schema,
        document,
        context_value=asked,
        variable_values=dict(variables),
        operation_name=operation,
        field_resolver=_attribute,
    )


@cache
def _schema() -> tuple[GraphQLSchema, frozenset[str], frozenset[str], dict[str, int]]:
    """The schema, the names of fields that ask the database, of those that are lists with a limit, and how long the
    lists of its introspection can be."""
    schema = build_schema("\n".join((_BASE, *(part.sdl for part in PARTS))))
    number = schema.type_map["Int64"]
    assert isinstance(number, GraphQLScalarType)
    number.description = "A whole number up to 2^53"
    fields = {name: field for part in PARTS for name, field in part.fields.items()}
    for name, field in fields.items():
        kind, _, attribute = name.partition(".")
        owner = schema.type_map[kind]
        assert isinstance(owner, GraphQLObjectType)
        owner.fields[attribute].resolve = _resolver(field)
    lookups = frozenset(name.partition(".")[2] for name, field in fields.items() if field.is_lookup)
    objects = [kind for kind in schema.type_map.values() if isinstance(kind, GraphQLObjectType)]
    lists = {name for kind in objects for name, field in kind.fields.items() if "limit" in field.args}
    return schema, lookups, frozenset(lists), _sizes(schema, objects)


def _sizes(schema: GraphQLSchema, objects: Sequence[GraphQLObjectType]) -> dict[str, int]:
    """It has neither interfaces, unions nor inputs: their lists are empty."""
    enums = [kind for kind in schema.type_map.values() if isinstance(kind, GraphQLEnumType)]
    takers = [*schema.directives, *(field for kind in objects for field in kind.fields.values())]
    return {
        "types": len(schema.type_map),
        "directives": len(schema.directives),
        "locations": max(len(each.locations) for each in schema.directives),
        "fields": max(len(kind.fields) for kind in objects),
        "enumValues": max(len(kind.values) for kind in enums),
        "args": max(len(each.args) for each in takers),
    }


def _resolver(field: Field) -> Any:  # noqa: ANN401 - as graphql-core calls it
    def resolve(parent: Any, info: GraphQLResolveInfo[Asked], **arguments: Any) -> Any:  # noqa: ANN401
        trio.from_thread.check_cancelled()  # who asked may have left: the rest of it is for nobody
        asked: Asked = info.context
        who = Caller(asked.principal, permitted(asked.principal, field.needs))
        if any("\0" in value for value in arguments.values() if isinstance(value, str)):
            raise GraphQLError("no argument holds NUL")  # PostgreSQL takes none
        return field.resolve(asked, who, parent, **arguments)

    return resolve


def _attribute(parent: Any, info: GraphQLResolveInfo[Asked], **arguments: Any) -> Any:  # noqa: ANN401
    name = _SNAKE.sub(lambda match: f"_{match[0].lower()}", info.field_name)
    return parent[name] if isinstance(parent, Mapping) else getattr(parent, name)


def _shown(result: ExecutionResult) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if result.errors:
        shown["errors"] = [_error(each) for each in result.errors[:_ERRORS_MAX]]
    if result.data is not None or not result.errors:
        shown["data"] = result.data
    return shown


def _error(error: GraphQLError) -> dict[str, Any]:
    cause = error.original_error
    message, code = error.message, "invalid_request"
    if isinstance(cause, RiosError):
        told: Any = error_object(cause)["error"]
        message, code = told["message"], told["code"]
    elif cause is not None and not isinstance(cause, GraphQLError):
        _logger.error("a GraphQL field failed: %s", error.path, exc_info=cause)
        message, code = "the server failed at this field", "internal"
    found: dict[str, Any] = {"message": message, "extensions": {"code": code}}
    if error.locations:
        found["locations"] = [{"line": each.line, "column": each.column} for each in error.locations]
    if error.path:
        found["path"] = list(error.path)
    return found
