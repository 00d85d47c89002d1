"""Combinations of values that a sweep file lists for some keys, and the names that they give to folders."""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any


def combinations(values: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of some keys; one that is empty without a key."""
    products = itertools.product(*values.values())
    return [dict(zip(values, product, strict=True)) for product in products]


def suffix(point: Mapping[str, Any]) -> str:
    """The part of a name that says which values a combination has."""
    return "".join(
        f"+{key.rpartition('.')[2]}={_for_a_file_name(value)}" for key, value in point.items()
    )


def as_text(value: Any) -> str:
    """A value as an override writes it: JSON, where other types (a date) are strings."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _for_a_file_name(value: Any) -> str:
    """A value as text without characters that a file's name should not have."""
    text = value if isinstance(value, str) else as_text(value)
    return re.sub(r"[^\w.-]", "_", text)


def first_repeated(names: list[str]) -> str | None:
    """The first name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
