"""Writes the report: one page that holds its data, its style, its script and plotly's, and loads nothing else."""

import math
import re
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.reports import cost, points, provenance, table, words
from core.reports.experts import experts
from core.reports.factors import factor_figures, factor_report
from core.reports.figure import Figure
from core.reports.glance import Answer, glance, sample_of
from core.reports.over_training import (
    OverTraining,
    acceptance,
    speed,
    training_loss,
    validation,
    violation,
)
from core.reports.paired import against_baseline
from core.reports.study_files import Study, read
from core.reports.style import ON_DARK
from core.storage.files import write_text

SMOOTHING = 0.8
"""The weight of the moving average at which the page of one run opens; a sweep's opens without."""


def write(folder: Path, file: Path) -> dict[str, Any]:
    """Writes the report on a folder.

    Returns:
        The file, whether it is about a run or a sweep, its bytes, and the number of runs in each state.

    Raises:
        UserError: there is neither run nor sweep, or the file cannot be written.
    """
    study = read(folder)
    text = render(study)
    try:
        # what is not text in a damaged file is shown as a question mark
        write_text(file, text.encode("utf-8", "replace").decode("utf-8"))
    except OSError as cause:
        raise UserError(f"--out {file}: cannot be written: {cause.strerror}") from cause
    kind = "run" if study.sweep is None else "sweep"
    result = {
        "file": str(file),
        "kind": kind,
        "bytes": file.stat().st_size,
        "runs": len(study.runs),
    }
    for state in ("done", "failed", "running", "interrupted", "waiting"):
        result[state] = study.count(state)
    return result


def render(study: Study) -> str:
    """The report on a study as the text of an HTML page."""
    from jinja2 import DictLoader, Environment, StrictUndefined
    from plotly.offline import get_plotlyjs  # type: ignore[import-not-found, import-untyped, unused-ignore]

    names = ("page.html.j2", "tables.html.j2")
    environment = Environment(
        loader=DictLoader({name: _own(name) for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["soft"] = soft
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    parts = {"style": _own("page.css"), "script": _own("page.js"), "plotly": get_plotlyjs()}
    return str(environment.get_template("page.html.j2").render(**context(study), **parts))


def soft(text: str, ends: str = "_+/=") -> Any:
    """A name as HTML in which a line may be broken after each of the characters `ends`."""
    from markupsafe import Markup, escape

    return Markup(re.sub(f"([{re.escape(ends)}])", r"\1<wbr>", str(escape(text))))


def context(study: Study) -> dict[str, Any]:
    """The values that the template fills in."""
    metric = words.metric_words(study.metric)
    loads = experts(study)
    figures = figures_of(study, metric)
    results = None
    runs = None
    numbers: list[tuple[str, str]] = []
    answers: list[Answer] = []
    if study.sweep is None:
        numbers = table.key_numbers(study.runs[0])
        answers = glance(study.runs[0])
    else:
        results = table.results_table(study)
        runs = table.every_run(study, metric)
    factors = None
    factor_plots: list[Figure] = []
    if study.sweep is not None:
        factors = factor_report(study)
        factor_plots = factor_figures(study, metric)
    drawn = [figure.document() for figure in [*factor_plots, *figures] if not figure.missing]
    return {
        "study": study,
        "sweep": study.sweep,
        "title": str((study.sweep or {}).get("title") or study.name),
        "metric": metric,
        "metric_key": study.metric,
        "progress": words.progress(study),
        "in_short": words.in_short(study),
        "warnings": words.warnings(study),
        "results": results,
        "runs": runs,
        "recipes": table.recipes(study),
        "numbers": numbers,
        "answers": answers,
        "sample": sample_of(study.runs[0]) if study.sweep is None else "",
        "smoothing": SMOOTHING if study.sweep is None else 0,
        "figures": figures,
        "factors": factors,
        "factor_figures": factor_plots,
        "experts": loads,
        "data": _finite_numbers({"figures": drawn, "experts": loads.runs, "onDark": ON_DARK}),
        "facts": provenance.facts(study),
        "command": provenance.command(study),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _finite_numbers(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON cannot hold; plotly leaves a gap there."""
    if isinstance(value, dict):
        return {key: _finite_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_numbers(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def figures_of(study: Study, metric: str) -> list[Figure]:
    """All figures but those of the experts, which the page's script draws from the loads themselves.

    Args:
        metric: the words for the metric by which the variants are compared.
    """
    over = OverTraining(study)
    figures = [training_loss(over)]
    if len(study.variants) > 1:
        figures.append(against_baseline(over))
    figures.append(validation(over, study.metric, metric))
    figures.append(violation(over))
    if study.sweep is None:
        figures.append(cost.against_flops(study))
        figures.append(cost.against_time(study))
        figures.append(acceptance(over))
        figures.append(speed(over))
        return figures
    figures.insert(0, points.differences(study, metric))
    figures.append(points.against_flops(study, study.metric, metric))
    figures.append(points.against_time(study, study.metric, metric))
    figures.append(acceptance(over))
    figures.append(points.throughput(study))
    return figures


def _own(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("core.reports").joinpath(name).read_text(encoding="utf-8")
