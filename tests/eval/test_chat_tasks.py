"""Tasks of the harness as turns of a conversation: by us, and by the harness's own `hf` model on the export."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import Lab
from tokenizer_files import ASSISTANT, END, TEMPLATE, USER, write_deepseek_like

import core

from .conftest import GROUPS
from .questions import GENERATED, MULTIPLE_CHOICE, write_task

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("transformers", reason="needs the extra hf")
from core.generation.run_tokenizer import RunTokenizer
from core.harness.model import HarnessModel
from core.harness.tasks import TaskOptions, load_tasks
from core.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def place(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a chat template, its export, and two tasks."""
    folder = tmp_path_factory.mktemp("chat-tasks")
    hf = write_deepseek_like(folder / "hf", template=TEMPLATE)
    keys = (f"data.tokenizer.file={hf}", "model.rope.max_length=128", "budget.steps=8")
    lab.fit(folder / "run", GROUPS, *keys)
    done = lab.command("convert", "to-hf", folder / "run", folder / "export", "--dtype", "fp32")
    assert done.code == 0, done.err
    rows = [
        {"query": f"word{n} the tale", "choices": ["houses", "it's read"], "gold": n % 2}
        for n in range(6)
    ]
    write_task(folder / "tasks", "choices", MULTIPLE_CHOICE, rows)
    written = [{"query": f"word{n}", "answer": "houses"} for n in range(4)]
    write_task(folder / "tasks", "written", GENERATED, written, stop="zz")
    return folder


def answers(lm: Any, place: Path, shots: int) -> list[Any]:
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(TaskOptions(("choices",), place / "tasks", shots=shots))
    found = evaluate(
        lm=lm,
        task_dict=loaded,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
    return [(one["arguments"], one["filtered_resps"]) for one in samples]


@pytest.mark.parametrize("shots", [0, 2])
def test_answers_are_those_of_the_harness(place: Path, cache: None, shots: int) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = RunTokenizer.of(RunFolder(place / "run"))
    ours = HarnessModel(core.load(place / "run"), tokenizer, batch_size=4, chat=tokenizer.chat())
    theirs = HFLM(
        pretrained=str(place / "export"),
        device="cpu",
        dtype="float32",
        softmax_dtype="float64",
        batch_size=4,
    )
    by_us, by_them = answers(ours, place, shots), answers(theirs, place, shots)
    for (asked, values), (same, others) in zip(by_us, by_them, strict=True):
        assert asked == same
        assert [value for value, _ in values] == pytest.approx(
            [value for value, _ in others], abs=1e-4
        )
    text = str(by_us[0][0])
    assert text.count(f"{USER}word") == 2 * (shots + 1)
    assert text.count(END) == 2 * shots
    assert ASSISTANT in text


def test_the_command_asks_in_turns(lab: Lab, place: Path, cache: None, tmp_path: Path) -> None:
    words = ("--tasks", "choices,written", "--task-path", place / "tasks", "--json")
    done = lab.command(
        "evaluate", place / "run", *words, "--apply-chat-template", "--output", tmp_path
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["tasks"]["written"]["questions"] == 4
    (file,) = tmp_path.glob("*/results_*.json")
    assert json.loads(file.read_text())["chat_template"] == TEMPLATE


def test_a_run_without_a_template_is_refused(lab: Lab, finished: Path, place: Path) -> None:
    words = ("--tasks", "choices", "--task-path", place / "tasks", "--apply-chat-template")
    done = lab.command("evaluate", finished, *words)
    assert done.code == 2
    assert "has no chat template" in done.sentence
