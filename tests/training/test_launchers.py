"""What a launcher leaves in the environment is used as documented, or ignored; never half."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import srun_task
from lab import Lab, assert_same_run
from lightning.pytorch.utilities import rank_zero_only
from tiers import first_by_default

from core.contracts.errors import UserError
from core.training.launchers import (
    FIRST_RANK,
    JOINED,
    Launch,
    check_folder_named,
    launch_of,
    launcher_notice,
    without_launcher,
)
from core.training.ranks import is_rank_zero, set_rank
from core.training.setup import WorldCheck
from plugins.strategies.data_parallel import DataParallel

SRUN = srun_task(1)
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_RUN_ID": "none",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
JSRUN = {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2", "LSB_JOBID": "3"}
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "master", "MASTER_PORT": "23456"}
LAUNCHERS = [SRUN, TORCHRUN, MPIRUN, JSRUN, KUBEFLOW]


def section(**keys: Any) -> Any:
    """The section of a strategy with these keys."""
    return SimpleNamespace(component=DataParallel, config=SimpleNamespace(**keys))


@pytest.mark.parametrize("variables", first_by_default(LAUNCHERS))
def test_a_run_on_one_device_ignores_every_launcher(
    lab: Lab,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
) -> None:
    """The second task of a launcher trains the whole recipe, in a folder of its own."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    run = tmp_path / "run"
    result = lab.command("fit", lab.file, "--out", run)
    assert result.code == 0, result.err
    assert "is not used: this strategy trains on one device" in result.err
    assert_same_run(run, finished)


def test_two_tasks_cannot_train_in_one_folder(
    lab: Lab, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    result = lab.command("fit", lab.file, "--out", finished)
    assert result.code == 2
    assert result.sentence.startswith(f"--out {finished}: holds a run already")


@pytest.mark.parametrize("variables", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}])
def test_the_script_of_a_job_is_not_a_task(variables: dict[str, str]) -> None:
    assert launch_of(section(ranks=2), variables) == Launch(0, 2)
    assert launcher_notice(Launch(), variables) is None


@pytest.mark.parametrize("tasks", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_one_task_starts_as_many_ranks_as_were_asked_for(tasks: str) -> None:
    one = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", tasks: "1"}
    if tasks == "SLURM_NTASKS":
        one.pop("SLURM_STEP_NUM_TASKS", None)
    assert launch_of(section(ranks=2), one) == Launch(0, 2)


def test_tasks_of_torchrun_and_srun_are_the_ranks() -> None:
    by_torchrun = launch_of(section(ranks=2), TORCHRUN)
    by_srun = launch_of(section(ranks=2), SRUN)
    assert by_torchrun == Launch(1, 2, "torchrun", port=29511, local_rank=1)
    assert by_srun == Launch(1, 2, "srun", port=15070, local_rank=1)
    with pytest.raises(UserError, match=r"^--out is missing: the 2 tasks of torchrun"):
        check_folder_named(by_torchrun, out=None, resume="auto")
    check_folder_named(by_torchrun, out=None, resume="runs/a")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {**SRUN, "SLURM_NTASKS": "4"},
            r"strategy.ranks = 2, but SLURM_NTASKS = 4 and SLURM_PROCID",
        ),
        ({**SRUN, "SLURM_NNODES": "2"}, r"strategy.ranks = 2: SLURM_NNODES = 2 .*: must be 1,"),
        (
            {**SRUN, "SLURM_PROCID": "2"},
            r"SLURM_PROCID = '2' .*: must be a whole number less than SLURM_NTASKS = 2",
        ),
        ({**TORCHRUN, "WORLD_SIZE": "16"}, r"strategy.ranks = 2, but WORLD_SIZE = 16 and RANK = 1"),
        (
            {**TORCHRUN, "RANK": "one"},
            r"RANK = 'one' in the environment: must be a whole number less than",
        ),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, r"LOCAL_WORLD_SIZE = 1 .*: must be 2, because"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, r"MASTER_PORT = 'http' in the environment: must be"),
        (
            {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"},
            r"^MASTER_PORT is not set in the environment: must be the port",
        ),
        (
            KUBEFLOW,
            r"strategy.ranks = 2: LOCAL_RANK is not set in the environment: must be 1, because",
        ),
        (
            MPIRUN,
            r"strategy.ranks = 2: OMPI_COMM_WORLD_RANK = 1 .*: not a task of torchrun or srun;",
        ),
        (JSRUN, r"strategy.ranks = 2: JSM_NAMESPACE_RANK = 1 .*: not a task of torchrun or srun;"),
    ],
)
def test_other_tasks_are_an_error_in_one_sentence(variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        launch_of(section(ranks=2), variables)


def test_the_first_rank_passes_its_folder_and_its_process_on() -> None:
    parent = os.getppid()
    variables = {JOINED: "/runs/a", FIRST_RANK: str(parent), "LOCAL_RANK": "1", **SRUN}
    assert launch_of(section(ranks=2), variables) == Launch(1, 2, parent=parent, local_rank=1)
    for rank in ("0", "2", "x", ""):
        with pytest.raises(UserError, match=r"LOCAL_RANK .*: must be from 1 to 1, the ranks that"):
            launch_of(section(ranks=2), {**variables, "LOCAL_RANK": rank})


@pytest.mark.parametrize("process", first_by_default(["12", "x"]))
def test_what_another_run_left_for_its_ranks_is_not_taken_for_ones_own(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    monkeypatch.setenv(JOINED, str(tmp_path / "other"))
    monkeypatch.setenv(FIRST_RANK, process)
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = lab.command("fit", lab.file, "strategy={name: ddp, ranks: 2}")
    assert result.code == 2
    assert result.sentence.startswith(f"{FIRST_RANK} = '{process}' in the environment: is not")
    result = lab.command("fit", lab.file, "budget.steps=1", "--out", tmp_path / "run")
    assert result.code == 0
    assert (tmp_path / "run/summary.json").exists()
    assert not (tmp_path / "other").exists()


def test_libraries_do_not_see_what_is_not_used() -> None:
    variables = {**SRUN, **TORCHRUN, **MPIRUN, "PATH": "/bin", "SLURM_JOB_ID": "7"}
    assert without_launcher(variables, Launch()).keys() == {
        "PATH",
        "SLURM_JOB_ID",
        "SLURM_JOB_NAME",
        "SLURM_STEP_ID",
        "SLURM_NNODES",
    }
    by_torchrun = launch_of(section(ranks=2), TORCHRUN)
    assert without_launcher(TORCHRUN, by_torchrun) == TORCHRUN


def test_a_rank_that_is_no_number_is_an_error_in_every_command(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "one")
    for command in ("fit", "describe"):
        result = lab.command(command, lab.file)
        assert result.code == 2
        assert (
            result.sentence == "RANK = 'one' in the environment: must be a whole number, or not set"
        )


def test_another_world_than_asked_for_is_an_error_before_the_first_step() -> None:
    with pytest.raises(
        UserError, match=r"strategy.name = ddp: 1 ranks would train, and .* asks for 2"
    ):
        WorldCheck("ddp", 2).compare(1)


def test_the_rank_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not is_rank_zero()
    set_rank(Launch())
    assert is_rank_zero()


def test_a_world_that_does_not_fit_the_recipe_leaves_no_folder(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SRUN, "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    result = lab.command("fit", lab.file, "strategy={name: ddp, ranks: 2}", "--out", run)
    assert result.code == 2
    assert result.sentence.startswith("strategy.ranks = 2, but SLURM_NTASKS = 4")
    assert not run.exists()


def test_a_strategy_that_makes_other_ranks_is_an_error(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plugins.strategies.data_parallel import Single

    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    monkeypatch.setattr(Single, "trainer_arguments", lambda _: two)
    with pytest.raises(UserError, match=r"strategy.name = single: 2 ranks would train"):
        lab.fit(tmp_path / "run")
