"""Finding a recipe, laying its layers over each other, and resolving the result.

Layers, each over the one before: the file it `extends`, the file, its `smoke` section where that is asked
for, the command line's `KEY.PATH=VALUE`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.contracts.errors import UserError, nearest
from core.extension.loader import registry_for
from core.recipe.resolve import Resolver, to_dict
from core.recipe.schema import FREE_TRAINER_KEYS, OWNED_TRAINER_KEYS, RecipeSchema

COMMAND_LINE = "command line"


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
    layers = _Layers()
    own = _read(file)
    if "extends" in own:
        layers.extend(_base(file, own.pop("extends")))
    layers.add(own, str(file))
    if smoke:
        layers.add(layers.values.get("smoke") or {}, f"{file} (smoke)")
    for text in overrides:
        layers.override(text)
    return _resolve(file, layers)


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe given by path or shipped name."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = shipped_recipes()
    name = str(path).removesuffix(".yaml").removeprefix("recipes/")
    if name in shipped:
        return shipped[name]
    raise UserError(f"{path}: no such recipe; {nearest(name, shipped)}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name (`dsv3_small`, `baselines/dense`)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "recipes", package / "recipes"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def _resolve(file: Path, layers: "_Layers") -> Recipe:
    values = layers.values
    named = values.get("plugins", [])
    _check_trainer(values.get("trainer") or {}, layers)
    registry = registry_for(named if isinstance(named, list) else ())
    # the core's own keys first: a mistake there is told before any component, and torch, is imported
    Resolver(registry, layers.origin, layers.inherited, components=False).section(RecipeSchema, values, "")
    resolver = Resolver(registry, layers.origin, layers.inherited)
    core = resolver.section(RecipeSchema, values, "")
    own = {key: getattr(core, key) for key in RecipeSchema.__dataclass_fields__}
    return Recipe(**own, name=file.stem, source=str(file), dropped=tuple(dict.fromkeys(resolver.dropped)))


def _check_trainer(trainer: Any, layers: "_Layers") -> None:
    for key in trainer if isinstance(trainer, Mapping) else ():
        where = f"{layers.origin(f'trainer.{key}')}: trainer.{key}"
        if key in OWNED_TRAINER_KEYS:
            raise UserError(f"{where}: the recipe owns this; use {OWNED_TRAINER_KEYS[key]}")
        if key not in FREE_TRAINER_KEYS:
            raise UserError(f"{where}: unknown key; {nearest(str(key), FREE_TRAINER_KEYS)}")


def _base(file: Path, extends: Any) -> tuple[dict[str, Any], str]:
    if not isinstance(extends, str):
        raise UserError(f"{file}: extends = {extends}: must be the name of one file")
    beside = file.parent / extends
    base = beside if beside.is_file() else find_recipe(extends)
    values = _read(base)
    if "extends" in values:
        raise UserError(f"{file}: extends = {extends!r}: that file extends another one, and only one level is allowed")
    return values, str(base)


def _read(file: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(file)
        values = OmegaConf.to_container(loaded, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as cause:
        raise UserError(f"{file}: cannot be read: {' '.join(str(cause).split())}") from cause
    if not isinstance(values, dict):
        raise UserError(f"{file}: must be a section of keys: {', '.join(RecipeSchema.__dataclass_fields__)}")
    return {str(key): value for key, value in values.items()}


class _Layers:
    """The layers of a recipe, laid over each other, with where each key was set.

    `inherited` remembers, for each section whose `name` a later layer changed, the keys that only the
    earlier layer set: they meant something to another component.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.inherited: dict[str, set[str]] = {}
        self._origins: dict[str, str] = {}

    def extend(self, base: tuple[dict[str, Any], str]) -> None:
        """The first layer."""
        self.add(*base)

    def add(self, layer: dict[str, Any], origin: str) -> None:
        """Lay a mapping over what is there; lists are replaced whole."""
        merged = OmegaConf.to_container(OmegaConf.merge(self.values, layer))
        self._replace(merged, dict.fromkeys(_paths(layer), origin))

    def override(self, text: str) -> None:
        """Lay one `KEY.PATH=VALUE` over what is there."""
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{COMMAND_LINE}: {text!r}: an override reads KEY.PATH=VALUE")
        try:
            value = OmegaConf.from_dotlist([f"value={text.partition('=')[2]}"])["value"]
            config = OmegaConf.create(self.values)
            OmegaConf.update(config, key, value, merge=True, force_add=True)
            merged = OmegaConf.to_container(config)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError, KeyError) as cause:
            raise UserError(f"{COMMAND_LINE}: {text!r}: cannot be laid over the recipe: {str(cause).splitlines()[0]}") from cause
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        paths = {key, *(f"{key}.{path}" for path in _paths(plain))}
        self._replace(merged, dict.fromkeys(paths, f"{COMMAND_LINE} ({text})"))

    def origin(self, path: str) -> str:
        """Where the nearest enclosing key was set."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (known := ".".join(parts[:end])) in self._origins:
                return self._origins[known]
        return next(iter(self._origins.values()), "recipe")

    def _replace(self, merged: Any, origins: dict[str, str]) -> None:
        for path in origins:
            section, _, key = path.rpartition(".")
            self.inherited.get(section, set()).discard(key)
        for path, keys in _renamed(self.values, merged, ""):
            explicit = {p.rpartition(".")[2] for p in origins if p.rpartition(".")[0] == path}
            self.inherited.setdefault(path, set()).update(keys - explicit - {"name"})
        self.values = merged
        self._origins.update(origins)


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
        if "name" in before and before["name"] != after.get("name"):
            yield path, set(before)
        pairs = [(key, before[key], after[key]) for key in before if key in after]
    elif isinstance(before, list) and isinstance(after, list):
        pairs = [(str(i), b, a) for i, (b, a) in enumerate(zip(before, after, strict=False))]
    else:
        return
    for key, b, a in pairs:
        yield from _renamed(b, a, f"{path}.{key}" if path else key)
