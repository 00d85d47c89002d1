"""Loads tasks of lm-evaluation-harness by name, runs them, and returns their results in plain containers."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.generation.run_tokenizer import RunTokenizer
from core.harness.task_files import find_code
from core.model.language_model import LanguageModel
from core.training.run_folder import RunFolder


@dataclass(frozen=True)
class TaskOptions:
    """The tasks to evaluate, and how.

    Args:
        tasks: names of tasks, groups or tags, or patterns of them (`mmlu_*`).
        folder: the user's own task files; they take precedence over tasks of the harness with the same name.
        limit: questions of each task; None: all of them.
        shots: solved questions before each question; None: what each task says, 0 where it says nothing.
        output: folder for the results in the harness's own format; None: they are not written.
        batch_size: sequences in a forward.
        chat: whether questions are turns of a conversation, in the words of the tokenizer's chat template.
        trust: whether files of that folder may run code.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    output: Path | None = None
    batch_size: int = 16
    chat: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 0:
            raise UserError(f"--num-fewshot = {self.shots}: must be at least 0")
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output}: is a file, not a folder")
        for option, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{option} = {value}: must be at least 1")
        if not self.tasks:
            raise UserError("--tasks: name at least one, as in --tasks arc_easy,hellaswag")
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--task-path {self.folder}: there is no such folder")


def load_tasks(options: TaskOptions, *, say: Callable[[str], None] = print) -> Any:
    """Loads the harness's tasks with their data.

    Args:
        options: the tasks.
        say: called with a note on what the user's own task files run.

    Raises:
        UserError: the harness is not installed, a name is unknown, a file of the folder runs code and is not trusted, a
            task's file or data cannot be loaded, or a task is of a type that is not supported.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness, not installed here: pip install 'moeloom[eval]'"
        )
    if options.folder is not None:
        _check_code(options.folder, options.trust, say)
    if options.output is not None:
        from core.harness.results_file import check_folder

        check_folder(options.output)
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)  # a task may shuffle its choices as it loads
    numpy.random.seed(DEFAULT_OTHER_SEED)
    manager, names = _find(options)
    loaded = _load(manager, names)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs what the model writes as a program; this command runs no such task"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} shows pictures; this model reads text only")
        shots = task.get_config("num_fewshot") or 0
        if options.shots is not None:
            shots = _shots(task, name, options.shots, say)
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _shots(task: Any, name: str, shots: int, say: Callable[[str], None]) -> int:
    """Returns the shots of a task for which the user asks for `shots`.

    As in the harness, a task whose own file says 0 keeps 0, and so does one that scores whole texts.

    Raises:
        UserError: the task has too few solved questions.
    """
    if shots == 0:
        return 0
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or task.get_config("num_fewshot") == 0:
        say(
            f"note: task {name} has no solved questions before a question, whatever --num-fewshot says"
        )
        return 0
    available = len(list(task.fewshot_docs() or ()))
    from_questions = not (task.has_training_docs() or task.has_validation_docs())
    if available < shots + from_questions:  # a question is not shown before itself
        raise UserError(
            f"--num-fewshot = {shots}: task {name} has {available} questions to take them from"
        )
    return shots


def _check_code(folder: Path, trust: bool, say: Callable[[str], None]) -> None:
    """Says what the task files of a folder run, or raises `UserError` if they are not trusted."""
    found = find_code(folder)
    if not found:
        return
    if not trust:
        more = f" (and {len(found) - 1} more in {folder})" if len(found) > 1 else ""
        raise UserError(f"{found[0]} runs code{more}; --trust allows it")
    say(f"note: code runs: {'; '.join(map(str, found))}")


def run_tasks(
    loaded: Any,
    run: RunFolder,
    model: LanguageModel,
    options: TaskOptions,
    *,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a run's model, in evaluation mode, on loaded tasks.

    Returns:
        Results under `tasks` and `groups`, by name: metrics with their standard errors, shots, version, number of
        questions.

    Raises:
        UserError: the model cannot answer a question, or the run has no tokenizer, or no template that is needed.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    from core.harness.model import HarnessModel

    try:
        tokenizer = RunTokenizer.of(run)
    except UserError as cause:
        why = "tasks are text; --text takes token ids from a .npy file, and core.generate --prompt-ids"
        raise UserError(f"{cause}; {why}") from cause
    chat = tokenizer.chat() if options.chat else None
    answering = HarnessModel(model, tokenizer, batch_size=options.batch_size, chat=chat, say=say)
    file = None
    if options.output is not None:
        from core.harness.results_file import ResultsFile

        settings: dict[str, Any] = {"batch_size": options.batch_size, "limit": options.limit}
        settings["device"] = str(model.embedding.weight.device)
        settings["fewshot_seed"] = DEFAULT_OTHER_SEED
        template = None if chat is None else chat.template.source
        file = ResultsFile(options.output, str(run.path), settings, template)
    results = evaluate(
        lm=answering,
        task_dict=loaded,
        limit=options.limit,
        log_samples=False,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
    )
    if file is not None:
        say(f"results: {file.write(results)}")
    groups = {name: _result(results, name) for name in results.get("groups", {})}
    tasks = {}
    for name in results["results"]:
        if name not in groups:
            tasks[name] = _result(results, name)
    return {
        "tasks": tasks,
        "groups": groups,
        "limit": options.limit,
        "lm_eval": version("lm_eval"),
    }


def _find(options: TaskOptions) -> tuple[Any, list[str]]:
    """Returns the harness's index of tasks, and the names that match the options' names and patterns.

    The harness's own index takes ten seconds to read. It is not needed if all names are single tasks of the user's
    folder; groups and tags need it, because they may name tasks of the harness.
    """
    from lm_eval.tasks import TaskManager

    if options.folder is not None:
        manager = TaskManager(include_path=str(options.folder), include_defaults=False)
        if set(options.tasks) <= set(manager.all_subtasks):
            return manager, list(options.tasks)
    folder = str(options.folder) if options.folder else None
    manager = TaskManager(include_path=folder)
    names: list[str] = []
    for name in options.tasks:
        found = manager.match_tasks([name])
        if not found:
            close = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            guess = f"; did you mean {' or '.join(close)}?" if close else ""
            where = "lm-evaluation-harness"
            if folder:
                where += f" and {folder}"
            raise UserError(f"--tasks: {where} has no task {name!r}{guess}")
        names += [own for own in found if own not in names]
    return manager, names


def _load(manager: Any, names: Sequence[str]) -> Any:
    """Loads tasks; the many exceptions of YAML files, data sets and task code become one `UserError`."""
    try:
        return manager.load(list(names))
    except UserError:
        raise
    except Exception as cause:
        why = (str(cause).strip().splitlines() or [""])[0]
        raise UserError(
            f"--tasks {','.join(names)}: cannot be loaded: {type(cause).__name__}: {why} "
            "(data that is not on this machine needs a network; --task-path takes tasks with data of your own)"
        ) from cause


def _result(results: Any, name: str) -> dict[str, Any]:
    """Returns the results of one task or group in plain containers."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in results["results"][name].items():
        metric, comma, choice = key.partition(",")
        if not comma:
            continue  # no metric, such as the alias
        plain, is_error = re.subn("_stderr$", "", metric)
        if choice != "none":
            plain = f"{plain},{choice}"
        # The harness writes "N/A" for a number that it cannot compute.
        finite = isinstance(value, int | float) and math.isfinite(value)
        field = "stderr" if is_error else "value"
        metrics.setdefault(plain, {})[field] = value if finite else None
    counted = results.get("n-samples", {}).get(name, {})
    return {
        "metrics": metrics,
        "shots": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
        "questions": counted.get("effective"),
    }


def table_lines(results: dict[str, Any]) -> list[str]:
    """Returns the results of `run_tasks` as lines of a table for a terminal."""
    rows: list[tuple[str, str, str, str]] = []
    for kind in ("tasks", "groups"):
        for name, result in results[kind].items():
            for metric, found in result["metrics"].items():
                rows.append((name, metric, _number(found), _size(result)))
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns[:3]]
    table = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        table.append("  ".join([*cells, row[3]]).rstrip())
    return table


def _number(metric: dict[str, Any]) -> str:
    """Returns the value of a metric, with its standard error if there is one."""
    value = metric.get("value")
    error = metric.get("stderr")
    text = "-" if value is None else f"{value:.4f}"
    if error is not None:
        text += f" +- {error:.4f}"
    return text


def _size(result: dict[str, Any]) -> str:
    """Returns the numbers of questions and shots of a task, as far as they are known."""
    text = ""
    if result["questions"] is not None:
        text += f"{result['questions']} questions, "
    if result["shots"] is not None:
        text += f"{result['shots']} shots"
    return text
