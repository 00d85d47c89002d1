"""Are the variants of a sweep comparable? Sizes are counted on the meta device, the rest is read off the recipes."""

from dataclasses import dataclass, replace
from typing import Any

from core.analysis.compare import held
from core.analysis.describe import document_of
from core.contracts.errors import UserError, nearest
from core.study.sweep_file import Sweep

NEEDS = {
    "mtp_acceptance": ("params_mtp", "a multi-token head"),
    "max_vio_global": ("top_k", "experts"),
    "max_vio_batch": ("top_k", "experts"),
}
"""Metrics that not every model has: the number of its description that must not be 0, and what it lacks."""
SCHEDULED = ("training tokens", "steps")
"""What differs by intention where every variant gets the same FLOPs."""


@dataclass(frozen=True)
class Matched:
    """What was found out before the first run.

    Args:
        documents: each variant's description, by name.
        held_equal: sentences: what is the same in all.
        not_equal: sentences: what is not, and why that was allowed.
    """

    documents: dict[str, dict[str, Any]]
    held_equal: list[str]
    not_equal: list[str]


def match(sweep: Sweep) -> Matched:
    """Describe every variant and hold it against the baseline.

    Raises:
        UserError: variants differ in what `match` says must be equal, all of them told; or one of them cannot have the
            metric.
    """
    rules, base_name = sweep.schema.match, sweep.schema.baseline
    documents = {variant.name: document_of(variant.recipe) for variant in sweep.variants}
    _has_metric(sweep, documents)
    refused: list[str] = []
    held_equal: list[str] = []
    not_equal: list[str] = []
    for rule, key, counts in _counted(sweep, documents):
        tolerance = getattr(rules, rule)
        base, off = counts[base_name], []
        for name, count in counts.items():
            difference = count / base - 1
            if tolerance is None or abs(difference) <= tolerance:
                continue
            sentence = f"{name}: {key} {count:,.0f} is {difference:+.1%} of {base_name}'s {base:,.0f}"
            off.append(name)
            (not_equal if name in rules.exempt else refused).append(sentence + _because(name, rules.exempt))
        if tolerance is not None:
            others = f", but for {', '.join(off)}" if off else ""
            held_equal.append(f"{key} within {tolerance:.0%} of {base_name}'s{others}")
    for thing, different in _different(sweep, documents).items():
        allowed = thing in rules.allow or (thing in SCHEDULED and "flops" in sweep.schema.budget)
        if not different:
            held_equal.append(thing)
        for name in different:
            sentence = f"{name}: another {thing} than {base_name}"
            (not_equal if allowed or name in rules.exempt else refused).append(sentence + _because(name, rules.exempt))
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        how = "match.allow names what may differ, match.exempt a variant with the reason"
        raise UserError(f"sweep {sweep.name}: variants cannot be compared ({how}):{lines}")
    return Matched(documents, held_equal, not_equal)


def _has_metric(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> None:
    """Raises `UserError` for a metric that some variants' summaries will not have."""
    metric = sweep.schema.metric
    count, thing = NEEDS.get(metric, ("", ""))
    without = [name for name, document in documents.items() if count and not document[count]]
    if without:
        raise UserError(f"sweep {sweep.name}: metric = {metric!r}: {', '.join(without)} cannot have it without {thing}")


def _counted(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, float]]]:
    """What must be equal but for a tolerance: its key in `match`, its name, and its count in each variant.

    Where the sweep's budget is in FLOPs, what must be equal is what a whole run spends: steps are whole, so a budget of
    a few steps may be missed by more than the tolerance.
    """
    by_budget = "flops" in sweep.schema.budget
    flops = {n: d["flops_per_token"] * (d["tokens"] if by_budget else 1) for n, d in documents.items()}
    params = {name: document["params_total"] for name, document in documents.items()}
    return [
        ("params", "params_total", params),
        ("flops", "training FLOPs of a run" if by_budget else "flops_per_token", flops),
    ]


def _because(name: str, reasons: dict[str, str]) -> str:
    return f" ({reasons[name]})" if name in reasons else ""


def _different(sweep: Sweep, documents: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """For each thing that should be the same, the variants in which it is not."""
    ordered = sorted(sweep.variants, key=lambda variant: variant.name != sweep.schema.baseline)
    recipes = [replace(variant.recipe, name=variant.name) for variant in ordered]
    found = held(recipes, [documents[variant.name] for variant in ordered])
    unknown = set(sweep.schema.match.allow) - set(found)
    if unknown:
        name = sorted(unknown)[0]
        raise UserError(
            f"sweep {sweep.name}: match.allow: {name!r} is nothing that is compared; {nearest(name, found)}"
        )
    return found
