"""python -m core.evaluate RUN [--tasks A,B]: a trained model's validation loss, or its results on benchmarks."""

import argparse
import sys
from typing import Any

from core.door import print_json, run_door


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.evaluate",
        description="Validate a trained model, or ask it the questions of lm-evaluation-harness.",
    )
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint file")
    p.add_argument("--xz", action="store_true", help="beside it, what xz -9e needs (two seconds for each MB of text)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    tasks = p.add_argument_group("benchmarks, instead of validation (pip install 'moeloom[eval]')")
    tasks.add_argument("--tasks", metavar="A,B", help="tasks, groups or tags of the harness; patterns as in 'mmlu_*'")
    tasks.add_argument("--task-path", metavar="DIR", help="a folder with task files of your own")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    tasks.add_argument("--batch-size", type=int, metavar="B", help="sequences in a forward (16)")
    tasks.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Read the whole validation split of the run's recipe once; or ask questions."""
    if arguments.tasks is None:
        _validate(arguments)
    else:
        _ask(arguments)


def _validate(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.contracts.errors import UserError

    for option in ("task_path", "limit", "batch_size", "device"):
        if getattr(arguments, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')} goes with --tasks: validation reads the recipe's whole split"
            )
    from core.run.evaluation import evaluate
    from core.training.resume import newest_checkpoint

    values = evaluate(newest_checkpoint(Path(arguments.run)), xz=arguments.xz, say=_say)
    if arguments.json:
        print_json(values)
        return
    for name, value in values.items():
        if name == "notices":
            continue  # they were told on stderr
        print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")


def _ask(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.contracts.errors import UserError

    if arguments.xz:
        raise UserError("--xz goes with validation, not with --tasks")
    from core.harness.tasks import Wanted, lines, load_tasks, moved, run_tasks
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    given: dict[str, Any] = {"limit": arguments.limit}
    if arguments.batch_size is not None:
        given["batch_size"] = arguments.batch_size
    if arguments.task_path is not None:
        given["folder"] = Path(arguments.task_path)
    wanted = Wanted(tuple(name.strip() for name in arguments.tasks.split(",") if name.strip()), **given)
    loaded = load_tasks(wanted)
    from core.recipe.compose import compose
    from core.run.loading import load, run_of

    folder = run_of(checkpoint)
    recipe = compose(folder.recipe)
    notices = recipe.notices()
    for notice in notices:
        _say(f"note: {notice}")
    model = moved(load(checkpoint), arguments.device or "cpu", recipe)
    told = run_tasks(loaded, folder, model, wanted, say=_say)
    if arguments.json:
        print_json({"checkpoint": checkpoint.name, **told, "notices": notices})
        return
    for line in lines(told):
        print(line)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_door(main, parser())
