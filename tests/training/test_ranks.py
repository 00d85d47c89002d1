"""Two ranks train as one does: the same weights, biases, loads and logs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from lab import ROOT, SPEED, Lab, assert_same_run, last_checkpoint, loads, rows

TWO = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
EVERY_SCOPE = (
    "precision.name=fp64",
    "model.blocks.moe.ffn.balance=[{name: bias, rate: 0.01}, {name: sequence, alpha: 0.01}, {name: batch, alpha: 0.01},"
    " {name: micro_batch, alpha: 0.01}, {name: z_loss}, {name: histogram}]",
    "plugins=[own_parts]",
    "model.attention={name: watched, heads: 4}",
    "model.blocks.dense.ffn={name: watched, hidden: 48}",
)
"""Losses over all there is, and layers and balancers with losses, tallies and metrics of their own."""


@contextmanager
def started(lab: Lab, run: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The first of two ranks, which starts the second; none of them is left behind."""
    command = [sys.executable, "-m", "core.fit", str(lab.file), *EVERY_SCOPE, TWO, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, env=environment, cwd=run.parent, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def pair(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run by one rank and one by two, both in fp64, and what the two printed on stdout."""
    folder = tmp_path_factory.mktemp("ranks")
    alone, both = folder / "alone", folder / "both"
    lab.fit(alone, *EVERY_SCOPE)
    with started(lab, both, "--out", str(both), "--json") as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert sorted(file.name for file in folder.iterdir()) == ["alone", "both"]
    return alone, both, out


def test_P22_two_ranks_reach_the_weights_and_biases_of_one(pair: tuple[Path, Path, str]) -> None:
    one, two = (last_checkpoint(folder)["state_dict"] for folder in pair[:2])
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name].dtype == value.dtype
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=name)
        if name.endswith(".bias") or not value.is_floating_point():
            assert torch.equal(two[name], value)
    counted = [name for name in one if name.endswith((".residues_R", ".counted_EN"))]
    assert len(counted) == 4 + 2
    assert all(one[name].any() for name in counted)


def test_P22_two_ranks_count_the_same_integers_as_one(pair: tuple[Path, Path, str]) -> None:
    one, two = (loads(folder) for folder in pair[:2])
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], one[name]) for name in one)


def test_P22_two_ranks_log_every_row_of_one_once(pair: tuple[Path, Path, str]) -> None:
    one, two = (rows(folder) for folder in pair[:2])
    assert {"attention/size", "attention/largest", "ffn/size", "loss/ffn/energy"} <= one[0].keys()
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for mine, other in zip(one, two, strict=True):
        for column, value in mine.items():
            assert float(other[column]) == pytest.approx(float(value), rel=1e-9, abs=1e-12), column


def test_P22_two_ranks_measure_and_say_what_one_does(pair: tuple[Path, Path, str]) -> None:
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in pair[:2])
    assert json.loads(pair[2]) == two
    clock = {*SPEED, "wall_seconds", "train_seconds", "peak_flops", "peak_memory_bytes"}
    assert one.keys() == two.keys()
    texts = {"precision_paths", "peak_flops_source", "sources"}
    assert [one[key] for key in texts] == [two[key] for key in texts]
    for key in one.keys() - clock - texts:
        assert two[key] == pytest.approx(one[key], rel=1e-9), key
    names = [
        sorted(file.name for file in (folder / "checkpoints").iterdir()) for folder in pair[:2]
    ]
    assert names[0] == names[1]
    assert (pair[0] / "sample.txt").read_text() == (pair[1] / "sample.txt").read_text()


def test_P22_two_ranks_draw_and_drop_as_one_does(lab: Lab, tmp_path: Path) -> None:
    """Tries GShard's random choices and capacity, and losses over a batch of one micro-batch."""
    gshard = (
        "model.blocks.moe.ffn.router={name: gshard, capacity_factor: 0.8}",
        "model.blocks.moe.ffn.balance=[{name: gshard, alpha: 1.0}, {name: batch, alpha: 0.01}]",
        "batch.accumulate=1",
        "budget.steps=3",
    )
    alone, both = tmp_path / "alone", tmp_path / "both"
    lab.fit(alone, *EVERY_SCOPE, *gshard)
    with started(lab, both, *gshard, "--out", str(both)) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    one, two = (last_checkpoint(folder)["state_dict"] for folder in (alone, both))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=name)
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (alone, both))
    assert second["dropped_fraction"] == first["dropped_fraction"] > 0
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_two_ranks_stop_together_when_one_gets_a_signal_and_resume_to_the_same_bits(
    lab: Lab, pair: tuple[Path, Path, str], tmp_path: Path, signum: signal.Signals
) -> None:
    """Only the first rank's process gets the signal; the second ends with it."""
    run = tmp_path / "run"
    with started(lab, run, "--out", str(run)) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (
            (run / "metrics.csv").exists() and len(rows(run)) >= 6
        ):
            time.sleep(0.005)
        process.send_signal(signum)
        # The pipes are open for as long as the second rank lives.
        _, err = process.communicate(timeout=60)
    if signum == signal.SIGTERM:
        assert process.returncode == 143
        assert err.count("moeloom: stopped by SIGTERM") == 1
    with started(lab, run, "--resume", str(run)) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_same_run(run, pair[1])
