"""The budget of a search before a sweep: equal for every variant, and known before the first run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.analysis.compare_recipes import different_recipes
from core.contracts.errors import UserError
from core.study.sweep_file import Sweep, Variant

SEARCHED = "optimizer and its schedule"
"""The thing that variants and values may differ in because it is searched."""


@dataclass(frozen=True)
class SearchBudget:
    """What a variant may spend on its search, all runs together.

    Args:
        runs: values times seeds.
        steps, tokens, flops: the totals of all these runs.
    """

    runs: int
    steps: int
    tokens: int
    flops: float


def search_budgets(
    sweep: Sweep, documents: Mapping[str, Mapping[str, Any]]
) -> dict[str, SearchBudget]:
    """The budget of each variant's search; empty without a search.

    Args:
        sweep: its candidates and its search's seeds count.
        documents: the candidates' descriptions by name.

    Raises:
        UserError: the budgets are not equal, or a value changes more than a search may.
    """
    budgets: dict[str, SearchBudget] = {}
    seeds = len(sweep.schema.search.seeds)
    for name, candidates in by_variant(sweep).items():
        own = [documents[candidate.name] for candidate in candidates]
        _check_comparable(sweep, candidates, own)
        tokens = sum(document["tokens"] for document in own) * seeds
        flops = sum(document["tokens"] * document["flops_per_token"] for document in own) * seeds
        steps = sum(document["steps"] for document in own) * seeds
        budgets[name] = SearchBudget(seeds * len(own), steps, tokens, flops)
    _check_equal(sweep, budgets)
    return budgets


def by_variant(sweep: Sweep) -> dict[str, list[Variant]]:
    """The candidates of each variant, in the order of the file."""
    found: dict[str, list[Variant]] = {}
    for candidate in sweep.candidates:
        found.setdefault(candidate.candidate_of, []).append(candidate)
    return found


def _check_equal(sweep: Sweep, budgets: Mapping[str, SearchBudget]) -> None:
    """Raises `UserError` unless all searches have the same runs, steps and tokens.

    Where the sweep's budget is in FLOPs, these are compared in the place of steps and tokens, within `match.flops`.
    """
    tolerance = sweep.schema.match.flops
    in_flops = "flops" in sweep.schema.budget
    base = budgets.get(sweep.schema.baseline)
    for name, own in budgets.items():
        assert base is not None, "every variant searches, or none"
        if in_flops:
            is_equal = tolerance is None or abs(own.flops / base.flops - 1) <= tolerance
        else:
            is_equal = (own.steps, own.tokens) == (base.steps, base.tokens)
        if own.runs != base.runs or not is_equal:
            first = f"{sweep.schema.baseline} has {_words(base)}"
            raise UserError(
                f"sweep {sweep.name}: the searches must have equal budgets, but {first}, and {name} {_words(own)}"
            )


def _check_comparable(
    sweep: Sweep, candidates: list[Variant], documents: list[Mapping[str, Any]]
) -> None:
    """Raises `UserError` if a value changes the model's size or anything but the optimizer that `match` holds equal.

    A variant is matched with the baseline before its value is chosen, so that must not depend on the value.
    """
    recipes = [replace(candidate.recipe, name=candidate.name) for candidate in candidates]
    different = different_recipes(recipes, [dict(document) for document in documents])
    allowed = {SEARCHED, *sweep.schema.match.allow}
    if "flops" in sweep.schema.budget:
        allowed |= {"training tokens", "steps"}
    changed = {thing for thing, names in different.items() if names} - allowed
    for key in ("params_total", "flops_per_token"):
        if len({document[key] for document in documents}) > 1:
            changed.add(key)
    if changed:
        name = candidates[0].candidate_of
        raise UserError(
            f"sweep {sweep.name}: the search of {name} must not change what is held equal, "
            f"and its values change: {', '.join(sorted(changed))}"
        )


def _words(budget: SearchBudget) -> str:
    return f"{budget.runs} runs, {budget.steps:,} steps, {budget.tokens:,} tokens"


def budget_sentences(sweep: Sweep, budgets: Mapping[str, SearchBudget]) -> list[str]:
    """A sentence for each variant: what its search may spend, and on which values."""
    seeds = ", ".join(map(str, sweep.schema.search.seeds))
    sentences = []
    for name, candidates in by_variant(sweep).items():
        values = searched_values(candidates)
        counts = " x ".join(f"{len(values[key])} values of {key}" for key in values)
        sentences.append(f"{name}: {_words(budgets[name])} ({counts}; seeds {seeds})")
    return sentences


def searched_values(candidates: list[Variant]) -> dict[str, list[Any]]:
    """The values of each key that a variant searches, in the order of the file."""
    values: dict[str, list[Any]] = {}
    for candidate in candidates:
        for key, value in candidate.searched.items():
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    return values
