"""The results of a sweep as two tables: `runs.csv` has a row for each run, `variants.csv` one for each variant.

The columns are the same for every sweep. A cell is empty where there is no value; numbers have all their digits, truth
values are `true` and `false`, and quotes stand where a text needs them (RFC 4180, with line feeds).
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from core.storage.documents import DocumentError, finite_number, read_object
from core.study.matching import Matched
from core.study.sweep_file import Sweep
from core.study.sweep_folder import SweepFolder
from core.study.sweep_schema import METRICS

OF_A_RUN = ("variant", "section", "point", "seed", "state", "reason", "metric", "value", "censored")
"""Columns of `runs.csv` before the numbers of `summary.json`."""

RUN_COLUMNS = (*OF_A_RUN, "process_seconds", *METRICS)
"""The columns of `runs.csv`."""

SIZES = ("params_total", "params_active", "flops_per_token", "kv_bytes_per_token")
"""Columns of `variants.csv` that describe a variant before it is run."""

VARIANT_COLUMNS = (
    "variant",
    "section",
    "point",
    "left_out",
    "metric",
    "better",
    "baseline",
    "runs",
    "n",
    "mean",
    "mean_low",
    "mean_high",
    "difference_n",
    "difference",
    "difference_low",
    "difference_high",
    "effect_size",
    "p",
    "p_holm",
    "verdict",
    "smallest_difference",
    *SIZES,
)
"""The columns of `variants.csv`."""

RUNS = "runs.csv"
VARIANTS = "variants.csv"


def write_tables(
    sweep: Sweep, folder: SweepFolder, matched: Matched, found: Mapping[str, Any]
) -> None:
    """Writes both tables into the sweep's folder.

    Args:
        sweep: the variants.
        folder: the sweep's.
        matched: the variants' descriptions.
        found: the document `results.json`.
    """
    by_name = {row["variant"]: row for row in found["rows"]}
    runs = _runs(sweep, folder, by_name)
    folder.write(folder.path / RUNS, as_csv(RUN_COLUMNS, runs))
    variants = _variants(sweep, matched, by_name)
    folder.write(folder.path / VARIANTS, as_csv(VARIANT_COLUMNS, variants))


def as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table as CSV, with a header; a row's missing keys are empty cells."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    return str(value)


def _point(values: Mapping[str, Any]) -> str:
    """The values of the grid as JSON; empty without a grid."""
    return json.dumps(dict(values), default=str, ensure_ascii=False) if values else ""


def _runs(
    sweep: Sweep, folder: SweepFolder, by_name: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each run of the comparison."""
    recorded = {}
    for name, row in by_name.items():
        for run in row["runs"]:
            recorded[name, run["seed"]] = run
    rows = []
    for job in folder.jobs(sweep):
        run = recorded[job.variant.name, job.seed]
        row = {
            "variant": job.variant.name,
            "section": job.variant.section,
            "point": _point(job.variant.point),
            "metric": sweep.schema.metric,
            "process_seconds": folder.status(job).seconds,
            **run,
            "censored": run.get("censored", False),
        }
        if run["state"] == "done":
            row |= _numbers(job.path)
        rows.append(row)
    return rows


def _numbers(run: Any) -> dict[str, float | None]:
    """The finite numbers of a run's summary."""
    try:
        summary = read_object(run / "summary.json")
    except DocumentError:
        return {}
    numbers = {}
    for key in METRICS:
        value = summary.get(key)
        numbers[key] = None if finite_number(value) is None else value
    return numbers


def _variants(
    sweep: Sweep, matched: Matched, by_name: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each variant, and one for each point of the grid that is left out."""
    schema = sweep.schema
    question = {"metric": schema.metric, "better": schema.better, "baseline": schema.baseline}
    rows: list[dict[str, Any]] = []
    for variant in sweep.variants:
        result = by_name[variant.name]
        difference = result["difference"] or {}
        document = matched.documents[variant.name]
        row: dict[str, Any] = {
            "variant": variant.name,
            "section": variant.section,
            "point": _point(variant.point),
            **question,
            "runs": len(result["runs"]),
            "n": result["n"],
            "mean": result["mean"],
            "mean_low": result["low"],
            "mean_high": result["high"],
            "difference_n": difference.get("n"),
            "difference": difference.get("mean"),
            "difference_low": difference.get("low"),
            "difference_high": difference.get("high"),
            "smallest_difference": result["smallest_difference"],
        }
        for key in ("effect_size", "p", "p_holm", "verdict"):
            row[key] = difference.get(key)
        for key in SIZES:
            row[key] = document[key]
        rows.append(row)
    for one in sweep.left_out:
        row = {"variant": one.name, "section": one.section, "point": _point(one.values)}
        rows.append({**row, **question, "left_out": one.reason, "runs": 0, "n": 0})
    return rows
