"""A run with a warm-up, a stable rate and a decay: the rates in its log, over a resume too."""

import math
from pathlib import Path

import pytest
from lab import Lab, assert_same, last_checkpoint, rows
from rank_runs import cut_after

WSD = (
    "optimizer={name: adamw, lr: {unit: steps, wsd: {peak: 0.01, warmup: 2, decay: 4, final: 0.001}}}",
    "budget.steps=8",
    "checkpoint={every_steps: 6, keep: 9}",
)


@pytest.mark.full
def test_logged_rates_are_the_closed_form_and_a_resumed_run_has_the_same_bits(
    lab: Lab, tmp_path: Path
) -> None:
    lab.fit(tmp_path / "run", *WSD)
    expected = [0.005, 0.01, 0.01, 0.01]
    expected += [0.001 + 0.009 * (1 - math.sqrt(step / 4)) for step in range(1, 5)]
    logged = [float(row["lr"]) for row in rows(tmp_path / "run") if row.get("lr")]
    assert logged == pytest.approx(expected, rel=1e-6)
    again = cut_after(tmp_path / "run", 6, tmp_path / "again")
    lab.fit(again, *WSD, resume=True)
    assert_same(rows(again), rows(tmp_path / "run"))
    for key in ("state_dict", "optimizer_states"):
        assert_same(last_checkpoint(again)[key], last_checkpoint(tmp_path / "run")[key])
