"""Bandwidth of collectives: which a recipe uses, what is measured, and the command."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import ROOT, Lab
from two_ranks import on_two_ranks

from core.assemble import build
from core.bench import table
from core.contracts.errors import RunFailed, UserError
from core.recipe.compose import Recipe
from core.speed.collectives import BUCKET, Collective, bus_factor, collectives_of, row
from core.speed.measure import measure
from core.speed.ranks import measure_here, torchrun_world

TWO = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


# ---- sizes


def test_gradients_are_added_up_whole_and_in_buckets(lab: Lab) -> None:
    recipe = lab.recipe(TWO)
    numbers = sum(p.numel() for p in build(recipe, device="meta").parameters())
    whole = Collective("all_reduce", "gradients, all", 4 * numbers, 2)
    assert collectives_of(recipe, 2) == [whole]
    large = collectives_of(lab.recipe(TWO, "model.dim=2048", "model.attention.heads=8"), 2)
    assert [found.bytes > BUCKET for found in large] == [True, False]
    assert large[1] == Collective("all_reduce", "gradients, one bucket", BUCKET, 2)


@pytest.fixture
def sharded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe in bf16 whose strategy shards weights."""
    recipe = lab.recipe(TWO, "precision.name=bf16")
    monkeypatch.setattr(recipe.strategy.component, "shards", True)
    return recipe


def test_sharded_weights_are_gathered_as_products_take_them(sharded: Recipe) -> None:
    blocks = build(sharded, device="meta").blocks
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    assert collectives_of(sharded, 4) == [
        Collective("all_gather", "weights of a block", 2 * largest, 4),
        Collective("reduce_scatter", "gradients of a block", 4 * largest, 4),
    ]


def test_expert_ranks_exchange_rows_and_keep_their_experts(sharded: Recipe) -> None:
    """Four sequences of 16 tokens on four ranks, two experts a token, rows of 32 numbers in bf16."""
    sharded.strategy.config.expert_ranks = 2
    gathered, scattered, exchanged = collectives_of(sharded, 4)
    experts = 8 * 3 * 32 * 16
    moe = build(sharded, device="meta").blocks[1]
    dense = build(sharded, device="meta").blocks[0]
    without = sum(p.numel() for p in moe.parameters()) - experts
    largest = max(without, sum(p.numel() for p in dense.parameters()))
    assert (gathered.bytes, scattered.bytes) == (2 * largest, 4 * largest)
    assert (exchanged.what, exchanged.ranks) == ("all_to_all", 2)
    assert exchanged.bytes == 16 * 2 * 32 * 2
    with pytest.raises(UserError, match="expert_ranks = 2: must divide the 3 ranks"):
        collectives_of(sharded, 3)


def test_bandwidths_are_those_of_nccl_tests() -> None:
    assert bus_factor("all_reduce", 8) == 2 * 7 / 8
    assert {bus_factor(kind, 8) for kind in ("all_gather", "reduce_scatter", "all_to_all")} == {
        7 / 8
    }
    found = row(Collective("all_reduce", "gradients", 10_000, 8), 1_000, "nccl", [4.0, 1.0, 2.0])
    assert (found["seconds"], found["spread"]) == (2.0, [1.0, 4.0])
    assert (found["algorithm_bandwidth"], found["bus_bandwidth"]) == (500.0, 875.0)
    assert (found["bytes"], found["bytes_of_recipe"]) == (1_000, 10_000)
    assert "the recipe moves 0 MB" in table([found])[-1]


# ---- measurements


def test_two_ranks_measure_every_kind(tmp_path: Path) -> None:
    """Sizes are rounded up to equal parts of fp32 numbers."""

    def work(rank: int) -> list[dict[str, Any]]:
        collectives = [Collective(kind, "test", 1001, 2) for kind in KINDS]
        return measure(collectives, torch.device("cpu"), seconds=0.01)

    first, second = on_two_ranks(work, tmp_path)
    assert first == second
    assert [found["what"] for found in first] == list(KINDS)
    for found in first:
        assert (found["bytes"], found["ranks"], found["backend"]) == (1008, 2, "gloo")
        fastest, slowest = found["spread"]
        assert 0 < fastest <= found["seconds"] <= slowest
        assert found["repetitions"] >= 5
        factor = bus_factor(found["what"], 2)
        assert found["bus_bandwidth"] == pytest.approx(1008 / found["seconds"] * factor)


@pytest.mark.full
def test_a_rank_that_fails_ends_all() -> None:
    """Groups of three cannot be made of two ranks."""
    with pytest.raises(RunFailed, match="could not measure"):
        measure_here([Collective("all_reduce", "test", 100, 3)], 2, "cpu", seconds=0.01)
    assert multiprocessing.active_children() == []


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--collectives", "--ranks", "1"), "--ranks = 1: must be at least 2"),
        (("--collectives",), "strategy.name = single trains on one rank"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    lab: Lab, arguments: tuple[str, ...], sentence: str
) -> None:
    done = lab.command("bench", *arguments, lab.file)
    assert done.code == 2
    assert sentence in done.sentence


def test_variables_of_torchrun_are_checked() -> None:
    good = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    assert torchrun_world(good) == 2
    assert torchrun_world({}) is None
    with pytest.raises(UserError, match="MASTER_PORT in the environment"):
        torchrun_world({**good, "MASTER_PORT": ""})


def run(*command: str) -> list[dict[str, Any]]:
    """The rows that a process prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.mark.full
def test_the_command_measures_on_its_own_ranks_and_on_those_of_torchrun(lab: Lab) -> None:
    arguments = ["-m", "core.bench", "--collectives", str(lab.file), "--json"]
    own = run(sys.executable, *arguments, "--ranks", "3")
    assert [(found["what"], found["ranks"]) for found in own] == [("all_reduce", 3)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    theirs = run(*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *arguments)
    assert [(found["what"], found["ranks"]) for found in theirs] == [("all_reduce", 2)]
