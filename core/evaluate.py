"""python -m core.evaluate RUN [--text FILE | --tasks A,B]: the loss of validation or of a text, or benchmark scores."""

import argparse
import sys
from typing import Any

from core.command import (
    drop_free_argument,
    placement_argument,
    print_json,
    run_command,
    trust_argument,
    weights_argument,
)


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
    placement_argument(p)
    drop_free_argument(p)
    p.add_argument("--json", action="store_true", help="print one JSON document")
    trust_argument(p, "the run's recipe or a task file names")
    text = p.add_argument_group(
        "your own text, instead of validation; the run may be a converted one"
    )
    text.add_argument(
        "--text",
        metavar="FILE",
        help="print bits per byte and perplexity of a text file, or perplexity of token ids in a .npy file",
    )
    text.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="longest input in tokens (the sequence length of the run's recipe)",
    )
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
    tasks.add_argument(
        "--num-fewshot",
        type=int,
        metavar="K",
        help="solved questions before each question (what the task says)",
    )
    tasks.add_argument(
        "--apply-chat-template",
        action="store_true",
        default=None,
        help="ask in the words of the chat template of the run's tokenizer, shots as turns before the question",
    )
    tasks.add_argument(
        "--output",
        metavar="DIR",
        help="write the results there too, in the harness's own format",
    )
    both = p.add_argument_group("your own text and benchmarks")
    both.add_argument("--batch-size", type=int, metavar="B", help="sequences in a forward (16)")
    both.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Reads the whole validation split of the run's recipe once, or a text, or runs benchmarks."""
    _check_options(arguments)
    if arguments.text is not None:
        _score_text(arguments)
    elif arguments.tasks is not None:
        _benchmark(arguments)
    else:
        _validate(arguments)


NEEDED_BY = {
    "task_path": ("--tasks",),
    "limit": ("--tasks",),
    "num_fewshot": ("--tasks",),
    "apply_chat_template": ("--tasks",),
    "output": ("--tasks",),
    "context": ("--text",),
    "batch_size": ("--tasks", "--text"),
    "device": ("--tasks", "--text"),
}
"""Options that change only one of the ways to evaluate, and the options that choose these."""


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options that cannot be combined."""
    from core.contracts.errors import UserError

    chosen = {"--tasks": arguments.tasks, "--text": arguments.text}
    given = [option for option, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise UserError("--tasks and --text cannot be combined: use one command for each")
    for option, needed in NEEDED_BY.items():
        if getattr(arguments, option) is None or set(given) & set(needed):
            continue
        flag = f"--{option.replace('_', '-')}"
        raise UserError(f"{flag} needs {' or '.join(needed)}")
    if arguments.xz and given:
        raise UserError(f"--xz is for validation and cannot be combined with {given[0]}")
    for option in ("batch_size", "context"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} = {value}: must be at least 1")


def _score_text(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.contracts.errors import NotFiniteError, UserError
    from core.deployment.placing import Placing
    from core.generation.markers import markers_of
    from core.harness.own_text import read_own_text, score_text
    from core.interop.run_weights import check_average
    from core.recipe.compose import compose_run
    from core.run.device import check_device
    from core.run.loading import load, run_of
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    folder = run_of(checkpoint)
    if arguments.weights is not None:
        check_average(checkpoint, arguments.weights)
    placing = Placing(arguments.placement, drop_free=arguments.drop_free)
    text = read_own_text(Path(arguments.text))
    recipe = compose_run(folder.recipe, trust=arguments.trust)
    longest = recipe.model.rope.max_length
    context = arguments.context or recipe.data.sequence_length
    if context > longest:
        raise UserError(f"--context = {context}: must be at most model.rope.max_length = {longest}")
    device = arguments.device or "cpu"
    check_device(device, recipe)
    placing.check(recipe)
    markers = markers_of(folder)
    tokenizer = None
    if isinstance(text, str):
        try:
            tokenizer = folder.load_tokenizer()
        except UserError as cause:
            how = "--text takes token ids too, from a .npy file, and core.generate --prompt-ids"
            raise UserError(f"{cause}; {how}") from cause
    notices = recipe.notices()
    for notice in notices:
        _say(f"note: {notice}")
    model = load(checkpoint, trust=arguments.trust, weights=arguments.weights).to(device)
    placing.place(model)
    batch = arguments.batch_size or 16
    try:
        with placing:
            found = score_text(model, markers, text, tokenizer, context=context, batch_size=batch)
    except UserError as cause:
        raise UserError(f"--text {arguments.text}: {cause}") from cause
    except NotFiniteError as cause:
        raise NotFiniteError(f"{checkpoint}: {cause}") from cause
    values: dict[str, Any] = {"checkpoint": checkpoint.name, **found.to_dict()}
    if arguments.weights is not None:
        values["weights"] = arguments.weights
    _print_values({**values, **placing.values(), "notices": notices}, arguments)


def _validate(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.deployment.placing import Placing
    from core.recipe.compose import compose_run
    from core.run.evaluation import evaluate
    from core.run.loading import run_of
    from core.training.ranks import is_rank_zero
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    with Placing(arguments.placement, divides=True, drop_free=arguments.drop_free) as placing:
        if arguments.placement is not None or arguments.drop_free:
            placing.check(compose_run(run_of(checkpoint).recipe, trust=arguments.trust))
        values = evaluate(
            checkpoint,
            xz=arguments.xz,
            trust=arguments.trust,
            weights=arguments.weights,
            say=_say,
            prepare=placing.place,
            dispatcher=placing.dispatcher,
        )
        values.update(placing.values())
    if is_rank_zero():
        _print_values(values, arguments)


def _print_values(values: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints values by name, or as one JSON document."""
    from core.deployment.placing import lines

    if arguments.json:
        print_json(values)
        return
    for name, value in values.items():
        if name == "notices":
            continue  # they are already on stderr
        if name == "placement":
            for line in lines(value):
                print(line)
            continue
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name:24} {shown}")


def _benchmark(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from core.contracts.errors import NotFiniteError
    from core.deployment.placing import Placing, lines
    from core.generation.run_tokenizer import RunTokenizer
    from core.harness.tasks import TaskOptions, load_tasks, run_tasks, table_lines
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    given: dict[str, Any] = {
        "limit": arguments.limit,
        "shots": arguments.num_fewshot,
        "chat": bool(arguments.apply_chat_template),
        "trust": arguments.trust,
    }
    if arguments.output is not None:
        given["output"] = Path(arguments.output)
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
    placing = Placing(arguments.placement, drop_free=arguments.drop_free)
    placing.check(recipe)
    if options.chat:
        RunTokenizer.of(folder).chat()  # a run without a template is reported before the tasks load
    loaded = load_tasks(options, say=_say)
    notices = recipe.notices()
    for notice in notices:
        _say(f"note: {notice}")
    model = load(checkpoint, trust=arguments.trust, weights=arguments.weights).to(device)
    placing.place(model)
    try:
        with placing:
            results = run_tasks(loaded, folder, model, options, say=_say)
    except NotFiniteError as cause:
        raise NotFiniteError(f"{checkpoint}: {cause}") from cause
    if arguments.json:
        document = {"checkpoint": checkpoint.name, **results}
        if arguments.weights is not None:
            document["weights"] = arguments.weights
        print_json({**document, **placing.values(), "notices": notices})
        return
    for line in table_lines(results):
        print(line)
    for value in placing.values().values():
        for line in lines(value):
            print(line)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
