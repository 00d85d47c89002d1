"""Reads a sweep file and validates all of it, with every variant, before the first run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from core.analysis.describe import unmet_requirements
from core.assemble import build
from core.contracts.errors import UserError, nearest
from core.extension.registry import Registry
from core.recipe.compose import Recipe, compose_variant
from core.recipe.key_paths import to_dict
from core.recipe.resolve import Resolver
from core.recipe.shipped import find_recipe
from core.study.combinations import as_text, combinations, first_repeated, suffix
from core.study.expected import Expected, expected_deviation
from core.study.left_out import LeftOut, rule_errors, rule_for
from core.study.sweep_schema import LONGEST, SweepSchema, VariantSection
from core.study.sweep_yaml import find_sweep, read_values


@dataclass(frozen=True)
class Variant:
    """One thing to run for every seed.

    Args:
        name: the variant's name, and that of its folder.
        recipe: validated, for the first seed.
        source: the recipe's file.
        overrides: `KEY=VALUE` each, without the seed.
        candidate_of: the variant that searches, if this is one of the combinations that it tries; "" if not.
        searched: the values of a candidate by key path.
        section: its name under `variants`, without what the grid adds.
        point: its values of the grid by key path.
    """

    name: str
    recipe: Recipe
    source: str
    overrides: tuple[str, ...]
    candidate_of: str = ""
    searched: Mapping[str, Any] = field(default_factory=dict)
    section: str = ""
    point: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A validated sweep.

    Args:
        name: the file's name without its suffix.
        schema: its keys; with `smoke`, the file's `smoke` keys replace them.
        variants: the variants in the file's order, grid included. Before a search has chosen, a variant has the first
            of the values that it searches.
        smoke: whether the small sizes are meant.
        trust: whether files of runs that were made elsewhere may name modules, which then run.
        candidates: what the variants search, variant by variant; empty without a search.
        expected: the standard deviation of the paired differences that is expected; None: unknown.
        left_out: points of the grid that are not run, each with the reason.
    """

    name: str
    schema: SweepSchema
    variants: list[Variant]
    smoke: bool
    trust: bool = False
    candidates: list[Variant] = field(default_factory=list)
    expected: Expected | None = None
    left_out: list[LeftOut] = field(default_factory=list)


def read_sweep(
    path: str | Path, *, smoke: bool = False, here: bool = True, trust: bool = False
) -> Sweep:
    """Reads and validates a sweep file and every variant, both in full size and with `smoke` laid over.

    Args:
        path: a file, or a shipped sweep's name.
        smoke: lay the file's `smoke` keys over it, and every recipe's `smoke` section over the recipe.
        here: whether the runs are this machine's, so that every variant must be able to run on it.
        trust: whether files of runs and sweeps that were made elsewhere may name modules, which then run.

    Raises:
        UserError: the file or a variant is invalid; the message lists all errors.
    """
    file = find_sweep(path)
    values = read_values(file)
    small = _smoke_values(values)
    full_size = _Reader(file, values, smoke=False, here=here, trust=trust)
    small_size = _Reader(file, {**values, **small}, smoke=True, here=here, trust=trust)
    errors = list(full_size.errors)
    if small:
        for line in small_size.errors:
            if line not in full_size.errors:
                errors.append(f"with --smoke: {line}")
    if errors:
        raise UserError(f"{file}: {_message(errors, full_size)}")
    chosen = small_size if smoke else full_size
    return Sweep(
        file.stem,
        chosen.schema,
        chosen.variants,
        smoke,
        trust,
        candidates=chosen.candidates,
        expected=chosen.expected,
        left_out=chosen.left_out,
    )


def _smoke_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The known keys under `smoke`; an unknown one is an error of the whole file."""
    small = values.get("smoke")
    if not isinstance(small, Mapping):
        return {}
    known = SweepSchema.__dataclass_fields__.keys() - {"smoke"}
    return {key: value for key, value in small.items() if key in known}


def _message(errors: list[str], reader: "_Reader") -> str:
    """One error as a sentence; several as a list under their number."""
    if len(errors) == 1 and not reader.rejected:
        return errors[0]
    what = "errors"
    if len(reader.rejected) == len(errors):
        what = f"of {reader.count} variants cannot run"
    lines = "".join(f"\n  {line}" for line in errors)
    return f"{len(errors)} {what}:{lines}"


class _Reader:
    """Reads a sweep file's values key by key and variant by variant, so that no error hides another.

    Args:
        file: the sweep file.
        values: its values by key.
        smoke: lay every recipe's `smoke` section over it.
        here: whether every variant must be able to run on this machine.
        trust: whether files of runs and sweeps that were made elsewhere may name modules.

    Attributes:
        errors: all that were found.
        schema: the valid keys, with `FILLER` in the place of the others.
        variants: the valid ones.
        rejected: names of the variants that cannot run.
        count: the number of all variants, grid included, without those that a rule leaves out.
        left_out: points of the grid that are not run.
    """

    FILLER: ClassVar[dict[str, Any]] = {"base": "", "seeds": [0], "variants": {}, "baseline": ""}
    """Values that replace required keys which are missing or invalid, while the others are read."""

    def __init__(
        self, file: Path, values: Mapping[str, Any], *, smoke: bool, here: bool, trust: bool
    ) -> None:
        self.file = file
        self.smoke = smoke
        self.here = here
        self.trust = trust
        self.resolver = Resolver(Registry(), lambda _: str(file), {})
        self.errors: list[str] = []
        self.invalid: set[str] = set()
        self.schema = self._valid_part(values)
        for error in self.schema.config_errors():
            follows = (
                error.key == "search" and "variants" in self.invalid
            )  # it counts the valid ones
            if error.key not in self.invalid and not follows:
                value = to_dict(getattr(self.schema, error.key))
                self._add_error(self.resolver.error(error.key, value, error.why))
                self.invalid.add(error.key)
        self.variants: list[Variant] = []
        self.candidates: list[Variant] = []
        self.expected: Expected | None = None
        self.rejected: list[str] = []
        self.rejected_sections: set[str] = set()
        self.left_out: list[LeftOut] = []
        points = self._points_to_run()
        self.count = len(points)
        for point in points:
            self._read_variant(point)
        self._check_refused()
        self._check_names([point.name for point in points])
        self._check_candidates()
        self._read_expected()

    def _read_expected(self) -> None:
        """Reads the expected standard deviation, from an earlier sweep where a folder is given."""
        if self.invalid & {"expected_sd", "metric"}:
            return
        try:
            self.expected = expected_deviation(self.schema, self.file.parent)
        except UserError as error:
            self._add_error(error)

    def _add_error(self, error: UserError | str) -> None:
        line = str(error).removeprefix(f"{self.file}: ")
        if line not in self.errors:
            self.errors.append(line)

    def _valid_part(self, values: Mapping[str, Any]) -> SweepSchema:
        """The valid keys of the file, with the filler for the rest."""
        valid = {**self.FILLER, "variants": {}}
        for key, value in values.items():
            if key == "variants" and isinstance(value, Mapping):
                valid_variants = {}
                for name, section in value.items():
                    if self._is_valid(f"{key}.{name}", {**valid, key: {name: section}}):
                        valid_variants[name] = section
                valid[key] = valid_variants
            elif self._is_valid(key, {**self.FILLER, key: value}):
                valid[key] = value
        for key in self.FILLER:
            if key not in values:
                self._is_valid(key, {k: v for k, v in self.FILLER.items() if k != key})
        schema: SweepSchema = self.resolver.section(SweepSchema, valid, "")
        return schema

    def _is_valid(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether the values can be read; if not, notes the error and the key that is invalid."""
        try:
            self.resolver.section(SweepSchema, values, "")
        except UserError as error:
            self._add_error(error)
            self.invalid |= {key, key.partition(".")[0]}
            return False
        return True

    def _points_to_run(self) -> list["Point"]:
        """Every variant with every combination of the grid, without those that a rule of `skip` leaves out."""
        if "grid" in self.invalid:
            return []
        points = list(_points(self.schema))
        if "skip" in self.invalid:
            return points
        if not self.smoke and not self.invalid & {"variants"}:
            for key, why in rule_errors(self.schema):
                self._add_error(f"{key}: {why}")
        kept = []
        for point in points:
            rule = rule_for(self.schema.skip, point.section, point.values)
            if rule is None:
                kept.append(point)
            else:
                self.left_out.append(
                    LeftOut(point.name, point.section, point.values, rule.reason, "rule")
                )
        if points and not kept:
            self._add_error("skip: the rules leave out every point of the grid")
        return kept

    def _read_variant(self, point: "Point") -> None:
        """Composes a variant, builds it without memory, and checks that its components can run here."""
        section = self.schema.variants[point.section]
        name = point.name
        if not section.recipe and "base" in self.invalid:
            return
        try:
            _check_length(name)
            candidates = []
            for searched in combinations(section.search):
                try:
                    candidate = self._compose(point, section, searched)
                    _check_length(candidate.name, "a name with the searched values")
                    build(candidate.recipe, device="meta")
                except UserError as error:
                    if not self.schema.skip_refused or not point.values:
                        raise
                    reason = f"its recipe is refused: {error}"
                    self.left_out.append(
                        LeftOut(name, point.section, point.values, reason, "refused")
                    )
                    return
                if self.here and (reasons := unmet_requirements(candidate.recipe)):
                    raise UserError(f"cannot run here: {'; '.join(reasons)}")
                candidates.append(candidate)
            if not candidates:
                return  # a key of the search has no value, which is reported with the file's keys
            self.variants.append(chosen_of(candidates[0], name))
            if section.search:
                self.candidates += candidates
        except UserError as error:
            self.rejected.append(name)
            self.rejected_sections.add(point.section)
            shown = name if len(name) <= LONGEST else f"{name[:40]}..."
            self.errors.append(f"{shown}: {error}")

    def _check_refused(self) -> None:
        """Adds an error for a section of `variants` whose every point is refused: it holds a mistake."""
        known = {variant.section for variant in self.variants} | self.rejected_sections
        for one in self.left_out:
            if one.by == "refused" and one.section not in known:
                known.add(one.section)
                why = f"every point of its grid is left out; {one.name}: {one.reason}"
                self._add_error(f"{one.section}: {why}")

    def _compose(
        self,
        point: "Point",
        section: VariantSection,
        searched: dict[str, Any],
    ) -> Variant:
        """The variant with one combination of what it searches, and its recipe for the first seed.

        Args:
            point: the variant's name, and its overrides from the grid.
            section: its keys in the file.
            searched: its overrides from the search.
        """
        schema = self.schema
        source = section.recipe or schema.base
        beside = self.file.parent / source
        found = beside if beside.is_file() else find_recipe(source)
        layers = {**schema.overrides, **section.overrides, **point.values, **searched}
        overrides = [f"{key}={as_text(value)}" for key, value in layers.items()]
        overrides += [f"budget.{key}={as_text(value)}" for key, value in schema.budget.items()]
        seed = 0 if "seeds" in self.invalid else schema.seeds[0]
        overrides_and_seed = [*overrides, f"seed={seed}"]
        recipe = compose_variant(
            found, overrides_and_seed, self.file, smoke=self.smoke, trust=self.trust
        )
        return Variant(
            point.name + suffix(searched),
            recipe,
            str(found),
            tuple(overrides),
            candidate_of=point.name,
            searched=searched,
            section=point.section,
            point=point.values,
        )

    def _check_names(self, names: list[str]) -> None:
        """Adds an error for a variant's name that occurs twice, and for keys that name no variant."""
        twice = first_repeated(names)
        if twice is not None:
            how = "give one of them another name"
            self._add_error(f"two variants of the grid are named {twice!r}; {how}")
        if "match" not in self.invalid:
            left_out_names = {one.name for one in self.left_out}
            for name in self.schema.match.exempt:
                if name not in left_out_names and self._is_unknown(name, names):
                    known = nearest(name, names)
                    self._add_error(f"match.exempt: no variant is named {name!r}; {known}")
        name = self.schema.baseline
        left_out = {one.name: one.reason for one in self.left_out}
        if "baseline" not in self.invalid and name in left_out:
            self._add_error(f"baseline = {name!r}: is left out: {left_out[name]}")
        elif "baseline" not in self.invalid and self._is_unknown(name, names):
            self._add_error(f"baseline = {name!r}: no such variant; {nearest(name, names)}")

    def _check_candidates(self) -> None:
        """Adds an error for two values that would be searched in one folder."""
        twice = first_repeated([candidate.name for candidate in self.candidates])
        if twice is not None:
            how = "search values whose names differ in letters, digits, _ - or ."
            self._add_error(f"two values that are searched are named {twice!r}; {how}")

    def _is_unknown(self, name: str, names: list[str]) -> bool:
        """Whether no variant has the name; False where the variant of that name is itself invalid."""
        if not names or name in names:
            return False
        return f"variants.{name.partition('+')[0]}" not in self.invalid


def _check_length(name: str, what: str = "a name") -> None:
    """Raises `UserError` for a name that is too long for a folder."""
    length = len(name.encode())
    if length > LONGEST:
        raise UserError(f"{what} of {length} bytes cannot name a folder: at most {LONGEST}")


@dataclass(frozen=True)
class Point:
    """A variant with one combination of the grid.

    Args:
        name: the variant's name with the grid's values.
        section: the name under `variants`.
        values: those of the grid by key path.
    """

    name: str
    section: str
    values: dict[str, Any]


def _points(schema: SweepSchema) -> Iterator[Point]:
    """Every variant with every combination of the grid; the name says what varies."""
    for name in schema.variants:
        for values in combinations(schema.grid):
            yield Point(name + suffix(values), name, values)


def chosen_of(candidate: Variant, name: str) -> Variant:
    """The variant of a name with the values of one of its candidates."""
    return replace(candidate, name=name, candidate_of="", searched={})
