"""Points of a sweep's grid that are not run: the rules that leave them out, and what is wrong with a rule."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from core.contracts.errors import nearest
from core.study.combinations import combinations
from core.study.sweep_schema import SkipSection, SweepSchema


@dataclass(frozen=True)
class LeftOut:
    """A point of the grid that is not run.

    Args:
        name: the name that its variant would have.
        section: the name under `variants`.
        values: those of the grid by key path.
        reason: why it is left out.
        by: "rule", or "refused" where the checks of its recipe did not allow it.
    """

    name: str
    section: str
    values: Mapping[str, Any]
    reason: str
    by: Literal["rule", "refused"]


def rule_for(
    rules: Sequence[SkipSection], section: str, values: Mapping[str, Any]
) -> SkipSection | None:
    """The first rule that leaves a point out; None if it is run.

    Args:
        rules: those of the file.
        section: the point's name under `variants`.
        values: the point's values by key path.
    """
    for rule in rules:
        if rule.variants and section not in rule.variants:
            continue
        if all(key in values and _is_among(values[key], one) for key, one in rule.when.items()):
            return rule
    return None


def _is_among(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one, or one of a list of them; a list may also be the value itself."""
    if isinstance(wanted, list) and any(_same(value, one) for one in wanted):
        return True
    return _same(value, wanted)


def _same(value: Any, wanted: Any) -> bool:
    """Whether two values are equal and no truth value is taken for a number."""
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def rule_errors(schema: SweepSchema) -> Iterator[tuple[str, str]]:
    """Pairs of a key and a sentence for each rule that is no rule about this grid, or leaves nothing out."""
    points = combinations(schema.grid)
    for index, rule in enumerate(schema.skip):
        where = f"skip.{index}"
        if why := _wrong_rule(rule, schema):
            yield where, why
            continue
        names = rule.variants or list(schema.variants)
        if not any(rule_for([rule], name, values) for name in names for values in points):
            yield where, "leaves out no point of the grid"


def _wrong_rule(rule: SkipSection, schema: SweepSchema) -> str | None:
    """The reason why a rule cannot be about the grid; None if there is none."""
    if not rule.reason.strip():
        return "reason must say why the points are left out"
    if not rule.when and not rule.variants:
        return "when must name at least one key of the grid"
    for name in rule.variants:
        if name not in schema.variants:
            return f"variants: no variant is named {name!r}; {nearest(name, schema.variants)}"
    for key, wanted in rule.when.items():
        if key not in schema.grid:
            return f"when: {key!r} is no key of the grid; {nearest(key, schema.grid)}"
        tried = schema.grid[key]
        for one in wanted if isinstance(wanted, list) and wanted not in tried else [wanted]:
            if not any(_same(value, one) for value in tried):
                listed = ", ".join(map(repr, tried))
                return f"when.{key} = {one!r}: the grid does not have it; it has {listed}"
    return None
