"""Where the numbers come from: distributions, versions, machines, data, commands."""

import shlex
from collections import Counter
from typing import Any

from core.reports.folder import Run, Study

TOLD = ("components", "command", "commit", "dirty", "gpus")
"""What is recorded and not told under its own name."""


def facts(study: Study) -> list[tuple[str, list[str]]]:
    """What is recorded, and each value of it with the number of runs where the runs differ."""
    runs = [run for run in study.runs if run.provenance]
    found: dict[str, Counter[str]] = {}
    for run in runs:
        for key, value in _of(run):
            found.setdefault(key, Counter())[value] += 1
    told = []
    for key, counts in found.items():
        same = len(counts) == 1 or key == "parts"
        told.append((key, [v if same else f"{v} ({n} of {len(runs)} runs)" for v, n in counts.items()]))
    return told


def _of(run: Run) -> list[tuple[str, str]]:
    """Pairs of a heading and a value; whatever plain value was recorded is told under its own name."""
    recorded = run.provenance
    parts = [p for p in recorded.get("components") or [] if isinstance(p, dict)]
    owners = sorted({f"{p.get('distribution')} {p.get('version')}" for p in parts})
    used = sorted({f"{p.get('slot')}: {p.get('name')} ({p.get('distribution')})" for p in parts})
    pairs = [("distributions", ", ".join(owners))] + [("parts", part) for part in used]
    if recorded.get("commit"):
        pairs.append(("commit", f"{recorded['commit']}{', with changes' if recorded.get('dirty') else ''}"))
    gpus = Counter(map(str, recorded.get("gpus") or []))
    pairs.append(("GPU", ", ".join(f"{count} × {name}" if count > 1 else name for name, count in gpus.items())))  # noqa: RUF001
    for key, value in recorded.items():
        if key in TOLD or value in (None, [], {}):
            continue
        if isinstance(value, dict):
            pairs.append((key, ", ".join(f"{k} {v}" for k, v in value.items())))
        else:
            pairs.append((key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return [(key, value) for key, value in pairs if value]


def command(study: Study) -> str | None:
    """What to type to get these runs again."""
    if study.sweep is not None:
        told: Any = study.sweep.get("command")
        return str(told) if told else None
    recorded = study.runs[0].provenance.get("command")
    return as_door(str(recorded)) if recorded else None


def as_door(recorded: str) -> str:
    """`fit.py RECIPE`, as a run records it, as it is typed: `python -m core.fit RECIPE`."""
    try:
        first, *rest = shlex.split(recorded)
    except ValueError:
        return recorded
    return (
        shlex.join(["python", "-m", f"core.{first.removesuffix('.py')}", *rest]) if first.endswith(".py") else recorded
    )
