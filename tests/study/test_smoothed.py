"""The report's measure of two training curves, on curves whose answer is known."""

import math
from pathlib import Path

import pytest

from core.statistics.smoothing import largest, relative, smoothed
from core.study.training_losses import against, losses_by_step


def test_the_average_is_the_sum_that_it_stands_for() -> None:
    """m_t = 0.9^t x_0 + 0.1 sum over s of 0.9^(t - s) x_s, written out."""
    losses = [3.0, 5.0, 1.0, 4.0, 1.5]
    for t, value in enumerate(smoothed(losses)):
        expected = 0.9**t * losses[0] + sum(
            0.1 * 0.9 ** (t - s) * losses[s] for s in range(1, t + 1)
        )
        assert value == pytest.approx(expected, abs=1e-14)


def test_a_loss_that_is_always_a_quarter_percent_higher_is_so() -> None:
    base = {step: 2 + math.exp(-step / 9) for step in range(1, 60)}
    found = relative({step: 1.0025 * loss for step, loss in base.items()}, base)
    assert found == pytest.approx([0.0025] * 59, abs=1e-15)
    assert largest(found) == pytest.approx(0.0025)


def test_only_steps_of_both_count_and_the_beginning_is_left_out_of_the_largest() -> None:
    base = dict.fromkeys(range(20), 2.0)
    mine = {step: 4.0 if step == 0 else 2.0 for step in range(30)}
    found = relative(mine, base)
    assert len(found) == 20
    assert found[0] == 1.0
    assert largest(found) == pytest.approx(0.9**2)


def write(folder: Path, losses: list[float]) -> Path:
    """A run's log: validation rows between, a row that is half written at the end."""
    rows = [f"{step},{loss},\n,,2.5\n" for step, loss in enumerate(losses, start=1)]
    folder.mkdir()
    (folder / "metrics.csv").write_text(
        "step,loss/next_token,val_loss\n" + "".join(rows) + "7", encoding="utf-8"
    )
    return folder


def test_curves_of_runs_are_paired_by_seed(tmp_path: Path) -> None:
    base = {seed: write(tmp_path / f"base-{seed}", [4.0 + seed] * 20) for seed in (0, 1, 2)}
    mine = {
        seed: write(tmp_path / f"mine-{seed}", [(4.0 + seed) * (1 + seed / 1000)] * 20)
        for seed in (1, 2, 3)
    }
    found = against(base, mine)
    assert found is not None
    assert found["n"] == 2
    assert found["mean"]["value"] == pytest.approx(0.0015)
    assert found["last"] == pytest.approx(found["mean"])
    assert found["mean"]["high"] - 0.0015 == pytest.approx(
        12.7062 * 0.0005 * math.sqrt(2) / math.sqrt(2), rel=1e-4
    )
    assert found["largest"] == pytest.approx(0.002)


def test_runs_without_a_curve_or_without_a_partner_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    there = write(tmp_path / "there", [3.0])
    assert against({0: there}, {1: there}) is None
    assert against({0: there}, {0: tmp_path / "empty"}) is None
    assert losses_by_step(tmp_path / "nowhere") == {}
    assert losses_by_step(write(tmp_path / "nan", [math.nan, 2.0, math.inf])) == {2: 2.0}


def test_damaged_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [3.0, 2.0])
    with (run / "metrics.csv").open("ab") as file:
        file.write(b"\ninf,1.0,\n\xff\xfe,1.0,\n1e400,1.0,\n\0\0,1.0,\n9,1.5,\n")
    assert losses_by_step(run) == {1: 3.0, 2: 2.0, 9: 1.5}
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").mkdir()
    assert losses_by_step(run) == {}
