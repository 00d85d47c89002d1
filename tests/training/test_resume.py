"""A run that is killed at any moment resumes to the bits of one that never stopped.

The small run: 12 steps of two micro-batches, more than an epoch; checkpoints after steps 5, 10 and 12, of which
two are kept; validations after steps 6 and 12.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import ROOT, Lab, assert_same_run, forked, last_checkpoint, loads, rows, run_command_here
from tiers import first_by_default

import core.run.training
from core.analysis.budget import plan_of
from core.assemble import make
from core.checkpoints import saving
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import UserError
from core.data.held_out import read_split
from core.data.recorded import identity
from core.recipe.compose import compose
from core.run.data import text_data
from core.training import callbacks
from core.training.module import TrainingModule
from core.training.run_folder import RunFolder


def die() -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Ends the process before a call of a function if `when` is true for its arguments."""
    function = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            die()
        return function(*args, **kwargs)

    setattr(owner, name, dying)


def half_written(step: int) -> None:
    """Ends the process when half of a checkpoint's bytes are on disk."""

    def half(content: Any, file: Any) -> None:
        torch_save(content, file)
        if content["moeloom"]["windows_done"] == step:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    torch_save = torch.save
    saving.torch.save = half  # type: ignore[attr-defined]


def at_step(step: int) -> Callable[..., bool]:
    """A condition for `before`: whether a callback's hook is called after this step."""
    return lambda self, trainer, module, *rest: bool(module.windows_done == step)


MOMENTS: dict[str, Callable[[], None]] = {
    "before it has written down what it is": lambda: before(
        RunFolder, "write_recipe", lambda *_: True
    ),
    "before the first checkpoint": lambda: before(
        callbacks.LoadLog, "on_train_batch_end", at_step(3)
    ),
    "between checkpoints": lambda: before(callbacks.StepLog, "on_train_batch_end", at_step(8)),
    "in the middle of a step": lambda: before(
        TrainingModule, "_agreed_finite", lambda m, _: m.windows_done == 6
    ),
    "in a validation": lambda: before(
        TrainingModule, "validation_step", lambda m, *_: m.windows_done == 6
    ),
    "in the last validation": lambda: before(
        TrainingModule, "validation_step", lambda m, *_: m.windows_done == 12
    ),
    "after a validation, before its checkpoint": lambda: before(
        callbacks, "save_step", lambda _, module, folder: module.windows_done == 12
    ),
    "when a checkpoint is half written": lambda: half_written(10),
    "after a checkpoint, before anything else": lambda: before(
        callbacks,
        "checkpoints_in",
        lambda folder: checkpoints_in(folder)[-1].name == "step-00000010.ckpt",
    ),
    "before the oldest checkpoint is taken away": lambda: before(
        callbacks, "checkpoints_in", lambda folder: len(checkpoints_in(folder)) == 3
    ),
    "before the summary": lambda: before(core.run.training, "_finish", lambda *_: True),
}
BY_DEFAULT = "when a checkpoint is half written"


@pytest.mark.parametrize("moment", first_by_default(sorted(MOMENTS, key=BY_DEFAULT.__ne__)))
def test_a_killed_run_resumes_to_the_same_bits(
    lab: Lab, finished: Path, tmp_path: Path, moment: str
) -> None:
    run = tmp_path / "run"

    def killed() -> None:
        MOMENTS[moment]()
        lab.fit(run)

    assert forked(killed).code == 128 + signal.SIGKILL
    assert not (run / "summary.json").exists()
    summary = lab.fit(run, resume=True)
    assert_same_run(run, finished)
    whole = json.loads((finished / "summary.json").read_text())
    clock = (
        "wall_seconds",
        "train_seconds",
        "tokens_per_second",
        "mfu",
        "peak_flops",
        "peak_memory_bytes",
    )
    assert {k: v for k, v in summary.items() if k not in clock} == {
        k: v for k, v in whole.items() if k not in clock
    }


def test_the_small_run_is_a_hard_one(lab: Lab, finished: Path) -> None:
    """Requires more than one epoch, accumulation, and a length that no multiple of the checkpoints reaches."""
    data = text_data(lab.recipe(), plan_of(lab.recipe()))
    data.prepare()
    assert (data.train_tokens - 1) // 16 < 12 * 2 * 4
    assert [int(row["step"]) for row in rows(finished) if "lr" in row] == list(range(1, 13))
    assert [int(row["step"]) for row in rows(finished) if "val_loss" in row] == [6, 12]
    assert [file.name for file in checkpoints_in(finished)] == [
        "step-00000010.ckpt",
        "step-00000012.ckpt",
    ]


@pytest.mark.full
def test_tensorboard_has_the_rows_of_the_csv_once_also_after_a_kill(
    lab: Lab, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def killed() -> None:
        before(callbacks.StepLog, "on_train_batch_end", at_step(8))
        lab.fit(tmp_path / "run")

    assert forked(killed).code == 128 + signal.SIGKILL
    time.sleep(1.0)  # TensorBoard reads a run's files in the order of the seconds in their names
    lab.fit(tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written: dict[str, list[tuple[int, float]]] = {}
    for row in rows(tmp_path / "run"):
        for tag in row.keys() - {"step"}:
            written.setdefault(tag, []).append((int(row["step"]), float(row[tag])))
    tags = set(events.Tags()["scalars"])
    assert tags - {"mfu", "tokens_per_second"} == written.keys()
    for tag, expected in written.items():
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], tag
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected], rel=1e-6
        ), tag


@pytest.mark.full
def test_a_row_that_was_cut_short_is_written_again(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    """Cuts `metrics.csv` within a row, as a full disk can; the rest of the row must not become a row of its own."""
    run = tmp_path / "run"

    def killed() -> None:
        before(callbacks.StepLog, "on_train_batch_end", at_step(8))
        lab.fit(run)

    assert forked(killed).code == 128 + signal.SIGKILL
    text = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").write_bytes(text + text.splitlines(keepends=True)[-1][:150])
    lab.fit(run, resume=True)
    assert_same_run(run, finished)


@pytest.mark.full
def test_a_run_that_was_moved_remembers_its_best(lab: Lab, tmp_path: Path) -> None:
    """Trains with a learning rate that ruins the weights from step 7 on."""
    jump = "optimizer.lr={unit: steps, start: 0.003, segments: [{until: 6}, {to: 30.0, until: 99}]}"

    def killed() -> None:
        before(callbacks.StepLog, "on_train_batch_end", at_step(11))
        lab.fit(tmp_path / "here", jump)

    assert forked(killed).code == 128 + signal.SIGKILL
    (tmp_path / "here").rename(tmp_path / "there")
    lab.fit(tmp_path / "there", jump, resume=True)
    best = read_checkpoint(tmp_path / "there" / "checkpoints" / "best.ckpt")
    assert best["moeloom"]["windows_done"] == 6


def test_a_finished_run_is_left_as_it_is(lab: Lab, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in run.rglob("*")
        if file.is_file()
    }
    assert lab.fit(run, resume=True) == json.loads((finished / "summary.json").read_text())
    assert {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in run.rglob("*")
        if file.is_file()
    } == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.dim=48", "model.dim = 48 here, but the run was started with 32"),
        (
            "model.blocks.moe.ffn.experts=16",
            "model.blocks.moe.ffn.experts = 16 here, but the run was started with 8",
        ),
        ("budget.steps=20", "budget.steps = 20 here, but the run was started with 12"),
        ("seed=4", "seed = 4 here, but the run was started with 3"),
        (
            "model.blocks.moe.ffn.balance.0.rate=0.02",
            "model.blocks.moe.ffn.balance.0.rate = 0.02 here, but",
        ),
        ("precision.name=bf16", "precision.name = bf16 here, but the run was started with fp32"),
    ],
)
def test_another_recipe_is_refused_by_its_first_difference(
    lab: Lab, finished: Path, override: str, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        lab.fit(finished, override, resume=True)
    assert sentence in str(caught.value)


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run without its last checkpoint."""
    run = tmp_path / "stopped"
    shutil.copytree(finished, run)
    checkpoints_in(run)[-1].unlink()
    (run / "summary.json").unlink()
    return run


def test_another_thread_count_is_refused(lab: Lab, stopped: Path) -> None:
    def with_two_threads() -> None:
        torch.set_num_threads(2)
        run_command_here("fit", lab.file, "--resume", stopped)

    result = forked(with_two_threads)
    assert result.code == 2
    assert "the run used 1 threads and this process has 2" in result.sentence
    assert "OMP_NUM_THREADS=1" in result.sentence


def test_another_corpus_is_refused(lab: Lab, stopped: Path) -> None:
    text = lab.texts / "doc-03.txt"
    kept = text.read_bytes()
    try:
        text.write_bytes(kept + b" more")
        with pytest.raises(UserError, match="the corpus has changed since this run began"):
            lab.fit(stopped, resume=True)
    finally:
        text.write_bytes(kept)


def test_a_corpus_that_has_moved_is_the_same(
    lab: Lab, stopped: Path, finished: Path, tmp_path: Path
) -> None:
    """Also by a run that another version of `tokenizers` began, and that has no list of documents."""
    shutil.copytree(lab.texts, tmp_path / "moved")
    moved = f"data.corpus.paths=[{tmp_path}/moved/*.txt]"
    provenance = json.loads((stopped / "provenance.json").read_text())
    documents = read_split(make(lab.recipe().data.corpus)).documents
    provenance["packages"]["tokenizers"] = "0.0.1"
    provenance["data"] = identity(documents, 300, "0.0.1")
    (stopped / "provenance.json").write_text(json.dumps(provenance))
    (stopped / "documents.txt").unlink()
    lab.fit(stopped, moved, resume=True)
    kept = compose(stopped / "recipe.yaml")
    assert kept.data.corpus.config.paths == [f"{tmp_path}/moved/*.txt"]
    assert lab.command("evaluate", stopped).code == 0
    assert json.loads((stopped / "summary.json").read_text())["steps"] == 12
    assert_same_run(stopped, finished)


def test_a_moved_corpus_with_another_text_is_refused(
    lab: Lab, stopped: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(lab.texts, tmp_path / "moved")
    (tmp_path / "moved" / "doc-04.txt").write_text("other")
    moved = f"data.corpus.paths=[{tmp_path}/moved/*.txt]"
    for run in (stopped, finished):
        with pytest.raises(
            UserError, match=r"document 'doc-04.txt' .*moved/doc-04.txt\) has another"
        ):
            lab.fit(run, moved, resume=True)
    assert compose(stopped / "recipe.yaml").data.corpus.config.paths == [f"{lab.texts}/*.txt"]


def test_another_layout_goes_on_and_says_so(lab: Lab, stopped: Path, finished: Path) -> None:
    result = lab.command("fit", lab.file, "--resume", stopped, "trainer.log_every_n_steps=2")
    assert result.code == 0
    assert "trainer.log_every_n_steps = 2 here" in result.err
    assert "resumed after step 10" in result.err
    assert [row["step"] for row in rows(stopped) if "lr" in row][-3:] == ["9", "10", "12"]
    assert torch.equal(loads(stopped)["bias.blocks.1"], loads(finished)["bias.blocks.1"])


@pytest.mark.full
def test_resume_auto_takes_the_newest_unfinished_run_or_starts_one(
    lab: Lab, tmp_path: Path
) -> None:
    """Repeats one command, which finishes a run and then starts the next."""

    def again(steps: int | None) -> str:
        def work() -> None:
            os.chdir(tmp_path)
            if steps:
                before(callbacks.StepLog, "on_train_batch_end", at_step(steps))
            run_command_here("fit", lab.file, "budget.steps=6", "--resume", "auto")

        result = forked(work)
        assert result.code == (128 + signal.SIGKILL if steps else 0), result.err
        return next(line for line in result.err.splitlines() if line.startswith("run folder"))

    assert again(2) == "run folder: runs/small"
    assert again(6) == "run folder: runs/small"
    assert again(None) == "run folder: runs/small (resumed after step 5)"
    assert again(2) == "run folder: runs/small-2"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small", "small-2"]
    assert (tmp_path / "runs" / "small" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume", "nowhere"], "--resume nowhere: there is no run in this folder"),
        (
            ["--resume", "one", "--out", "two"],
            "--out two: a resumed run stays in its own folder, one",
        ),
    ],
)
def test_a_run_that_is_not_there_is_not_resumed(
    lab: Lab, arguments: list[str], sentence: str
) -> None:
    result = lab.command("fit", lab.file, *arguments)
    assert result.code == 2
    assert result.sentence.startswith(sentence)


@pytest.mark.full
def test_a_real_process_that_is_killed_from_outside_resumes(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    """Runs `python -m core.fit`, kills it with `kill -9` at an arbitrary moment, and resumes it with `--resume`."""
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "core.fit",
        str(lab.file),
        "--resume",
        "auto",
        "--out",
        str(run),
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if (run / "metrics.csv").exists() and len(rows(run)) >= 7:
                break
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(resumed.stdout)["steps"] == 12
    assert_same_run(run, finished)
    assert last_checkpoint(run)["moeloom"]["threads"] == 1
