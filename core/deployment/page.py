"""Writes a plan as one HTML page without a script: load of each GPU before and after, and how long it stays good."""

from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.deployment.words import kept_words, summary_lines
from core.storage.files import write_text

MOST_LAYERS = 96
"""Layers that the page shows, the least balanced ones first; the document has all."""

MOST_NAMES = 40_000
"""Physical experts whose places the page lists, over all layers."""

MEANINGS = (
    ("logical expert", "an expert of the model, by its number in the layer"),
    ("physical expert", "a copy of a logical expert on a GPU; the original is one too"),
    ("load", "assignments of tokens to an expert, before any drop; copies share it equally"),
    ("balancedness", "mean over maximum of the GPUs' loads: 1 where all are equal"),
    ("in order", "experts divided over the GPUs by their numbers, without replicas"),
    ("a plan later", "planned on one stretch of the loads and measured on a later one"),
)


def write(document: dict[str, Any], file: Path) -> int:
    """Writes the page of a document and returns its size in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    text = render(document).encode("utf-8", "replace").decode("utf-8")
    try:
        write_text(file, text)
    except OSError as cause:
        raise UserError(f"--out {file}: cannot be written: {cause.strerror}") from cause
    return file.stat().st_size


def render(document: dict[str, Any]) -> str:
    """The page of a document as text; it loads nothing and runs nothing."""
    style = resources.files("core.deployment").joinpath("page.css").read_text(encoding="utf-8")
    source = document["source"]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    first, last = source["planned_from"]
    unit = source["unit"]
    planned = f"{source['name']}, {unit}s {first} to {last}"
    if first == last:
        planned = f"{source['name']}, {unit} {first}"
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Placement of experts</title><style>{style}</style></head>",
        "<body><header><h1>Placement of experts</h1>",
        f'<p class="about">{escape(summary_lines(document)[0])}. Planned from {escape(planned)}.</p>',
        *_facts(document),
        *(f'<p class="note">Note: {escape(notice)}.</p>' for notice in document["notices"]),
        "</header><main>",
        *_loads(document),
        *_lags(document["lags"]),
        *_places(document),
        "<details><summary>What is counted</summary><dl>",
        *(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in MEANINGS),
        f"<dt>predicted gain</dt><dd>{escape(document['prefill']['model'])}</dd>",
        "</dl></details></main>",
        "<footer>Written by moeloom's core.placement. This page holds all its data and loads nothing from other "
        "machines.</footer>",
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _facts(document: dict[str, Any]) -> Iterator[str]:
    """The figures at the top."""
    prefill = document["prefill"]
    balance = prefill["balancedness"]
    yield '<div class="facts">'
    yield _fact(f"{balance['before']:.3f}", "balancedness in order")
    if "without_replicas" in balance:
        yield _fact(f"{balance['without_replicas']:.3f}", "placed, without replicas")
    yield _fact(f"{balance['after']:.3f}", "with this plan")
    gain = prefill["gain"]
    yield _fact(f"{gain['experts']:+.1%}", "predicted for the experts of a prefill step")
    if gain["step"] is not None:
        share = prefill["experts_share"]
        yield _fact(
            f"{gain['step']:+.1%}", f"predicted for the step, of which experts take {share:.0%}"
        )
    yield "</div>"


def _fact(value: str, words: str) -> str:
    return f"<div><b>{escape(value)}</b><small>{escape(words)}</small></div>"


def _shown(document: dict[str, Any]) -> list[int]:
    """The layers that are shown, in the model's order."""
    values = document["balancedness"]["before"]
    worst = sorted(range(len(values)), key=lambda index: values[index])[:MOST_LAYERS]
    return sorted(worst)


def _loads(document: dict[str, Any]) -> Iterator[str]:
    """The load of each GPU, a row for each layer."""
    shown = _shown(document)
    yield "<section><h2>Load of each GPU</h2>"
    yield (
        '<p class="legend"><span><i class="before"></i>in order</span>'
        '<span><i class="plan"></i>with this plan</span>'
        '<span><i class="mean"></i>mean: the most loaded GPU has at least this</span></p>'
    )
    if len(shown) < len(document["layers"]):
        yield f'<p class="note">The {len(shown)} least balanced of {len(document["layers"])} layers.</p>'
    yield '<div class="layers">'
    for index in shown:
        before = document["load"]["before"][index]
        after = document["load"]["after"][index]
        was = document["balancedness"]["before"][index]
        now = document["balancedness"]["after"][index]
        path = escape(document["layers"][index])
        top = max(*before, *after)
        yield f"<span>{path}<small>{was:.3f} to {now:.3f}</small></span>"
        yield _strip(before, top, "before", f"{path} in order: balancedness {was:.3f}")
        yield _strip(after, top, "plan", f"{path} with this plan: balancedness {now:.3f}")
    yield "</div></section>"


def _strip(load_G: Sequence[float], top: float, kind: str, label: str) -> str:
    """The bars of one layer's GPUs, with a line at their mean."""
    top = top or 1.0
    path = ""
    for gpu, load in enumerate(load_G):
        height = 100 * load / top
        path += f"M{gpu + 0.08:.2f} 100V{100 - height:.2f}H{gpu + 0.92:.2f}V100Z"
    mean = 100 - 100 * sum(load_G) / len(load_G) / top
    count = len(load_G)
    return (
        f'<svg class="strip" viewBox="0 -4 {count} 104" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<title>{label}</title><path class="{kind}" d="{path}"/>'
        f'<line x1="0" x2="{count}" y1="{mean:.2f}" y2="{mean:.2f}"/></svg>'
    )


def _lags(lags: dict[str, Any]) -> Iterator[str]:
    """How balancedness falls with the distance between planning and measuring."""
    yield "<section><h2>How long a plan stays good</h2>"
    rows = lags["by_lag"]
    if len(rows) < 2:
        yield "<p>The loads are one stretch, so nothing says how long.</p></section>"
        return
    unit = escape(f"{lags['unit']}s")
    yield (
        f'<p class="note">Balancedness of plans from one of {lags["stretches"]} stretches of {lags["span"]:.4g} '
        f"{unit}, measured so many stretches later; in grey without a plan.</p>"
    )
    yield _chart(rows)
    yield '<div class="scroll"><table><thead><tr>'
    for title in ("stretches later", "pairs", "with the plan", "lowest", "in order"):
        yield f'<th class="n">{title}</th>'
    yield "</tr></thead><tbody>"
    for row in rows:
        yield (
            f'<tr><td class="n">{row["lag"]}</td><td class="n">{row["pairs"]}</td>'
            f'<td class="n">{row["balancedness"]:.3f}</td><td class="n">{row["lowest"]:.3f}</td>'
            f'<td class="n">{row["in_order"]:.3f}</td></tr>'
        )
    yield "</tbody></table></div>"
    yield f"<p>In short: {escape(kept_words(lags))}.</p></section>"


def _chart(rows: Sequence[dict[str, Any]]) -> str:
    """Two lines over the lag."""
    width, height, left, bottom = 640, 240, 44, 28
    lowest = min(min(row["balancedness"], row["in_order"]) for row in rows)
    low = max(0.0, int(lowest * 10) / 10)

    def x(index: int) -> float:
        return left + 10 + index * (width - left - 24) / (len(rows) - 1)

    def y(value: float) -> float:
        return 10 + (1 - value) / (1 - low) * (height - bottom - 10)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">']
    parts.append("<title>Balancedness by the distance between planning and measuring</title>")
    for tick in (low, (1 + low) / 2, 1.0):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>'
        )
    for index, row in enumerate(rows):
        parts.append(
            f'<text x="{x(index):.1f}" y="{height - 8}" text-anchor="middle">{row["lag"]}</text>'
        )
    for key, kind in (("in_order", "before"), ("balancedness", "plan")):
        places = [(x(index), y(row[key])) for index, row in enumerate(rows)]
        line = " ".join(f"{at:.1f},{value:.1f}" for at, value in places)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        for at, value in places:
            parts.append(f'<circle class="{kind}" cx="{at:.1f}" cy="{value:.1f}" r="3.5"/>')
    return "".join(parts) + "</svg>"


def _places(document: dict[str, Any]) -> Iterator[str]:
    """The experts of each GPU; those with replicas stand out."""
    left = MOST_NAMES
    yield "<section><h2>Experts of each GPU</h2>"
    yield '<p class="note">Experts with more than one copy are bold.</p>'
    tables = zip(document["layers"], document["phy2log"], document["logcnt"], strict=True)
    for path, expert_P, count_E in tables:
        left -= len(expert_P)
        if left < 0:
            yield '<p class="note">The JSON document has the other layers.</p>'
            break
        slots = len(expert_P) // document["gpus"]
        yield f"<details><summary>{escape(path)}</summary>"
        yield '<div class="scroll"><table><tbody>'
        for gpu in range(document["gpus"]):
            names = []
            for expert in expert_P[gpu * slots : (gpu + 1) * slots]:
                names.append(f"<b>{expert}</b>" if count_E[expert] > 1 else str(expert))
            yield f"<tr><th>GPU {gpu}</th><td>{' '.join(names)}</td></tr>"
        yield "</tbody></table></div></details>"
    yield "</section>"
