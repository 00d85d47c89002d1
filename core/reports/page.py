"""Puts the report together: one page that holds its data, its style, its script and plotly's, and asks for nothing."""

import os
import re
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.reports import cost, points, provenance, table, words
from core.reports.experts import experts
from core.reports.figure import Figure
from core.reports.folder import Study, read
from core.reports.over_training import (
    OverTraining,
    acceptance,
    speed,
    training_loss,
    validation,
    violation,
)
from core.reports.paired import against_baseline


def write(folder: Path, file: Path) -> dict[str, Any]:
    """Write the report on a folder and say what it is about.

    Raises:
        UserError: there is neither run nor sweep, or the file cannot be written.
    """
    study = read(folder)
    text = render(study)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as cause:
        raise UserError(f"--out {file}: cannot be written: {cause.strerror}") from cause
    counts = {state: study.count(state) for state in ("done", "failed", "running", "interrupted", "waiting")}
    kind = "run" if study.sweep is None else "sweep"
    return {"file": str(file), "kind": kind, "bytes": file.stat().st_size, "runs": len(study.runs), **counts}


def render(study: Study) -> str:
    """The page's text."""
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
    """A name as HTML that may be broken where its words end."""
    from markupsafe import Markup, escape

    return Markup(re.sub(f"([{re.escape(ends)}])", r"\1<wbr>", str(escape(text))))


def context(study: Study) -> dict[str, Any]:
    """Everything that the template fills in."""
    metric = words.metric_words(study.metric)
    loads = experts(study)
    figures = figures_of(study, metric)
    return {
        "study": study,
        "sweep": study.sweep,
        "title": str((study.sweep or {}).get("title") or study.name),
        "metric": metric,
        "metric_key": study.metric,
        "progress": words.progress(study),
        "in_short": words.in_short(study),
        "warnings": words.warnings(study),
        "results": table.results(study) if study.sweep is not None else None,
        "runs": table.every_run(study, metric) if study.sweep is not None else None,
        "recipes": table.recipes(study),
        "numbers": table.key_numbers(study.runs[0]) if study.sweep is None else [],
        "figures": figures,
        "experts": loads,
        "data": {"figures": [f.document() for f in figures if not f.missing], "experts": loads.runs},
        "facts": provenance.facts(study),
        "command": provenance.command(study),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def figures_of(study: Study, metric: str) -> list[Figure]:
    """All figures but those of the experts, which the page's script draws from the loads themselves."""
    over = OverTraining(study)
    loss, later = training_loss(over), [validation(over, study.metric, metric), violation(over)]
    if study.sweep is None:
        return [loss, *later, cost.against_flops(study), cost.against_time(study), acceptance(over), speed(over)]
    curves = [loss, *([against_baseline(over)] if len(study.variants) > 1 else []), *later]
    costs = [points.against_flops(study, study.metric, metric), points.against_time(study, study.metric, metric)]
    return [points.differences(study, metric), *curves, *costs, acceptance(over), points.throughput(study)]


def _own(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files("core.reports").joinpath(name).read_text(encoding="utf-8")
