"""The first stage of a sweep: every variant searches its own values, of which the best is compared."""

from collections.abc import Mapping
from typing import Any

from core.contracts.errors import UserError
from core.recipe.key_paths import to_dict
from core.storage.documents import DocumentError, read_object
from core.study.results import value_of
from core.study.search_budget import by_variant, searched_values
from core.study.sweep_file import Sweep, Variant, chosen_of
from core.study.sweep_folder import SweepFolder

METRIC = "val_loss"
"""What chooses: the validation loss, mean over the search's seeds; lower is better."""

FILE = "search.json"
"""The name of its results; the file is written once, when every variant has chosen."""


def search_results(sweep: Sweep, folder: SweepFolder) -> dict[str, Any]:
    """The document of the search so far.

    Returns:
        `rows`, one for each variant: its candidates with their values, their mean loss (None unless every seed has
        one) and their runs; `chosen`, the values of the candidate with the lowest mean, None before there is one; and
        `edges`, the keys whose chosen value is the first or the last of those that were tried.
    """
    means, runs = _measured(sweep, folder)
    rows = []
    for name, candidates in by_variant(sweep).items():
        tried = []
        for candidate in candidates:
            row = {
                "name": candidate.name,
                "values": to_dict(dict(candidate.searched)),
                "mean": means[candidate.name],
                "runs": runs[candidate.name],
            }
            tried.append(row)
        best = _best(candidates, means)
        rows.append(
            {
                "variant": name,
                "candidates": tried,
                "chosen": None if best is None else to_dict(dict(best.searched)),
                "edges": [] if best is None else _edges(best, searched_values(candidates)),
            }
        )
    return {"metric": METRIC, "seeds": list(sweep.schema.search.seeds), "rows": rows}


def _measured(
    sweep: Sweep, folder: SweepFolder
) -> tuple[dict[str, float | None], dict[str, list[dict[str, Any]]]]:
    """The mean loss of each candidate over the search's seeds, and its runs."""
    values: dict[str, list[float | None]] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    for job in folder.search_jobs(sweep):
        status = folder.status(job)
        value = value_of(job, METRIC) if status.state == "done" else None
        row = {"seed": job.seed, "state": status.state, "value": value, "reason": status.reason}
        values.setdefault(job.variant.name, []).append(value)
        runs.setdefault(job.variant.name, []).append(row)
    means: dict[str, float | None] = {}
    for name, own in values.items():
        known = [value for value in own if value is not None]
        means[name] = sum(known) / len(known) if len(known) == len(own) else None
    return means, runs


def _best(candidates: list[Variant], means: Mapping[str, float | None]) -> Variant | None:
    """The candidate with the lowest mean loss, the first of equal ones; None if none has one."""
    best: Variant | None = None
    lowest = 0.0
    for candidate in candidates:
        mean = means[candidate.name]
        if mean is not None and (best is None or mean < lowest):
            best = candidate
            lowest = mean
    return best


def _edges(best: Variant, values: Mapping[str, list[Any]]) -> list[str]:
    """The keys whose value is the first or the last of several that were tried."""
    edges = []
    for key, tried in values.items():
        if len(tried) > 1 and best.searched[key] in (tried[0], tried[-1]):
            edges.append(key)
    return edges


def chosen_variants(sweep: Sweep, found: Mapping[str, Any]) -> list[Variant]:
    """The variants with the values that a search has chosen.

    Args:
        sweep: it searches.
        found: the document of the search.

    Raises:
        UserError: no value of a variant gave a finite validation loss with every seed.
    """
    rows = {row["variant"]: row for row in found["rows"]}
    chosen = []
    for name, candidates in by_variant(sweep).items():
        values = rows[name]["chosen"]
        if values is None:
            raise UserError(
                f"sweep {sweep.name}: no value that {name} searches has a finite {METRIC} with every seed; "
                "see the logs under search/"
            )
        (best,) = [one for one in candidates if to_dict(dict(one.searched)) == values]
        chosen.append(chosen_of(best, name))
    return chosen


def recorded_search(sweep: Sweep, folder: SweepFolder) -> dict[str, Any] | None:
    """The document of a search that has ended in this folder; None if it has not, or the file is damaged.

    What was once chosen stays, so that a resumed sweep goes on with the same runs.
    """
    try:
        found = read_object(folder.path / FILE)
        chosen_variants(sweep, found)
    except (DocumentError, KeyError, TypeError, ValueError, UserError):
        return None
    return found
