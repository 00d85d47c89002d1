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
    sweep = read_sweep(arguments.sweep, smoke=arguments.smoke, here=arguments.ray is None)
    if arguments.dry_run:
        _dry_run(sweep)
        return
    from core.study.cores import cores
    from core.study.sweep import run_sweep

    workers = arguments.workers
    if arguments.ray is None and workers > (there := cores()):
        print(
            f"note: --workers = {workers}: {there} runs at a time, as this machine has {there} cores", file=sys.stderr
        )
        workers = there
    path = arguments.out or Path("sweeps") / (f"{sweep.name}-smoke" if arguments.smoke else sweep.name)
    command = f"python -m core.sweep {shlex.join(sys.argv[1:])}"
    more = {"workers": workers, "ray": arguments.ray, "resume": arguments.resume, "command": command}
    with Display(sys.stderr) as display:
        found = run_sweep(sweep, path, progress=display.told, **more)
    if arguments.json:
        print_json(found)
        return
    print("\n".join(_lines(found)))
    print(f"sweep folder: {path}  (python -m core.report {path})")


def _dry_run(sweep: Any) -> None:
    """What would be run, and what was found equal."""
    from core.study.matching import match

    matched = match(sweep)
    variants, seeds = [variant.name for variant in sweep.variants], sweep.schema.seeds
    lines = [f"{len(variants) * len(seeds)} runs: {len(variants)} variants x {len(seeds)} seeds"]
    lines += [f"run: {name}/seed-{seed}" for seed in seeds for name in variants]
    lines += [f"equal: {line}" for line in matched.held_equal]
    print("\n".join([*lines, *(f"not equal: {line}" for line in matched.not_equal)]))


class Display:
    """One line for the whole sweep, with the time left; on a terminal it moves, elsewhere it is a line for each run."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(file=stream, soft_wrap=True)
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}")
        self.bar = Progress(*columns, left, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("runs", total=None, left="")

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def told(self, job: Any, status: Any, done: int, total: int, left: float | None) -> None:
        """At the beginning, and after each run."""
        if job is None:
            self.bar.update(self.task, completed=done, total=total)
            return
        told = f"about {_duration(left)} left" if done < total and left is not None else ""
        self.bar.update(self.task, completed=done, total=total, left=told)
        reason = f": {status.reason}" if status.reason else ""
        line = f"{done}/{total} {job.name} {status.state} in {status.seconds:.0f} s{reason}"
        self.console.print(f"{line}; {told}" if told else line, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes > 99:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"


def _lines(found: dict[str, Any]) -> list[str]:
    """The results as a table that is never cut: every column is as wide as its widest cell."""
    cells = [["variant", "n", "mean", "95% interval"]] + [_means(row) for row in found["rows"]]
    lines = [f"{found['metric']} over the seeds", *_columns(cells)]
    against = [row for row in found["rows"] if row["difference"]]
    if against:
        head = ["variant", "n", "mean", "95% interval", "d_z", "p (Holm)", ""]
        cells = [head] + [_difference(row["variant"], row["difference"]) for row in against]
        lines += ["", f"minus {found['baseline']}, paired by seed", *_columns(cells)]
    return lines + [f"note: {warning}" for warning in found["warnings"]]


def _columns(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _means(row: dict[str, Any]) -> list[str]:
    return [row["variant"], str(row["n"]), _number(row["mean"], ".5g"), _span(row, ".5g")]


def _difference(variant: str, difference: dict[str, Any]) -> list[str]:
    head = [variant, str(difference["n"]), _number(difference["mean"], "+.4g"), _span(difference, "+.4g")]
    tail = [_number(difference["effect_size"], ".2f"), _number(difference["p_holm"], ".3g")]
    return [*head, *tail, difference["verdict"] or ""]


def _span(row: dict[str, Any], form: str) -> str:
    return "" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    run_door(main, parser())
