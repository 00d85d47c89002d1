"""What a sweep has found so far, as the documents that its report is made of."""

import json
import math
from pathlib import Path
from typing import Any

from core.recipe.resolve import to_dict
from core.statistics.comparison import compare, interval
from core.study.curves import against
from core.study.folder import Job, SweepFolder
from core.study.matching import Matched
from core.study.sweep_file import Sweep

FACTS = (
    *("params_total", "params_experts", "params_active", "flops_per_token", "kv_bytes_per_token"),
    *("top_k", "capacity_factor", "drops", "causal", "batch_dependent", "notices"),
)
"""What is told of each variant beside its results."""

CLOCK = ("wall_seconds", "train_seconds", "tokens_per_second", "mfu")
"""Metrics that depend on what else the machine did."""

MEASURED = ("mfu", "peak_flops", "peak_memory_bytes")
"""Metrics that not every machine can measure."""

NOTHING_HELD_OUT = "the corpus has no validation split (fewer than 11 documents)"

HELD_OUT = ("val_bits_per_byte", "val_loss", "max_vio_global", "mtp_acceptance")
"""Metrics that are measured on validation text."""


def identity(sweep: Sweep, matched: Matched, command: str, started: str) -> dict[str, Any]:
    """`sweep.json`: the question, what was held equal, and what each variant is."""
    base = next(v for v in sweep.variants if v.name == sweep.schema.baseline)
    leaves = _leaves(_model_of(base.recipe))
    variants = []
    for variant in sweep.variants:
        own = _leaves(_model_of(variant.recipe))
        keys = [key for key in {**leaves, **own} if leaves.get(key) != own.get(key)]
        variants.append(
            {
                "name": variant.name,
                "recipe": variant.source,
                "overrides": list(variant.overrides),
                **{fact: matched.documents[variant.name][fact] for fact in FACTS},
                "differences": {key: [leaves.get(key), own.get(key)] for key in keys},
            }
        )
    schema = sweep.schema
    head = {"name": sweep.name, "title": schema.title, "metric": schema.metric, "better": schema.better}
    more = {"baseline": schema.baseline, "seeds": schema.seeds, "command": command, "started": started}
    return {**head, **more, "held_equal": matched.held_equal, "not_equal": matched.not_equal, "variants": variants}


def _model_of(recipe: Any) -> dict[str, Any]:
    return {k: v for k, v in recipe.to_dict().items() if k not in ("smoke", "seed")}


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every plain value by its key path; a whole list where it holds no sections."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict) and not (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
        return {path: to_dict(value)}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _leaves(item, f"{path}.{key}" if path else str(key))
    return found


def value_of(job: Job, metric: str) -> float | None:
    """The metric of a finished run; None where it has none or it is no number."""
    try:
        value = json.loads((job.path / "summary.json").read_text(encoding="utf-8")).get(metric)
    except (OSError, ValueError):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def never_measured(job: Job, metric: str) -> str | None:
    """Why no run of the sweep can have the metric, where a finished one tells; a loss that is no number is its own."""
    try:
        summary = json.loads((job.path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if summary.get(metric) is not None:
        return None
    if metric in MEASURED:
        return "this machine does not measure it"
    if metric in HELD_OUT and not summary.get("validation_bytes"):
        return NOTHING_HELD_OUT
    return None


def results(sweep: Sweep, folder: SweepFolder, matched: Matched) -> dict[str, Any]:
    """`results.json`: each variant's runs, mean and interval, and its difference to the baseline."""
    metric, baseline = sweep.schema.metric, sweep.schema.baseline
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in sweep.variants}
    values: dict[str, dict[int, float]] = {variant.name: {} for variant in sweep.variants}
    done: dict[str, dict[int, Path]] = {variant.name: {} for variant in sweep.variants}
    for job in folder.jobs(sweep):
        status, value = folder.status(job), None
        if status.state == "done" and (value := value_of(job, metric)) is not None:
            values[job.variant.name][job.seed], done[job.variant.name][job.seed] = value, job.path
        row = {"seed": job.seed, "state": status.state, "value": value, "reason": status.reason}
        runs[job.variant.name].append(row)
    differences = compare(values, baseline, sweep.schema.better)
    rows = []
    for name, mine in values.items():
        found = interval(list(mine.values())) if mine else None
        spread = {key: getattr(found, key) if found else None for key in ("mean", "low", "high")}
        held = {"difference": differences[name]}
        held["training_loss"] = against(done[baseline], done[name]) if name != baseline else None
        rows.append({"variant": name, "runs": runs[name], "n": len(mine), **spread, **held})
    return {
        "metric": metric,
        "baseline": baseline,
        "rows": rows,
        "warnings": [*_clock(sweep, folder), *_warnings(runs, matched)],
    }


def _clock(sweep: Sweep, folder: SweepFolder) -> list[str]:
    """Where the metric is measured by the clock, the spread of throughput that it must be read beside."""
    metric = sweep.schema.metric
    rates: dict[str, list[float]] = {}
    for job in folder.jobs(sweep) if metric in CLOCK else ():
        if (rate := value_of(job, "tokens_per_second")) is not None:
            rates.setdefault(job.variant.name, []).append(rate)
    if not rates:
        return []
    told = ", ".join(f"{name} {min(each):.0f} to {max(each):.0f}" for name, each in rates.items())
    why = f"{metric} is measured by the clock, and throughput varied with the machine's other work"
    return [f"{why}: {told} tokens/s"]


def _warnings(runs: dict[str, list[dict[str, Any]]], matched: Matched) -> list[str]:
    """What a reader must know first: runs that failed, variants that do not match, notices."""
    told = [
        f"{name}, seed {run['seed']}: {run['reason']}"
        for name, mine in runs.items()
        for run in mine
        if run["state"] == "failed"
    ]
    notices = [f"{name}: {n}" for name, document in matched.documents.items() for n in document["notices"]]
    return [*told, *matched.not_equal, *notices]
