"""Provenance of the numbers: distributions, versions, machines, data, commands."""

import shlex
from collections import Counter
from typing import Any

from core.reports.study_files import Run, Study

SHOWN_ELSEWHERE = ("components", "command", "commit", "dirty", "gpus")
"""Keys of `provenance.json` that are not shown under their own names."""


def facts(study: Study) -> list[tuple[str, list[str]]]:
    """Pairs of a heading and its values; each value has the number of its runs where the runs differ."""
    runs = [run for run in study.runs if run.provenance]
    found: dict[str, Counter[str]] = {}
    for run in runs:
        for heading, value in _facts_of(run):
            found.setdefault(heading, Counter())[value] += 1
    pairs = []
    for heading, counts in found.items():
        values = list(counts)
        if len(counts) > 1 and heading != "parts":
            values = [f"{value} ({n} of {len(runs)} runs)" for value, n in counts.items()]
        pairs.append((heading, values))
    return pairs


def _facts_of(run: Run) -> list[tuple[str, str]]:
    """Pairs of a heading and a value of one run; a recorded value without special treatment is listed under its key."""
    recorded = run.provenance
    pairs = _facts_of_components(recorded.get("components"))
    if recorded.get("commit"):
        commit = str(recorded["commit"])
        if recorded.get("dirty"):
            commit += ", with changes"
        pairs.append(("commit", commit))
    pairs.append(("GPU", _counted(_items(recorded.get("gpus")))))
    for key, value in recorded.items():
        if key in SHOWN_ELSEWHERE or value in (None, [], {}):
            continue
        if isinstance(value, dict):
            pairs.append((key, ", ".join(f"{k} {v}" for k, v in value.items())))
        elif isinstance(value, list):
            pairs.append((key.replace("_", " "), ", ".join(map(str, value))))
        else:
            pairs.append((key.replace("_", " "), str(value)))
    return [(heading, value) for heading, value in pairs if value]


def _facts_of_components(components: Any) -> list[tuple[str, str]]:
    """All distributions in one value, and one value for each component."""
    owners = set()
    parts = set()
    for component in _items(components):
        if isinstance(component, dict):
            distribution = component.get("distribution")
            owners.add(f"{distribution} {component.get('version')}")
            parts.add(f"{component.get('slot')}: {component.get('name')} ({distribution})")
    pairs = [("distributions", ", ".join(sorted(owners)))]
    pairs += [("parts", part) for part in sorted(parts)]
    return pairs


def _items(value: Any) -> list[Any]:
    """The list that a value is; an empty one for anything else."""
    return value if isinstance(value, list) else []


def _counted(gpus: list[Any]) -> str:
    """The names of GPUs, with their number if a name occurs more than once."""
    found = []
    for name, count in Counter(map(str, gpus)).items():
        if count > 1:
            found.append(f"{count} \u00d7 {name}")
        else:
            found.append(name)
    return ", ".join(found)


def command(study: Study) -> str | None:
    """The command that makes these runs again; None if it was not recorded."""
    if study.sweep is not None:
        recorded = study.sweep.get("command")
    else:
        recorded = study.runs[0].provenance.get("command")
    if not recorded:
        return None
    if study.sweep is not None:
        return str(recorded)
    return _as_typed(str(recorded))


def _as_typed(recorded: str) -> str:
    """The command as it was typed, `python -m core.fit RECIPE` if an earlier version recorded `fit.py RECIPE`."""
    try:
        first, *rest = shlex.split(recorded)
    except ValueError:
        return recorded
    if first.endswith(".py"):
        return shlex.join(["python", "-m", f"core.{first.removesuffix('.py')}", *rest])
    return recorded
