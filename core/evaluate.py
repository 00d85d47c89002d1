"""python -m core.evaluate RUN [--tasks A,B]: measure a trained model's validation loss, or its benchmark scores."""

import argparse
import sys
from typing import Any

from core.command import print_json, run_command, trust_argument, weights_argument


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.evaluate",
        description="Validate a trained model, or run tasks of lm-evaluation-harness on it.",
    )
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    p.add_argument(
        "--xz",
        action="store_true",
        help="print also what xz -9e needs (two seconds for each MB of text)",
    )
    weights_argument(p)
    p.add_argument("--json", action="store_true", help="print one JSON document")
    trust_argument(p, "the run's recipe or a task file names")
    tasks = p.add_argument_group("benchmarks, instead of validation (pip install 'moeloom[eval]')")
    tasks.add_argument(
        "--tasks",
        metavar="A,B",
        help="tasks, groups or tags of the harness; patterns as in 'mmlu_*'",
    )
    tasks.add_argument("--task-path", metavar="DIR", help="a folder with task files of your own")
    tasks.add_argument(
        "--limit", type=int, metavar="N", help="only the first N questions of each task"
    )
    tasks.add_argument("--batch-size", type=int, metavar="B", help="sequences in a forward (16)")
    tasks.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Reads the whole validation split of the run's recipe once, or runs benchmarks."""
    if arguments.tasks is None:
        _validate(arguments)
    else:
        _benchmark(arguments)


def _validate(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.contracts.errors import UserError

    for option in ("task_path", "limit", "batch_size", "device"):
        if getattr(arguments, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"{flag} needs --tasks: validation reads the recipe's whole split")
    from core.run.evaluation import evaluate
    from core.training.resume import newest_checkpoint

    values = evaluate(
        newest_checkpoint(Path(arguments.run)),
        xz=arguments.xz,
        trust=arguments.trust,
        weights=arguments.weights,
        say=_say,
    )
    if arguments.json:
        print_json(values)
        return
    for name, value in values.items():
        if name == "notices":
            continue  # they are already on stderr
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name:24} {shown}")


def _benchmark(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.contracts.errors import NotFiniteError, UserError

    if arguments.xz:
        raise UserError("--xz is for validation and cannot be combined with --tasks")
    from core.harness.tasks import TaskOptions, load_tasks, run_tasks, table_lines
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    given: dict[str, Any] = {"limit": arguments.limit, "trust": arguments.trust}
    if arguments.batch_size is not None:
        given["batch_size"] = arguments.batch_size
    if arguments.task_path is not None:
        given["folder"] = Path(arguments.task_path)
    names = [name.strip() for name in arguments.tasks.split(",")]
    options = TaskOptions(tuple(name for name in names if name), **given)
    from core.interop.run_weights import check_average
    from core.recipe.compose import compose_run
    from core.run.device import check_device
    from core.run.loading import load, run_of

    folder = run_of(checkpoint)
    if arguments.weights is not None:
        check_average(checkpoint, arguments.weights)
    recipe = compose_run(folder.recipe, trust=arguments.trust)
    device = arguments.device or "cpu"
    check_device(device, recipe)
    loaded = load_tasks(options, say=_say)
    notices = recipe.notices()
    for notice in notices:
        _say(f"note: {notice}")
    model = load(checkpoint, trust=arguments.trust, weights=arguments.weights).to(device)
    try:
        results = run_tasks(loaded, folder, model, options, say=_say)
    except NotFiniteError as cause:
        raise NotFiniteError(f"{checkpoint}: {cause}") from cause
    if arguments.json:
        document = {"checkpoint": checkpoint.name, **results}
        if arguments.weights is not None:
            document["weights"] = arguments.weights
        print_json({**document, "notices": notices})
        return
    for line in table_lines(results):
        print(line)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
