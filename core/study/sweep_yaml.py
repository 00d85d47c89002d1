"""Finds a sweep file and reads its YAML: a key that occurs twice is an error, and stays as it is written."""

import re
from pathlib import Path
from typing import Any

import yaml

from core.contracts.errors import UserError, nearest
from core.recipe.shipped import shipped_sweeps
from core.storage.documents import TOO_DEEP, read_yaml
from core.study.combinations import first_repeated
from core.study.sweep_schema import SweepSchema


def find_sweep(path: str | Path) -> Path:
    """The file of a sweep given by path or shipped name."""
    file = Path(path)
    shipped = shipped_sweeps()
    if file.is_file():
        return file
    name = str(path).removesuffix(".yaml").removeprefix("recipes/").removeprefix("sweeps/")
    if name not in shipped:
        raise UserError(f"{str(path) or repr('')}: no such sweep; {nearest(name, shipped)}")
    return shipped[name]


def read_values(file: Path) -> dict[str, Any]:
    """The values of a sweep file by key."""
    try:
        values = yaml.load(read_yaml(file, SweepSchema.__dataclass_fields__), Loader=_UniqueKeys)
    except RecursionError as cause:
        raise UserError(f"{file}: {TOO_DEEP}") from cause
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as cause:
        raise UserError(f"{file}: cannot be read: {' '.join(str(cause).split())}") from cause
    if not isinstance(values, dict):
        known = ", ".join(SweepSchema.__dataclass_fields__)
        raise UserError(f"{file}: must be a section of keys: {known}")
    return {str(key): value for key, value in values.items()}


class _UniqueKeys(yaml.SafeLoader):
    """Rejects a key that occurs twice in a section: YAML would silently drop the first variant of that name.

    A key is kept as it is written (`no`, `1e-3`); the value 1e-3 is a number, as in a recipe.
    """


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    """Builds a section whose keys are text, each of them once."""
    loader.flatten_mapping(node)
    keys = [str(key.value) if isinstance(key, yaml.ScalarNode) else "" for key, _ in node.value]
    error = None
    if "" in keys:
        error = "a key must be a name"
    elif (twice := first_repeated(keys)) is not None:
        error = f"the key {twice!r} occurs twice"
    if error is not None:
        raise yaml.constructor.ConstructorError(None, None, error, node.start_mark)
    section = {}
    for key, (_, value) in zip(keys, node.value, strict=True):
        section[key] = loader.construct_object(value, deep=True)  # type: ignore[no-untyped-call]
    return section


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_UniqueKeys.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
