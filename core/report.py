"""python -m core.report RUN_OR_SWEEP [--out FILE] [--json]: write one HTML file about a run or a sweep."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from core.command import print_json, run_command
from core.contracts.errors import UserError

NEEDED = ("jinja2", "pandas", "plotly")
"""The packages of the extra `report`."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.report",
        description="Write a report on a run or a sweep, finished or not: one HTML file that opens without a network.",
    )
    p.add_argument(
        "folder", metavar="RUN_OR_SWEEP", type=Path, help="a run folder or a sweep folder"
    )
    p.add_argument(
        "--out", metavar="FILE", type=Path, help="the file to write (report.html in the folder)"
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document: the file, its size, the runs' states",
    )
    return p


def main(arguments: argparse.Namespace) -> None:
    """Writes the report and prints its path."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        hint = "pip install 'moeloom[report]'"
        raise UserError(f"a report needs {', '.join(lacking)}, not installed here: {hint}")
    from core.reports.page import write

    written = write(arguments.folder, arguments.out or arguments.folder / "report.html")
    if arguments.json:
        print_json(written)
        return
    size = f"{written['bytes'] / 1e6:.1f} MB"
    print(f"{written['file']} ({size}, {written['done']} of {written['runs']} runs done)")


if __name__ == "__main__":
    run_command(main, parser())
