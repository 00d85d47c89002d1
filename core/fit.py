"""python -m core.fit RECIPE [KEY=VALUE ...]: train a recipe into a run folder."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from core.command import print_json, recipe_arguments, run_command, trust_argument
from core.contracts.errors import RunFailed


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.fit", description="Train a recipe into a run folder."
    )
    recipe_arguments(p)
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="the run folder (default: runs/<recipe>, numbered)"
    )
    p.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder; `auto`: the newest unfinished one, if any",
    )
    p.add_argument(
        "--from",
        type=Path,
        dest="parent",
        metavar="RUN",
        help="begin a new run at the end of this run or checkpoint, with its moments: longer, or at other rates",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="compose, validate, build on meta, print the summary"
    )
    p.add_argument("--json", action="store_true", help="print the run's summary as JSON")
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Composes and validates the recipe; only then are the modules that train imported."""
    from core.recipe.compose import compose
    from core.training.early_checks import (
        check_corpus,
        check_folders,
        check_initial_weights,
        check_parent,
    )
    from core.training.launchers import (
        Launch,
        check_folder_named,
        joined_folder,
        launch_of,
        launcher_notice,
    )
    from core.training.libraries import ignore_warnings, silence_greetings
    from core.training.rank_logs import redirect_output

    start = not arguments.dry_run
    if start:
        check_folders(arguments.out, arguments.resume)
        check_parent(arguments.parent, arguments.resume)
    recipe = compose(
        arguments.recipe, arguments.overrides, trust=arguments.trust, check_source=start
    )
    launch = Launch()
    if start:
        launch = launch_of(recipe.strategy)
    if launch.rank == 0:
        for key in recipe.dropped:
            print(f"dropped {key}: the component now named there has no such key", file=sys.stderr)
    if arguments.dry_run:
        from core.describe import show

        show(recipe, as_json=arguments.json)
        return
    check_corpus(recipe)
    check_initial_weights(recipe)
    check_folder_named(launch, out=arguments.out, resume=arguments.resume)
    redirect_output(Path(arguments.out or arguments.resume or ""), launch)
    notice = launcher_notice(launch)
    if notice is not None:
        print(f"note: {notice}", file=sys.stderr)
    ignore_warnings()
    from core.run.divergence import divergence_in
    from core.run.training import fit
    from core.training.choose_folder import resumable, start_folder
    from core.training.host_memory import keep_freed_memory
    from core.training.run_folder import RunFolder

    silence_greetings()
    keep_freed_memory()
    resume = arguments.resume is not None
    existing = joined_folder() if launch.parent is not None else None
    if existing is None:
        existing = resumable(arguments.resume, arguments.out, recipe.name)
    if existing is None:
        folder = start_folder(arguments.out, recipe.name)
        resume = False
    else:
        folder = RunFolder(existing)
    with redirect_stdout(sys.stderr):  # what a library or a callback prints is not the result
        summary = fit(
            recipe,
            folder,
            resume=resume,
            parent=arguments.parent,
            trust=arguments.trust,
            launch=launch,
            say=print,
        )
    if launch.rank != 0:
        return
    diverged = divergence_in(summary)
    if arguments.json:
        print_json(summary)
    else:
        print(_summary_line(summary))
        for notice in summary["notices"]:
            if notice != diverged:
                print(f"note: {notice}")
    if diverged:
        sys.stdout.flush()  # the sentence about it comes last, whatever stdout and stderr are
        raise RunFailed(diverged)


def _summary_line(summary: dict[str, object]) -> str:
    """The measured values of a run's summary in one line."""
    shown = (
        "val_bits_per_byte",
        "val_loss",
        "max_vio_global",
        "mtp_acceptance",
        "tokens_per_second",
        "wall_seconds",
    )
    measured = [key for key in shown if isinstance(summary.get(key), float)]
    return "  ".join(f"{key} {summary[key]:.4g}" for key in measured)


if __name__ == "__main__":
    run_command(main, parser())
