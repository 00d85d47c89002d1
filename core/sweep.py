"""python -m core.sweep SWEEP: run every variant of a sweep with every seed, and compare them."""

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.command import command_line, command_prefix, print_json, run_command, trust_argument
from core.contracts.errors import StoppedBySignal

MEAN_COLUMNS = ["variant", "n", "mean", "95% interval"]
TEST_COLUMNS = ["factor", "F", "p", "p (Holm)", ""]
EFFECT_COLUMNS = ["value", "effect", "95% interval", ""]
DIFFERENCE_COLUMNS = [*MEAN_COLUMNS, "d_z", "p (Holm)", ""]


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.sweep", description="Run and compare the variants of a sweep."
    )
    p.add_argument("sweep", metavar="SWEEP", help="a sweep file, or the name of a shipped one")
    p.add_argument("--smoke", action="store_true", help="the small sizes: minutes on two cores")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="the sweep's folder (default: sweeps/NAME)"
    )
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs at a time; they share the cores (default 1)",
    )
    p.add_argument(
        "--per-gpu",
        type=int,
        metavar="N",
        help="N runs at a time on each visible GPU; their seconds are not comparable",
    )
    p.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster instead (auto, ray://HOST:PORT, or local)",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on: what is finished stays, what was under way continues",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="validate, match and list the runs; start nothing"
    )
    p.add_argument("--json", action="store_true", help="print the results as one JSON document")
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Validates the whole sweep, then runs it."""
    from core.contracts.errors import UserError
    from core.study.sweep_file import read_sweep

    for option, value in (("--workers", arguments.workers), ("--per-gpu", arguments.per_gpu)):
        if value is not None and value < 1:
            raise UserError(f"{option} = {value}: must be at least 1")
    if arguments.per_gpu and (arguments.workers or arguments.ray):
        other = "--workers" if arguments.workers else "--ray"
        raise UserError(
            f"--per-gpu = {arguments.per_gpu}: {other} also says where runs go: give one"
        )
    sweep = read_sweep(
        arguments.sweep,
        smoke=arguments.smoke,
        here=arguments.ray is None,
        trust=arguments.trust,
    )
    if arguments.dry_run:
        _dry_run(sweep, arguments.per_gpu)
        return
    from core.study.cores import cores
    from core.study.sweep import run_sweep

    workers = arguments.workers or 1
    available = cores()
    if arguments.ray is None and workers > available:
        why = f"{available} runs at a time, as this machine has {available} cores"
        print(f"note: --workers = {workers}: {why}", file=sys.stderr)
        workers = available
    name = f"{sweep.name}-smoke" if arguments.smoke else sweep.name
    path = arguments.out or Path("sweeps") / name
    with Display(sys.stderr) as display, _resumption_named(path):
        found = run_sweep(
            sweep,
            path,
            progress=display.update,
            workers=workers,
            ray=arguments.ray,
            per_gpu=arguments.per_gpu,
            resume=arguments.resume,
            command=command_line(),
            say=lambda line: print(line, file=sys.stderr),
        )
    if arguments.json:
        print_json(found)
        return
    print("\n".join(_result_lines(found)))
    report = f"{command_prefix('report')} {shlex.quote(str(path))}"
    print(f"sweep folder: {path}  ({report})")


@contextmanager
def _resumption_named(path: Path) -> Iterator[None]:
    """Says, where a signal ends the sweep, that it can go on and how."""
    how = f"what is done is kept in {path}: the same command with --resume goes on"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {how}") from None
    except StoppedBySignal as stopped:
        name = signal.Signals(stopped.signum).name
        print(f"moeloom: stopped by {name}; {how}", file=sys.stderr)
        raise


def _dry_run(sweep: Any, per_gpu: int | None) -> None:
    """Prints the runs that the sweep would start, and what is equal in all variants."""
    from core.study.matching import match
    from core.study.results import sweep_document
    from core.study.sweep import beforehand

    if per_gpu:
        from core.study.gpus import gpu_slots

        at_a_time = len(gpu_slots(sweep, per_gpu))
        print(
            f"{at_a_time} runs at a time, {per_gpu} on each GPU: their seconds are not comparable"
        )
    matched = match(sweep)
    variants = [variant.name for variant in sweep.variants]
    seeds = sweep.schema.seeds
    runs = len(variants) * len(seeds)
    searches = len(sweep.candidates) * len(sweep.schema.search.seeds)
    after = f", after {searches} of a search" if searches else ""
    print(f"{runs} runs: {len(variants)} variants x {len(seeds)} seeds{after}")
    for seed in sweep.schema.search.seeds:
        for candidate in sweep.candidates:
            print(f"search: {candidate.name}/seed-{seed}")
    for seed in seeds:
        for name in variants:
            print(f"run: {name}/seed-{seed}")
    for one in sweep.left_out:
        print(f"left out: {one.name}: {one.reason}")
    for line in beforehand(sweep_document(sweep, matched, command="", started="")):
        print(line)
    for line in matched.held_equal:
        print(f"equal: {line}")
    for line in matched.not_equal:
        print(f"not equal: {line}")


class Display:
    """The progress of a sweep: on a terminal one bar with the time left, elsewhere one line for each run."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.console = Console(file=stream, soft_wrap=True)
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}")
        self.bar = Progress(
            *columns, left, console=self.console, disable=not self.console.is_terminal
        )
        self.task = self.bar.add_task("runs", total=None, left="")

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, job: Any, status: Any, done: int, total: int, left: float | None) -> None:
        """Shows the state of the sweep; it is called at the beginning and after each run.

        Args:
            job: the run that has ended; None at the beginning.
            status: how that run ended.
            done: how many runs have ended.
            total: how many runs the sweep has.
            left: seconds until the end of the sweep, estimated; None if there is no estimate.
        """
        if job is None:
            self.bar.update(self.task, completed=done, total=total)
            return
        estimate = ""
        if done < total and left is not None:
            estimate = f"about {_duration(left)} left"
        self.bar.update(self.task, completed=done, total=total, left=estimate)
        line = f"{done}/{total} {job.name} {status.state} in {status.seconds:.0f} s"
        if status.reason:
            line = f"{line}: {status.reason}"
        if estimate:
            line = f"{line}; {estimate}"
        self.console.print(line, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes > 99:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes > 1:
        return f"{minutes} min"
    return f"{seconds:.0f} s"


def _result_lines(found: dict[str, Any]) -> list[str]:
    """The results as tables whose columns are as wide as their widest cells, and the warnings."""
    means = [MEAN_COLUMNS]
    differences = [DIFFERENCE_COLUMNS]
    for row in found["rows"]:
        means.append(_mean_cells(row))
        if row["difference"]:
            differences.append(_difference_cells(row["variant"], row["difference"]))
    lines = [f"{found['metric']} over the seeds", *_table_lines(means)]
    if len(differences) > 1:
        title = f"minus {found['baseline']}, paired by seed"
        lines += ["", title, *_table_lines(differences)]
        lines += _shown_lines(found["rows"])
    lines += _factor_lines(found.get("factors"))
    lines += _chosen_lines(found.get("search"))
    lines += [f"left out: {one['name']}: {one['reason']}" for one in found.get("left_out", [])]
    return lines + [f"note: {warning}" for warning in found["warnings"]]


def _shown_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line with the smallest difference that each comparison could show, given the deviation that was observed."""
    shown = []
    for row in rows:
        smallest = row.get("smallest_difference")
        if smallest is not None:
            shown.append(f"{row['variant']} {smallest:.3g}")
    if not shown:
        return []
    return ["", f"could show, with the observed spread: {', '.join(shown)}"]


def _factor_lines(factors: dict[str, Any] | None) -> list[str]:
    """The factor view of a grid: a table of tests, and one of effects with their intervals."""
    if factors is None:
        return []
    if factors["missing"]:
        return ["", f"no factor view: {factors['missing']}"]
    tests = [TEST_COLUMNS]
    effects = [EFFECT_COLUMNS]
    for term in factors["terms"]:
        name = " x ".join(term["factors"])
        f = "" if term["f"] is None else f"{term['f']:.2f} ({term['df']}, {factors['df']})"
        tests.append([name, f, _number(term["p"], ".3g"), _number(term["p_holm"], ".3g"), ""])
        for effect in term["effects"]:
            values = ", ".join(effect["values"])
            numbers = [_number(effect["effect"], "+.4g"), _interval(effect, "+.4g"), ""]
            effects.append([f"{name} = {values}", *numbers])
    lines = ["", f"factors ({factors['model']})", *_table_lines(tests), "", *_table_lines(effects)]
    if factors["residual_sd"] is not None:
        lines.append(
            f"residual sd {factors['residual_sd']:.3g} with {factors['df']} degrees of freedom"
        )
    return lines + [f"note: {note}" for note in factors["notes"]]


def _chosen_lines(search: dict[str, Any] | None) -> list[str]:
    """A line for each variant with the values that its search has chosen."""
    lines = []
    for row in (search or {}).get("rows", []):
        values = ", ".join(f"{key} = {value}" for key, value in (row["chosen"] or {}).items())
        lines.append(
            f"searched: {row['variant']}: {values}, of {len(row['candidates'])} values tried"
        )
    return lines


def _table_lines(rows: list[list[str]]) -> list[str]:
    """A table of rows, the first of which is the header; the first and the last column are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    lines: list[str] = []
    for row in rows:
        cells: list[str] = []
        for index, width in enumerate(widths):
            if index in (0, last):
                cells.append(row[index].ljust(width))
            else:
                cells.append(row[index].rjust(width))
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:]]


def _mean_cells(row: dict[str, Any]) -> list[str]:
    return [row["variant"], str(row["n"]), _number(row["mean"], ".5g"), _interval(row, ".5g")]


def _difference_cells(variant: str, difference: dict[str, Any]) -> list[str]:
    return [
        variant,
        str(difference["n"]),
        _number(difference["mean"], "+.4g"),
        _interval(difference, "+.4g"),
        _number(difference["effect_size"], ".2f"),
        _number(difference["p_holm"], ".3g"),
        difference["verdict"] or "",
    ]


def _interval(row: dict[str, Any], form: str) -> str:
    if row["low"] is None:
        return ""
    return f"{row['low']:{form}} to {row['high']:{form}}"


def _number(value: float | None, form: str) -> str:
    """A formatted number; empty for None."""
    if value is None:
        return ""
    return format(value, form)


if __name__ == "__main__":
    run_command(main, parser())
