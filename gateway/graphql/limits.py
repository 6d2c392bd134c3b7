"""What a document may ask for: known before it runs, and before graphql-core's own, costlier checks. Pure.

Every selection costs 1, a field that asks the database :data:`LOOKUP_COST`; what lies below a list is multiplied by its
``limit``. Fragments are followed where they are spread, and each spread costs too, so the walk itself is bounded by
:data:`COST_MAX`. One place of the answer can be asked for :data:`REPEATS_MAX` times: graphql-core compares each with
each (370 of them took 2.4 s).

Introspection may be deeper and has a total of its own, in which every list counts with its longest length, and there is
one schema to ask for: 160 times ``__schema`` in 3 KB made 1.2 MB, in 0.9 s.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    IntValueNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
    VariableNode,
)

TEXT_CHARACTERS_MAX = 16 << 10
TOKENS_MAX = 1500
DEPTH_MAX = 8
INTROSPECTION_DEPTH_MAX = 16
COST_MAX = 2000
INTROSPECTION_COST_MAX = 40_000
"""What tools send costs 36,000 and fills 1900 places: few lists are the longest, few types a chain of nine."""
_INTROSPECTIONS_MAX = {"__schema": 1, "__type": 5}
LOOKUP_COST = 10
REPEATS_MAX = 5
LIMIT_DEFAULT = 20
LIMIT_MAX = 100

_Path = tuple[str, ...]
"""The definition's number, and the fields' names in the answer."""


@dataclass(slots=True)
class _Walk:
    lookups: Collection[str]
    lists: Collection[str]
    sizes: Mapping[str, int]
    fragments: Mapping[str, FragmentDefinitionNode]
    variables: Mapping[str, Any]
    cost: int = 0
    introspection_cost: int = 0
    introspections: Counter[str] = field(default_factory=Counter)
    seen: Counter[_Path] = field(default_factory=Counter)

    def visit(self, selections: SelectionSetNode | None, path: _Path, times: int, depth_max: int) -> None:
        """Add what these selections cost, each of them ``times``."""
        for each in selections.selections if selections else ():
            self._charge(each, times, depth_max)
            if isinstance(each, FieldNode):
                self._field(each, path, times, depth_max)
            elif isinstance(each, FragmentSpreadNode):
                fragment = self.fragments.get(each.name.value)
                self.visit(fragment.selection_set if fragment else None, path, times, depth_max)
            else:
                self.visit(getattr(each, "selection_set", None), path, times, depth_max)

    def _charge(self, each: SelectionNode, times: int, depth_max: int) -> None:
        if depth_max == INTROSPECTION_DEPTH_MAX:
            self.introspection_cost += times
        else:
            looks_up = isinstance(each, FieldNode) and each.name.value in self.lookups
            self.cost += times * (LOOKUP_COST if looks_up else 1)
        if self.cost > COST_MAX:
            raise GraphQLError(f"this costs more than {COST_MAX}: ask for less at once, with smaller limits", each)
        if self.introspection_cost > INTROSPECTION_COST_MAX:
            raise GraphQLError(f"this introspection costs more than {INTROSPECTION_COST_MAX}: ask for less", each)

    def _field(self, each: FieldNode, path: _Path, times: int, depth_max: int) -> None:
        name = each.name.value
        if name in _INTROSPECTIONS_MAX:
            depth_max = INTROSPECTION_DEPTH_MAX
            self.introspections[name] += times
            if self.introspections[name] > _INTROSPECTIONS_MAX[name]:
                raise GraphQLError(f"a document has {_INTROSPECTIONS_MAX[name]} {name} at most", each)
        path = (*path, (each.alias or each.name).value)
        if len(path) - 1 > depth_max:
            raise GraphQLError(f"this is nested deeper than {depth_max} fields", each)
        self.seen[path] += 1
        if self.seen[path] > REPEATS_MAX:
            raise GraphQLError(f"{path[-1]} is asked for more than {REPEATS_MAX} times in one place", each)
        if depth_max == INTROSPECTION_DEPTH_MAX:
            times *= self.sizes.get(name, 1)
        elif name in self.lists:
            times *= self._limit(each)
        self.visit(each.selection_set, path, times, depth_max)

    def _limit(self, each: FieldNode) -> int:
        for argument in each.arguments or ():
            if argument.name.value != "limit":
                continue
            value: Any = None
            if isinstance(argument.value, IntValueNode):
                value = int(argument.value.value[:9])
            elif isinstance(argument.value, VariableNode):
                value = self.variables.get(argument.value.name.value)
            # anything else is refused later, or is a variable's default
            return max(1, min(value, LIMIT_MAX)) if isinstance(value, int) else LIMIT_MAX
        return LIMIT_DEFAULT


def check(
    document: DocumentNode,
    variables: Mapping[str, Any],
    *,
    lookups: Collection[str],
    lists: Collection[str],
    sizes: Mapping[str, int],
) -> None:
    """Raises GraphQLError for a document too deep or too costly; all of its operations count, and no cycle is endless.

    ``lookups``: names of fields that ask the database; ``lists``: of those with an argument ``limit``; ``sizes``: how
    long introspection's lists can be.
    """
    definitions = document.definitions
    fragments = {each.name.value: each for each in definitions if isinstance(each, FragmentDefinitionNode)}
    walk = _Walk(lookups, lists, sizes, fragments, variables)
    alone = _Walk((), (), {}, fragments, variables)  # what nobody spreads is validated as well
    try:
        for number, each in enumerate(definitions):
            if isinstance(each, OperationDefinitionNode):
                walk.visit(each.selection_set, (str(number),), 1, DEPTH_MAX)
            elif isinstance(each, FragmentDefinitionNode):
                alone.visit(each.selection_set, (str(number),), 1, INTROSPECTION_DEPTH_MAX)
    except RecursionError:
        raise GraphQLError("fragments are spread in a circle, or too deep") from None
