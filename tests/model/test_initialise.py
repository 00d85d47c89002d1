"""Initial weights by address: each depends on (seed, name, expert) alone."""

import pytest
import torch
from torch import Tensor, nn

import core
from core.model.initialise import initialise
from core.numerics.draw import address

from . import tiny

SWAPS = {
    "no balancer": (f"{tiny.BALANCE}=[]",),
    "balancers in the other order": (
        f"{tiny.BALANCE}=[{{name: sequence, alpha: 0.1}}, {{name: bias, rate: 0.1}}]",
    ),
    "another attention": ("model.attention={name: mha, heads: 4}",),
    "no query latent": ("model.attention.q_rank=null",),
    "multi-token prediction": tiny.MTP,
    "more blocks": ("model.blocks.moe.count=3",),
    "other routing": (f"{tiny.ROUTER}.top_k=3",),
    "no shared expert": (f"{tiny.FFN}.shared_experts=0",),
    "another format of products": ("precision.name=bf16",),
    "recomputation": ("recompute.blocks=[moe]",),
}


def weights(*overrides: str) -> dict[str, Tensor]:
    """The initial state, in fp32 by default."""
    return core.build(tiny.compose("precision.name=fp32", *overrides)).state_dict()


@pytest.mark.parametrize("swap", SWAPS)
def test_swapping_one_part_leaves_every_other_weight(swap: str) -> None:
    """Every weight of the same name and shape is bitwise the same, and most of the model is."""
    before, after = weights(), weights(*SWAPS[swap])
    common = [name for name in before if name in after and before[name].shape == after[name].shape]
    assert len(common) >= len(before) - 3 * 7
    tiny.assert_equal(
        {name: after[name] for name in common}, {name: before[name] for name in common}
    )


def test_more_experts_leave_expert_e_as_it_was() -> None:
    before, after = weights(), weights(f"{tiny.FFN}.experts=12")
    for name in ("routed.gate_up", "routed.down", "router.centroids"):
        for block in (1, 2):
            key = f"blocks.{block}.ffn.{name}.weight"
            assert len(after[key]) == 12
            assert torch.equal(after[key][:8], before[key]), key


def test_experts_blocks_and_matrices_differ_from_each_other() -> None:
    state = weights(f"{tiny.FFN}.experts=12", f"{tiny.FFN}.expert_hidden=16")
    assert not torch.equal(
        state["blocks.1.ffn.router.centroids.weight"], state["blocks.2.ffn.router.centroids.weight"]
    )
    for name, weight in state.items():
        if "routed" in name:
            assert len({tuple(expert.flatten().tolist()) for expert in weight}) == 12
    matrices = [tuple(w.flatten()[:4].tolist()) for w in state.values() if w.dim() > 1]
    assert len(set(matrices)) == len(matrices)


def test_another_seed_changes_every_matrix() -> None:
    before, after = weights(), weights("seed=1")
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == (weight.dim() == 1), name
    for name, weight in before.items():
        if "routed" in name:
            assert all(
                not torch.equal(one, two) for one, two in zip(weight, after[name], strict=True)
            )


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    torch.rand(3)
    tiny.assert_equal(weights(), first)


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("attention", tiny.ATTENTIONS)
def test_every_module_survives_the_meta_device(precision: str, attention: str) -> None:
    """meta, to_empty, initialise: the values of a model that was built outright."""
    recipe = tiny.compose(f"precision.name={precision}", *tiny.MTP, *tiny.ATTENTIONS[attention])
    model = core.build(recipe, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    initialise(model, recipe.seed)
    tiny.assert_equal(model.state_dict(), core.build(recipe).state_dict())


def test_a_module_that_could_not_be_reset_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    with pytest.raises(TypeError, match=r"0 \(Stubborn\)"):
        initialise(nn.Sequential(Stubborn()), 0)


def test_addresses_are_63_bits_of_seed_and_name() -> None:
    seen = {address(seed, name) for seed in range(10) for name in ("a", "b", "0:a", ":a")}
    assert len(seen) == 40
    assert all(0 <= value < 2**63 for value in seen)
    assert address(0, "blocks.0") == address(0, "blocks.0")


def test_measured_deviations() -> None:
    """`std` everywhere, `output_std` for what writes into the residual stream, `embedding_std`; norms 1, biases 0."""
    state = weights(
        "model.init={std: 0.02, output_std: 0.005, embedding_std: 0.5}", *tiny.MTP, "model.dim=64"
    )
    residual = (
        "attention.output.weight",
        "ffn.down.weight",
        "routed.down.weight",
        "shared.down.weight",
    )
    for name, tensor in state.items():
        if name.endswith(".bias"):
            assert not tensor.any()
        elif tensor.dim() == 1:
            assert (tensor == 1).all()
        else:
            expected = (
                0.5 if name == "embedding.weight" else 0.005 if name.endswith(residual) else 0.02
            )
            error = 5 / (2 * tensor.numel()) ** 0.5
            assert tensor.std().item() == pytest.approx(expected, rel=error), name
            assert abs(tensor.mean().item()) < 5 * expected / tensor.numel() ** 0.5, name
    assert sum(name.endswith(residual) for name in state) == 1 * 2 + 2 * 3 + 2 * 3


def test_the_default_is_deepseek_v3s_deviation() -> None:
    """0.006 (report, section 4.2), not the released config's 0.02."""
    init = tiny.compose("model.dim=64").model.init.__class__
    assert init().std == 0.006
