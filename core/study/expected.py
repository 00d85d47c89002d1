"""The standard deviation of paired differences that a sweep expects, and the smallest difference it could show."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.statistics.power import POWER, pooled_deviation, smallest_effect
from core.storage.documents import DocumentError, finite_number, read_object
from core.study.sweep_schema import SweepSchema

HOW = f"power {POWER:.0%}, two-sided 5% with Holm's correction"
"""The terms on which a difference counts as one that the design could show."""

NEEDS_SCIPY = "not computed: it needs scipy (pip install -e '.[report]')"


@dataclass(frozen=True)
class Expected:
    """A standard deviation of paired differences, and where it comes from."""

    deviation: float
    source: str


def expected_deviation(schema: SweepSchema, beside: Path) -> Expected | None:
    """The expected standard deviation of a sweep file; None if it gives none.

    Args:
        schema: the file's keys.
        beside: the file's folder, in which an earlier sweep is looked for too.

    Raises:
        UserError: the earlier sweep cannot be read, has another metric, or no variant with two pairs of runs.
    """
    given = schema.expected_sd
    if given is None:
        return None
    if not isinstance(given, str):
        return Expected(float(given), "expected_sd")
    folder = beside / given
    if not folder.is_dir():
        folder = Path(given)
    key = f"expected_sd = {given!r}"
    try:
        results = read_object(folder / "results.json")
    except DocumentError as cause:
        why = f"must be a number, or an earlier sweep's folder with a results.json ({cause.why})"
        raise UserError(f"{key}: {why}") from cause
    if results.get("metric") != schema.metric:
        other = results.get("metric")
        raise UserError(f"{key}: that sweep compares {other}, and this one {schema.metric}")
    deviation = pooled_deviation(_differences(results))
    if not deviation:
        raise UserError(f"{key}: no variant there has two pairs of runs whose differences spread")
    return Expected(deviation, f"the differences in {given}")


def _differences(results: Mapping[str, Any]) -> list[list[float]]:
    """The differences to the baseline over the seeds, for each other variant in a `results.json`."""
    values: dict[str, dict[int, float]] = {}
    rows = results.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("runs"), list):
            values[str(row.get("variant"))] = _by_seed(row["runs"])
    base = values.pop(str(results.get("baseline")), {})
    differences = []
    for own in values.values():
        differences.append([own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())])
    return differences


def _by_seed(runs: list[Any]) -> dict[int, float]:
    """The finite values of a variant's runs by seed."""
    found = {}
    for run in runs:
        if not isinstance(run, dict) or not isinstance(run.get("seed"), int):
            continue
        value = finite_number(run.get("value"))
        if value is not None:
            found[run["seed"]] = value
    return found


def smallest_difference(schema: SweepSchema, variants: int, expected: Expected | None) -> Any:
    """The smallest difference in the metric that a sweep could show, as plain containers.

    Args:
        schema: its seeds count.
        variants: how many there are; each but the baseline is compared with it.
        expected: the standard deviation of the paired differences; None: unknown.

    Returns:
        `effect_size` in standard deviations and `difference` in the metric, None where they are not known, and a
        `sentence` that says so.
    """
    n = len(schema.seeds)
    comparisons = variants - 1
    found: dict[str, Any] = {
        "seeds": n,
        "comparisons": comparisons,
        "effect_size": None,
        "expected_sd": expected.deviation if expected else None,
        "source": expected.source if expected else None,
        "difference": None,
    }
    counts = f"{n} {'seed' if n == 1 else 'seeds'}"
    if comparisons < 1:
        return {**found, "sentence": f"{counts}: nothing is compared"}
    if n < 2:
        return {**found, "sentence": f"{counts}: no difference can be shown, whatever its size"}
    counts += f", {comparisons} {'comparison' if comparisons == 1 else 'comparisons'}"
    try:
        effect = smallest_effect(n, comparisons)
    except ImportError:
        return {**found, "sentence": f"{counts}: {NEEDS_SCIPY}"}
    assert effect is not None
    found["effect_size"] = effect
    if expected is None:
        what = f"a difference of at least {effect:.2g} sd of the paired differences"
    else:
        found["difference"] = effect * expected.deviation
        of = f"{effect:.2g} sd of {expected.deviation:.3g}, from {expected.source}"
        what = f"a difference in {schema.metric} of at least {found['difference']:.3g} ({of})"
    return {**found, "sentence": f"{counts}: {what}; {HOW}"}


def observed_difference(differences: list[float], comparisons: int) -> float | None:
    """The smallest difference that a comparison could show, with the standard deviation that was observed.

    Args:
        differences: variant minus baseline, by seed.
        comparisons: how many variants are compared with the baseline.
    """
    deviation = pooled_deviation([differences])
    if not deviation:
        return None
    effect = smallest_effect(len(differences), comparisons)
    return None if effect is None else effect * deviation
