"""Whole runs with divided weights: what recipes may say, checkpoints, initial weights, and resuming elsewhere."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import lightning as L
import pytest
import torch
from lab import Lab, last_checkpoint
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from torch import nn

from core.assemble import build
from core.contracts.errors import ConfigError, UserError
from core.numerics.finite import not_finite_in
from core.run.environment import check_environment
from core.testing.forked_ranks import on_ranks
from core.training.local_parameters import local_state
from core.training.ranks import first_text_over_ranks
from core.training.sharded import ShardedStrategy
from plugins.strategies.sharded import FullyShardedDataParallel
from plugins.strategies.sharding import check_experts

FSDP = "strategy={name: fsdp, ranks: 2}"
EXPERTS = "strategy={name: expert_parallel, expert_ranks: 2}"
FP64 = "precision.name=fp64"
ALL_CHECKPOINTS = ("checkpoint.keep=9", "checkpoint.every_steps=5")


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ("{name: fsdp, ranks: 3}", "strategy.ranks = 3: must divide batch.sequences = 4"),
        (
            "{name: fsdp, ranks: 4, nodes: 3}",
            "strategy.nodes = 3: must be at least 1, and divide ranks = 4",
        ),
        (
            "{name: expert_parallel, expert_ranks: 0}",
            "strategy.expert_ranks = 0: must be at least 1",
        ),
        (
            "{name: expert_parallel, expert_ranks: 2, ranks: 3}",
            "strategy.ranks = 3: must be a multiple of expert_ranks = 2",
        ),
        (
            "{name: expert_parallel, expert_ranks: 3}",
            "strategy.expert_ranks = 3: must divide batch.sequences = 4",
        ),
        (
            "{name: expert_parallel, expert_ranks: 4, ranks_per_node: 3}",
            "strategy.ranks_per_node = 3: must divide the number of ranks, 4",
        ),
        (
            "{name: expert_parallel, expert_ranks: 2, dispatcher: {name: local}}",
            "strategy.dispatcher = {...}: local works on one device; all_to_all moves tokens between ranks",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_errors_of_the_recipe(
    lab: Lab, strategy: str, sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        lab.recipe(f"strategy={strategy}")
    assert sentence.replace(" = {...}", "") in str(error.value).replace(" = {...}", "")


def test_experts_that_the_ranks_cannot_share_are_an_error_of_the_recipe(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"strategy\.expert_ranks = 4: must divide the 6 experts"):
        lab.recipe(
            "strategy={name: expert_parallel, expert_ranks: 4}",
            "model.blocks.moe.ffn.experts=6",
            "model.blocks.moe.ffn.router.groups=3",
        )


def test_maxima_of_experts_are_an_error_where_ranks_hold_different_ones(lab: Lab) -> None:
    delayed = "precision={name: fp8_emulated, scaling: delayed}"
    sentence = "strategy.name = 'expert_parallel': the precision may keep maxima of each expert of the layer blocks.1"
    with pytest.raises(UserError, match=sentence):
        check_environment(lab.recipe(EXPERTS, delayed))
    check_environment(lab.recipe(FSDP, delayed))
    check_environment(lab.recipe(EXPERTS, "precision.name=fp8_emulated"))


def test_experts_that_cannot_be_divided_are_found_before_the_ranks_meet(lab: Lab) -> None:
    model = build(lab.recipe(), device="meta")
    check_experts(model, 2)
    with pytest.raises(ConfigError, match="must divide the 8 experts"):
        check_experts(model, 3)
    layer: Any = model.expert_layers()["blocks.1"]
    with (
        patch.object(type(layer), "dispatchers", []),
        pytest.raises(ConfigError, match=r"the layer blocks\.1\.ffn \(moe\) has no dispatcher"),
    ):
        check_experts(model, 2)
    layer.routed = nn.Module()
    with pytest.raises(ConfigError, match="are not one matrix for each of its 8 experts"):
        check_experts(model, 2)


@pytest.mark.parametrize("offload", [False, True])
def test_the_module_is_on_the_device_of_the_collectives_also_if_weights_are_not(
    offload: bool,
) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.BatchNorm1d(2)

    module = Module()
    strategy = ShardedStrategy(FullyShardedDataParallel(None), offload=offload)
    strategy._lightning_module = module
    strategy.model = module
    device = PropertyMock(return_value=torch.device("meta"))
    with patch.object(ShardedStrategy, "root_device", new_callable=device):
        strategy.model_to_device()
    assert module.device.type == "meta"
    assert module.model.running_mean is not None
    assert module.model.running_mean.device.type == "meta"
    assert module.model.weight.device.type == ("cpu" if offload else "meta")


def test_a_weight_that_is_not_finite_is_named_on_every_rank(lab: Lab) -> None:
    def work(rank: int) -> str | None:
        module = nn.Linear(2, 2)
        if rank == 1:
            nn.init.constant_(module.weight, float("nan"))
        return first_text_over_ranks(not_finite_in(local_state(module)))

    with tempfile.TemporaryDirectory() as folder:
        one, two = on_ranks(work, Path(folder), world=2)
    assert one == two == "tensor weight holds a number that is not finite (nan at [0, 0])"


def test_describe_counts_nodes_as_the_run_does(lab: Lab) -> None:
    four = "strategy={name: expert_parallel, expert_ranks: 4, nodes: 2}"
    assert expert_layout(lab, four) == (4, 2)
    assert expert_layout(lab, four.replace("nodes: 2", "ranks_per_node: 1")) == (4, 1)
    two = "strategy={name: expert_parallel, expert_ranks: 2, ranks: 4, ranks_per_node: 4}"
    assert expert_layout(lab, two) == (2, 2)
    assert expert_layout(lab, FSDP) is None


def expert_layout(lab: Lab, strategy: str) -> tuple[int, int] | None:
    """The expert ranks of a recipe, and how many of them are one node."""
    chosen = lab.recipe(strategy).strategy
    found: tuple[int, int] | None = chosen.component.expert_layout_of(chosen.config)
    return found


@pytest.fixture(scope="module")
def alone(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    lab.fit(run, FP64, *ALL_CHECKPOINTS)
    return run


@pytest.mark.full
@pytest.mark.parametrize("strategy", [FSDP, EXPERTS], ids=["fsdp", "expert_parallel"])
def test_a_run_continues_under_another_strategy(
    lab: Lab, alone: Path, tmp_path: Path, strategy: str
) -> None:
    """From one process to two ranks after step 5, and from there back to one after step 10."""
    run = cut_after(alone, 5, tmp_path / "divided")
    fit_on_ranks(lab, run, FP64, *ALL_CHECKPOINTS, strategy, resume=True)
    assert_same_end(alone, run)
    assert (run / "sample.txt").read_text() == (alone / "sample.txt").read_text()
    back = cut_after(run, 10, tmp_path / "back")
    lab.fit(back, FP64, *ALL_CHECKPOINTS, resume=True)
    assert_same_end(alone, back)


@pytest.mark.full
@pytest.mark.parametrize("strategy", [FSDP, EXPERTS], ids=["fsdp", "expert_parallel"])
def test_divided_weights_start_from_those_of_another_run(
    lab: Lab, alone: Path, tmp_path: Path, strategy: str
) -> None:
    start = (FP64, *ALL_CHECKPOINTS, f"initial_weights={alone}")
    lab.fit(tmp_path / "one", *start)
    fit_on_ranks(lab, tmp_path / "two", *start, strategy)
    assert_same_end(tmp_path / "one", tmp_path / "two")


@pytest.mark.full
def test_initial_weights_of_another_shape_are_found_before_the_ranks_meet(
    lab: Lab, alone: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"tensor .* is \(.*\), the model's \(.*\)"):
        lab.fit(tmp_path / "run", FP64, f"initial_weights={alone}", FSDP, "model.dim=48")


@pytest.mark.full
def test_weights_gathered_in_bf16_change_no_number(lab: Lab, tmp_path: Path) -> None:
    """`fsdp` gathers operands of bf16 products in bf16, which rounds them as `ddp` does."""
    bf16 = ("precision.name=bf16", "budget.steps=3", "checkpoint.every_steps=3")
    fit_on_ranks(lab, tmp_path / "whole", *bf16, "strategy={name: ddp, ranks: 2}")
    fit_on_ranks(lab, tmp_path / "divided", *bf16, FSDP)
    one, two = (last_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "divided"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
