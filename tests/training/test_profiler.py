"""The callback `profiler`: a run reaches the same bits, its profile is whole or absent, its times are a clock's."""

import gzip
import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lab import CommandResult, Lab, assert_same_run, forked, run_command_here
from lightning.pytorch.profilers import SimpleProfiler
from tiers import first_by_default
from torch.profiler import ProfilerActivity, profile

from core.contracts.errors import UserError
from core.training import callbacks
from core.training.module import TrainingModule
from plugins.profiler.analysis import PARTS, PAUSE, STEP
from plugins.profiler.callback import ObservedProfiler, ProfilerCallback
from plugins.profiler.factory import Profiler
from plugins.profiler.recording import Recording

FILES = ["rank-00000.trace.json.gz", "summary.json", "summary.md"]


def keys(**given: Any) -> Any:
    """The keys of the callback's section."""
    return Profiler.Config(**{"first_step": 2, "steps": 2, **given})


def section(**given: Any) -> str:
    """The override that adds the callback."""
    text = ", ".join(f"{key}: {value}" for key, value in given.items())
    return f"callbacks=[{{name: profiler, {text}}}]"


def names(folder: Path) -> list[str]:
    """The sorted names of a folder's files; none if there is no folder."""
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


# ---- a whole run


@dataclass(frozen=True)
class ProfiledRun:
    """A run with a profile, and when a clock saw its first step begin and each step end, in s."""

    folder: Path
    looks: list[float]


@pytest.fixture(scope="module")
def profiled(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ProfiledRun:
    """A run of the small recipe of which steps 6 and 7 are profiled; in between it validates and saves."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    looks: list[float] = []

    def looking(function: Any) -> Any:
        def called(self: Recording) -> None:
            function(self)
            looks.append(time.perf_counter())

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in ("start", "end_step"):
            patch.setattr(Recording, name, looking(getattr(Recording, name)))
        lab.fit(folder, section(first_step=6, steps=2, memory="true"))
    return ProfiledRun(folder, looks)


def test_a_profiled_run_reaches_the_same_bits(profiled: ProfiledRun, finished: Path) -> None:
    assert_same_run(profiled.folder, finished)


def test_the_profile_of_a_run(profiled: ProfiledRun) -> None:
    folder = profiled.folder / "profile"
    assert names(folder) == FILES
    trace = json.loads(gzip.decompress((folder / FILES[0]).read_bytes()))
    seen = Counter(event.get("name") for event in trace["traceEvents"])
    assert seen[STEP] == 2
    assert seen["profiler.backward"] == 2 * 2  # micro-batches
    assert seen["Optimizer.step#AdamW.step"] == 2
    assert seen[PAUSE] == 2  # the validation after step 6, and its best checkpoint
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["first_step"], summary["steps"]) == (6, 2)
    (rank,) = summary["ranks"]
    assert list(rank["seconds"]) == list(PARTS)
    assert sum(rank["seconds"].values()) == pytest.approx(rank["wall_seconds"], rel=1e-12)
    assert sum(rank["shares"].values()) == pytest.approx(1, rel=1e-12)
    assert (rank["seconds"]["exchange"], rank["seconds"]["wait"]) == (0, 0)
    assert min(rank["seconds"][part] for part in ("data", "compute", "other")) > 0
    assert rank["collectives"]["covered_share"] is None
    assert rank["memory_snapshot"].startswith("none: torch records a memory snapshot on GPUs only")
    assert rank["peak_memory_bytes"] > 100_000
    assert "aten::mm" in [operator["name"] for operator in rank["operators"]]
    assert "| compute |" in (folder / "summary.md").read_text()


def test_the_steps_are_as_long_as_a_clock_says(profiled: ProfiledRun) -> None:
    """The tolerance is for the marks themselves, and for the moments between a mark and the look at the clock."""
    (rank,) = json.loads((profiled.folder / "profile" / "summary.json").read_text())["ranks"]
    clock = [later - before for before, later in pairwise(profiled.looks)]
    assert rank["step_seconds"][0] == pytest.approx(clock[0], rel=0.05, abs=0.01)
    assert 0 < rank["step_seconds"][1] < clock[1]  # which includes the validation


def callback(folder: Path, **given: Any) -> ProfilerCallback:
    """The callback that profiles steps 2 and 3, or others that are given."""
    made = Profiler(keys(**given)).make(folder)
    assert isinstance(made, ProfilerCallback)
    return made


# ---- profiled steps of which some are not run


class Fails(L.Callback):
    """Raises when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Any) -> None:
        """Fails in the middle of the step."""
        if pl_module.windows_done == self.step - 1:
            raise RuntimeError("something failed")


class Stops(L.Callback):
    """Lets the run end after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Stops the Trainer."""
        trainer.should_stop = pl_module.windows_done >= self.step


def test_a_run_that_fails_in_a_profiled_step_leaves_no_profile(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="something failed"):
        lab.train("budget.steps=4", callbacks=[callback(tmp_path), Fails(3)])
    assert names(tmp_path / "profile") == []
    said = "note: profiler: steps 2 to 3 not profiled: the run stopped after step 2; no profile is written"
    assert said in capsys.readouterr().err
    with profile(activities=[ProfilerActivity.CPU]):
        pass  # torch's profiler is free again, or this is an error


@pytest.mark.full
@pytest.mark.parametrize("step", [1, 2], ids=["before", "inside"])
def test_a_run_that_ends_early_leaves_no_profile(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    lab.train("budget.steps=4", callbacks=[Stops(step), callback(tmp_path)])
    assert names(tmp_path / "profile") == []
    assert f"not profiled: the run ended after step {step};" in capsys.readouterr().err


def interrupted(lab: Lab, run: Path, step: int, *overrides: str) -> CommandResult:
    """Trains in a forked process that gets a signal in a step."""

    def work() -> None:
        function = callbacks.LoadLog.on_train_batch_end

        def sends_a_signal(self: Any, trainer: Any, module: TrainingModule, *rest: Any) -> None:
            if module.windows_done == step:
                os.kill(os.getpid(), signal.SIGTERM)
            function(self, trainer, module, *rest)

        callbacks.LoadLog.on_train_batch_end = sends_a_signal  # type: ignore[method-assign]
        run_command_here("fit", lab.file, *overrides, "--out", run)

    return forked(work)


@pytest.mark.full
@pytest.mark.parametrize(("step", "is_inside"), [(3, False), (6, True), (8, False)])
def test_a_run_that_is_interrupted_and_resumed(
    lab: Lab, finished: Path, tmp_path: Path, step: int, is_inside: bool
) -> None:
    """Steps 5 to 7 are profiled, by whichever part of the run contains them all."""
    run = tmp_path / "run"
    profiler = section(first_step=5, steps=3)
    first = interrupted(lab, run, step, profiler)
    assert first.code == 143
    given_up = "note: profiler: steps 5 to 7 not profiled: the run stopped after step 6"
    assert (given_up in first.err) == is_inside
    assert names(run / "profile") == (FILES if step > 7 else [])
    second = lab.command("fit", lab.file, profiler, "--resume", run)
    assert second.code == 0, second.err
    late = "note: profiler: steps 5 to 7 not profiled: the run continues after step 6"
    assert (late in second.err) == is_inside
    assert names(run / "profile") == ([] if is_inside else FILES)
    assert_same_run(run, finished)


# ---- a GPU


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "given up"])
def test_what_a_gpu_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    """The calls of torch in their order, on a machine that has no GPU."""
    asked: list[str] = []

    class Profile:
        """Stands for torch's profiler."""

        def __init__(self, *, activities: list[ProfilerActivity], **options: Any) -> None:
            given = [name for name, value in options.items() if value]
            asked.append(f"profile {[activity.name for activity in activities]} {given}")

        def start(self) -> None:
            """Is noted."""
            asked.append("start")

        def stop(self) -> None:
            """Is noted."""
            asked.append("stop")

    def history(enabled: str | None = "all", **_: Any) -> None:
        asked.append(f"history {enabled}")

    monkeypatch.setattr("plugins.profiler.recording.profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(f"wait {device}"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", history)
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda file: asked.append(f"dump {file}")
    )
    recording = Recording(keys(memory=True, stacks=True), torch.device("cuda", 1))
    recording.start()
    recording.end_step()
    begun = [
        "wait cuda:1",
        "history all",
        "profile ['CPU', 'CUDA'] ['profile_memory', 'with_stack']",
    ]
    ended = ["stop", "history None"]
    if is_whole:
        recording.stop()
        recording.write_snapshot(tmp_path / "snapshot")
        ended = ["stop", f"dump {tmp_path / 'snapshot'}", "history None"]
    else:
        recording.discard()
    assert asked == [*begun, "start", "wait cuda:1", *ended]


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"first_step": 0}, "callbacks.0.first_step = 0: must be at least 1"),
        ({"steps": 0}, "callbacks.0.steps = 0: must be at least 1"),
        (
            {"first_step": 11},
            "callbacks.0.first_step = 11: the profile would end with step 13, and the run has 12",
        ),
        ({"ranks": "second"}, "callbacks.0.ranks = 'second': must be one of first, all"),
    ],
    ids=["first_step", "steps", "too late", "ranks"],
)
def test_a_mistake_is_one_sentence(lab: Lab, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        lab.recipe(section(**given))
    assert sentence in str(error.value)


@pytest.mark.parametrize("tokens", first_by_default([11 * 128 + 1, 12 * 128]))
def test_a_budget_in_tokens_has_so_many_steps(lab: Lab, tokens: int) -> None:
    budget = ("budget.steps=null", f"budget.tokens={tokens}")
    lab.recipe(section(first_step=10), *budget)
    with pytest.raises(UserError, match="would end with step 13, and the run has 12"):
        lab.recipe(section(first_step=11), *budget)


def test_a_run_whose_length_the_recipe_does_not_say_is_checked_before_the_first_step(
    lab: Lab, tmp_path: Path
) -> None:
    ramp = (
        "batch.accumulate={start: 1, unit: tokens, segments: [{shape: linear, to: 2, until: 200}]}"
    )
    overrides = ("budget.steps=null", "budget.tokens=384", ramp, section(first_step=30))
    with pytest.raises(UserError, match=r"profile would end with step 32, and the run has \d+"):
        lab.fit(tmp_path / "run", *overrides)
    assert names(tmp_path / "run" / "checkpoints") == []


def test_another_use_of_torchs_profiler_is_an_error(lab: Lab, tmp_path: Path) -> None:
    lab.recipe(section(), "trainer.profiler=simple")
    with pytest.raises(UserError, match=r"trainer\.profiler = pytorch uses"):
        lab.recipe(section(), "trainer.profiler=pytorch")
    twice = [callback(tmp_path), callback(tmp_path)]
    with pytest.raises(UserError, match="profiler is there twice"):
        lab.train("budget.steps=4", callbacks=twice)


def test_a_file_in_the_folders_place_is_an_error(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    with pytest.raises(UserError, match="profile: must be a folder"):
        lab.train("budget.steps=4", callbacks=[callback(tmp_path)])


# ---- Lightning's own profiler


class Watched(SimpleProfiler):
    """A profiler that lists its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Lists the call."""
        self.calls.append(f"setup {stage}")
        super().setup(stage, local_rank, log_dir)

    def describe(self) -> None:
        """Lists the call."""
        self.calls.append("describe")

    def teardown(self, stage: str | None) -> None:
        """Lists the call."""
        self.calls.append(f"teardown {stage}")


def test_the_profiler_of_the_trainer_still_sees_everything() -> None:
    heard: list[str] = []
    listener: Any = SimpleNamespace(
        begin=lambda mark: heard.append(f"begin {mark}"),
        end=lambda mark: heard.append(f"end {mark}"),
        loader_begins=lambda trainer: heard.append("loader"),
    )
    trainer: Any = None
    inner = Watched()
    outer = ObservedProfiler(inner, listener, trainer)
    for action in ("[_TrainingEpochLoop].train_dataloader_next", "run_training_batch", "other"):
        with outer.profile(action):
            pass
        assert len(inner.recorded_durations[action]) == 1
    outer.setup("fit", 0, None)
    outer.describe()
    outer.teardown("fit")
    assert inner.calls == ["setup fit", "describe", "teardown fit"]
    assert "train_dataloader_next" in outer.summary()
    assert heard == ["loader", "end profiler.data", "begin profiler.batch", "end profiler.batch"]
