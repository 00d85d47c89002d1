"""Numbers and results in words."""

from collections.abc import Iterable
from typing import Any

from core.reports.folder import Run, Study, finite
from core.statistics.comparison import NOT_AFTER_HOLM, NOTHING_SHOWN

METRICS = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss (nats per token)",
    "max_vio_global": "MaxVio over the held-out split",
    "max_vio_batch": "MaxVio of the last 100 steps",
    "mtp_acceptance": "agreement of multi-token depth 1",
    "tokens_per_second": "tokens per second",
    "dropped_fraction": "dropped fraction",
}
LOSS = "loss/next_token"
NONE = "–"  # noqa: RUF001 - a dash, as in tables


def metric_words(key: str) -> str:
    """What a metric is, for people."""
    return METRICS.get(key, key)


def number(value: float | None, decimals: int | None = None) -> str:
    """A number with so many decimals, or with four digits."""
    if value is None:
        return NONE
    text = (
        f"{value:,.{decimals}f}" if decimals is not None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    )
    return text.replace("-", "−")  # noqa: RUF001 - the minus sign


def signed(value: float | None, decimals: int) -> str:
    """A difference: its sign is always there."""
    if value is None:
        return NONE
    value = round(value, decimals) or 0.0  # what is shown as nothing has no sign
    return ("+" if value > 0 else "") + number(value, decimals)


def yes_no(value: Any) -> str:
    """A promise of a recipe."""
    return NONE if value is None else "yes" if value else "no"


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return NONE
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def progress(study: Study) -> str | None:
    """That not everything is there yet; None where it is."""
    if study.sweep is None:
        (run,) = study.runs
        return _how_far(run) if run.state in ("running", "waiting") else None
    rest_of = {state: study.count(state) for state in ("running", "interrupted", "failed", "waiting")}
    if not any(count for state, count in rest_of.items() if state != "failed"):
        return None
    rest = ", ".join(f"{count} {state}" for state, count in rest_of.items() if count)
    how = "Not finished" if rest_of["interrupted"] and not rest_of["running"] else "In progress"
    return f"{how}: {study.count('done')} of {len(study.runs)} runs done ({rest}). All numbers may still change."


def _how_far(run: Run) -> str:
    step = run.metrics["step"].max() if run.has("step") else None
    budget = run.recipe.get("budget") or {}
    asked = {key: finite(budget.get(key)) for key in ("steps", "tokens")} if isinstance(budget, dict) else {}
    if step is None:
        return "In progress: no step has been logged yet."
    of = f" of {asked['steps']:,.0f}" if asked.get("steps") else ""
    if not of and asked.get("tokens") and run.has("tokens"):
        of = f", {run.metrics['tokens'].max():,.0f} of {asked['tokens']:,.0f} tokens"
    return f"In progress, or stopped early: step {step:,.0f}{of}. There is no summary yet."


def in_short(study: Study) -> list[str]:
    """The verdicts, variants gathered; a sentence for each verdict there is."""
    baseline = str((study.sweep or {}).get("baseline"))
    found: dict[str | None, list[str]] = {}
    for row in study.results.get("rows") or []:
        if row.get("variant") == baseline or not row.get("n"):
            continue
        name = str(row.get("variant"))
        but = caveats(study, name)
        found.setdefault((row.get("difference") or {}).get("verdict"), []).append(f"{name} ({but})" if but else name)
    told = [
        f"{word.capitalize()} than {baseline}: {listed(found[word])}." for word in ("better", "worse") if word in found
    ]
    if NOT_AFTER_HOLM in found:
        corrected = f"No difference to {baseline} shown after Holm's correction, though the interval leaves out 0"
        told.append(f"{corrected}: {listed(found[NOT_AFTER_HOLM])}.")
    if NOTHING_SHOWN in found:
        told.append(f"No difference to {baseline} shown: {listed(found[NOTHING_SHOWN])}.")
    if not told and None in found:
        return [f"There are too few seeds to tell any variant from {baseline}."]
    if None in found:
        told.append(f"Too few seeds in common with {baseline} to say: {listed(found[None])}.")
    if told and (but := seeds_without(study, baseline)):
        told.append(f"All of this rests on fewer seeds of {baseline} than were asked for ({but}).")
    return told


def caveats(study: Study, name: str) -> str:
    """What must be known wherever a variant's verdict stands; the warnings tell it in full."""
    sweep = study.sweep or {}
    fact: dict[str, Any] = next((v for v in sweep.get("variants") or [] if v["name"] == name), {})
    found = ["not causal"] if fact.get("causal") is False else ["see its note"] if fact.get("notices") else []
    if any(str(line).startswith(f"{name}:") for line in sweep.get("not_equal") or []):
        found.append("not held equal")
    return ", ".join(filter(None, [seeds_without(study, name), *found]))


def seeds_without(study: Study, name: str) -> str:
    """How many of a variant's seeds count nowhere, because they failed or finished without the metric."""
    runs = study.of(name)
    failed, lost = sum(run.state == "failed" for run in runs), sum(_is_lost(study, run) for run in runs)
    told = [f"{failed} of {len(runs)} failed"] * bool(failed) + [f"{lost} of {len(runs)} without a value"] * bool(lost)
    return ", ".join(told)


def warnings(study: Study) -> list[tuple[str, list[str]]]:
    """What a reader must know before any number: headings and their sentences."""
    sweep = study.sweep or {}
    failed = [_failure(study, run) for run in study.runs if run.state == "failed"]
    rose = [s for run in study.runs if (s := _rise(study, run))]
    skipped = [s for run in study.runs if (s := _skipped(study, run))]
    notices = _notices(study)
    lost = [
        f"{_name(study, run)}: finished without a finite {study.metric}" for run in study.runs if _is_lost(study, run)
    ]
    grouped = [("Runs that failed", failed), ("Runs without a result", lost), ("Steps that were skipped", skipped)]
    grouped += [("Losses that rose above where they began", rose)]
    unequal = [str(line) for line in sweep.get("not_equal") or []]
    grouped += [("Not held equal", unequal), ("Notes on the parts in use", notices)]
    known = {line for _, lines in grouped for line in lines} | _told_by_runner(study)
    others = [str(line) for line in study.results.get("warnings") or [] if str(line) not in known]
    grouped += [("Also", others), ("Files", study.unread)]
    return [(heading, lines) for heading, lines in grouped if lines]


def _name(study: Study, run: Run) -> str:
    return f"{run.variant}, seed {run.seed}" if study.sweep is not None else "This run"


def _is_lost(study: Study, run: Run) -> bool:
    """A sweep's run that finished and still counts nowhere."""
    return study.sweep is not None and run.state == "done" and run.number(study.metric) is None


def _failure(study: Study, run: Run) -> str:
    return f"{_name(study, run)}: {run.reason or 'no reason was recorded'}"


def _skipped(study: Study, run: Run) -> str | None:
    """Divergence that a run survived: steps whose gradient was not finite, or losses that were not."""
    logged = float(run.metrics["skipped_steps"].max()) if run.has("skipped_steps") else 0.0
    count = run.number("skipped_steps") or logged
    return f"{_name(study, run)}: {count:,.0f} steps, because the gradient was not finite" if count else None


def _rise(study: Study, run: Run) -> str | None:
    """Divergence that stayed finite: a loss above the first one, which an untrained model has."""
    if not run.has(LOSS):
        return None
    losses = run.metrics[["step", LOSS]].dropna()
    first, highest = losses[LOSS].iloc[0], losses.loc[losses[LOSS].idxmax()]
    if not highest[LOSS] > first:
        return None
    return f"{_name(study, run)}: {highest[LOSS]:.2f} nats at step {highest['step']:,.0f}, from {first:.2f} at first"


def _notices(study: Study) -> list[str]:
    """Each notice once, with the variants that it holds for; and what no one else says of causality."""
    owners: dict[str, list[str]] = {}
    for variant in (study.sweep or {}).get("variants") or []:
        own = [str(n) for n in variant.get("notices") or []]
        if variant.get("causal") is False and not any("causal" in n.lower() for n in own):
            own.append("not causal: an output may depend on later tokens, so its loss is no measure of prediction")
        for notice in own:
            owners.setdefault(notice, []).append(str(variant["name"]))
    if study.sweep is None:
        return [str(n) for n in study.runs[0].summary.get("notices") or []]
    return [f"{listed(names)}: {notice}" for notice, names in owners.items()]


def _told_by_runner(study: Study) -> set[str]:
    """How the runner words what stands under a heading of its own here."""
    variants = (study.sweep or {}).get("variants") or []
    return {f"{v['name']}: {n}" for v in variants for n in v.get("notices") or []}
