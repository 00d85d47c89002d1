"""`python -m core.evaluate RUN --tasks`."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, forked, run_command_here

import core.run.device
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import UserError
from core.data.tokenizer import Tokenizer

from .by_hand import greedy, log_likelihood
from .questions import GENERATED, MULTIPLE_CHOICE, write_task

pytest.importorskip("lm_eval", reason="needs the extra eval")

CHOICES = ["abc", "de fgh", "l k", "ab"]
ROWS = [
    {"query": f"{'abc de ' * (k % 3)}which {k}?", "choices": CHOICES, "gold": k % 4}
    for k in range(10)
]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Forked processes inherit what takes seconds to import."""
    import lm_eval.evaluator  # noqa: F401


@pytest.fixture
def folder(tmp_path: Path, cache: None) -> Path:
    """A task of one's own."""
    write_task(tmp_path / "tasks", "chosen", MULTIPLE_CHOICE, ROWS)
    return tmp_path / "tasks"


def by_hand(run: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracies by likelihood, and by likelihood per letter."""
    model, tokenizer = core.load(run), Tokenizer.load(run / "tokenizer.json")
    right, right_norm = 0, 0
    for row in rows:
        context = tokenizer.encode(row["query"])
        values = []
        for choice in row["choices"]:
            ids = [0, *tokenizer.encode(f"{row['query']} {choice}")]
            values.append(log_likelihood(model, ids, len(ids) - 1 - len(context)))
        norms = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        right += values.index(max(values)) == row["gold"]
        right_norm += norms.index(max(norms)) == row["gold"]
    return {"acc": right / len(rows), "acc_norm": right_norm / len(rows)}


def test_a_multiple_choice_task_gives_the_accuracy_of_the_likelihoods(
    lab: Lab, finished: Path, folder: Path
) -> None:
    result = lab.command("evaluate", finished, "--tasks", "chosen", "--task-path", folder, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["checkpoint"] == "step-00000012.ckpt"
    assert (report["limit"], report["groups"], report["notices"]) == (None, {}, [])
    chosen = report["tasks"]["chosen"]
    assert (chosen["questions"], chosen["shots"], chosen["version"]) == (10, 0, 1.0)
    expected = by_hand(finished, ROWS)
    assert {name: found["value"] for name, found in chosen["metrics"].items()} == pytest.approx(
        expected
    )
    share = expected["acc"]
    assert chosen["metrics"]["acc"]["stderr"] == pytest.approx((share * (1 - share) / 9) ** 0.5)
    assert "Scoring answers" in result.err


def test_averaged_weights_are_scored_like_a_run_that_trained_them(
    lab: Lab, tmp_path: Path, folder: Path
) -> None:
    run = tmp_path / "run"
    lab.fit(run, "callbacks=[{name: ema, decay: 0.9}]", "model.init.std=0.5")
    asked = ("--tasks", "chosen", "--task-path", folder, "--json")
    found = json.loads(lab.command("evaluate", run, *asked, "--weights", "ema").out)
    assert found["weights"] == "ema"
    file = checkpoints_in(run)[-1]
    content = read_checkpoint(file)
    content["state_dict"].update(content["averages"]["ema"]["weights"])
    torch.save(content, file)
    same = json.loads(lab.command("evaluate", run, *asked).out)
    assert found["tasks"] == same["tasks"]
    refused = lab.command("evaluate", run, *asked, "--weights", "swa")
    assert refused.code == 2
    assert refused.sentence.endswith("holds no average of this name: it holds ema")


def test_a_limit_asks_the_first_questions_only_and_the_table_says_so(
    lab: Lab, finished: Path, folder: Path
) -> None:
    result = lab.command(
        "evaluate",
        finished,
        "--tasks",
        "chosen",
        "--task-path",
        folder,
        "--limit",
        "3",
        "--batch-size",
        "1",
    )
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    expected = by_hand(finished, ROWS[:3])
    assert [line[:3] for line in lines] == [
        ["chosen", name, f"{expected[name]:.4f}"] for name in ("acc", "acc_norm")
    ]
    assert all(line[5:] == ["3", "questions,", "0", "shots"] for line in lines)


def test_a_task_that_wants_text_gets_what_the_model_writes(
    lab: Lab, finished: Path, folder: Path
) -> None:
    model, tokenizer = core.load(finished), Tokenizer.load(finished / "tokenizer.json")
    ids = greedy(model, [0, *tokenizer.encode("abc")], 4)
    answer = tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)
    rows = [{"query": "abc", "answer": answer}, {"query": "abc", "answer": answer + "x"}]
    write_task(folder, "written", GENERATED, rows, stop="#")
    result = lab.command(
        "evaluate", finished, "--tasks", "written,chosen", "--task-path", folder, "--json"
    )
    assert result.code == 0, result.err
    results = json.loads(result.out)["tasks"]
    assert results["written"]["metrics"]["exact_match"]["value"] == 0.5
    assert set(results) == {"written", "chosen"}


def test_shots_come_before_a_question_and_results_are_files_that_the_harness_reads(
    lab: Lab, finished: Path, folder: Path, tmp_path: Path
) -> None:
    own_zero = MULTIPLE_CHOICE + "num_fewshot: 0\n"
    write_task(folder, "zero", own_zero, ROWS)
    result = lab.command(
        "evaluate",
        finished,
        *("--tasks", "chosen,zero", "--task-path", folder, "--num-fewshot", "1"),
        *("--output", tmp_path / "out", "--json"),
    )
    assert result.code == 0, result.err
    tasks = json.loads(result.out)["tasks"]
    assert (tasks["chosen"]["shots"], tasks["zero"]["shots"]) == (1, 0)
    assert "note: task zero has no solved questions before a question" in result.err
    (file,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(file.read_text())
    from lm_eval.utils import make_table

    assert "chosen" in make_table(written)
    assert written["n-shot"] == {"chosen": 1, "zero": 0}
    assert written["results"]["chosen"]["acc,none"] == tasks["chosen"]["metrics"]["acc"]["value"]
    assert written["config"]["model_args"] == {"path": str(finished)}


def test_shots_that_cannot_be_are_refused(
    lab: Lab, finished: Path, folder: Path, tmp_path: Path
) -> None:
    given = ("--tasks", "chosen", "--task-path", folder)
    few = lab.command("evaluate", finished, *given, "--num-fewshot", "10")
    assert few.code == 2
    assert few.sentence == "--num-fewshot = 10: task chosen has 10 questions to take them from"
    (tmp_path / "taken").write_text("")
    taken = lab.command("evaluate", finished, *given, "--output", tmp_path / "taken")
    assert taken.code == 2
    assert taken.sentence.startswith(f"--output {tmp_path}/taken: is a file, not a folder")


def test_a_name_that_nobody_knows_comes_with_the_nearest(
    lab: Lab, finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness indexes three of its own folders here, as its index of all 14,000 names takes ten seconds."""
    import lm_eval.tasks.manager

    theirs = Path(lm_eval.tasks.manager.__file__).parent
    for name in ("hellaswag", "arc", "piqa"):
        shutil.copytree(theirs / name, tmp_path / "theirs" / name)
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "theirs" / "manager.py"))
    result = lab.command("evaluate", finished, "--tasks", "chosen,helaswag", "--task-path", folder)
    assert result.code == 2
    assert result.sentence.startswith(
        f"--tasks: lm-evaluation-harness and {folder} has no task 'helaswag'; did you mean"
    )
    assert " hellaswag" in result.sentence
    result = lab.command("evaluate", finished, "--tasks", "harc_*")
    assert (
        result.sentence
        == "--tasks: lm-evaluation-harness has no task 'harc_*'; did you mean arc_easy?"
    )


def test_data_that_is_not_there_is_one_sentence(lab: Lab, finished: Path, folder: Path) -> None:
    (folder / "chosen.jsonl").unlink()
    result = lab.command("evaluate", finished, "--tasks", "chosen", "--task-path", folder)
    assert result.code == 2
    assert result.sentence.startswith("--tasks chosen: cannot be loaded: ")
    assert "chosen.jsonl" in result.sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tasks", "a", "--limit", "0"), "--limit = 0: must be at least 1"),
        (("--tasks", "a", "--batch-size", "-1"), "--batch-size = -1: must be at least 1"),
        (("--tasks", " , "), "--tasks: name at least one"),
        (
            ("--tasks", "a", "--task-path", "/no/such"),
            "--task-path /no/such: there is no such folder",
        ),
        (("--tasks", "a", "--xz"), "--xz is for validation and cannot be combined with --tasks"),
        (("--tasks", "a", "--num-fewshot", "-1"), "--num-fewshot = -1: must be at least 0"),
        (("--limit", "3"), "--limit needs --tasks"),
        (("--num-fewshot", "3"), "--num-fewshot needs --tasks"),
        (("--output", "x"), "--output needs --tasks"),
        (("--batch-size", "3"), "--batch-size needs --tasks"),
        (("--task-path", "."), "--task-path needs --tasks"),
        (("--device", "cpu"), "--device needs --tasks"),
    ],
)
def test_options_that_cannot_be_are_refused(
    lab: Lab, finished: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = lab.command("evaluate", finished, *arguments)
    assert result.code == 2
    assert result.sentence.startswith(sentence)


def test_a_device_that_is_not_here_is_refused(lab: Lab, finished: Path, folder: Path) -> None:
    result = lab.command(
        "evaluate", finished, "--tasks", "chosen", "--task-path", folder, "--device", "nonsense"
    )
    assert result.code == 2
    assert result.sentence.startswith("--device nonsense: is no device; give cpu, cuda or cuda:N")


def test_a_gpu_that_a_part_cannot_run_on_is_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the one of `fit`; otherwise the first product would raise a less clear one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    unmet = ["precision te_fp8: needs CUDA 12.9"]
    monkeypatch.setattr(core.run.device, "unmet_requirements", lambda recipe: unmet)
    with pytest.raises(UserError, match="--device cuda: cannot run there: precision te_fp8: needs"):
        core.run.device.check_device("cuda", lab.recipe())


def test_without_the_harness_it_says_what_to_install(finished: Path) -> None:
    def run() -> None:
        import importlib.util as util

        real = find_spec
        for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
            del sys.modules[name]
        util.find_spec = lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
        sys.modules.pop("core.harness.tasks", None)
        run_command_here("evaluate", finished, "--tasks", "chosen")

    result = forked(run)
    assert result.code == 2
    assert (
        result.sentence
        == "--tasks needs lm-evaluation-harness, not installed here: pip install 'moeloom[eval]'"
    )


def test_validation_imports_no_harness(lab: Lab, finished: Path) -> None:
    """It takes seconds, and may not be there."""

    def run() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
            del sys.modules[name]
        try:
            run_command_here("evaluate", finished, "--json")
        finally:
            found = [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]
            print(f"found {found}", file=sys.stderr)

    result = forked(run)
    assert result.code == 0, result.err
    assert "found []" in result.err


@pytest.mark.full
def test_a_score_that_is_not_finite_is_an_error(
    lab: Lab, finished: Path, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoints/step-00000012.ckpt"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["model.output.weight"].fill_(3e38)
    content["state_dict"]["model.norm.weight"].fill_(3e38)
    torch.save(content, file)
    result = lab.command(
        "evaluate", run, "--tasks", "chosen", "--task-path", folder, "--limit", "1"
    )
    assert result.code == 2, result.err
    assert f"{file}: the model's log-likelihood of an answer is not finite (" in result.sentence
