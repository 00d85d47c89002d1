"""Steps whose gradient norm is far above those before are skipped, exactly as steps with a non-finite norm are."""

import random
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab import Lab, assert_same, last_checkpoint, rows
from rank_runs import cut_after, fit_on_ranks

from core.checkpoints.content import check_content
from core.checkpoints.listing import checkpoints_in
from core.contracts.errors import RunFailed, UserError
from core.data.batch import Batch
from core.recipe.recipe_schema import SpikeSection
from core.training.module import TrainingModule
from core.training.spikes import SpikeGuard

GUARD = "skip_spikes={factor: 3, window: 3}"


class Scaled(L.Callback):
    """Multiplies every gradient of some steps by a factor, by its loss; keeps what each step read."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors = factors
        self.windows: list[list[Batch]] = []
        self.hooks: list[Any] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.windows.append(batch)
        factor = self.factors.get(batch_idx)
        if factor is not None:
            for weight in pl_module.model.parameters():
                self.hooks.append(weight.register_hook(lambda g, factor=factor: g * factor))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_the_guard_skips_what_the_definition_skips(statistic: Any) -> None:
    """A slow reference: the last `window` applied norms, looked up anew in each step."""
    draw = random.Random(1)
    settings = SpikeSection(factor=1.5, window=5, statistic=statistic)
    guard = SpikeGuard(settings)
    applied: list[float] = []
    skipped = 0
    for _ in range(400):
        norm = draw.lognormvariate(0, 0.5)
        middle = getattr(statistics, statistic)(applied[-5:]) if len(applied) >= 5 else None
        expected = middle is not None and norm > 1.5 * middle
        assert guard.is_spike(norm) == expected
        skipped += expected
        if not expected:
            applied.append(norm)
            guard.applied(norm)
    assert 40 < skipped < 300


def test_a_history_of_zeros_skips_nothing_and_other_learning_weights_begin_it_anew() -> None:
    guard = SpikeGuard(SpikeSection(factor=2, window=2))
    for _ in range(2):
        guard.begin_step(None)
        guard.applied(0.0)
    assert not guard.is_spike(1e9)
    guard.applied(1.0)
    guard.applied(1.0)
    assert guard.is_spike(2.1)
    guard.begin_step(["a"])
    assert not guard.is_spike(2.1)


def test_a_spike_leaves_the_run_as_if_its_window_had_not_been(lab: Lab) -> None:
    """Weights, moments, biases and all later steps are those of a run that never read the window."""
    scaled = Scaled({5: 1e4})
    spiked = lab.train(GUARD, "budget.steps=8", callbacks=[scaled])
    assert (spiked.skipped_steps, spiked.skipped_in_a_row, spiked.windows_done) == (1, 0, 8)
    without = lab.train(GUARD, windows=[*scaled.windows[:5], *scaled.windows[6:]])
    assert_same(spiked.state_dict(), without.state_dict())
    assert spiked.spikes is not None
    assert without.spikes is not None
    assert list(spiked.spikes.norms) == list(without.spikes.norms)


def test_by_default_and_without_a_spike_no_bit_changes(lab: Lab) -> None:
    plain = lab.train("budget.steps=6")
    guarded = lab.train("skip_spikes={factor: 1000, window: 2}", "budget.steps=6")
    assert plain.spikes is None
    assert guarded.skipped_steps == 0
    assert_same(guarded.state_dict(), plain.state_dict())


def test_spikes_and_norms_that_are_not_finite_count_together(lab: Lab) -> None:
    factors = {4: 1e4, 5: float("nan"), 6: 1e4}
    with pytest.raises(RunFailed, match=r"skip_spikes allows .*; 3 steps in a row .* step 7"):
        lab.train(GUARD, "max_skipped_steps=3", "budget.steps=9", callbacks=[Scaled(factors)])
    module = lab.train(GUARD, "max_skipped_steps=4", "budget.steps=9", callbacks=[Scaled(factors)])
    assert (module.skipped_steps, module.windows_done) == (3, 9)


@pytest.fixture
def spiky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the norm of step 7, counted from 1, a hundred times larger."""
    usual = TrainingModule._is_spike

    def scaled(self: TrainingModule, norm: torch.Tensor, learning: Any) -> bool:
        return usual(self, norm * 100 if self.windows_done == 6 else norm, learning)

    monkeypatch.setattr(TrainingModule, "_is_spike", scaled)


@pytest.mark.usefixtures("spiky")
def test_a_resumed_run_has_the_history_and_the_bits_of_one_that_never_stopped(
    lab: Lab, tmp_path: Path
) -> None:
    overrides = (GUARD, "budget.steps=10", "checkpoint.keep=9")
    summary = lab.fit(tmp_path / "whole", *overrides)
    assert summary["skipped_steps"] == 1
    logged = [row["skipped_steps"] for row in rows(tmp_path / "whole") if row.get("skipped_steps")]
    assert logged == ["0.0"] * 6 + ["1.0"] * 4
    run = cut_after(tmp_path / "whole", 5, tmp_path / "run")
    assert len(last_checkpoint(run)["moeloom"]["spikes"]["norms"]) == 3
    lab.fit(run, *overrides, resume=True)
    for key in ("state_dict", "optimizer_states"):
        assert_same(last_checkpoint(run)[key], last_checkpoint(tmp_path / "whole")[key])
    assert_same(rows(run), rows(tmp_path / "whole"))


@pytest.mark.full
def test_a_spike_on_one_rank_is_skipped_by_all(lab: Lab, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        usual = TrainingModule._is_spike

        def scaled(self: TrainingModule, norm: torch.Tensor, learning: Any) -> bool:
            here = rank == 1 and self.windows_done == 4
            return usual(self, norm * 100 if here else norm, learning)

        TrainingModule._is_spike = scaled  # type: ignore[method-assign]

    ranks = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
    fit_on_ranks(lab, tmp_path / "run", ranks, GUARD, "budget.steps=6", before=before)
    logged = [row["skipped_steps"] for row in rows(tmp_path / "run") if row.get("skipped_steps")]
    assert logged == ["0.0"] * 4 + ["1.0"] * 2


@pytest.mark.full
def test_another_bound_is_another_run(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", GUARD, "budget.steps=5")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"skip_spikes\.factor = 4"):
        lab.fit(
            tmp_path / "run", "skip_spikes={factor: 4, window: 3}", "budget.steps=5", resume=True
        )


DAMAGES: dict[str, Any] = {
    "no section": [],
    "no norms": {"learning": ""},
    "a text among the norms": {"norms": [1.0, "a"], "learning": ""},
    "an infinite norm": {"norms": [float("inf")], "learning": ""},
    "a number in place of the learning weights": {"norms": [1.0], "learning": 3},
}


def test_a_damaged_history_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", GUARD, "budget.steps=2")
    file = checkpoints_in(tmp_path / "run")[-1]
    content = last_checkpoint(tmp_path / "run")
    check_content(content, file)
    for damage in DAMAGES.values():
        content["moeloom"]["spikes"] = damage
        with pytest.raises(UserError, match=r"moeloom\.spikes: must hold the norms of steps"):
            check_content(content, file)


BAD = {
    "skip_spikes={}": "skip_spikes.factor: required key is missing",
    "skip_spikes={factor: 1}": "skip_spikes.factor = 1: must be more than 1 and finite",
    "skip_spikes={factor: .nan}": "skip_spikes.factor = nan: must be finite",
    "skip_spikes={factor: 2, window: 0}": "skip_spikes.window = 0: must be at least 1",
    "skip_spikes={factor: 2, window: 1000000}": "skip_spikes.window = 1000000: must be at most 100000",
    "skip_spikes={factor: 2, statistic: mode}": "skip_spikes.statistic = 'mode': must be one of median, mean",
}


@pytest.mark.parametrize(("override", "sentence"), BAD.items())
def test_a_bad_bound_is_refused(lab: Lab, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        lab.recipe(override)
    assert sentence in str(wrong.value)
