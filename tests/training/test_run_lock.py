"""Two processes on one run folder: one works, the other ends with a sentence that names the first."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import ROOT, Lab, rows

from core.checkpoints.listing import checkpoints_in
from core.contracts.errors import UserError
from core.training.choose_folder import start_folder
from core.training.resume import RunningWarning, newest_checkpoint
from core.training.run_folder import RunFolder


def test_a_folder_in_which_a_run_works_takes_no_other(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run).locked():
        result = lab.command("fit", lab.file, "--out", run)
        assert result.code == 2
        who = f"another run (process {os.getpid()}) works in this folder since 20"
        assert result.sentence.startswith(f"--out {run}: {who}")
        assert [file.name for file in run.iterdir()] == [".lock"]
    assert not (run / ".lock").exists()


def test_a_run_that_is_still_going_is_not_resumed(lab: Lab, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lab.fit(run)
    (run / "summary.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    with RunFolder(run).locked():
        for resume in ("auto", str(run)):
            result = lab.command("fit", lab.file, "--out", run, "--resume", resume)
            assert result.code == 2
            assert result.sentence.startswith(
                f"--resume {run}: another run (process {os.getpid()})"
            )
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    (run / "checkpoints" / ".step-00000099.ckpt.tmp").write_bytes(b"half")
    lab.fit(run, resume=True)
    assert not list(run.rglob(".*"))


def test_a_checkpoint_of_a_run_that_is_still_going_is_read_with_a_warning(finished: Path) -> None:
    with (
        RunFolder(finished).locked(),
        pytest.warns(
            RunningWarning, match="still training: its newest checkpoint, step-00000012.ckpt"
        ),
    ):
        newest_checkpoint(finished)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest_checkpoint(finished)


def test_runs_that_start_together_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: start_folder(None, "small").path, range(24)))
    names = ["small", *(f"small-{number}" for number in range(2, 25))]
    assert sorted(folders) == sorted(Path("runs", name) for name in names)


def test_a_start_that_fails_leaves_no_folder(lab: Lab, tmp_path: Path) -> None:
    missing = f"data.corpus.paths=[{tmp_path}/none/*.txt]"
    with pytest.raises(UserError, match=r"none/\*\.txt.* matches no file"):
        lab.fit(tmp_path / "a/run", missing)
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"none/\*\.txt.* matches no file"):
        lab.fit(tmp_path / "mine", missing)
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("option", ["--out", "--resume", ""])
def test_two_commands_at_once_leave_the_rows_of_one(lab: Lab, tmp_path: Path, option: str) -> None:
    """One of two real commands trains; with no folder named, both do, each in its own."""
    run = tmp_path / "run"
    if option == "--resume":
        lab.fit(run)
        (run / "summary.json").unlink()
        checkpoints_in(run)[-1].unlink()
    command = [sys.executable, "-m", "core.fit", str(lab.file), "trainer.enable_progress_bar=false"]
    if option:
        command += [option, str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    together = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in together]
    codes = [process.returncode for process in together]
    folders = [run] if option else [tmp_path / "runs/small", tmp_path / "runs/small-2"]
    complete = [f"run folder: {run} (this run is complete)" in error for error in errors]
    if option == "--resume" and codes == [0, 0]:
        # The second process was so late that the first one had completed the run.
        assert sorted(complete) == [False, True], errors
    else:
        assert sorted(codes) == ([0, 2] if option else [0, 0]), errors
    if 2 in codes:
        winner = together[codes.index(0)].pid
        loser = errors[codes.index(2)]
        assert f"{option} {run}: another run (process {winner}" in loser or "holds a run" in loser
        assert "Traceback" not in loser
    for folder in folders:
        steps = [int(row["step"]) for row in rows(folder) if "loss/total" in row]
        assert steps == list(range(1, 13))
