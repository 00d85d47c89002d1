"""The memory of one rank under the recipe's strategy, compared with a count by hand."""

from typing import Any

import pytest
from lab import Lab
from torch import nn

from core.analysis.describe import document_of
from core.assemble import build

FSDP = "strategy={name: fsdp, ranks: 2}"
EXPERTS = "strategy={name: expert_parallel, expert_ranks: 2, ranks: 4}"


def memory_of(lab: Lab, *overrides: str) -> Any:
    """The part of the description."""
    return document_of(lab.recipe(*overrides))["rank_memory"]


def split(model: nn.Module) -> tuple[int, list[tuple[int, int]]]:
    """The numbers of weights outside of blocks and, for each block, of experts' and of other weights."""
    outside = 0
    blocks: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        block = None
        if name.startswith("blocks."):
            block = ".".join(name.split(".")[:2])
        elif ".block." in name:
            block = name.split(".block.")[0]
        if block is None:
            outside += parameter.numel()
            continue
        kind = 0 if parameter.ndim == 3 else 1
        blocks.setdefault(block, [0, 0])[kind] += parameter.numel()
    return outside, [(experts, others) for experts, others in blocks.values()]


def test_one_rank_has_none(lab: Lab) -> None:
    assert memory_of(lab) is None


@pytest.mark.parametrize(("strategy", "ranks", "expert_ranks"), [(FSDP, 2, 1), (EXPERTS, 4, 2)])
def test_a_rank_owns_its_share_and_gathers_two_blocks(
    lab: Lab, strategy: str, ranks: int, expert_ranks: int
) -> None:
    model = build(lab.recipe(), device="meta")
    outside, blocks = split(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    units = sorted(experts // expert_ranks + others for experts, others in blocks)
    several = memory_of(lab, strategy)
    one = memory_of(lab, strategy, "batch.accumulate=1")
    assert (several["ranks"], several["expert_ranks"]) == (ranks, expert_ranks)
    for memory in (several, one):
        assert memory["weights"] == memory["gradients"]
        assert memory["weights"] == pytest.approx(4 * weights / ranks, rel=1e-3)
        assert memory["optimizer"] == pytest.approx(8 * weights / ranks, rel=1e-3)
        assert memory["whole_weights"] == 4 * (outside + units[-1] + units[-2])
    assert one["whole_gradients"] == 4 * (outside + units[-1])
    assert several["whole_gradients"] == 4 * (outside + sum(units))
    kept = memory_of(lab, strategy.replace("}", ", reshard_after_forward: false}"))
    assert kept["whole_weights"] == 4 * (outside + sum(units))


def test_blocks_in_bf16_are_gathered_in_two_bytes(lab: Lab) -> None:
    whole = memory_of(lab, FSDP)["whole_weights"]
    halved = memory_of(lab, FSDP, "precision.name=bf16")["whole_weights"]
    outside, _ = split(build(lab.recipe(), device="meta"))
    assert 2 * outside < halved - 2 * outside < (whole + 4 * outside) / 2


def test_offload_and_recomputation_take_less(lab: Lab) -> None:
    plain = memory_of(lab, FSDP)
    offloaded = memory_of(lab, FSDP.replace("}", ", offload: true}"))
    owned = plain["weights"] + plain["gradients"] + plain["optimizer"]
    assert offloaded["on_cpu"] == owned
    assert offloaded["total"] == plain["total"] - owned
    parts = ("whole_weights", "whole_gradients", "activations")
    assert plain["total"] == owned + sum(plain[part] for part in parts)
    again = memory_of(lab, FSDP, "recompute.blocks=[dense, moe]")
    assert again["activations"] < plain["activations"]
    assert again["total"] - again["activations"] == plain["total"] - plain["activations"]


def test_ddp_holds_the_whole_model(lab: Lab) -> None:
    memory = memory_of(lab, "strategy={name: ddp, ranks: 2}")
    weights = sum(
        parameter.numel() for parameter in build(lab.recipe(), device="meta").parameters()
    )
    assert memory["weights"] == 4 * weights
    assert memory["whole_weights"] == memory["whole_gradients"] == 0


def test_the_line_is_printed(lab: Lab) -> None:
    result = lab.command("fit", lab.file, EXPERTS, "--dry-run")
    assert result.code == 0, result.err
    assert (
        "4 ranks on 1 nodes (2 expert ranks), 2 micro-batches of 1 sequences a rank a step: one rank holds"
        in (" ".join(result.out.split()))
    )


def test_a_stage_of_a_pipeline_owns_its_layers_and_holds_its_micro_batches(lab: Lab) -> None:
    """The weights of all stages are those of the model, and once more the embedding, which both ends have."""
    more = ("model.blocks.moe.count=3", "batch.accumulate=4")
    recipe = lab.recipe(*more)
    model = build(recipe, device="meta")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    two = memory_of(lab, *more, "strategy={name: pipeline, stages: 2}")
    assert (two["ranks"], two["expert_ranks"], two["sequences"]) == (2, 1, 4)
    assert len(two["stage_totals"]) == 2
    assert two["total"] == max(two["stage_totals"]) == two["stage_totals"][two["stage"] - 1]
    assert two["whole_weights"] == two["whole_gradients"] == 0
    assert two["weights"] == two["gradients"] < 4 * numbers
    component = lab.recipe(*more, "strategy={name: pipeline, stages: 2}").strategy
    stages = component.component.stages_of(component.config, model, 4)
    assert [stage.in_flight for stage in stages] == [2, 1]
    held = [
        sum(weight.numel() for name, weight in model.named_parameters() if stage.holds(name))
        for stage in stages
    ]
    assert sum(held) == numbers + model.embedding.weight.numel()
    assert two["weights"] == 4 * held[two["stage"] - 1]
    inner = "{name: expert_parallel, expert_ranks: 2}"
    four = memory_of(lab, *more, f"strategy={{name: pipeline, stages: 2, inner: {inner}}}")
    assert (four["ranks"], four["expert_ranks"], four["sequences"]) == (4, 2, 2)
    assert four["weights"] < 0.6 * max(4 * size for size in held)
