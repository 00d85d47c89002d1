"""Running a sweep, with runs that are forked: what is written, what a failure leaves, what is an error."""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import yaml
from lab import Lab, fill, forked, run_command_here, small_disk

import core.run.training
import core.study.matching
import core.sweep
import core.training.throughput
from core.analysis.budget import plan_of
from core.contracts.errors import UserError
from core.run.data import text_data
from core.study.sweep import run_sweep
from core.study.sweep_file import read_sweep
from core.study.sweep_folder import Job, SweepFolder

from .conftest import TWO, ForkPool, Write

CRASH = "  crash: {{overrides: {{optimizer.lr: 1.0e+30, max_skipped_steps: 1}}}}\n"
CRASHING = TWO.replace("budget:", CRASH + "budget:").replace("steps: 2", "steps: 4")
WITHOUT_HEAD = TWO.replace("model.blocks.moe.ffn.balance: []", "model.heads.mtp: null")
WITHOUT_HEAD += "metric: mtp_acceptance\nmatch: {{flops: null, allow: [loss heads]}}\n"
CRASHING += "match: {{exempt: {{crash: it diverges}}}}\n"


def read(path: Path) -> Any:
    """A JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def states(path: Path) -> dict[str, str]:
    """The state of every run by `variant/seed-N`."""
    files = sorted(path.glob("runs/*/*/status.json"))
    return {"/".join(file.parts[-3:-1]): read(file)["state"] for file in files}


def kept(path: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file of the runs, as it is."""
    files = (file for file in (path / "runs").rglob("*") if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def crashed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants that run and one that does not, by two seeds; to be read only."""
    path = tmp_path_factory.mktemp("crashed")
    file = path / "question.yaml"
    file.write_text(CRASHING.format(base=lab.file), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.study.sweep, "_pool", lambda *_: ForkPool())
        run_sweep(read_sweep(file), path / "out", command="python -m core.sweep question.yaml")
    return path / "out"


def test_a_failed_run_is_reported_with_its_reason_and_stops_nobody(crashed: Path) -> None:
    assert states(crashed) == {
        **{f"{name}/seed-{seed}": "done" for name in ("bias", "none") for seed in (3, 4)},
        **{f"crash/seed-{seed}": "failed" for seed in (3, 4)},
    }
    status = read(crashed / "runs/crash/seed-3/status.json")
    assert set(status) == {"state", "reason", "seconds", "process"}
    assert status["reason"].startswith("exit code 1: ")
    assert "Traceback" not in status["reason"]
    assert not (crashed / "runs/crash/seed-3/summary.json").exists()


@pytest.mark.full
def test_a_run_that_diverged_is_failed_and_again_after_a_resume(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.study.sweep, "_pool", lambda *_: ForkPool())
    file = tmp_path / "question.yaml"
    text = CRASHING.replace("1.0e+30, max_skipped_steps: 1", "1.0e+20")
    file.write_text(text.format(base=lab.file), encoding="utf-8")
    for resume in (False, True):
        run_sweep(read_sweep(file), tmp_path / "out", resume=resume)
        status = read(tmp_path / "out/runs/crash/seed-3/status.json")
        assert status["state"] == "failed"
        assert status["reason"].startswith(
            "exit code 1: the run diverged: the training loss is nan"
        )
        assert (tmp_path / "out/runs/crash/seed-3/summary.json").exists()
    assert states(tmp_path / "out")["bias/seed-3"] == "done"


def test_results_are_what_the_runs_measured(crashed: Path) -> None:
    results = read(crashed / "results.json")
    documents = {"metric", "baseline", "rows", "left_out", "factors", "warnings"}
    assert set(results) == documents
    assert (results["metric"], results["baseline"]) == ("val_bits_per_byte", "bias")
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["bias", "none", "crash"]
    for name in ("bias", "none"):
        row = rows[name]
        values = [
            read(crashed / f"runs/{name}/seed-{s}/summary.json")["val_bits_per_byte"]
            for s in (3, 4)
        ]
        assert [run["value"] for run in row["runs"]] == values
        assert row["n"] == 2
        assert row["mean"] == pytest.approx(sum(values) / 2)
        assert row["low"] < row["mean"] < row["high"]
    assert rows["bias"]["difference"] is None
    assert rows["none"]["difference"]["mean"] == pytest.approx(
        rows["none"]["mean"] - rows["bias"]["mean"]
    )
    assert rows["none"]["difference"]["verdict"] in (
        *("better", "worse", "no difference shown", "not shown after Holm's correction"),
    )
    assert (rows["crash"]["n"], rows["crash"]["mean"], rows["crash"]["difference"]) == (
        0,
        None,
        None,
    )
    assert [run["state"] for run in rows["crash"]["runs"]] == ["failed", "failed"]
    assert results["warnings"][0] == f"crash, seed 3: {rows['crash']['runs'][0]['reason']}"
    assert (
        "crash: another optimizer and its schedule than bias (it diverges)" in results["warnings"]
    )


def test_the_sweep_says_what_it_is(crashed: Path) -> None:
    document = read(crashed / "sweep.json")
    assert set(document) == {
        *("name", "title", "metric", "better", "baseline", "seeds", "command", "started"),
        *("held_equal", "not_equal", "variants", "smallest_difference", "search"),
        *("left_out", "per_gpu"),
    }
    assert (document["name"], document["seeds"]) == ("question", [3, 4])
    assert document["command"] == "python -m core.sweep question.yaml"
    bias, none, _ = document["variants"]
    assert set(bias) == {
        *(
            "name",
            "recipe",
            "overrides",
            "params_total",
            "params_experts",
            "params_active",
            "flops_per_token",
        ),
        *(
            "kv_bytes_per_token",
            "top_k",
            "capacity_factor",
            "drops",
            "causal",
            "batch_dependent",
            "notices",
        ),
        "differences",
    }
    assert bias["differences"] == {}
    assert none["overrides"] == ["model.blocks.moe.ffn.balance=[]", "budget.steps=4"]
    assert none["differences"]["model.blocks.moe.ffn.balance.0.name"] == ["bias", None]
    file = yaml.safe_load((crashed / "sweep.yaml").read_text(encoding="utf-8"))
    assert file["match"]["exempt"] == {"crash": "it diverges"}
    assert file["budget"] == {"steps": 4}


def test_every_run_is_an_ordinary_run_with_its_log(crashed: Path, finished: Path) -> None:
    run = crashed / "runs/none/seed-4"
    ordinary = {file.name for file in finished.iterdir()}
    assert {file.name for file in run.iterdir()} == ordinary | {"status.json", "log.txt"}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["seed"], recipe["budget"]["steps"]) == (4, 4)
    assert recipe["model"]["blocks"]["moe"]["ffn"]["balance"] == []
    assert "run folder: " in (run / "log.txt").read_text(encoding="utf-8")


def test_equal_seeds_read_equal_data_whatever_the_variant(lab: Lab, write: Write) -> None:
    switch = "  dense: {{overrides: {{model.blocks.moe.ffn: {{name: swiglu, hidden: 48}}}}}}\n"
    rules = "match: {{params: null, flops: null}}\n"
    sweep = read_sweep(write(TWO.replace("budget:", switch + rules + "budget:")))
    read_by = {}
    for variant in sweep.variants:
        for seed in (3, 4):
            recipe = lab.recipe(*variant.overrides, f"seed={seed}")
            data = text_data(recipe, plan_of(recipe))
            data.prepare()
            windows = [batch.tokens_BL for window in data.train_dataloader() for batch in window]
            read_by[variant.name, seed] = torch.cat(windows)
    for (_, seed), tokens in read_by.items():
        assert torch.equal(tokens, read_by["bias", seed])
    assert not torch.equal(read_by["bias", 3], read_by["bias", 4])


def test_the_runs_of_a_sweep_have_the_same_data(crashed: Path) -> None:
    fingerprints = {
        json.dumps(read(run / "provenance.json")["data"]) for run in crashed.glob("runs/*/seed-3")
    }
    assert len(fingerprints) == 1


@pytest.mark.full
def test_resuming_redoes_nothing_that_is_done_and_tries_again_what_failed(
    lab: Lab, write: Write, crashed: Path, pool: ForkPool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(crashed, out)
    before, identity = kept(out), read(out / "sweep.json")
    run_sweep(
        read_sweep(write(CRASHING)),
        out,
        resume=True,
        command="python -m core.sweep question.yaml --resume",
    )
    assert [command[-2:] for command in pool.commands] == [
        ["--resume", str(out / f"runs/crash/seed-{seed}")] for seed in (3, 4)
    ]
    after = kept(out)
    assert {file: after[file] for file in before if "crash" not in file.parts} == {
        file: content for file, content in before.items() if "crash" not in file.parts
    }
    assert read(out / "sweep.json") == identity  # when and how it was begun, not resumed
    assert read(out / "runs/crash/seed-3/status.json")["seconds"] == 2.0


@pytest.mark.full
def test_a_done_run_that_has_lost_its_summary_writes_it_again(
    write: Write, pool: ForkPool, tmp_path: Path
) -> None:
    sweep = read_sweep(
        write(TWO.replace("steps: 2", "steps: 1").replace("seeds: [3, 4]", "seeds: [3]"))
    )
    out = tmp_path / "out"
    before = run_sweep(sweep, out)
    commands = len(pool.commands)
    (out / "runs/none/seed-3/summary.json").unlink()
    after = run_sweep(sweep, out, resume=True)
    assert len(pool.commands) == commands + 1
    assert [row["mean"] for row in after["rows"]] == [row["mean"] for row in before["rows"]]


@pytest.mark.parametrize(
    ("text", "resume", "expected"),
    [
        (CRASHING, False, "holds this sweep already; go on with --resume, or name another"),
        (CRASHING.replace("steps: 4", "steps: 5"), True, "(budget: {'steps': 4} there, {'steps': 5} here)"),
        (CRASHING.replace("[3, 4]", "[3]"), False, "holds another sweep (seeds: [3, 4] there, [3] here)"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_a_sweep(
    write: Write, crashed: Path, text: str, resume: bool, expected: str
) -> None:
    before = kept(crashed)
    with pytest.raises(UserError, match=re.escape(expected)):
        run_sweep(read_sweep(write(text)), crashed, resume=resume)
    assert kept(crashed) == before


@pytest.mark.full
def test_the_same_sweep_by_another_path_is_the_same(
    lab: Lab, crashed: Path, tmp_path: Path
) -> None:
    """A moved checkout, or the same recipe named from elsewhere: its resolved recipes say what it is."""
    moved, file = tmp_path / "moved.yaml", tmp_path / "question.yaml"
    shutil.copy2(lab.file, moved)
    file.write_text(CRASHING.format(base=moved), encoding="utf-8")
    before = kept(crashed)
    SweepFolder(crashed).open(read_sweep(file), resume=True)
    moved.write_text(
        lab.file.read_text(encoding="utf-8").replace("lr: 0.003", "lr: 0.004"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"bias's recipe has changed since \(optimizer\)"):
        SweepFolder(crashed).open(read_sweep(file), resume=True)
    assert kept(crashed) == before


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("sweep.yaml", "seeds: [", "sweep.yaml: is damaged"),
        ("sweep.yaml", "lost", "sweep.yaml: must be a section of keys"),
        ("sweep.yaml", b"\xff\xfe", "sweep.yaml: cannot be read: it is not UTF-8 text"),
        ("recipes/none.yaml", None, "recipes/none.yaml: there is no such file"),
        ("recipes/none.yaml", "", "recipes/none.yaml: is damaged"),
    ],
)
def test_a_damaged_sweep_folder_is_reported(
    write: Write,
    crashed: Path,
    tmp_path: Path,
    name: str,
    content: str | bytes | None,
    expected: str,
) -> None:
    out = tmp_path / "out"
    for part in ("sweep.yaml", "recipes"):
        copy = shutil.copytree if (crashed / part).is_dir() else shutil.copy2
        out.mkdir(exist_ok=True)
        copy(crashed / part, out / part)
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(f"--out {out}: {expected}")):
        run_sweep(read_sweep(write(CRASHING)), out, resume=True)


def test_a_changed_base_is_refused(lab: Lab, write: Write, crashed: Path) -> None:
    text = lab.file.read_text(encoding="utf-8")
    try:
        lab.file.write_text(text.replace("lr: 0.003", "lr: 0.004"), encoding="utf-8")
        with pytest.raises(UserError, match=r"bias's recipe has changed since \(optimizer\)"):
            run_sweep(read_sweep(write(CRASHING)), crashed, resume=True)
    finally:
        lab.file.write_text(text, encoding="utf-8")


def test_a_folder_of_something_else_is_left_alone(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("", encoding="utf-8")
    for resume in (True, False):
        with pytest.raises(
            UserError, match=r"is not a sweep's folder: it holds thesis.tex; name another"
        ):
            run_sweep(read_sweep(write(TWO)), tmp_path / "out", resume=resume)


def test_a_folder_that_cannot_be_made_is_reported(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        run_sweep(read_sweep(write(TWO)), tmp_path / "file")


def test_a_second_runner_is_refused(write: Write, tmp_path: Path) -> None:
    sweep = read_sweep(write(TWO))
    with SweepFolder(tmp_path / "out").locked():
        message = rf"another runner \(process {os.getpid()}\) works in this folder"
        with pytest.raises(UserError, match=message):
            run_sweep(sweep, tmp_path / "out", resume=True)
    assert not (tmp_path / "out" / "sweep.yaml").exists()


def test_a_report_that_looks_at_the_lock_keeps_no_runner_out(tmp_path: Path) -> None:
    """It holds the lock, shared, for a moment only."""
    folder = SweepFolder(tmp_path / "out")
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    with (folder.path / ".lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        Timer(0.15, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with folder.locked():
            pass


@pytest.mark.full
@pytest.mark.parametrize("name", ["sweep.yaml", "status.json", "results.json"])
def test_a_full_disk_is_one_sentence_and_can_be_resumed(
    lab: Lab,
    write: Write,
    pool: ForkPool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    file, out, replace = write(TWO.replace("[3, 4]", "[3]")), tmp_path / "out", os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        result = forked(lambda: run_command_here("sweep", file, "--out", out))
    assert result.code == 2
    assert (
        result.sentence
        == f"{out}: no space is left on the disk; free some space and go on with --resume"
    )
    again = forked(lambda: run_command_here("sweep", file, "--out", out, "--resume", "--json"))
    assert again.code == 0, again.err
    assert [row["n"] for row in json.loads(again.out)["rows"]] == [1, 1]


@pytest.mark.full
def test_a_disk_that_fills_up_in_the_middle_costs_nothing_that_was_done(
    lab: Lab, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real file system is full at the third of four runs and for the runner; --resume does the rest."""

    class FillingPool(ForkPool):
        def submit(self, job: Job, command: list[str]) -> Any:
            if len(self.commands) == 2:
                fill(disk)
            return super().submit(job, command)

    with small_disk(tmp_path / "disk", kilobytes=16_000) as disk:
        file, out = write(TWO), disk / "out"
        with monkeypatch.context() as patch:
            patch.setattr(core.study.sweep, "_pool", lambda *_: FillingPool())
            result = forked(lambda: run_command_here("sweep", file, "--out", out))
        assert (result.code, result.sentence) == (
            2,
            f"{out}: no space is left on the disk; free some space and go on with --resume",
        )
        before = {path: value for path, value in kept(out).items() if "seed-3" in path.parts}
        assert sum(path.name == "summary.json" for path in before) == 2
        (disk / "filler").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(core.study.sweep, "_pool", lambda *_: ForkPool())
            again = forked(
                lambda: run_command_here("sweep", file, "--out", out, "--resume", "--json")
            )
        assert again.code == 0, again.err
        assert [row["n"] for row in json.loads(again.out)["rows"]] == [2, 2]
        assert {
            path: value for path, value in kept(out).items() if "seed-3" in path.parts
        } == before


@pytest.mark.full
@pytest.mark.parametrize("what", ["summary.json", "step-00000005.ckpt"])
def test_a_run_that_finds_no_space_ends_the_sweep_and_is_not_failed(
    lab: Lab, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """The runner's small files still fit: no later run is begun to fail in turn, and the run itself goes on later."""

    class FullPool(ForkPool):
        def submit(self, job: Job, command: list[str]) -> Any:
            with monkeypatch.context() as patch:
                if not self.commands:
                    patch.setattr(os, "replace", full)
                return super().submit(job, command)

    def full(source: Path, target: Path, replace: Any = os.replace) -> None:
        if Path(target).name == what:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    file, out = (
        write(TWO.replace("[3, 4]", "[3]").replace("steps: 2", "steps: 6")),
        tmp_path / "out",
    )
    with monkeypatch.context() as patch:
        patch.setattr(core.study.sweep, "_pool", lambda *_: FullPool())
        result = forked(lambda: run_command_here("sweep", file, "--out", out))
    assert (result.code, result.sentence) == (
        2,
        f"{out}: no space is left on the disk; free some space and go on with --resume",
    )
    assert states(out) == {"bias/seed-3": "waiting"}
    with monkeypatch.context() as patch:
        patch.setattr(core.study.sweep, "_pool", lambda *_: ForkPool())
        again = forked(lambda: run_command_here("sweep", file, "--out", out, "--resume", "--json"))
    assert [row["n"] for row in json.loads(again.out)["rows"]] == [1, 1]


def test_a_metric_that_a_variant_cannot_have_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"metric = 'mtp_acceptance': none cannot have it without a multi-token head$",
    ):
        run_sweep(read_sweep(write(WITHOUT_HEAD)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_run_without_the_metric_failed(
    write: Write, pool: ForkPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether a metric exists cannot always be known beforehand."""
    monkeypatch.setattr(core.study.matching, "NEEDS", {})
    text = WITHOUT_HEAD.replace("[3, 4]", "[3]")
    rows = run_sweep(read_sweep(write(text)), tmp_path / "out")["rows"]
    assert [(row["n"], row["runs"][0]["state"]) for row in rows] == [(1, "done"), (0, "failed")]
    assert rows[1]["runs"][0]["reason"] == "its summary has no finite mtp_acceptance"


def test_a_metric_of_text_that_nobody_holds_out_is_refused_before_a_run(
    lab: Lab, write: Write, pool: ForkPool, tmp_path: Path
) -> None:
    few = f"overrides: {{{{data.corpus.paths: ['{lab.texts}/doc-0*.txt'], data.tokenizer.vocab: 270}}}}\n"
    with pytest.raises(
        UserError,
        match=r"metric = 'val_bits_per_byte': bias cannot have it: nothing is held out to validate on",
    ):
        run_sweep(read_sweep(write(TWO + few)), tmp_path / "out")
    assert pool.commands == []


@pytest.mark.full
def test_a_metric_that_the_machine_does_not_measure_ends_the_sweep_with_the_first_run(
    write: Write, pool: ForkPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(core.training.throughput, "peak_of", lambda *_: (None, None))
    monkeypatch.setattr(core.run.training, "measured_peak_flops", lambda device: None)
    with pytest.raises(
        UserError,
        match=r"metric = 'mfu': bias/seed-3 has ended without it: this machine does not meas",
    ):
        run_sweep(read_sweep(write(TWO + "metric: mfu\n")), tmp_path / "out")
    assert len(pool.commands) == 1


@pytest.mark.full
def test_the_data_are_made_once_before_the_first_run(
    lab: Lab, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several runs that begin at once with a cold cache would each train the same tokenizer."""

    class Cold(ForkPool):
        def submit(self, job: Job, command: list[str]) -> Any:
            assert len(list((tmp_path / "cache").glob("*/seal.json"))) == 2
            raise KeyboardInterrupt

    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(core.study.sweep, "_pool", lambda *_: Cold())
    more = "  other: {{overrides: {{data.tokenizer.vocab: 280}}}}\nbudget:"
    rules = "match: {{params: null, flops: null, allow: [vocabulary]}}\n"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(read_sweep(write(TWO.replace("budget:", more) + rules)), tmp_path / "out")


@pytest.mark.full
def test_what_the_clock_measured_stands_beside_the_spread_of_throughput(
    write: Write, crashed: Path, pool: ForkPool, tmp_path: Path
) -> None:
    text = TWO.replace("[3, 4]", "[3]") + "metric: train_seconds\n"
    warnings = run_sweep(read_sweep(write(text)), tmp_path / "out")["warnings"]
    assert re.match(
        r"train_seconds is measured by the clock, and throughput varied with the machine's other work: "
        r"bias \d+ to \d+, none \d+ to \d+ tokens/s$",
        warnings[0],
    )
    assert not [line for line in read(crashed / "results.json")["warnings"] if "clock" in line]


@pytest.mark.full
def test_the_command_prints_a_table_that_is_not_cut(
    lab: Lab, write: Write, pool: ForkPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    long = "a_variant_with_quite_a_long_name_that_says_what_it_is"
    result = lab.command(
        "sweep", write(TWO.replace("none:", f"{long}:")), "--out", tmp_path / "out"
    )
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "val_bits_per_byte over the seeds"
    assert lines[1].split() == ["variant", "n", "mean", "95%", "interval"]
    assert lines[4].startswith(f"{long}  2  ")
    assert lines[6] == "minus bias, paired by seed"
    assert lines[9].startswith(f"{long}  2  ")
    assert lines[-1] == f"sweep folder: {tmp_path}/out  (python -m core.report {tmp_path}/out)"
    progress = [line for line in result.err.splitlines() if re.match(r"\d/4 ", line)]
    assert [line.partition(" in ")[0] for line in progress] == [
        *(
            "1/4 bias/seed-3 done",
            f"2/4 {long}/seed-3 done",
            "3/4 bias/seed-4 done",
            f"4/4 {long}/seed-4 done",
        )
    ]
    assert all(re.search(r"; about \d+ s left$", line) for line in progress[:-1])


def test_rows_are_printed_with_what_there_is() -> None:
    span = {"n": 5, "mean": -0.04123, "low": -0.0772, "high": -0.00275}
    difference = {**span, "effect_size": -1.3333, "p": 0.02, "p_holm": 0.0405, "verdict": "better"}
    found = {
        "metric": "val_loss",
        "baseline": "a",
        "warnings": ["c: lost"],
        "rows": [
            {"variant": "a", "n": 5, "mean": 2.334, "low": 2.27, "high": 2.398, "difference": None},
            {
                "variant": "bb",
                "n": 5,
                "mean": 2.294,
                "low": 2.25,
                "high": 2.338,
                "difference": difference,
            },
            {"variant": "c", "n": 0, "mean": None, "low": None, "high": None, "difference": None},
        ],
    }
    assert core.sweep._result_lines(found) == [
        "val_loss over the seeds",
        "variant  n   mean  95% interval",
        "-" * 32,
        "a        5  2.334  2.27 to 2.398",
        "bb       5  2.294  2.25 to 2.338",
        "c        0",
        "",
        "minus a, paired by seed",
        "variant  n      mean         95% interval    d_z  p (Holm)",
        "-" * 66,
        "bb       5  -0.04123  -0.0772 to -0.00275  -1.33    0.0405  better",
        "note: c: lost",
    ]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(4.4, "4 s"), (89, "89 s"), (150, "2 min"), (5900, "98 min"), (7500, "2 h 05 min")],
)
def test_the_time_left_is_reported(seconds: float, expected: str) -> None:
    assert core.sweep._duration(seconds) == expected
