"""Numbers, durations, verdicts and warnings as the report words them."""

from collections.abc import Callable, Iterable
from typing import Any

from core.reports.study_files import Run, Study
from core.statistics.comparison import CENSORED, NOT_AFTER_HOLM, NOTHING_SHOWN
from core.storage.documents import finite_number

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
UNFINISHED = ("running", "interrupted", "failed", "waiting")
"""States of a run that has no result, in the order in which they are counted."""


def metric_words(key: str) -> str:
    """The meaning of a metric in words; the key itself if it is not one of `METRICS`."""
    return METRICS.get(key, key)


def number(value: float | None, decimals: int | None = None) -> str:
    """A number with the given decimals, or with four significant digits; a dash for None."""
    if value is None:
        return NONE
    if decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif abs(value) < 1e4:
        text = f"{value:,.4g}"
    else:
        text = f"{value:,.0f}"
    return text.replace("-", "−")  # noqa: RUF001 - the minus sign


def signed(value: float | None, decimals: int) -> str:
    """A difference with its sign, also if it is positive; what is rounded to 0 has no sign."""
    if value is None:
        return NONE
    shown = round(value, decimals) or 0.0
    text = number(shown, decimals)
    if shown > 0:
        return f"+{text}"
    return text


def yes_no(value: Any) -> str:
    """A truth value in words; a dash if it was not recorded."""
    if value is None:
        return NONE
    elif value:
        return "yes"
    return "no"


def listed(words: Iterable[str]) -> str:
    """The words as an enumeration: `a, b and c`."""
    *most, last = words
    if not most:
        return last
    return f"{', '.join(most)} and {last}"


def duration(seconds: float | None) -> str:
    """A time in seconds, in minutes from 2 minutes on, in hours from 2 hours on."""
    if seconds is None:
        return NONE
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s"


def time_unit(longest: float) -> tuple[str, float]:
    """The unit of an axis that reaches to `longest` seconds: its name, and how many seconds it has."""
    if longest > 7200:
        return "hours", 3600.0
    if longest > 120:
        return "minutes", 60.0
    return "seconds", 1.0


def progress(study: Study) -> str | None:
    """A sentence on how much is done; None if nothing is left to do."""
    if study.sweep is None:
        (run,) = study.runs
        if run.state in ("running", "waiting"):
            return _progress_of_run(run)
        return None
    counts = {state: study.count(state) for state in UNFINISHED}
    if counts["running"] + counts["interrupted"] + counts["waiting"] == 0:
        return None
    rest = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if counts["interrupted"] and not counts["running"]:
        status = "Not finished"
    else:
        status = "In progress"
    done = f"{study.count('done')} of {len(study.runs)} runs done"
    return f"{status}: {done} ({rest}). All numbers may still change."


def _progress_of_run(run: Run) -> str:
    if not run.has("step"):
        return "In progress: no step has been logged yet."
    step = run.metrics["step"].max()
    steps = _budgeted(run, "steps")
    tokens = _budgeted(run, "tokens")
    goal = ""
    if steps:
        goal = f" of {steps:,.0f}"
    elif tokens and run.has("tokens"):
        goal = f", {run.metrics['tokens'].max():,.0f} of {tokens:,.0f} tokens"
    return f"In progress, or stopped early: step {step:,.0f}{goal}. There is no summary yet."


def _budgeted(run: Run, key: str) -> float | None:
    """A number of the recipe's section `budget`; None if it has none."""
    budget = run.recipe.get("budget")
    if isinstance(budget, dict):
        return finite_number(budget.get(key))
    return None


def in_short(study: Study) -> list[str]:
    """A sentence for each verdict that occurs, naming the variants that have it."""
    baseline = str((study.sweep or {}).get("baseline"))
    found = _by_verdict(study, baseline)
    sentences = []
    for word in ("better", "worse"):
        if word in found:
            sentences.append(f"{word.capitalize()} than {baseline}: {listed(found[word])}.")
    if NOT_AFTER_HOLM in found:
        corrected = f"No difference to {baseline} shown after Holm's correction, though the interval leaves out 0"
        sentences.append(f"{corrected}: {listed(found[NOT_AFTER_HOLM])}.")
    if NOTHING_SHOWN in found:
        sentences.append(f"No difference to {baseline} shown: {listed(found[NOTHING_SHOWN])}.")
    if CENSORED in found:
        bound = "a run ended before its load was balanced, so its value is only a lower bound"
        sentences.append(
            f"Not compared with {baseline}, because {bound}: {listed(found[CENSORED])}."
        )
    if not sentences and None in found:
        return [f"There are too few seeds to distinguish any variant from {baseline}."]
    if None in found:
        sentences.append(f"Too few seeds in common with {baseline} to say: {listed(found[None])}.")
    missing = seeds_without(study, baseline)
    if sentences and missing:
        rests_on = f"All of this rests on fewer seeds of {baseline} than were planned"
        sentences.append(f"{rests_on} ({missing}).")
    return sentences


def _by_verdict(study: Study, baseline: str) -> dict[str | None, list[str]]:
    """The variants that have runs, by verdict (None: without one); each name is followed by its verdict notes."""
    found: dict[str | None, list[str]] = {}
    for row in study.results.get("rows") or []:
        if row.get("variant") == baseline or not row.get("n"):
            continue
        name = str(row.get("variant"))
        notes = verdict_notes(study, name)
        if notes:
            name = f"{name} ({notes})"
        verdict = (row.get("difference") or {}).get("verdict")
        found.setdefault(verdict, []).append(name)
    return found


def verdict_notes(study: Study, name: str) -> str:
    """The reservations printed beside a variant's verdict, in a few words; the warnings give them in full."""
    fact = _recorded(study, name)
    found = [seeds_without(study, name)]
    if fact.get("causal") is False:
        found.append("not causal")
    elif fact.get("notices"):
        found.append("see its note")
    unequal = (study.sweep or {}).get("not_equal") or []
    if any(str(line).startswith(f"{name}:") for line in unequal):
        found.append("not held equal")
    return ", ".join(filter(None, found))


def _recorded(study: Study, name: str) -> dict[str, Any]:
    """The entry of `sweep.json` on a variant; {} if it has none."""
    for variant in (study.sweep or {}).get("variants") or []:
        if variant["name"] == name:
            return dict(variant)
    return {}


def seeds_without(study: Study, name: str) -> str:
    """How many of a variant's runs count nowhere: those that failed, and those that finished without the metric."""
    runs = study.of(name)
    failed = sum(run.state == "failed" for run in runs)
    lost = sum(_is_lost(study, run) for run in runs)
    counts = []
    if failed:
        counts.append(f"{failed} of {len(runs)} failed")
    if lost:
        counts.append(f"{lost} of {len(runs)} without a value")
    return ", ".join(counts)


def warnings(study: Study) -> list[tuple[str, list[str]]]:
    """What a reader must know before any number: pairs of a heading and its sentences, without empty ones."""
    unequal = [str(line) for line in (study.sweep or {}).get("not_equal") or []]
    grouped = [
        ("Runs that failed", _about_runs(study, _failure)),
        ("Runs without a result", _about_runs(study, _loss_of_result)),
        ("Steps that were skipped", _about_runs(study, _skipped)),
        ("Losses that rose above where they began", _about_runs(study, _rise)),
        ("Not held equal", unequal),
        ("Notes on the parts in use", _notices(study)),
    ]
    known = _notices_as_recorded(study)
    for _, lines in grouped:
        known.update(lines)
    recorded = [str(line) for line in study.results.get("warnings") or []]
    others = [line for line in recorded if line not in known]
    grouped += [("Also", others), ("Files", study.unread)]
    return [(heading, lines) for heading, lines in grouped if lines]


def _about_runs(study: Study, sentence_on: Callable[[Study, Run], str | None]) -> list[str]:
    """A sentence with the run's name for each run on which there is something to say."""
    found = []
    for run in study.runs:
        sentence = sentence_on(study, run)
        if sentence is not None:
            found.append(f"{_name(study, run)}: {sentence}")
    return found


def _name(study: Study, run: Run) -> str:
    if study.sweep is not None:
        return f"{run.variant}, seed {run.seed}"
    return "This run"


def _is_lost(study: Study, run: Run) -> bool:
    """Whether a run of a sweep finished without the metric, so that it counts nowhere."""
    return study.sweep is not None and run.state == "done" and run.number(study.metric) is None


def _loss_of_result(study: Study, run: Run) -> str | None:
    if _is_lost(study, run):
        return f"finished without a finite {study.metric}"
    return None


def _failure(study: Study, run: Run) -> str | None:
    if run.state == "failed":
        return run.reason or "no reason was recorded"
    return None


def _skipped(study: Study, run: Run) -> str | None:
    """A sentence on divergence that a run survived: steps whose gradient was not finite, or losses that were not."""
    logged = 0.0
    if run.has("skipped_steps"):
        logged = float(run.metrics["skipped_steps"].max())
    count = run.number("skipped_steps") or logged
    if count:
        return f"{count:,.0f} steps, because the gradient was not finite"
    return None


def _rise(study: Study, run: Run) -> str | None:
    """A sentence on divergence that stayed finite: a loss above the first one, which an untrained model has."""
    if not run.has(LOSS):
        return None
    losses = run.metrics[["step", LOSS]].dropna()
    first = losses[LOSS].iloc[0]
    highest = losses.loc[losses[LOSS].idxmax()]
    if not highest[LOSS] > first:
        return None
    return f"{highest[LOSS]:.2f} nats at step {highest['step']:,.0f}, from {first:.2f} at first"


def _notices(study: Study) -> list[str]:
    """Each notice once, with the variants that it holds for; one is added for a variant that is not causal."""
    if study.sweep is None:
        return [str(notice) for notice in study.runs[0].summary.get("notices") or []]
    owners: dict[str, list[str]] = {}
    for variant in study.sweep.get("variants") or []:
        own = [str(notice) for notice in variant.get("notices") or []]
        says_so = any("causal" in notice.lower() for notice in own)
        if variant.get("causal") is False and not says_so:
            own.append(
                "not causal: an output may depend on later tokens, so its loss does not measure prediction"
            )
        for notice in own:
            owners.setdefault(notice, []).append(str(variant["name"]))
    return [f"{listed(names)}: {notice}" for notice, names in owners.items()]


def _notices_as_recorded(study: Study) -> set[str]:
    """The warnings of `results.json` that repeat a notice, which has a heading of its own here."""
    found = set()
    for variant in (study.sweep or {}).get("variants") or []:
        for notice in variant.get("notices") or []:
            found.add(f"{variant['name']}: {notice}")
    return found
