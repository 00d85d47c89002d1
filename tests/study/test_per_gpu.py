"""Several runs on each GPU: every slot has its GPU, what cannot share one is refused, and the report says so."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from lab import Lab, run_command_here

import core.study.sweep
from core.contracts.errors import UserError
from core.reports import words
from core.reports.study_files import read
from core.study.gpus import gpu_slots, visible_gpus
from core.study.runner import LocalPool
from core.study.sweep_file import read_sweep
from core.study.sweep_folder import SweepFolder

from .conftest import TWO, ForkPool, Write


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    """Makes torch count GPUs, without the variable that names them unless it is given."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_gpus_have_the_names_that_select_them_for_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_gpus(monkeypatch, 2)
    assert visible_gpus() == ["0", "1"]
    with_gpus(monkeypatch, 2, "5, GPU-12ab,-1")
    assert visible_gpus() == ["5", "GPU-12ab"]
    with_gpus(monkeypatch, 0, "")
    assert visible_gpus() == []


def test_gpus_are_filled_in_turn(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TWO + "overrides: {{strategy.accelerator: auto}}\n"
    with_gpus(monkeypatch, 2, "3,7")
    assert gpu_slots(read_sweep(write(text)), 2) == ["3", "7", "3", "7"]


@pytest.mark.parametrize(
    ("addition", "count", "message"),
    [
        ("", 0, "--per-gpu 2: this machine has no GPU that torch can use"),
        ("overrides: {{strategy.accelerator: cpu}}\n", 1, "bias trains on the CPU"),
        ("overrides: {{strategy: {{name: ddp, ranks: 2, accelerator: auto}}}}\n", 1, "on 2 ranks"),
        ("metric: mfu\noverrides: {{strategy.accelerator: auto}}\n", 1, "metric = 'mfu' cannot be"),
    ],
)
def test_what_cannot_share_a_gpu_is_one_sentence(
    addition: str, count: int, message: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read_sweep(write(TWO + addition), here=False)
    with_gpus(monkeypatch, count)
    with pytest.raises(UserError) as caught:
        gpu_slots(sweep, 2)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per-gpu", "0"], "--per-gpu = 0: must be at least 1"),
        (["--per-gpu", "2", "--workers", "2"], "--per-gpu = 2: --workers also says"),
        (["--per-gpu", "2", "--ray", "local"], "--per-gpu = 2: --ray also says"),
    ],
)
def test_the_option_is_checked_first(
    arguments: list[str], message: str, lab: Lab, write: Write
) -> None:
    assert message in lab.command("sweep", write(TWO), *arguments).sentence


def test_each_process_sees_the_gpu_of_its_slot_and_hands_it_on(
    write: Write, tmp_path: Path
) -> None:
    sweep = read_sweep(write(TWO))
    folder = SweepFolder(tmp_path / "it")
    code = "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    pool = LocalPool(2, lambda *_: None, ["3", "GPU-7"])
    barrier = threading.Barrier(2, timeout=60)  # both begin before one ends
    pool.started = lambda *_: barrier.wait() and None
    seen = []
    futures = []
    for job in folder.jobs(sweep):
        job.path.mkdir(parents=True)
        out = job.path / "gpu.txt"
        futures.append((out, pool.submit(job, [sys.executable, "-c", code, str(out)])))
    for out, future in futures:
        assert future.result()[0] == 0
        seen.append(out.read_text())
    pool.stop()
    assert sorted(seen[:2]) == sorted(seen[2:]) == ["3", "GPU-7"]


@pytest.mark.full
def test_the_results_and_the_report_say_that_times_are_not_comparable(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_gpus(monkeypatch, 2)
    given: list[list[str]] = []

    def pool(folder: SweepFolder, workers: int, ray: str | None, gpus: list[str]) -> ForkPool:
        given.append(gpus)
        return ForkPool()

    monkeypatch.setattr(core.study.sweep, "_pool", pool)
    monkeypatch.setattr(core.study.sweep, "gpu_slots", lambda sweep, n: ["0", "1"] * n)
    out = tmp_path / "it"
    run_command_here("sweep", str(write(TWO)), "--out", str(out), "--per-gpu", "3")
    assert given == [["0", "1"] * 3]
    assert json.loads((out / "sweep.json").read_text())["per_gpu"] == 3
    sentence = "up to 3 runs shared each GPU: their seconds, tokens per second and MFU"
    assert sentence in capsys.readouterr().out
    run_command_here("sweep", str(tmp_path / "question.yaml"), "--out", str(out), "--resume")
    assert json.loads((out / "sweep.json").read_text())["per_gpu"] == 3  # of any run
    pytest.importorskip("pandas", reason="the extra `report` is not installed")
    shown = [line for _, lines in words.warnings(read(out)) for line in lines]
    assert any(line.startswith(sentence) for line in shown)
