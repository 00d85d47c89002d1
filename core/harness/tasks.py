"""From names of tasks to results: what the harness knows, what it says, and every mistake as one sentence."""

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

import torch

from core.analysis.describe import obstacles
from core.contracts.errors import UserError
from core.data.tokenizer import Tokenizer
from core.harness.markers import markers_of
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.training.folder import RunFolder


@dataclass(frozen=True)
class Wanted:
    """What to evaluate on.

    Args:
        tasks: names of tasks, groups or tags, or patterns of them (`mmlu_*`).
        folder: of the user's own task files; they go before the harness's where names are the same.
        limit: questions of each task; None: all of them.
        batch_size: sequences in a forward.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for option, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{option} = {value}: must be at least 1")
        if not self.tasks:
            raise UserError("--tasks: name at least one, as in --tasks arc_easy,hellaswag")
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--task-path {self.folder}: there is no such folder")


def load_tasks(wanted: Wanted) -> Any:
    """The harness's tasks with their data.

    Raises:
        UserError: the harness is not installed, a name that nobody knows, a task whose file or data cannot be had, or
            one that this door does not run.
    """
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness, not installed here: pip install 'moeloom[eval]'")
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)  # a task may shuffle its choices as it loads
    numpy.random.seed(DEFAULT_OTHER_SEED)
    manager, names = _find(wanted)
    loaded = _load(manager, names)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name} runs what the model writes as a program; this command runs no such task")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} shows pictures; this model reads text only")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def run_tasks(
    loaded: Any, run: RunFolder, model: LanguageModel, wanted: Wanted, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Evaluate a run's model, in evaluation mode, on loaded tasks.

    Returns:
        Under `tasks` and `groups`, by name: metrics with their standard errors, shots, version, number of questions.

    Raises:
        UserError: a question that the model cannot be asked, or a run without a tokenizer.
    """
    from lm_eval.evaluator import evaluate

    from core.harness.model import HarnessModel

    tokenizer, markers = Tokenizer.load(run.tokenizer), markers_of(run)
    answering = HarnessModel(model, tokenizer, markers, batch_size=wanted.batch_size, say=say)
    results = evaluate(lm=answering, task_dict=loaded, limit=wanted.limit, log_samples=False)
    groups = results.get("groups", {})
    return {
        "tasks": {name: _told(results, name) for name in results["results"] if name not in groups},
        "groups": {name: _told(results, name) for name in groups},
        "limit": wanted.limit,
        "lm_eval": version("lm_eval"),
    }


def moved(model: LanguageModel, device: str, recipe: Recipe) -> LanguageModel:
    """The model on a device.

    Raises:
        UserError: there is no such device here, or a part of its recipe cannot run on the one there is.
    """
    if device.startswith("cuda") and torch.cuda.is_available() and (found := obstacles(recipe)):
        raise UserError(f"--device {device}: cannot run there: {'; '.join(found)}")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as cause:  # an unknown name; CUDA that torch has not, or finds no GPU for
        why = str(cause).splitlines()[0]
        raise UserError(f"--device {device}: the model cannot go there: {why}") from cause


def _find(wanted: Wanted) -> tuple[Any, list[str]]:
    """The index that knows every name, and the names that patterns stand for.

    The harness's own index takes ten seconds to read; plain tasks of the user's folder do not need it. Groups and tags
    do, because they may name tasks of the harness.
    """
    from lm_eval.tasks import TaskManager

    if wanted.folder is not None:
        manager = TaskManager(include_path=str(wanted.folder), include_defaults=False)
        if set(wanted.tasks) <= set(manager.all_subtasks):
            return manager, list(wanted.tasks)
    manager = TaskManager(include_path=str(wanted.folder) if wanted.folder else None)
    names: list[str] = []
    for name in wanted.tasks:
        found = manager.match_tasks([name])
        if not found:
            close = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            guess = f"; did you mean {' or '.join(close)}?" if close else ""
            where = "lm-evaluation-harness" + (f" and {wanted.folder}" if wanted.folder else "")
            raise UserError(f"--tasks: {where} has no task {name!r}{guess}")
        names += [own for own in found if own not in names]
    return manager, names


def _load(manager: Any, names: Sequence[str]) -> Any:
    try:
        return manager.load(list(names))
    except UserError:
        raise
    except Exception as cause:  # reading YAML, loading data sets and importing task code fail in many ways
        why = (str(cause).strip().splitlines() or [""])[0]
        raise UserError(
            f"--tasks {','.join(names)}: cannot be loaded: {type(cause).__name__}: {why} "
            "(data that is not on this machine needs a network; --task-path takes tasks with data of your own)"
        ) from cause


def _told(results: Any, name: str) -> dict[str, Any]:
    """One task's or group's results in plain containers."""
    own = results["results"][name]
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in own.items():
        metric, comma, choice = key.partition(",")
        if not comma:
            continue  # alias and the like
        plain, is_error = re.subn("_stderr$", "", metric)
        told = metrics.setdefault(plain if choice == "none" else f"{plain},{choice}", {})
        finite = isinstance(value, int | float) and math.isfinite(value)  # "N/A" where the harness has none
        told["stderr" if is_error else "value"] = value if finite else None
    counted = results.get("n-samples", {}).get(name, {})
    return {
        "metrics": metrics,
        "shots": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
        "questions": counted.get("effective"),
    }


def lines(told: dict[str, Any]) -> list[str]:
    """What `run_tasks` returned, for a terminal."""
    rows = []
    for kind in ("tasks", "groups"):
        for name, result in told[kind].items():
            for metric, found in result["metrics"].items():
                value, error = found.get("value"), found.get("stderr")
                number = "-" if value is None else f"{value:.4f}"
                spread = "" if error is None else f" +- {error:.4f}"
                asked = "" if result["questions"] is None else f"{result['questions']} questions, "
                shots = "" if result["shots"] is None else f"{result['shots']} shots"
                rows.append((name, metric, number + spread, asked + shots))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    ]
