"""The factor view of a sweep's grid: what each key of the grid does to the metric, and what two do together."""

from collections.abc import Mapping
from typing import Any

from core.statistics.comparison import ALPHA, holm
from core.statistics.factors import Cell, Factorial, Term, factorial
from core.study.combinations import as_text
from core.study.sweep_file import Sweep

VARIANT = "variant"
"""The name of the factor that a sweep's `variants` are, if there are several."""

MODEL = (
    "fixed effects: a mean for each point of the grid plus an effect for each seed (block); "
    "the effect of a value is the mean over its points minus the mean over all points"
)
ADDITIVE = (
    "fixed effects without interaction: an effect for each value of each key plus one for each seed (block), "
    "because some points of the grid have no finished run"
)


def factor_view(
    sweep: Sweep, values: Mapping[str, Mapping[int, float]], *, censored: bool = False
) -> dict[str, Any] | None:
    """The factor view as a document; None if fewer than two keys of the grid (or the variants) vary.

    Args:
        sweep: its grid.
        values: the metric by variant and seed, of the finished runs.
        censored: whether some value is only a lower bound.

    Returns:
        `missing`, why there is no model, or None. With a model: `model`, a sentence; `complete`; `runs`, `seeds`,
        `points`, `df`; `residual_sd`; `terms`, one for each factor and each pair of them, with `factors`, `f`, `df`,
        `p`, `p_holm` and `effects` (`values`, `mean`, `effect`, `low`, `high`); `lack_of_fit`, the test of a model
        without interactions; and `notes`.
    """
    names = [key for key, tried in sweep.schema.grid.items() if len(tried) > 1]
    levels = [[_label(value) for value in sweep.schema.grid[key]] for key in names]
    if not sweep.schema.grid or len(names) + (len(sweep.schema.variants) > 1) < 2:
        return None
    if len(sweep.schema.variants) > 1:
        names.insert(0, VARIANT)
        levels.insert(0, list(sweep.schema.variants))
    document: dict[str, Any] = {"factors": names, "missing": None}
    if censored:
        return {
            **document,
            "missing": "a run ended before its load was balanced, so its value is only a bound",
        }
    runs: dict[Cell, Mapping[int, float]] = {}
    for variant in sweep.variants:
        cell = [variant.section if n == VARIANT else _label(variant.point[n]) for n in names]
        runs[tuple(cell)] = values.get(variant.name, {})
    found = factorial(runs, levels)
    if isinstance(found, str):
        return {**document, "missing": found}
    return document | _document(found, names)


def _label(value: Any) -> str:
    """The name of a value of the grid; no two of a key are alike, since they name folders."""
    return value if isinstance(value, str) else as_text(value)


def _document(found: Factorial, names: list[str]) -> dict[str, Any]:
    """The document of a fitted model."""
    corrected = holm([term.p for term in found.terms])
    terms = []
    for term, p_holm in zip(found.terms, corrected, strict=True):
        effects = []
        for effect in term.effects:
            numbers = {key: getattr(effect, key) for key in ("mean", "effect", "low", "high")}
            effects.append({"values": list(effect.levels), **numbers})
        row = {"factors": [names[index] for index in term.factors], "f": term.f, "df": term.df}
        terms.append({**row, "p": term.p, "p_holm": p_holm, "effects": effects})
    lack = found.lack_of_fit
    return {
        "model": MODEL if found.complete else ADDITIVE,
        "complete": found.complete,
        "runs": found.runs,
        "seeds": found.seeds,
        "points": found.cells,
        "df": found.df,
        "residual_sd": found.residual_sd,
        "terms": terms,
        "lack_of_fit": None if lack is None else {"f": lack.f, "df": lack.df, "p": lack.p},
        "notes": _notes(found, corrected),
    }


def _notes(found: Factorial, corrected: list[float | None]) -> list[str]:
    """What a reader must know of the effects."""
    notes = []
    if found.df < 1:
        notes.append(
            "one run for each point leaves no spread to compare with: effects have no intervals"
        )
    elif found.residual_sd == 0:
        notes.append("the runs of a point do not spread: there is no test")
    pairs = [p for term, p in zip(found.terms, corrected, strict=True) if _is_pair(term)]
    if any(p is not None and p < ALPHA for p in pairs):
        notes.append(
            "keys interact: the effect of a value is a mean over the others and may hold for none of them"
        )
    lack = found.lack_of_fit
    if not found.complete:
        how = "whether keys interact cannot be estimated, since points are missing"
        if lack is None:
            how += ", and the points that were run cannot test it"
        elif lack.p < ALPHA:
            how += f"; the points that were run contradict a model without it (lack of fit p = {lack.p:.2g})"
        else:
            how += f"; the points that were run do not contradict a model without it (lack of fit p = {lack.p:.2g})"
        notes.append(how)
    return notes


def _is_pair(term: Term) -> bool:
    return len(term.factors) == 2
