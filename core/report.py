"""python -m core.report RUN_OR_SWEEP [--out FILE] [--json]: one HTML file about a run or a sweep."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from core.contracts.errors import UserError
from core.door import print_json, run_door

NEEDED = ("jinja2", "pandas", "plotly")
"""Of the extra `report`."""


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.report",
        description="Write a report on a run or a sweep, finished or not: one HTML file that opens without a network.",
    )
    p.add_argument("folder", metavar="RUN_OR_SWEEP", type=Path, help="a run folder or a sweep folder")
    p.add_argument("--out", metavar="FILE", type=Path, help="the file to write (report.html in the folder)")
    p.add_argument("--json", action="store_true", help="print one JSON document: the file, its size, the runs' states")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Write the report and say where it is."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise UserError(f"a report needs {', '.join(lacking)}, not installed here: pip install 'moeloom[report]'")
    from core.reports.page import write

    told = write(arguments.folder, arguments.out or arguments.folder / "report.html")
    if arguments.json:
        print_json(told)
    else:
        print(f"{told['file']} ({told['bytes'] / 1e6:.1f} MB, {told['done']} of {told['runs']} runs done)")


if __name__ == "__main__":
    run_door(main, parser())
