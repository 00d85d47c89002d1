"""A non-finite gradient changes nothing but the count of skipped steps."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab import Lab, assert_same, rows
from tiers import first_by_default

from core.contracts.errors import RunFailed
from core.data.batch import Batch
from core.training.module import TrainingModule


class Poison(L.Callback):
    """Multiplies one weight's gradient by a factor in some steps, and records the state after each step."""

    def __init__(self, steps: Iterable[int], factor: float, only_first: bool = False) -> None:
        self.steps, self.factor, self.only_first = set(steps), factor, only_first
        self.left: list[dict[str, Any]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.hook, done = None, []

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            done.append(True)
            return gradient * self.factor if len(done) == 1 or not self.only_first else None

        if batch_idx in self.steps:
            self.hook = pl_module.model.blocks[0].ffn.down.weight.register_hook(spoil)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.hook is not None:
            self.hook.remove()
        state = {
            "model": pl_module.model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
        }
        self.left.append(copy.deepcopy(state))


@pytest.mark.parametrize("factor", first_by_default([float("nan"), float("inf")]))
@pytest.mark.parametrize("only_first", [False, True], ids=["every micro-batch", "one micro-batch"])
def test_P4_a_poisoned_step_changes_no_weight_moment_or_bias_and_is_counted(
    lab: Lab, factor: float, only_first: bool
) -> None:
    poison = Poison({2}, factor, only_first)
    module = lab.train("budget.steps=4", callbacks=[poison])
    before, skipped, after = poison.left[1:]
    assert_same(skipped, before)
    for name in ("model.blocks.1.ffn.balance.0.bias", "model.blocks.0.ffn.down.weight"):
        own = name.removeprefix("model.")
        assert not torch.equal(after["model"][own], skipped["model"][own])
    assert (module.skipped_steps, module.skipped_in_a_row, module.windows_done) == (1, 0, 4)
    assert float(module.step_values["skipped_steps"]) == 1.0


def test_a_skipped_step_leaves_the_run_as_if_its_window_had_not_been(lab: Lab) -> None:
    keep: list[list[Batch]] = []

    class Windows(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            keep.append(batch)

    poisoned = lab.train("budget.steps=4", callbacks=[Windows(), Poison({1}, float("inf"))])
    without = lab.train(windows=[keep[0], *keep[2:]])
    assert_same(poisoned.state_dict(), without.state_dict())


def test_enough_skipped_steps_in_a_row_fail_the_run(lab: Lab) -> None:
    poison = Poison({1, 3, 4, 5}, float("nan"))
    with pytest.raises(
        RunFailed, match=r"nan for 3 steps in a row, the last one step 6; .* optimizer\.lr"
    ):
        lab.train("max_skipped_steps=3", "budget.steps=9", callbacks=[poison])


def test_steps_that_are_not_in_a_row_do_not(lab: Lab) -> None:
    module = lab.train(
        "max_skipped_steps=2", "budget.steps=6", callbacks=[Poison({0, 2, 4}, float("inf"))]
    )
    assert (module.skipped_steps, module.windows_done) == (3, 6)


def test_a_run_that_diverges_leaves_by_its_command_with_1_and_a_sentence(
    lab: Lab, tmp_path: Path
) -> None:
    result = lab.command("fit", lab.file, "optimizer.lr=1e38", "--out", tmp_path / "run")
    assert result.code == 1
    assert "the gradient norm was" in result.sentence
    assert not (tmp_path / "run" / "summary.json").exists()
    steps = [row["skipped_steps"] for row in rows(tmp_path / "run") if "lr" in row]
    # The fifth skipped step in a row ended the run.
    assert steps == ["0.0", "1.0", "2.0", "3.0", "4.0"]


def test_the_count_survives_a_checkpoint(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped steps in a row are counted across a resume, so restarting does not keep a failed run alive."""
    finite = TrainingModule._agreed_finite

    def finite_before_step_4(self: TrainingModule, norm: torch.Tensor) -> bool:
        return finite(self, norm) and self.windows_done < 4

    monkeypatch.setattr(TrainingModule, "_agreed_finite", finite_before_step_4)
    rest = ("max_skipped_steps=3", "checkpoint.every_steps=2")
    for resume in (False, True):
        with pytest.raises(RunFailed, match="3 steps in a row, the last one step 7"):
            lab.fit(tmp_path / "run", *rest, resume=resume)
    assert [row["skipped_steps"] for row in rows(tmp_path / "run") if "lr" in row][3:] == [
        "0.0",
        "1.0",
        "2.0",
    ]
