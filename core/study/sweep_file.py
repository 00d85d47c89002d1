"""A sweep file: which variants, which seeds, what is held equal; validated whole before the first run."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from core.contracts.errors import UserError, Wrong, nearest
from core.contracts.schema import setting
from core.extension.registry import Registry
from core.recipe.compose import Recipe, compose, find_recipe, shipped_sweeps
from core.recipe.resolve import Resolver

METRICS = (
    *("val_bits_per_byte", "val_loss", "max_vio_global", "max_vio_batch", "dropped_fraction", "mtp_acceptance"),
    *("steps", "tokens", "skipped_steps", "wall_seconds", "train_seconds", "tokens_per_second", "mfu", "peak_flops"),
    *("params_total", "params_mtp", "params_active", "flops_per_token", "peak_memory_bytes", "validation_bytes"),
    "threads",
)
"""The numbers in summary.json."""


@dataclass(kw_only=True)
class VariantSection:
    """One variant: a recipe, or the base, with something changed."""

    recipe: str | None = setting(None, doc="a recipe file or shipped name; null: the sweep's base")
    overrides: dict[str, Any] = setting({}, doc="KEY.PATH: VALUE, as on the command line")


@dataclass(kw_only=True)
class MatchSection:
    """What must be equal, and for whom it need not be."""

    params: float | None = setting(0.02, doc="total parameters, as a fraction of the baseline's; null: not checked")
    flops: float | None = setting(
        0.02, doc="training FLOPs per token, or of a run where budget.flops is given; likewise"
    )
    allow: list[str] = setting([], doc="things that may differ, in the words of describe --compare (attention, steps)")
    exempt: dict[str, str] = setting({}, doc="variants that need not match, each with the reason, which is printed")

    def check(self, parent: Any) -> None:
        """Raises `Wrong` for a tolerance that is none."""
        for key in ("params", "flops"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise Wrong(key, "must be at least 0 and less than 1, or null")


@dataclass(kw_only=True)
class SweepSchema:
    """A whole sweep file."""

    title: str = setting("", doc="what is asked, one sentence")
    base: str = setting(doc="a recipe file or shipped name that variants start from")
    seeds: list[int] = setting(doc="one run of every variant for each")
    variants: dict[str, VariantSection] = setting(doc="what is compared, by name")
    grid: dict[str, list[Any]] = setting({}, doc="KEY.PATH: [values]; every variant with every combination")
    baseline: str = setting(doc="the variant that all others are held against")
    metric: str = setting("val_bits_per_byte", doc="a key of summary.json")
    better: Literal["lower", "higher"] = setting("lower", doc="values of the metric")
    budget: dict[str, Any] = setting({}, doc="the recipe's budget for every run; empty: each recipe's own")
    overrides: dict[str, Any] = setting({}, doc="KEY.PATH: VALUE for every run")
    match: MatchSection = setting({}, doc="what must be equal before anything is run")
    smoke: dict[str, Any] = setting({}, doc="keys of this file for --smoke, each in the place of the whole key above")

    def check(self, parent: Any) -> None:
        """Raises `Wrong` for nothing to run, for names that are none, and for what two keys would both set."""
        if not self.seeds:
            raise Wrong("seeds", "must hold at least one seed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise Wrong("seeds", "must be different whole numbers of at least 0")
        if not self.variants:
            raise Wrong("variants", "must hold at least one variant")
        for name in self.variants:
            if not name or not all(c.isalnum() or c in "_-+=" for c in name):
                raise Wrong("variants", f"{name!r} cannot name a folder: use letters, digits and _ - + =")
        for key, values in self.grid.items():
            if not values:
                raise Wrong("grid", f"{key} must have at least one value")
        if self.metric not in METRICS:
            raise Wrong("metric", f"no run logs it; {nearest(self.metric, METRICS)}")
        for key in self.smoke:
            if key not in self.__dataclass_fields__ or key == "smoke":
                raise Wrong("smoke", f"unknown key {key!r}; {nearest(key, set(self.__dataclass_fields__) - {'smoke'})}")
        for where, keys in (("overrides", self.overrides), ("grid", self.grid)):
            if taken := _taken(keys, self.budget):
                raise Wrong(where, taken)
        for name, section in self.variants.items():
            if taken := _taken(section.overrides, self.budget):
                raise Wrong("variants", f"{name}: {taken}")


def _taken(keys: Iterable[str], budget: Mapping[str, Any]) -> str | None:
    """Why an override would be lost without a word."""
    for key in keys:
        if key == "seed":
            return "seed is given by `seeds`"
        if budget and key.partition(".")[0] == "budget":
            return f"{key} is given by `budget`, for every run"
    return None


@dataclass(frozen=True)
class Variant:
    """One thing to run for every seed.

    Args:
        name: also of its folder.
        recipe: validated, for the first seed.
        source: the recipe's file.
        overrides: `KEY=VALUE` each, without the seed.
    """

    name: str
    recipe: Recipe
    source: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A validated sweep.

    Args:
        name: of the file.
        schema: its keys, `smoke` laid over them where that was asked for.
        variants: in the file's order, grid included.
        smoke: whether the small sizes are meant.
    """

    name: str
    schema: SweepSchema
    variants: list[Variant]
    smoke: bool


def read_sweep(path: str | Path, *, smoke: bool = False) -> Sweep:
    """Read and validate a sweep file and every one of its variants.

    Args:
        path: a file, or a shipped sweep's name.
        smoke: lay the file's `smoke` keys over it, and every recipe's `smoke` section over the recipe.

    Raises:
        UserError: what cannot be right; of several variants that fail, all are told.
    """
    file = find_sweep(path)
    values = _read(file)
    if smoke and isinstance(small := values.get("smoke", {}), Mapping):
        values = {**values, **small}
    resolver = Resolver(Registry(), lambda _: str(file), {})
    schema: SweepSchema = resolver.section(SweepSchema, values, "")
    variants, errors = [], []
    for name, section, point in _points(schema):
        try:
            variants.append(_variant(file, schema, name, section, point, smoke=smoke))
        except UserError as told:
            errors.append(f"{name}: {told}")
    if errors:
        lines = "".join(f"\n  {line}" for line in errors)
        raise UserError(f"{file}: {len(errors)} of {len(errors) + len(variants)} variants cannot run:{lines}")
    names = [variant.name for variant in variants]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise UserError(f"{file}: two variants of the grid are named {twice!r}; give one of them another name")
    for name in schema.match.exempt:
        if name not in names:
            raise UserError(f"{file}: match.exempt: no variant is named {name!r}; {nearest(name, names)}")
    if schema.baseline not in names:
        raise UserError(f"{file}: baseline = {schema.baseline!r}: no such variant; {nearest(schema.baseline, names)}")
    return Sweep(file.stem, schema, variants, smoke)


def find_sweep(path: str | Path) -> Path:
    """The file of a sweep given by path or shipped name."""
    file, shipped = Path(path), shipped_sweeps()
    if file.is_file():
        return file
    name = str(path).removesuffix(".yaml").removeprefix("recipes/").removeprefix("sweeps/")
    if name not in shipped:
        raise UserError(f"{str(path) or repr('')}: no such sweep; {nearest(name, shipped)}")
    return shipped[name]


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as cause:
        raise UserError(f"{file}: cannot be read: {' '.join(str(cause).split())}") from cause
    if not isinstance(values, dict):
        raise UserError(f"{file}: must be a section of keys: {', '.join(SweepSchema.__dataclass_fields__)}")
    return {str(key): value for key, value in values.items()}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice: the first variant of that name would be lost without a word.

    A key is the text that stands there (`no`, `1e-3`), and 1e-3 is a number, as in a recipe.
    """


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    keys = [str(key.value) if isinstance(key, yaml.ScalarNode) else "" for key, _ in node.value]
    if "" in keys:
        raise yaml.constructor.ConstructorError(None, None, "a key must be a name", node.start_mark)
    twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}  # type: ignore[no-untyped-call]


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_UniqueKeys.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _points(schema: SweepSchema) -> Iterator[tuple[str, VariantSection, dict[str, Any]]]:
    """Every variant with every combination of the grid; the name says what varies."""
    combinations = list(itertools.product(*schema.grid.values()))
    for name, section in schema.variants.items():
        for values in combinations:
            point = dict(zip(schema.grid, values, strict=True))
            suffix = "".join(f"+{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items())
            yield name + suffix, section, point


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _written(value)
    return "".join(c if c.isalnum() or c in "_-." else "_" for c in text)


def _written(value: Any) -> str:
    """As an override writes it; what JSON does not know (a date) as text."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _variant(
    file: Path, schema: SweepSchema, name: str, section: VariantSection, point: dict[str, Any], *, smoke: bool
) -> Variant:
    source = section.recipe or schema.base
    beside = file.parent / source
    found = beside if beside.is_file() else find_recipe(source)
    layers = {**schema.overrides, **section.overrides, **point}
    overrides = [f"{key}={_written(value)}" for key, value in layers.items()]
    overrides += [f"budget.{key}={_written(value)}" for key, value in schema.budget.items()]
    seeded = [*overrides, f"seed={schema.seeds[0]}"]
    return Variant(name, compose(found, seeded, smoke=smoke), str(found), tuple(overrides))
