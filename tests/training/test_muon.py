"""Muon: the iterations beside a singular value decomposition, the update beside torch's, groups, bytes and runs."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same_run, last_checkpoint, rows
from torch import Tensor, nn

from core.assemble import build, make
from core.checkpoints.listing import checkpoints_in
from core.contracts.errors import UserError
from core.contracts.training import NamedParameter
from core.model.parameters import check_groups, kind_of, named_parameters
from core.run.environment import check_environment
from core.training.run_folder import RunFolder
from plugins.muon import newton_schulz
from plugins.muon.newton_schulz import SCHEDULES, orthogonalise
from plugins.muon.update import Muon

MUON = "optimizer={name: muon, lr: 0.01}"
QUINTIC = "optimizer.newton_schulz=quintic5"
V4 = SCHEDULES["v4"]
RATE = 0.02
SHAPES = {"square": (12, 12), "tall": (31, 7), "wide": (6, 25), "column": (9, 1)}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers from a normal distribution."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


def with_values(values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with given singular values, and its singular vectors as U and V^T."""
    u, _, vh = torch.linalg.svd(drawn(rows, columns), full_matrices=False)
    return u @ torch.diag(values) @ vh, u, vh


def orthogonal(x: Tensor, schedule: str = "v4", products: torch.dtype | None = None) -> Tensor:
    """`orthogonalise` of one matrix or of a stack."""
    stack = x if x.ndim == 3 else x[None]
    found = orthogonalise(stack, SCHEDULES[schedule], eps=1e-7, products=products or x.dtype)
    return found if x.ndim == 3 else found[0]


def by_hand(g: Tensor, schedule: str) -> Tensor:
    """The iterations as the papers write them: X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    x = g / g.square().sum().sqrt()
    for a, b, c in SCHEDULES[schedule]:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


# The iterations


def test_the_schedules_are_those_of_the_sources() -> None:
    first, last = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
    assert {"v4": (first,) * 8 + (last,) * 2, "quintic5": (first,) * 5} == SCHEDULES


@pytest.mark.parametrize("schedule", ["v4", "quintic5"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_iterations_are_those_by_hand(shape: tuple[int, int], schedule: str) -> None:
    g = 1e3 * drawn(*shape)
    torch.testing.assert_close(
        orthogonal(g, schedule), by_hand(g, schedule), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("schedule", "smallest", "low", "high"),
    [
        ("v4", 1e-2, 1.0, 1.0006),
        ("v4", 1e-3, 1.0, 1.0006),
        ("v4", 1e-4, 1.0, 1.0021),
        ("quintic5", 1e-2, 0.6818, 1.135),
        ("quintic5", 1e-3, 0.470, 1.203),
        ("quintic5", 1e-4, 0.048, 1.203),
    ],
)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=["tall", "wide"])
def test_singular_values_come_into_the_band_and_vectors_stay(
    shape: tuple[int, int], schedule: str, smallest: float, low: float, high: float
) -> None:
    """Singular values from `smallest` of the Frobenius norm on; in fp64 the vectors differ by rounding alone."""
    values = torch.logspace(math.log10(smallest), 0, 24, dtype=torch.float64)
    values = values.clamp(min=1.01 * smallest * float(values.norm()))
    g, u, vh = with_values(values, *shape)
    found = orthogonal(g, schedule)
    inner = u.T @ found @ vh.T
    reached = inner.diagonal()
    assert reached.min() >= low - 1e-9
    assert reached.max() <= high
    torch.testing.assert_close(u @ torch.diag(reached) @ vh, found, rtol=0, atol=1e-9)
    if schedule == "v4":
        torch.testing.assert_close(found, u @ vh, rtol=0, atol=2.1e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_lower_formats_reach_the_orthogonal_factor_too(dtype: torch.dtype, error: float) -> None:
    g = drawn(20, 30, dtype=torch.float32)
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    found = orthogonal(g, products=dtype)
    assert found.dtype == torch.float32
    assert float((found - u @ vh).abs().max()) < error


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_stack_is_each_matrix_by_itself(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of very different norms, one of zeros, also when the stack is iterated in slices."""
    stack = drawn(5, *shape) * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None, None]
    stack[2] = 0
    apart = torch.stack([orthogonal(matrix) for matrix in stack])
    assert not apart[2].any()
    torch.testing.assert_close(orthogonal(stack), apart, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(newton_schulz, "WORKSPACE", 2 * shape[0] * shape[1])
    torch.testing.assert_close(orthogonal(stack), apart, rtol=1e-12, atol=1e-12)


def test_an_empty_part_stays_empty() -> None:
    assert orthogonal(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert orthogonal(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


# The update


def named(shapes: dict[str, tuple[tuple[int, ...], str]]) -> list[NamedParameter]:
    """Weights in fp64 of given shapes and roles."""
    found = []
    for seed, (name, (shape, role)) in enumerate(shapes.items()):
        weight = nn.Parameter(drawn(*shape, seed=seed))
        found.append(NamedParameter(name, weight, role, kind_of(len(shape), role)))
    return found


def muon_of(lab: Lab, weights: list[NamedParameter], *overrides: str) -> Muon:
    """Muon of the recipe, with one learning rate for all steps."""
    optimizer = make(lab.recipe(MUON, *overrides).optimizer).make(weights)[0]
    assert isinstance(optimizer, Muon)
    optimizer.param_groups[0]["lr"] = RATE
    return optimizer


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steps_are_those_of_torchs_muon(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], nesterov: bool
) -> None:
    """torch always iterates in bf16; with that cast taken out both agree to rounding of fp64, over six steps."""
    ours = named({"w": (shape, "ffn.down")})
    theirs = nn.Parameter(ours[0].parameter.detach().clone())
    optimizer = muon_of(
        lab,
        ours,
        QUINTIC,
        "optimizer.update_rms=0.2",
        "optimizer.weight_decay=0.3",
        f"optimizer.nesterov={str(nesterov).lower()}",
    )
    torchs = torch.optim.Muon(
        [theirs],
        lr=RATE,
        weight_decay=0.3,
        momentum=0.95,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    for step in range(6):
        ours[0].parameter.grad = drawn(*shape, seed=100 + step)
        theirs.grad = ours[0].parameter.grad.clone()
        optimizer.step()
        torchs.step()
        torch.testing.assert_close(ours[0].parameter, theirs, rtol=0, atol=1e-12)


def test_in_bf16_steps_are_close_to_those_of_torchs_muon(lab: Lab) -> None:
    weight = NamedParameter("w", nn.Parameter(drawn(16, 24).float()), "ffn.down", "matrix")
    theirs = nn.Parameter(weight.parameter.detach().clone())
    bf16 = ("optimizer.products=bf16", "optimizer.update_rms=0.2")
    optimizer = muon_of(lab, [weight], QUINTIC, *bf16)
    torchs = torch.optim.Muon([theirs], lr=RATE, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        weight.parameter.grad = drawn(16, 24, seed=step).float()
        theirs.grad = weight.parameter.grad.clone()
        before = theirs.detach().clone()
        optimizer.step()
        torchs.step()
        largest = float((theirs.detach() - before).abs().max())
        assert float((weight.parameter - theirs).detach().abs().max()) < 0.03 * largest * (step + 1)


def test_steps_are_those_of_the_papers_algorithm(lab: Lab) -> None:
    """M = mu M + G; direction mu M + G; W = (1 - lr decay) W - lr rms sqrt(max(m, n)) O (DeepSeek-V4)."""
    ours = named({"w": ((6, 10), "ffn.down")})
    weight = ours[0].parameter.detach().clone()
    momentum = torch.zeros_like(weight)
    optimizer = muon_of(lab, ours)
    for step in range(5):
        gradient = drawn(6, 10, seed=10 + step)
        ours[0].parameter.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        update = by_hand(0.95 * momentum + gradient, "v4") * 0.18 * math.sqrt(10)
        weight = (1 - RATE * 0.1) * weight - RATE * update
        torch.testing.assert_close(ours[0].parameter, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (4, 20, 8)], ids=["tall", "wide", "stack"])
def test_the_update_has_the_given_rms(lab: Lab, shape: tuple[int, ...]) -> None:
    weights = named({"w": (shape, "experts.down")})
    optimizer = muon_of(lab, weights, "optimizer.weight_decay=0")
    before = weights[0].parameter.detach().clone()
    weights[0].parameter.grad = drawn(*shape, seed=5)
    optimizer.step()
    moved = (weights[0].parameter.detach() - before) / RATE
    per_matrix = moved.reshape(-1, *shape[-2:]).square().mean(dim=(1, 2)).sqrt()
    assert per_matrix.tolist() == pytest.approx([0.18] * len(per_matrix), rel=1e-3)


def test_gate_and_up_are_orthogonalised_apart(lab: Lab) -> None:
    """One weight of both moves as two weights do; without `split` it does not."""
    fused = named({"w": ((3, 8, 10), "experts.gate_up")})
    halves = named({"g": ((3, 4, 10), "experts.down"), "u": ((3, 4, 10), "experts.down")})
    whole = fused[0].parameter.detach().clone()
    gradient = drawn(3, 8, 10, seed=9)
    for place, half in enumerate(halves):
        rows = slice(4 * place, 4 * place + 4)
        half.parameter.data = whole[:, rows].clone()
        half.parameter.grad = gradient[:, rows].clone()
    fused[0].parameter.grad = gradient
    muon_of(lab, fused).step()
    muon_of(lab, halves).step()
    apart = torch.cat([half.parameter for half in halves], dim=1)
    torch.testing.assert_close(fused[0].parameter, apart, rtol=0, atol=1e-12)
    one = [NamedParameter("w", nn.Parameter(whole), "experts.gate_up", "stack")]
    one[0].parameter.grad = gradient
    muon_of(lab, one, 'optimizer.split={"*.gate_up": 1}').step()
    assert float((one[0].parameter - apart).abs().max()) > 1e-4


def test_a_gradient_of_zeros_only_decays_and_a_weight_without_one_is_left_alone(lab: Lab) -> None:
    weights = named({"zero": ((5, 4), "ffn.down"), "none": ((5, 4), "ffn.down")})
    before = [weight.parameter.detach().clone() for weight in weights]
    weights[0].parameter.grad = torch.zeros(5, 4, dtype=torch.float64)
    optimizer = muon_of(lab, weights)
    optimizer.step()
    torch.testing.assert_close(weights[0].parameter, before[0] * (1 - RATE * 0.1))
    assert torch.equal(weights[1].parameter, before[1])
    assert list(optimizer.state) == [weights[0].parameter]


def test_the_size_of_the_gradient_does_not_matter(lab: Lab) -> None:
    ends = []
    for size in (1e-4, 1.0, 1e6):
        weights = named({"w": ((5, 4), "ffn.down")})
        weights[0].parameter.grad = size * drawn(5, 4, seed=3)
        muon_of(lab, weights).step()
        ends.append(weights[0].parameter)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ends[2], ends[1], rtol=1e-10, atol=1e-10)


# Which weights are whose, and settings


def owners(lab: Lab, *overrides: str) -> dict[str, str]:
    """The optimizer that has each weight of the small model, by its class."""
    recipe = lab.recipe(MUON, *overrides)
    weights = named_parameters(build(recipe, device="meta"))
    optimizers = make(recipe.optimizer).make(weights)
    check_groups(optimizers, weights)
    names = {id(weight.parameter): weight.name for weight in weights}
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found.update({names[id(p)]: type(optimizer).__name__ for p in group["params"]})
    return found


def test_every_weight_is_in_the_optimizer_of_its_role(lab: Lab) -> None:
    found = owners(lab)
    model = build(lab.recipe(MUON), device="meta")
    by_adamw = {name for name, optimizer in found.items() if optimizer == "AdamW"}
    vectors = {weight.name for weight in named_parameters(model) if weight.kind == "vector"}
    assert by_adamw == vectors | {"embedding.weight", "output.weight"}
    assert found["blocks.1.ffn.router.centroids.weight"] == "Muon"
    assert found["blocks.1.ffn.routed.down.weight"] == "Muon"


def test_further_roles_can_be_given_to_adamw(lab: Lab) -> None:
    found = owners(lab, "optimizer.adamw.roles=[embedding, head, router, attention.*]")
    assert found["blocks.1.ffn.router.centroids.weight"] == "AdamW"
    assert found["blocks.0.attention.q_up.weight"] == "AdamW"
    assert found["blocks.0.ffn.down.weight"] == "Muon"


def test_a_tied_embedding_is_adamws(lab: Lab) -> None:
    found = owners(lab, "model.tied_embedding=true")
    assert found["embedding.weight"] == "AdamW"
    assert "output.weight" not in found


def test_the_rate_of_adamws_weights_has_a_factor_of_its_own(lab: Lab) -> None:
    recipe = lab.recipe(MUON, "optimizer.adamw.lr_scale=0.25")
    muon, other = make(recipe.optimizer).make(named_parameters(build(recipe, device="meta")))
    assert all(group["lr_scale"] == 0.25 for group in other.param_groups)
    assert all("lr_scale" not in group for group in muon.param_groups)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0]


REFUSED = {
    "lr=-1": "optimizer.lr = -1: must be at least 0",
    "lr=.nan": "optimizer.lr = nan: must be finite",
    "momentum=1": "optimizer.momentum = 1: must be at least 0 and less than 1",
    "momentum=-0.1": "optimizer.momentum = -0.1: must be at least 0 and less than 1",
    "momentum=.nan": "optimizer.momentum = nan: must be finite",
    "weight_decay=-1": "optimizer.weight_decay = -1: must be at least 0 and finite",
    "weight_decay=.inf": "optimizer.weight_decay = inf: must be finite",
    "update_rms=0": "optimizer.update_rms = 0: must be more than 0 and finite",
    "update_rms=.inf": "optimizer.update_rms = inf: must be finite",
    "eps=0": "optimizer.eps = 0: must be more than 0 and finite",
    "eps=.nan": "optimizer.eps = nan: must be finite",
    "newton_schulz=v5": "optimizer.newton_schulz = 'v5': must be one of v4, quintic5",
    "products=fp8": "optimizer.products = 'fp8': must be one of auto, weights, bf16",
    "split={routers: 2}": "optimizer.split: 'routers' is not a role; did you mean router?",
    "split={router: 0}": "optimizer.split: router: 0 must be at least 1",
    "split={router: 3}": "optimizer.split: router: 3 must divide the 8 rows of blocks.1.ffn.rout",
    "adamw.lr_scale=0": "optimizer.adamw.lr_scale = 0: must be more than 0 and finite",
    "adamw.lr_scale=.inf": "optimizer.adamw.lr_scale = inf: must be finite",
    "adamw.eps=0": "optimizer.adamw.eps = 0: must be more than 0 and finite",
    "adamw.betas=[0.9, 1]": "optimizer.adamw.betas = [0.9, 1.0]: must be two numbers in [0, 1)",
    "adamw.weight_decay=-1": "optimizer.adamw.weight_decay = -1: must be at least 0 and finite",
    "adamw.roles=[heads]": "optimizer.adamw.roles = ['heads']: 'heads' is not a role; did you",
    "adamw.lr=1": "optimizer.adamw.lr: unknown key",
}


@pytest.mark.parametrize("override", REFUSED)
def test_values_outside_their_ranges_are_one_sentence(lab: Lab, override: str) -> None:
    with pytest.raises(UserError) as caught:
        check_environment(lab.recipe(MUON, f"optimizer.{override}"))
    assert REFUSED[override] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_momentum_that_bf16_cannot_follow_is_refused(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"optimizer\.momentum = 0\.999: .* at most 1 - 2\^-8"):
        lab.recipe(MUON, "optimizer.momentum=0.999", "optimizer.moments=bf16")
    lab.recipe(MUON, "optimizer.momentum=0.999")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["eps", "weight_decay"])
def test_adamws_numbers_are_checked_without_a_recipe_too(lab: Lab, key: str, value: float) -> None:
    config = lab.recipe().optimizer.config
    setattr(config, key, value)
    with pytest.raises(Exception, match=f"{key}: must be .* finite"):
        config.check(None)


# Runs, checkpoints and bytes


def test_a_run_learns_and_resumes_to_the_bit(lab: Lab, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    low = "optimizer.moments=bf16"
    overrides = (MUON, low, "budget.steps=14", "validation.every_steps=14", "checkpoint.keep=9")
    lab.fit(whole, *overrides)
    losses = [float(row["loss/total"]) for row in rows(whole) if "loss/total" in row]
    assert losses[-1] < losses[0] - 0.2
    shutil.copytree(whole, stopped)
    checkpoints_in(stopped)[-1].unlink()
    RunFolder(stopped).summary.unlink()
    lab.fit(stopped, *overrides, resume=True)
    muon, other = last_checkpoint(stopped)["optimizer_states"]
    momenta = [state["momentum_buffer"] for state in muon["state"].values()]
    assert {momentum.dtype for momentum in momenta} == {torch.bfloat16}
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in other["state"].values())
    assert_same_run(stopped, whole)


def measured(optimizers: list[torch.optim.Optimizer]) -> Iterator[int]:
    """The bytes of each tensor that optimizers keep, but for step counters."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (v.untyped_storage().nbytes() for k, v in state.items() if k != "step")


@pytest.mark.parametrize(
    "overrides",
    [(), ("optimizer.moments=bf16",), ("optimizer.adamw={moments: bf16, roles: [router]}",)],
    ids=["weights", "bf16 momentum", "bf16 moments, another role"],
)
def test_describe_counts_what_the_optimizers_keep(lab: Lab, overrides: tuple[str, ...]) -> None:
    recipe = lab.recipe(MUON, *overrides)
    model = build(recipe)
    optimizers = make(recipe.optimizer).make(named_parameters(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    result = lab.command("describe", lab.file, MUON, *overrides, "--json")
    assert result.code == 0, result.err
    document: dict[str, Any] = json.loads(result.out)
    assert document["memory_bytes"]["optimizer"] == sum(measured(optimizers))
