"""A sweep file: which variants, which seeds, what is held equal; validated whole before the first run."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from core.analysis.describe import obstacles
from core.assemble import build
from core.contracts.errors import UserError, nearest
from core.extension.registry import Registry
from core.recipe.compose import Recipe, compose, find_recipe, shipped_sweeps
from core.recipe.resolve import Resolver
from core.study.schema import LONGEST, SweepSchema, VariantSection


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


def read_sweep(path: str | Path, *, smoke: bool = False, here: bool = True) -> Sweep:
    """Read and validate a sweep file and every one of its variants, as they stand and with `smoke` laid over.

    Args:
        path: a file, or a shipped sweep's name.
        smoke: lay the file's `smoke` keys over it, and every recipe's `smoke` section over the recipe.
        here: whether the runs are this machine's, so that every variant must be able to run on it.

    Raises:
        UserError: what cannot be right; all of it is told.
    """
    file = find_sweep(path)
    values = _read(file)
    small = values.get("smoke")
    laid = (
        {k: v for k, v in small.items() if k in SweepSchema.__dataclass_fields__} if isinstance(small, Mapping) else {}
    )
    laid.pop("smoke", None)
    full, little = (
        _Reading(file, each, smoke=s, here=here) for each, s in ((values, False), ({**values, **laid}, True))
    )
    more = [f"with --smoke: {line}" for line in little.mistakes if line not in full.mistakes] if laid else []
    if mistakes := [*full.mistakes, *more]:
        if len(mistakes) == 1 and not full.refused:
            raise UserError(f"{file}: {mistakes[0]}")
        lines = "".join(f"\n  {line}" for line in mistakes)
        only_variants = len(full.refused) == len(mistakes)
        what = f"of {full.count} variants cannot run" if only_variants else "mistakes"
        raise UserError(f"{file}: {len(mistakes)} {what}:{lines}")
    chosen = little if smoke else full
    return Sweep(file.stem, chosen.schema, chosen.variants, smoke)


class _Reading:
    """A sweep file's values, read key by key and variant by variant, so that no mistake hides another.

    Args:
        file: that they stand in.
        values: of its keys.
        smoke: lay every recipe's `smoke` section over it.
        here: whether every variant must be able to run on this machine.
    """

    FILLER: ClassVar[dict[str, Any]] = {"base": "", "seeds": [0], "variants": {}, "baseline": ""}
    """In the place of a required key that is missing or wrong, while the others are read."""

    def __init__(self, file: Path, values: Mapping[str, Any], *, smoke: bool, here: bool) -> None:
        self.file, self.smoke, self.here = file, smoke, here
        self.resolver = Resolver(Registry(), lambda _: str(file), {})
        self.mistakes: list[str] = []
        self.lost: set[str] = set()
        self.schema = self._schema(values)
        for wrong in self.schema.wrongs():
            if wrong.key not in self.lost:
                self._tell(self.resolver.error(wrong.key, getattr(self.schema, wrong.key), wrong.why))
                self.lost.add(wrong.key)
        self.variants: list[Variant] = []
        self.refused: list[str] = []
        points = list(_points(self.schema)) if "grid" not in self.lost else []
        self.count = len(points)
        for point in points:
            self._variant(*point)
        self._names([name for name, _, _ in points])

    def _tell(self, told: UserError) -> None:
        line = str(told).removeprefix(f"{self.file}: ")
        if line not in self.mistakes:
            self.mistakes.append(line)

    def _schema(self, values: Mapping[str, Any]) -> SweepSchema:
        """What of the file is right, with the filler for the rest."""
        good = {**self.FILLER, "variants": {}}
        for key, value in values.items():
            if key == "variants" and isinstance(value, Mapping):
                sections = {name: {name: section} for name, section in value.items()}
                good[key] = {
                    n: value[n] for n, one in sections.items() if self._right(f"{key}.{n}", {**good, key: one})
                }
            elif self._right(key, {**self.FILLER, key: value}):
                good[key] = value
        for key in self.FILLER.keys() - values.keys():
            self._right(key, {k: v for k, v in self.FILLER.items() if k != key})
        schema: SweepSchema = self.resolver.section(SweepSchema, good, "")
        return schema

    def _right(self, what: str, values: Mapping[str, Any]) -> bool:
        try:
            self.resolver.section(SweepSchema, values, "")
        except UserError as told:
            self._tell(told)
            self.lost |= {what, what.partition(".")[0]}
            return False
        return True

    def _variant(self, name: str, section: VariantSection, point: dict[str, Any]) -> None:
        """Compose it, build it without memory, and ask its components whether they can run here."""
        if not section.recipe and "base" in self.lost:
            return
        try:
            if len(name.encode()) > LONGEST:
                raise UserError(f"a name of {len(name.encode())} bytes cannot name a folder: at most {LONGEST}")
            seed = 0 if "seeds" in self.lost else self.schema.seeds[0]
            variant = _variant(self.file, self.schema, name, section, point, seed=seed, smoke=self.smoke)
            build(variant.recipe, device="meta")
            if self.here and (found := obstacles(variant.recipe)):
                raise UserError(f"cannot run here: {'; '.join(found)}")
            self.variants.append(variant)
        except UserError as told:
            self.refused.append(name)
            self.mistakes.append(f"{name if len(name) <= LONGEST else name[:40] + '...'}: {told}")

    def _names(self, names: list[str]) -> None:
        """What stands twice, and what names no variant."""
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            self._tell(UserError(f"two variants of the grid are named {twice!r}; give one of them another name"))
        for name in self.schema.match.exempt if "match" not in self.lost else ():
            if self._is_none(name, names):
                self._tell(UserError(f"match.exempt: no variant is named {name!r}; {nearest(name, names)}"))
        name = self.schema.baseline
        if "baseline" not in self.lost and self._is_none(name, names):
            self._tell(UserError(f"baseline = {name!r}: no such variant; {nearest(name, names)}"))

    def _is_none(self, name: str, names: list[str]) -> bool:
        """Whether no variant has that name; of one that could not be read nothing is known."""
        return bool(names) and name not in names and f"variants.{name.partition('+')[0]}" not in self.lost


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
    file: Path,
    schema: SweepSchema,
    name: str,
    section: VariantSection,
    point: dict[str, Any],
    *,
    seed: int,
    smoke: bool,
) -> Variant:
    source = section.recipe or schema.base
    beside = file.parent / source
    found = beside if beside.is_file() else find_recipe(source)
    layers = {**schema.overrides, **section.overrides, **point}
    overrides = [f"{key}={_written(value)}" for key, value in layers.items()]
    overrides += [f"budget.{key}={_written(value)}" for key, value in schema.budget.items()]
    seeded = [*overrides, f"seed={seed}"]
    return Variant(name, compose(found, seeded, smoke=smoke), str(found), tuple(overrides))
