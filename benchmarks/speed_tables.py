"""python benchmarks/speed_tables.py: writes the tables of records/speed/README.md from the JSON files beside it.

`bench.json` is what `core.bench --json` printed, `growth.json` and `startup.json` are written by benchmarks/growth.py
and benchmarks/startup.py. A file that is missing leaves its table out.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "records" / "speed"
BEGIN = "<!-- tables -->"
END = "<!-- end of tables -->"


def speed_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of `core.bench` as Markdown."""
    lines = [
        "| what | model | tokens/s | transformers' best | ratio (95% interval) | of the limit | memory | activations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = row["peer"]
        best = f"{peer['tokens_per_second']:,.0f} ({peer['best']})" if peer else row["no_ratio"]
        ratio = _shown(row["ratio"])
        if row["interval"]:
            low, high = row["interval"]
            ratio += f" ({low:.2f} to {high:.2f})"
        cells = [
            row["what"],
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            best,
            ratio,
            _shown(row["fraction_of_limit"]),
            _shown(row["memory_ratio"]),
            _shown(row.get("activation_ratio")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items() if value)
    lines += ["", f"{first['device_name']}, {first['threads']} threads; {versions}."]
    return lines


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def start_table(found: dict[str, Any]) -> list[str]:
    """The start of `core.fit` as Markdown."""
    seconds = found["first_step_seconds"]
    lines = [
        f"First step of `core.fit {found['recipe']}` with prepared data after {seconds['median']:.2f} s "
        f"(median of {len(seconds['all'])}); imports alone take {found['import_seconds']:.2f} s, by package:",
        "",
        "| package | own seconds |",
        "|---|---|",
    ]
    for package, own in found["own_seconds_by_package"].items():
        lines.append(f"| {package} | {own:.2f} |")
    return lines


def tables(folder: Path) -> str:
    """All tables whose files are there."""
    from benchmarks.growth import table as growth_table

    parts: list[str] = []
    makers = {
        "bench.json": ("## Beside transformers", speed_table),
        "growth.json": ("## Growth", growth_table),
        "startup.json": ("## Start", start_table),
    }
    for name, (heading, make) in makers.items():
        file = folder / name
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            parts.append("\n".join([heading, "", *make(found)]))
    return "\n\n".join(parts)


def with_tables(text: str, made: str) -> str:
    """A page with its tables between `BEGIN` and `END` replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


if __name__ == "__main__":
    page = FOLDER / "README.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), tables(FOLDER)), encoding="utf-8")
