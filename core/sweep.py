"""python -m core.sweep SWEEP: run every variant of a sweep with every seed, and compare them."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from core.door import print_json, run_door


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(prog="python -m core.sweep", description="Run and compare the variants of a sweep.")
    p.add_argument("sweep", metavar="SWEEP", help="a sweep file, or the name of a shipped one")
    p.add_argument("--smoke", action="store_true", help="the small sizes: minutes on two cores")
    p.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder (default: sweeps/NAME)")
    p.add_argument(
        "--workers", type=int, default=1, metavar="N", help="runs at a time; they share the cores (default 1)"
    )
    p.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster instead (auto, ray://HOST:PORT, or local)")
    p.add_argument("--resume", action="store_true", help="go on: what is finished stays, what was under way continues")
    p.add_argument("--dry-run", action="store_true", help="validate, match and list the runs; start nothing")
    p.add_argument("--json", action="store_true", help="print the results as one JSON document")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Validate everything, then run."""
    from core.contracts.errors import UserError
    from core.study.sweep_file import read_sweep

    if arguments.workers < 1:
        raise UserError(f"--workers = {arguments.workers}: must be at least 1")
    sweep = read_sweep(arguments.sweep, smoke=arguments.smoke)
    if arguments.dry_run:
        from core.study.matching import match

        matched = match(sweep)
        runs = len(sweep.variants) * len(sweep.schema.seeds)
        print(f"{runs} runs: {len(sweep.variants)} variants x {len(sweep.schema.seeds)} seeds")
        print(
            "\n".join(
                [f"equal: {line}" for line in matched.held_equal] + [f"not equal: {line}" for line in matched.not_equal]
            )
        )
        return
    from core.study.sweep import run_sweep

    path = arguments.out or Path("sweeps") / (f"{sweep.name}-smoke" if arguments.smoke else sweep.name)
    command = f"python -m core.sweep {shlex.join(sys.argv[1:])}"
    more = {"workers": arguments.workers, "ray": arguments.ray, "resume": arguments.resume, "command": command}
    with Display(sys.stderr) as display:
        found = run_sweep(sweep, path, progress=display.told, **more)
    if arguments.json:
        print_json(found)
        return
    _print(found, sweep.schema.metric)
    print(f"sweep folder: {path}  (python -m core.report {path})")


class Display:
    """One line for the whole sweep, with the time left; on a terminal it moves, elsewhere it is a line for each run."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(file=stream)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left:"), TimeRemainingColumn())
        self.bar = Progress(*columns, *left, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("runs", total=None)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def told(self, job: Any, status: Any, done: int, total: int) -> None:
        """After each run."""
        self.bar.update(self.task, completed=done, total=total)
        if job is not None:
            reason = f": {status.reason}" if status.reason else ""
            self.console.print(
                f"{done}/{total} {job.name} {status.state} in {status.seconds:.0f} s{reason}", markup=False
            )


def _print(found: dict[str, Any], metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "variant", "n", metric, "95% interval", f"minus {found['baseline']}", "interval", "d_z", "p (Holm)", ""
    )
    for row in found["rows"]:
        table.add_row(*_cells(row))
    console = Console()
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"note: {warning}", markup=False)


def _cells(row: dict[str, Any]) -> list[str]:
    difference = row["difference"] or {}
    spans = [f"{s['low']:.4f} to {s['high']:.4f}" if s.get("low") is not None else "" for s in (row, difference)]
    numbers = [
        _number(difference.get(key), form)
        for key, form in (("mean", "+.4f"), ("effect_size", ".2f"), ("p_holm", ".3g"))
    ]
    head = [row["variant"], str(row["n"]), _number(row["mean"], ".4f"), spans[0], numbers[0], spans[1]]
    return [*head, *numbers[1:], difference.get("verdict") or ""]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    run_door(main, parser())
