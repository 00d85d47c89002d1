"""The results of a sweep so far, as the documents that its report is made of."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.recipe.key_paths import to_dict
from core.statistics.comparison import CENSORED, compare, interval
from core.statistics.recovery import WINDOW
from core.storage.documents import DocumentError, finite_number, read_object
from core.study.expected import observed_difference, smallest_difference
from core.study.factor_view import factor_view
from core.study.matching import AFTER_SHIFT, Matched
from core.study.search_budget import budget_sentences
from core.study.sweep_file import Sweep, Variant
from core.study.sweep_folder import Job, SweepFolder
from core.study.sweep_schema import average_of
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

NOTHING_HELD_OUT = (
    "nothing is held out to validate on: data.validation_fraction or data.validation hold out text"
)

HELD_OUT = ("val_bits_per_byte", "val_loss", "max_vio_global", "mtp_acceptance")
"""Metrics that are measured on validation text."""


def is_held_out(metric: str) -> bool:
    """Whether a metric is measured on validation text."""
    return metric in HELD_OUT or bool(average_of(metric))


def sweep_document(
    sweep: Sweep, matched: Matched, command: str, started: str, per_gpu: int | None = None
) -> dict[str, Any]:
    """The document `sweep.json`: the question, what it could show, what was held equal, and what each variant is."""
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
        "per_gpu": per_gpu,
        "smallest_difference": smallest_difference(schema, len(sweep.variants), sweep.expected),
        "search": _search_document(sweep, matched),
        "held_equal": matched.held_equal,
        "not_equal": matched.not_equal,
        "left_out": left_out_document(sweep),
        "variants": variants,
    }


def left_out_document(sweep: Sweep) -> list[dict[str, Any]]:
    """The points of the grid that are not run: name, values, reason, and whether a rule or a check left them out."""
    rows = []
    for one in sweep.left_out:
        row = {"name": one.name, "values": to_dict(dict(one.values))}
        rows.append({**row, "reason": one.reason, "by": one.by})
    return rows


def _search_document(sweep: Sweep, matched: Matched) -> dict[str, Any] | None:
    """The seeds, values and budgets of the search, known before it begins; None without a search."""
    if not matched.budgets:
        return None
    return {
        "seeds": list(sweep.schema.search.seeds),
        "budgets": {name: asdict(budget) for name, budget in matched.budgets.items()},
        "sentences": budget_sentences(sweep, matched.budgets),
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
    if is_held_out(metric) and not summary.get("validation_bytes"):
        return NOTHING_HELD_OUT
    if metric in AFTER_SHIFT:
        return f"metrics.csv lacks a step, or fewer than {WINDOW} steps come after the shift"
    return None


def sweep_results(
    sweep: Sweep,
    folder: SweepFolder,
    matched: Matched,
    search: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document `results.json`: each variant's runs, mean and interval, and its difference to the baseline.

    Args:
        sweep: the variants, with chosen values where they search.
        folder: the sweep's.
        matched: what is held equal.
        search: the document of the search so far; None: there is none.
    """
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
        row: dict[str, Any] = {"seed": job.seed, "state": status.state, "value": value}
        row["reason"] = status.reason
        if value is not None and is_censored(job, metric):
            row["censored"] = True
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
            "smallest_difference": _observed(values, name, baseline),
            "training_loss": training_loss,
        }
        rows.append(row)
    censored = withhold_verdicts(rows, baseline)
    warnings = [
        *censored,
        *_shared_gpus(folder),
        *_clock_warnings(sweep, folder),
        *_warnings(runs, matched),
    ]
    found: dict[str, Any] = {"metric": metric, "baseline": baseline, "rows": rows}
    found["left_out"] = left_out_document(sweep)
    found["factors"] = factor_view(sweep, values, censored=bool(censored))
    found["warnings"] = warnings
    if search is not None:
        found["search"] = dict(search)
        warnings[:0] = search_caveats(search)
    return found


def _observed(values: Mapping[str, Mapping[int, float]], name: str, baseline: str) -> float | None:
    """The smallest difference that the comparison could show, with the observed deviation; None without one."""
    base = values[baseline]
    seeds = sorted(base.keys() & values[name].keys())
    if name == baseline or len(seeds) < 2:
        return None
    differences = [values[name][seed] - base[seed] for seed in seeds]
    return observed_difference(differences, len(values) - 1)


def is_censored(job: Job, metric: str) -> bool:
    """Whether a run ended before its load was balanced again, so that its value is a lower bound."""
    if metric != "steps_until_balanced":
        return False
    summary = _summary(job) or {}
    return summary.get("balanced_again") is False


def withhold_verdicts(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    """Takes intervals, p and verdict from rows that a censored run is part of; a t test takes its bound for a value.

    Args:
        rows: those of `results.json`, which are changed.
        baseline: the variant that all others are compared with.

    Returns:
        A warning for each censored run.
    """
    censored: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        censored[row["variant"]] = [run for run in row["runs"] if run.get("censored")]
    warnings = []
    for row in rows:
        name = row["variant"]
        if censored[name]:
            row.update(low=None, high=None)
        if row["difference"] is not None and (censored[name] or censored[baseline]):
            withheld = dict.fromkeys(("p", "p_holm", "effect_size", "low", "high"))
            row["difference"] = {**row["difference"], **withheld, "verdict": CENSORED}
            row["smallest_difference"] = None
        for run in censored[name]:
            bound = f"at least {run['value']:g} steps, the value that its mean contains"
            seed = f"{name}, seed {run['seed']}"
            warnings.append(f"{seed}: not balanced again before the end: {bound}")
    return warnings


def search_caveats(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a search: values at the edge of what was tried, and runs that failed."""
    caveats = []
    for row in found["rows"]:
        for key in row["edges"]:
            at = f"{row['variant']}: the chosen {key} = {row['chosen'][key]} is at the edge of the values"
            caveats.append(f"{at} that were searched: a better one may lie outside")
        for candidate in row["candidates"]:
            for run in candidate["runs"]:
                if run["state"] == "failed":
                    name = f"search of {candidate['name']}, seed {run['seed']}"
                    caveats.append(f"{name}: {run['reason']}; this value cannot be chosen")
    return caveats


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


def runs_per_gpu(folder: SweepFolder) -> int:
    """The most runs of the sweep that shared a GPU, as `sweep.json` has it; 0 if none did."""
    try:
        recorded = finite_number(read_object(folder.path / "sweep.json").get("per_gpu"))
    except DocumentError:
        return 0
    return int(recorded or 0)


def _shared_gpus(folder: SweepFolder) -> list[str]:
    """A warning that times say nothing, where several runs shared a GPU."""
    most = runs_per_gpu(folder)
    if most < 2:
        return []
    unlike = "their seconds, tokens per second and MFU are not comparable, with each other or with other runs"
    return [f"up to {most} runs shared each GPU: {unlike}"]


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
