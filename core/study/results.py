"""The results of a sweep so far, as the documents that its report is made of."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.recipe.key_paths import to_dict
from core.statistics.comparison import compare, interval
from core.storage.documents import DocumentError, finite_number, read_object
from core.study.matching import Matched
from core.study.sweep_file import Sweep, Variant
from core.study.sweep_folder import Job, SweepFolder
from core.study.training_losses import against

FACTS = (
    "params_total",
    "params_experts",
    "params_active",
    "flops_per_token",
    "kv_bytes_per_token",
    "top_k",
    "capacity_factor",
    "drops",
    "causal",
    "batch_dependent",
    "notices",
)
"""Keys of a description that a report shows of each variant beside its results."""

CLOCK = ("wall_seconds", "train_seconds", "tokens_per_second", "mfu")
"""Metrics that depend on what else the machine did."""

MEASURED = ("mfu", "peak_flops", "peak_memory_bytes")
"""Metrics that not every machine can measure."""

NOTHING_HELD_OUT = "the corpus has no validation split (fewer than 11 documents)"

HELD_OUT = ("val_bits_per_byte", "val_loss", "max_vio_global", "mtp_acceptance")
"""Metrics that are measured on validation text."""


def sweep_document(sweep: Sweep, matched: Matched, command: str, started: str) -> dict[str, Any]:
    """The document `sweep.json`: the question, what was held equal, and what each variant is."""
    schema = sweep.schema
    base = next(variant for variant in sweep.variants if variant.name == schema.baseline)
    base_values = _compared_values(base)
    variants = []
    for variant in sweep.variants:
        document = matched.documents[variant.name]
        row: dict[str, Any] = {
            "name": variant.name,
            "recipe": variant.source,
            "overrides": list(variant.overrides),
        }
        for fact in FACTS:
            row[fact] = document[fact]
        row["differences"] = _differences(base_values, _compared_values(variant))
        variants.append(row)
    return {
        "name": sweep.name,
        "title": schema.title,
        "metric": schema.metric,
        "better": schema.better,
        "baseline": schema.baseline,
        "seeds": schema.seeds,
        "command": command,
        "started": started,
        "held_equal": matched.held_equal,
        "not_equal": matched.not_equal,
        "variants": variants,
    }


def _differences(base: dict[str, Any], own: dict[str, Any]) -> dict[str, list[Any]]:
    """The key paths whose values differ, with the baseline's value and the variant's own."""
    found = {}
    for key in {**base, **own}:
        pair = [base.get(key), own.get(key)]
        if pair[0] != pair[1]:
            found[key] = pair
    return found


def _compared_values(variant: Variant) -> dict[str, Any]:
    """The values of a variant's recipe by key path, without its seed and its small sizes."""
    document = dict(variant.recipe.to_dict())
    document.pop("smoke", None)
    document.pop("seed", None)
    return _leaves(document)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every plain value by its key path; a whole list if it holds no sections."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {path: to_dict(value)}
    found: dict[str, Any] = {}
    for key, item in items:
        inner = f"{path}.{key}" if path else str(key)
        found |= _leaves(item, inner)
    return found


def _summary(job: Job) -> dict[str, Any] | None:
    """A finished run's `summary.json`; None if it cannot be read."""
    try:
        return read_object(job.path / "summary.json")
    except DocumentError:
        return None


def value_of(job: Job, metric: str) -> float | None:
    """The metric of a finished run; None if it has none or it is not a finite number."""
    summary = _summary(job)
    if summary is None:
        return None
    return finite_number(summary.get(metric))


def never_measured(job: Job, metric: str) -> str | None:
    """The reason why no run of the sweep can have the metric, from the summary of a finished one.

    None where other runs may have it: a loss that is not finite concerns this run alone.
    """
    summary = _summary(job)
    if summary is None or summary.get(metric) is not None:
        return None
    if metric in MEASURED:
        return "this machine does not measure it"
    if metric in HELD_OUT and not summary.get("validation_bytes"):
        return NOTHING_HELD_OUT
    return None


def sweep_results(sweep: Sweep, folder: SweepFolder, matched: Matched) -> dict[str, Any]:
    """The document `results.json`: each variant's runs, mean and interval, and its difference to the baseline."""
    metric = sweep.schema.metric
    baseline = sweep.schema.baseline
    runs: dict[str, list[dict[str, Any]]] = {}
    values: dict[str, dict[int, float]] = {}
    done: dict[str, dict[int, Path]] = {}
    for variant in sweep.variants:
        runs[variant.name] = []
        values[variant.name] = {}
        done[variant.name] = {}
    for job in folder.jobs(sweep):
        name = job.variant.name
        status = folder.status(job)
        value = value_of(job, metric) if status.state == "done" else None
        if value is not None:
            values[name][job.seed] = value
            done[name][job.seed] = job.path
        row = {"seed": job.seed, "state": status.state, "value": value, "reason": status.reason}
        runs[name].append(row)
    differences = compare(values, baseline, sweep.schema.better)
    rows = []
    for name, own in values.items():
        training_loss = None
        if name != baseline:
            training_loss = against(done[baseline], done[name])
        row = {
            "variant": name,
            "runs": runs[name],
            "n": len(own),
            **_mean(own),
            "difference": differences[name],
            "training_loss": training_loss,
        }
        rows.append(row)
    return {
        "metric": metric,
        "baseline": baseline,
        "rows": rows,
        "warnings": [*_clock_warnings(sweep, folder), *_warnings(runs, matched)],
    }


def _mean(values: dict[int, float]) -> dict[str, float | None]:
    """The mean of a variant's values with its interval; all None without a value."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    found = interval(list(values.values()))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _clock_warnings(sweep: Sweep, folder: SweepFolder) -> list[str]:
    """A warning with the spread of throughput, where the metric depends on the clock."""
    metric = sweep.schema.metric
    if metric not in CLOCK:
        return []
    rates: dict[str, list[float]] = {}
    for job in folder.jobs(sweep):
        rate = value_of(job, "tokens_per_second")
        if rate is not None:
            rates.setdefault(job.variant.name, []).append(rate)
    if not rates:
        return []
    spread = ", ".join(f"{name} {min(each):.0f} to {max(each):.0f}" for name, each in rates.items())
    why = f"{metric} is measured by the clock, and throughput varied with the machine's other work"
    return [f"{why}: {spread} tokens/s"]


def _warnings(runs: dict[str, list[dict[str, Any]]], matched: Matched) -> list[str]:
    """What a reader must know first: runs that failed, variants that do not match, caveats of their recipes."""
    failed = []
    for name, own in runs.items():
        for run in own:
            if run["state"] == "failed":
                failed.append(f"{name}, seed {run['seed']}: {run['reason']}")
    caveats = []
    for name, document in matched.documents.items():
        caveats += [f"{name}: {notice}" for notice in document["notices"]]
    return [*failed, *matched.not_equal, *caveats]
