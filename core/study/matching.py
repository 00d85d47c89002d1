"""Checks that the variants of a sweep are comparable: sizes on the meta device, the rest from the recipes."""

from dataclasses import dataclass, field, replace
from typing import Any

from core.analysis.compare_recipes import different_recipes
from core.analysis.describe import document_of
from core.assemble import make
from core.contracts.errors import UserError, nearest
from core.data.parts import step_of_shift
from core.statistics.recovery import WINDOW
from core.study.search_budget import SEARCHED, SearchBudget, search_budgets
from core.study.sweep_file import Sweep
from core.study.sweep_schema import average_of

AFTER_SHIFT = ("steps_until_balanced", "max_vio_before_shift", "max_vio_peak_after_shift")
"""Metrics of runs whose data shift."""
NEEDS = {
    "mtp_acceptance": ("params_mtp", "a multi-token head"),
    "max_vio_global": ("top_k", "experts"),
    "max_vio_batch": ("top_k", "experts"),
    **dict.fromkeys(AFTER_SHIFT, ("top_k", "experts")),
}
"""Metrics that not every model has: the number of its description that must not be 0, and what is missing if it is."""
SCHEDULED = ("training tokens", "steps")
"""Things that differ by intention where every variant gets the same FLOPs."""


@dataclass(frozen=True)
class Matched:
    """The result of matching, known before the first run.

    Args:
        documents: each variant's description, by name.
        held_equal: sentences: what is the same in all.
        not_equal: sentences: what is not, and why that was allowed.
        budgets: what each variant's search may spend; empty without a search.
    """

    documents: dict[str, dict[str, Any]]
    held_equal: list[str]
    not_equal: list[str]
    budgets: dict[str, SearchBudget] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """A number that must be equal in all variants, but for a tolerance.

    Args:
        rule: its key in `match`.
        name: its name in messages.
        by_variant: its value in each variant.
    """

    rule: str
    name: str
    by_variant: dict[str, float]


def match(sweep: Sweep) -> Matched:
    """Describes every variant and compares it with the baseline.

    Raises:
        UserError: variants differ in what `match` says must be equal (the message lists all differences), one of
            them cannot have the metric, or the budgets of their searches are not equal.
    """
    documents = {variant.name: document_of(variant.recipe) for variant in sweep.variants}
    _check_metric(sweep, documents)
    matching = _Matching(sweep)
    for count in _counts(sweep, documents):
        matching.compare_counts(count)
    for thing, different in _different_variants(sweep, documents).items():
        matching.compare_thing(thing, different)
    if matching.forbidden:
        lines = "".join(f"\n  {line}" for line in matching.forbidden)
        how = "match.allow names what may differ, match.exempt a variant with the reason"
        raise UserError(f"sweep {sweep.name}: variants cannot be compared ({how}):{lines}")
    tried = {one.name: document_of(one.recipe) for one in sweep.candidates}
    budgets = search_budgets(sweep, tried)
    return Matched(documents, matching.held_equal, matching.not_equal, budgets)


class _Matching:
    """Collects sentences about a sweep's variants: what is equal, what may differ, and what may not (`forbidden`).

    Args:
        sweep: its baseline and its `match` section decide.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.rules = sweep.schema.match
        self.baseline = sweep.schema.baseline
        self.equal_flops = "flops" in sweep.schema.budget
        self.is_searched = bool(sweep.candidates)
        self.forbidden: list[str] = []
        self.held_equal: list[str] = []
        self.not_equal: list[str] = []

    def compare_counts(self, count: Count) -> None:
        """Compares a number with the baseline's, within the tolerance of its rule; None as tolerance: no check."""
        tolerance = getattr(self.rules, count.rule)
        if tolerance is None:
            return
        base = count.by_variant[self.baseline]
        outside = []
        for variant, value in count.by_variant.items():
            difference = value / base - 1
            if abs(difference) > tolerance:
                outside.append(variant)
                distance = f"{difference:+.1%} of {self.baseline}'s {base:,.0f}"
                self._differs(variant, f"{variant}: {count.name} {value:,.0f} is {distance}")
        others = f", but for {', '.join(outside)}" if outside else ""
        self.held_equal.append(f"{count.name} within {tolerance:.0%} of {self.baseline}'s{others}")

    def compare_thing(self, thing: str, different: list[str]) -> None:
        """Notes that a thing is equal in all variants, or in which of them it differs from the baseline's."""
        if not different:
            self.held_equal.append(thing)
        allowed = (
            thing in self.rules.allow
            or (thing in SCHEDULED and self.equal_flops)
            or (thing == SEARCHED and self.is_searched)
        )
        for variant in different:
            sentence = f"{variant}: another {thing} than {self.baseline}"
            self._differs(variant, sentence, allowed=allowed)

    def _differs(self, variant: str, sentence: str, *, allowed: bool = False) -> None:
        """Adds a difference, with the reason where the variant is exempt."""
        reason = self.rules.exempt.get(variant)
        if reason is not None:
            self.not_equal.append(f"{sentence} ({reason})")
        elif allowed:
            self.not_equal.append(sentence)
        else:
            self.forbidden.append(sentence)


def _check_metric(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> None:
    """Raises `UserError` for a metric that some variants' summaries will not have."""
    metric = sweep.schema.metric
    if metric in AFTER_SHIFT:
        _check_shift(sweep, documents)
    if average := average_of(metric):
        _check_average(sweep, average)
    if metric not in NEEDS:
        return
    count, thing = NEEDS[metric]
    without = [name for name, document in documents.items() if not document[count]]
    if without:
        why = f"{', '.join(without)} cannot have it without {thing}"
        raise UserError(f"sweep {sweep.name}: metric = {metric!r}: {why}")


def _check_average(sweep: Sweep, average: str) -> None:
    """Raises `UserError` for a variant without a callback that keeps the averaged weights of the metric."""
    without = []
    for variant in sweep.variants:
        callbacks = variant.recipe.callbacks
        if average not in [section.component.average for section in callbacks]:
            without.append(variant.name)
    if without:
        why = f"{', '.join(without)} cannot have it without a callback that averages weights as {average!r}"
        raise UserError(f"sweep {sweep.name}: metric = {sweep.schema.metric!r}: {why}")


def _check_shift(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> None:
    """Raises `UserError` for a variant whose data do not shift, or too late, or that does not log every step."""
    where = f"sweep {sweep.name}: metric = {sweep.schema.metric!r}"
    without = []
    for variant in sweep.variants:
        corpus = variant.recipe.data.corpus
        shift_at = None if corpus is None else make(corpus).shift_at()
        if shift_at is None:
            without.append(variant.name)
            continue
        steps = documents[variant.name]["steps"]
        after = steps - (step_of_shift(shift_at, steps) or 0)
        if after < WINDOW:
            has = f"{variant.name} has {after} of its {steps} steps after the shift of its data"
            raise UserError(f"{where}: {has}, and a window of {WINDOW} is the least")
        every = variant.recipe.trainer.get("log_every_n_steps", 1)
        if every != 1:
            needed = (
                f"{variant.name} has trainer.log_every_n_steps = {every}, and every step is needed"
            )
            raise UserError(f"{where}: {needed}: it must be 1")
    if without:
        why = f"{', '.join(without)} cannot have it without a corpus whose data shift"
        raise UserError(f"{where}: {why}")


def _counts(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> list[Count]:
    """The numbers that must be equal but for a tolerance.

    Where the sweep's budget is in FLOPs, they are those of a whole run, FLOPs per token x tokens: steps are whole, so a
    budget of a few steps may be missed by more than the tolerance.
    """
    params = {name: document["params_total"] for name, document in documents.items()}
    flops = {name: document["flops_per_token"] for name, document in documents.items()}
    flops_name = "flops_per_token"
    if "flops" in sweep.schema.budget:
        flops_name = "training FLOPs of a run"
        for name, document in documents.items():
            flops[name] *= document["tokens"]
    return [Count("params", "params_total", params), Count("flops", flops_name, flops)]


def _different_variants(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The variants that differ from the baseline, for each thing that should be the same.

    Raises:
        UserError: `match.allow` names something else.
    """
    ordered = sorted(sweep.variants, key=lambda variant: variant.name != sweep.schema.baseline)
    recipes = [replace(variant.recipe, name=variant.name) for variant in ordered]
    different = different_recipes(recipes, [documents[variant.name] for variant in ordered])
    for name in sorted(sweep.schema.match.allow):
        if name not in different:
            raise UserError(
                f"sweep {sweep.name}: match.allow: unknown name {name!r}; {nearest(name, different)}"
            )
    return different
