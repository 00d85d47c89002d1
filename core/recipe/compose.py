"""Finding a recipe, laying its layers over each other, and resolving the result.

Layers, each over the one before: the file it `extends`, the file, its `smoke` section where that is asked
for, the command line's `KEY.PATH=VALUE`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from core.contracts.errors import UserError, Wrong, nearest
from core.contracts.schema import REQUIRED
from core.extension.loader import installed_registry, registry_for
from core.recipe.resolve import Resolver, to_dict
from core.recipe.schema import FREE_TRAINER_KEYS, OWNED_TRAINER_KEYS, RecipeSchema

BUDGETS = frozenset({"steps", "tokens", "flops"})
COMMAND_LINE = "command line"
SWEEPS = "sweeps/"


@dataclass(kw_only=True)
class Recipe(RecipeSchema):
    """A validated recipe and how it came about.

    Args:
        name: the file's name without its ending.
        source: the file.
        dropped: keys that a changed `name` left without a meaning.
    """

    name: str = ""
    source: str = ""
    dropped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain containers; composing it again gives the same recipe."""
        return {key: value for key, value in to_dict(self).items() if key not in ("name", "source", "dropped")}


def compose(path: str | Path, overrides: Iterable[str] = (), *, smoke: bool = False) -> Recipe:
    """Read, extend, override, resolve and validate a recipe.

    Args:
        path: a file, or the name of a shipped recipe.
        overrides: `KEY.PATH=VALUE` each; list items as `balance.0.rate=0.01`.
        smoke: lay the recipe's `smoke` section over it.

    Raises:
        UserError: anything that cannot be right, in one sentence.
    """
    file = find_recipe(path)
    layers = _Layers(str(file))
    own = _read(file)
    if "extends" in own:
        layers.add(*_base(file, own.pop("extends")))
    layers.add(own, str(file))
    if smoke and isinstance(section := layers.values.get("smoke", {}), dict):
        layers.add(section, f"{file} (smoke)")
    layers.override(overrides)
    return _resolve(file, layers)


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe given by path or shipped name."""
    file = Path(path)
    if file.is_file():
        return file
    return _shipped(str(path), f"{str(path) or repr('')}: ")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name (`dsv3_small`, `baselines/dense`)."""
    return {name: file for name, file in _shipped_files().items() if not name.startswith(SWEEPS)}


def shipped_sweeps() -> dict[str, Path]:
    """The sweep files that come with the package, by name (`routing`)."""
    return {name.removeprefix(SWEEPS): file for name, file in _shipped_files().items() if name.startswith(SWEEPS)}


def _shipped_files() -> dict[str, Path]:
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "recipes", package / "recipes"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def _shipped(path: str, who: str) -> Path:
    shipped = shipped_recipes()
    name = path.removesuffix(".yaml").removeprefix("recipes/")
    if name in shipped:
        return shipped[name]
    kind = "a folder, not a recipe" if Path(path).is_dir() and path else "no such recipe"
    raise UserError(f"{who}{kind}; {nearest(name, shipped)}")


def _resolve(file: Path, layers: "_Layers") -> Recipe:
    values = _interpolated(layers)
    _check_trainer(values.get("trainer"), layers)
    # the core's own keys, then the names, then components: an error in a key of the core needs no import of torch
    resolver = Resolver(installed_registry(), layers.origin, layers.inherited, defer=True)
    core = resolver.section(RecipeSchema, values, "", beside=["extends"])
    try:
        registry = registry_for(core.plugins)
    except UserError as cause:
        raise UserError(f"{layers.origin('plugins')}: plugins: {cause}") from cause
    resolver.read_components(registry, core)
    own = {key: getattr(core, key) for key in RecipeSchema.__dataclass_fields__}
    return Recipe(**own, name=file.stem, source=str(file), dropped=tuple(dict.fromkeys(resolver.dropped)))


def _check_trainer(trainer: Any, layers: "_Layers") -> None:
    for key in trainer if isinstance(trainer, Mapping) else ():
        where = f"{layers.origin(f'trainer.{key}')}: trainer.{key}"
        if key in OWNED_TRAINER_KEYS:
            raise UserError(f"{where}: the recipe owns this; use {OWNED_TRAINER_KEYS[key]}")
        if key not in FREE_TRAINER_KEYS:
            raise UserError(f"{where}: unknown key; {nearest(str(key), FREE_TRAINER_KEYS)}")


def _interpolated(layers: "_Layers") -> dict[str, Any]:
    """The values with every `${other.key}` replaced; none may be left open."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(layers.values), resolve=True)
    except OmegaConfBaseException as cause:
        path = cause.full_key or ""
        why = f"cannot be worked out: {_line(cause)}"
        if isinstance(cause, InterpolationKeyError):
            why = f"refers to a key that the recipe does not hold ({_line(cause)})"
        raise UserError(f"{layers.origin(path)}: {path}: {why}") from cause
    assert isinstance(values, dict)
    for path, value in _leaves(values):
        if value == REQUIRED:
            raise UserError(f"{layers.origin(path)}: {path}: a value must be given here, where {REQUIRED} stands")
    return {str(key): value for key, value in values.items()}


def _base(file: Path, extends: Any) -> tuple[dict[str, Any], str]:
    if not isinstance(extends, str) or not extends:
        shown = "null" if extends is None else repr(extends)
        raise UserError(f"{file}: extends = {shown}: must be the name of one file")
    beside = file.parent / extends
    base = beside if beside.is_file() else _shipped(extends, f"{file}: extends = {extends!r}: ")
    values = _read(base)
    if "extends" in values:
        raise UserError(f"{file}: extends = {extends!r}: that file extends another one, and only one level is allowed")
    return values, str(base)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = _plain(OmegaConf.to_container(OmegaConf.load(file)))
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{file}{where}: cannot be read: {cause.problem or cause.context}") from cause
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as cause:
        raise UserError(f"{file}: cannot be read: {_line(cause)}") from cause
    if not isinstance(values, dict):
        raise UserError(f"{file}: must be a section of keys: {', '.join(RecipeSchema.__dataclass_fields__)}")
    return values


def _line(cause: Exception) -> str:
    """What an exception says, without OmegaConf's own account of where."""
    own = ("full_key:", "object_type=", "reference_type=")
    lines = [line.strip() for line in str(cause).splitlines()]
    return " ".join(line for line in lines if not line.startswith(own)).replace("NoneType", "null")


class _Layers:
    """The layers of a recipe, laid over each other, with where each key was set.

    `inherited` remembers, for each section whose `name` a later layer changed, the keys that only the
    earlier layer set: they meant something to another component.

    Args:
        file: the recipe's file, which answers for every key that no layer sets.
    """

    def __init__(self, file: str) -> None:
        self.values: dict[str, Any] = {}
        self.inherited: dict[str, set[str]] = {}
        self._origins: dict[str, str] = {}
        self._file = file

    def add(self, layer: dict[str, Any], origin: str) -> None:
        """Lay a mapping over what is there; lists are replaced whole."""
        self._replace(_laid(self.values, layer), dict.fromkeys(_paths(layer), origin))

    def override(self, texts: Iterable[str]) -> None:
        """Lay `KEY.PATH=VALUE` each over what is there; together they are one layer, whatever their order."""
        values = self.values
        origins: dict[str, str] = {}
        for text in texts:
            key, value = _parsed(text)
            try:
                values = _put(_with_defaults(RecipeSchema, values, key), key, value)
            except Wrong as wrong:
                raise UserError(f"{COMMAND_LINE}: {text!r}: {wrong.why}") from wrong
            path = ".".join(key)
            before = set(_paths(self.values))
            new = {p for p in _paths(values) if p not in before and path.startswith(f"{p}.")}
            below = {f"{path}.{p}" for p in _paths(value)}
            origins |= dict.fromkeys({path, *new, *below}, f"{COMMAND_LINE} ({text})")
        self._replace(values, origins)

    def origin(self, path: str) -> str:
        """Where the nearest enclosing key was set."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (known := ".".join(parts[:end])) in self._origins:
                return self._origins[known]
        return self._file

    def _replace(self, merged: Any, origins: dict[str, str]) -> None:
        explicit: dict[str, set[str]] = {}
        for path in origins:
            section, _, key = path.rpartition(".")
            explicit.setdefault(section, set()).add(key)
            self.inherited.get(section, set()).discard(key)
        for path, keys in _renamed(self.values, merged, ""):
            self.inherited.setdefault(path, set()).update(keys - explicit.get(path, set()) - {"name"})
        self.values = _one_budget(merged, explicit.get("budget", set()))
        standing = set(_paths(self.values))
        self._origins = {path: by for path, by in (self._origins | origins).items() if path in standing}


def _one_budget(values: dict[str, Any], said: set[str]) -> dict[str, Any]:
    """A budget that a later layer gives takes the place of an earlier layer's, whatever its unit."""
    budget = values.get("budget")
    if not isinstance(budget, dict) or all(budget.get(key) is None for key in said):
        return values
    return {**values, "budget": {key: value for key, value in budget.items() if key in said or key not in BUDGETS}}


def _parsed(text: str) -> tuple[list[str], Any]:
    """The key path and the value of one override."""
    key, equals, written = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"{COMMAND_LINE}: {text!r}: an override reads KEY.PATH=VALUE")
    if path == ["extends"]:
        raise UserError(f"{COMMAND_LINE}: {text!r}: only a file can extend another")
    try:
        held = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as cause:
        what = cause.problem if isinstance(cause, yaml.MarkedYAMLError) else _line(cause)
        raise UserError(f"{COMMAND_LINE}: {text!r}: the value cannot be read: {what}") from cause
    assert isinstance(held, dict)
    return path, _plain(held["value"])


def _plain(value: Any) -> Any:
    """Containers whose keys are texts: a block may be called 1."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _laid(below: Any, above: Any) -> Any:
    """One value over another: mappings key by key, everything else whole."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _laid(below.get(key), item) for key, item in above.items()}}
    return above


def _put(below: Any, path: list[str], value: Any, done: str = "") -> Any:
    """`below` with a value laid over what stands at a key path.

    Raises:
        Wrong: the path leads into something that has no keys, or past the end of a list.
    """
    if not path:
        return _laid(below, value)
    key, rest = path[0], path[1:]
    where = f"{done}.{key}" if done else key
    if isinstance(below, list):
        if not key.isdecimal() or int(key) >= len(below):
            raise Wrong(where, f"{done} has {len(below)} items, numbered from 0, and no {key!r}")
        return [_put(item, rest, value, where) if i == int(key) else item for i, item in enumerate(below)]
    if not isinstance(below, dict | None):
        raise Wrong(where, f"{done} = {below!r} has no keys")
    return {**(below or {}), key: _put((below or {}).get(key), rest, value, where)}


def _with_defaults(schema: Any, values: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The values with the default list or mapping of components that a key path leads into, where there is none."""
    key, rest = path[0], path[1:]
    f = schema.__dataclass_fields__.get(key)
    if f is None or not rest:
        return values
    if f.metadata.get("many", "one") != "one":
        return values if key in values else {**values, key: f.default_factory()}
    inner = values.get(key, {})
    if is_dataclass(f.type) and isinstance(inner, dict):
        return {**values, key: _with_defaults(f.type, inner, rest)}
    return values


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
    for key, item in items or ():
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _paths(value: Any, path: str = "") -> Iterator[str]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        where = f"{path}.{key}" if path else str(key)
        yield where
        yield from _paths(item, where)


def _renamed(before: Any, after: Any, path: str) -> Iterator[tuple[str, set[str]]]:
    """Sections whose `name` changed, with the keys that they had before."""
    if isinstance(before, dict) and isinstance(after, dict):
        if "name" in after and before.get("name") != after["name"]:
            yield path, set(before)
        pairs = [(key, before[key], after[key]) for key in before if key in after]
    elif isinstance(before, list) and isinstance(after, list):
        pairs = [(str(i), b, a) for i, (b, a) in enumerate(zip(before, after, strict=False))]
    else:
        return
    for key, b, a in pairs:
        yield from _renamed(b, a, f"{path}.{key}" if path else key)
