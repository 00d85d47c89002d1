"""The SLURM files are right on paper: what SLURM starts is what the strategy expects, and it fits into a GPU."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from core.recipe.compose import compose

from .documents import ROOT

FILES = sorted((ROOT / "docs" / "slurm").glob("*.sbatch"))
PAGE = ROOT / "docs" / "clusters.md"
GPU_BYTES = 80e9


def requested(file: Path) -> dict[str, str]:
    """The options of a file's lines with #SBATCH."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", file.read_text(), re.MULTILINE))


def fit_arguments(file: Path) -> list[str]:
    """The arguments of `python -m core.fit`."""
    found = re.search(r"^FIT=\((.*?)^\)$", file.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    words = shlex.split(found[1])
    assert words[:3] == ["python", "-m", "core.fit"]
    return words[3:]


def run_with_stand_ins(file: Path, folder: Path, code: int, *, dry_run: int = 0) -> tuple[int, str]:
    """Runs a file with programs in the place of srun, scontrol and python.

    Returns:
        Its exit code, and what the programs were called with, one call a line.
    """
    called = folder / "called"
    called.write_text("")
    for name, ends in (("srun", code), ("scontrol", 0), ("python", dry_run)):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\nexit {ends}\n')
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "8",
        "RUN": str(folder / "a b"),
    }
    done = subprocess.run(["bash", str(file)], env=environment, check=False, cwd=folder)
    return done.returncode, called.read_text()


def test_there_are_files_for_three_sizes() -> None:
    gpus = [int(requested(file)["nodes"]) * int(requested(file)["gpus-per-node"]) for file in FILES]
    assert sorted(gpus) == [8, 64, 2048]
    page = PAGE.read_text()
    for file in FILES:
        assert f"({file.parent.name}/{file.name})" in page
        assert f"docs/slurm/{file.name} --dry-run" in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_slurm_starts_the_ranks_of_the_recipe(file: Path) -> None:
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    options = requested(file)
    recipe, *overrides = fit_arguments(file)
    strategy = compose(recipe, overrides).strategy
    tasks = int(options["ntasks-per-node"])
    assert strategy.component.nodes_of(strategy.config) == int(options["nodes"])
    assert strategy.component.ranks_of(strategy.config) == int(options["nodes"]) * tasks
    assert int(options["gpus-per-node"]) == tasks
    assert options["job-name"] == recipe
    assert options["distribution"] == "block"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_job_that_was_saved_or_lost_a_rank_is_queued_again(file: Path, tmp_path: Path) -> None:
    """Time that is up is no failure; a job that has lost ranks five times in a row stays away."""
    ends = [(0, False), (2, False), (1, True), (137, True), (138, True)]
    ends += [(1, True)] * 5 + [(1, False)]
    for code, again in ends:
        ended, called = run_with_stand_ins(file, tmp_path, code)
        assert ended == code
        begin = "srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=400 python -m core.fit dsv3_"
        assert begin in called
        assert f"--out {tmp_path}/a b --resume auto\n" in called
        assert ("scontrol requeue 7\n" in called) == again, (code, called)


def test_a_mistake_in_the_recipe_starts_no_rank(tmp_path: Path) -> None:
    ended, called = run_with_stand_ins(FILES[0], tmp_path, 0, dry_run=2)
    assert ended == 2
    assert called.count("\n") == 1
    assert called.endswith(" --dry-run\n")


@pytest.mark.full
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_shows_its_layout_and_fits_into_a_gpu(file: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(file), "--dry-run", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    memory = document["rank_memory"]
    options = requested(file)
    assert memory["nodes"] == int(options["nodes"])
    assert memory["ranks"] == memory["nodes"] * int(options["ntasks-per-node"])
    assert memory["total"] < 0.8 * GPU_BYTES
    row = next(
        line for line in PAGE.read_text().splitlines() if f"]({'slurm/' + file.name})" in line
    )
    assert f"| {memory['total'] / 1e9:.1f} GB |" in row
    assert f"| {memory['expert_ranks']} expert ranks" in row
    assert document["exchange"]["expert_ranks"] == memory["expert_ranks"]
