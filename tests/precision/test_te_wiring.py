"""te_fp8's layers around a stand-in of Transformer Engine: what it is given, and what stays inside."""

import importlib.util
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, flat, last_checkpoint
from tiers import first_by_default
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from core.assemble import build, make
from core.contracts.precision import Precision
from core.model.parameters import named_parameters
from core.numerics.padded import PaddedGroups
from plugins.te_fp8.engine import SCALINGS
from plugins.te_fp8.layers import ScalingRecipe

from . import te_standin
from .te_standin import State, quantised

SIXTEENS = (
    "model.attention={name: mla, heads: 2, q_rank: 16, kv_rank: 16, nope_dim: 16, rope_dim: 16, value_dim: 16}",
)
"""The small recipe in widths that Transformer Engine takes."""

TE = (*SIXTEENS, "precision={name: te_fp8, stream: fp32}")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> type[State]:
    """The stand-in, as if there were a GPU."""
    return te_standin.install(monkeypatch)


def precision(lab: Lab, *overrides: str) -> Precision:
    """te_fp8 with an fp32 stream, in which the stand-in's arithmetic is exact enough to compare."""
    made: Precision = make(lab.recipe(*TE, *overrides).precision)
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# One weight


@pytest.mark.parametrize("shape", [(16, 32), (5, 32), (2, 3, 32), (1, 32)])
def test_a_product_is_taken_in_fp8_whatever_the_number_of_rows(
    lab: Lab, state: type[State], shape: tuple[int, ...]
) -> None:
    layer: Any = precision(lab).linear(32, 48, "ffn.gate_up", std=0.1)
    x = random(*shape).requires_grad_()
    y = layer(x)
    dy = random(*shape[:-1], 48, seed=1)
    y.backward(dy)
    rows, dy_rows = (t.detach().reshape(-1, t.shape[-1]) for t in (x, dy))
    torch.testing.assert_close(
        y.reshape(-1, 48), quantised(rows) @ quantised(layer.weight).T, rtol=1e-6, atol=1e-6
    )
    expected = (quantised(dy_rows) @ quantised(layer.weight)).view(shape)
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        layer.weight.grad, quantised(dy_rows).T @ quantised(rows), rtol=1e-6, atol=1e-6
    )
    assert [which for which, _ in state.products] == ["forward", "backward"]
    assert {type(recipe) for _, recipe in state.products} == {te_standin.Float8BlockScaling}


def test_no_rows_are_no_product(lab: Lab, state: type[State]) -> None:
    layer = precision(lab).linear(32, 48, "ffn.gate_up", std=0.1)
    x = torch.zeros(0, 32, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, layer.weight.grad.abs().sum()) == ((0, 48), 0)
    assert state.products == []


def test_roles_that_stay_high_never_meet_transformer_engine(lab: Lab, state: type[State]) -> None:
    made = precision(lab)
    for role in ("head", "router", "mtp.projection"):
        made.linear(32, 48, role, std=0.1)(random(16, 32))
    assert state.products == []
    low = precision(lab, "precision.high=[]")
    low.linear(32, 48, "head", std=0.1)(random(16, 32))
    assert len(state.products) == 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("state")
def test_what_is_not_finite_is_never_hidden(lab: Lab, bad: float, grouped: bool) -> None:
    """Transformer Engine itself would saturate infinities, as the stand-in does."""
    made, more = precision(lab), (torch.tensor([4, 16]),) if grouped else ()
    layer = made.grouped_linear(2, 32, 48, "experts.down", std=0.1) if grouped else None
    layer = layer or made.linear(32, 48, "ffn.down", std=0.1)
    x = random(16, 32).requires_grad_()
    dy = random(16, 48, seed=1)
    dy[7, 9] = bad
    layer(x, *more).backward(dy)
    assert (~x.grad.isfinite()).all(1).tolist() == [row == 7 for row in range(16)]
    own = layer.weight.grad[1] if grouped else layer.weight.grad
    assert (~own.isfinite()).all(1).tolist() == [row == 9 for row in range(48)]
    wrong = x.detach().clone()
    wrong[3, 5] = bad
    assert (~layer(wrong, *more).isfinite()).all(1).tolist() == [row == 3 for row in range(16)]


@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_the_stream_has_one_format_and_masters_fp32(
    lab: Lab, state: type[State], stream: str
) -> None:
    made = precision(lab, f"precision.stream={stream}")
    plain, grouped = (
        made.linear(32, 48, "ffn.down", std=0.1),
        made.grouped_linear(2, 32, 48, "experts.down", std=0.1),
    )
    x = random(16, 32).requires_grad_()
    outputs = (plain(x), grouped(x, torch.tensor([4, 16])))
    assert {y.dtype for y in outputs} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[stream]}
    sum(y.sum() for y in outputs).backward()
    assert {t.dtype for t in (plain.weight, plain.weight.grad, grouped.weight.grad, x.grad)} == {
        torch.float32
    }


# A weight for every expert


def experts_by_loop(
    weight: Tensor, x: Tensor, dy: Tensor, ends: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients, an expert after the other."""
    y, dx, dw = torch.zeros(len(x), weight.shape[1]), torch.zeros_like(x), torch.zeros_like(weight)
    for expert, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > begin:
            rows, w, g = (
                quantised(x[begin:end]),
                quantised(weight[expert]),
                quantised(dy[begin:end]),
            )
            y[begin:end], dx[begin:end], dw[expert] = rows @ w.T, g @ w, g.T @ rows
    return y, dx, dw


@pytest.mark.parametrize(
    ("ends", "rows"),
    [
        ([4, 4, 20, 37], 37),
        ([16, 32, 48, 64], 64),
        ([0, 0, 0, 0], 0),
        ([0, 0, 0, 3], 9),
        ([40, 40, 40, 40], 40),
    ],
)
def test_experts_are_padded_to_tiles_and_no_expert_is_empty(
    lab: Lab, state: type[State], ends: list[int], rows: int
) -> None:
    layer: Any = precision(lab).grouped_linear(4, 32, 48, "experts.gate_up", std=0.1)
    x = random(rows, 32)
    x[ends[-1] :] = torch.nan  # rows that belong to no expert may hold anything
    x.requires_grad_()
    dy = random(rows, 48, seed=1)
    y = layer(x, torch.tensor(ends, dtype=torch.int32))
    y.backward(dy)
    expected = experts_by_loop(layer.weight.detach(), x.detach(), dy, ends)
    for actual, right in zip((y, x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-6, atol=1e-6)
    (sizes,) = te_standin.GroupedLinear.splits
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert sizes == [max(16, -(-count // 16) * 16) for count in counts]


def test_mxfp8_pads_to_thirty_two(lab: Lab, state: type[State]) -> None:
    made = precision(lab, "precision.scaling=mxfp8")
    made.grouped_linear(2, 32, 64, "experts.gate_up", std=0.1)(
        random(40, 32), torch.tensor([3, 40])
    )
    made.linear(32, 64, "ffn.gate_up", std=0.1)(random(5, 32))
    assert te_standin.GroupedLinear.splits == [[32, 64]]
    assert {type(recipe) for _, recipe in state.products} == {te_standin.MXFP8BlockScaling}


@pytest.mark.parametrize("tile", [16, 32])
def test_padding_and_cutting_is_the_identity(tile: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        counts = torch.randint(0, 40, (5,), generator=draw) * torch.randint(
            0, 2, (5,), generator=draw
        )
        ends = counts.cumsum(0)
        x = random(int(ends[-1]) + 3, 2, seed=7)
        groups = PaddedGroups.of(ends, len(x), tile)
        padded = groups.pad(x)
        assert padded.shape[0] == sum(groups.sizes)
        begins = torch.tensor([0, *groups.sizes]).cumsum(0)
        for index, (count, end) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True)):
            own = padded[begins[index] : begins[index + 1]]
            assert torch.equal(own[:count], x[end - count : end])
            assert not own[count:].any()
        assert torch.equal(groups.cut(padded)[:-3], x[:-3])
        assert not groups.cut(padded)[-3:].any()


# The recipe


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("gradients", ["e4m3", "e5m2"])
def test_the_recipe_is_always_said(
    lab: Lab, state: type[State], scaling: str, gradients: str
) -> None:
    made: Any = precision(lab, f"precision.scaling={scaling}", f"precision.gradients={gradients}")
    made.linear(32, 64, "ffn.gate_up", std=0.1)(random(32, 32))
    ((_, recipe),) = state.products
    assert type(recipe).__name__ == SCALINGS[scaling].recipe
    assert recipe.fp8_format.name == {"e4m3": "E4M3", "e5m2": "HYBRID"}[gradients]
    assert (
        made.gradient_dtype("ffn.down")
        == {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[gradients]
    )
    assert made.gradient_dtype("head") == torch.float32
    assert made.recipe.make() is recipe  # one object for all layers: histories are found by it


@pytest.mark.parametrize("scales", ["ue8m0", "fp32"])
def test_the_kind_of_scales_is_said_outright(lab: Lab, state: type[State], scales: str) -> None:
    made: Any = precision(lab, f"precision.scales={scales}")
    recipe = made.recipe.make()
    operands = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad)
    assert {(operand.power_2_scale, operand.amax_epsilon) for operand in operands} == {
        (scales == "ue8m0", 0.0)
    }
    assert (
        te_standin.Float8BlockScaling.fp8_quant_fwd_inp.power_2_scale
    )  # the class is left as it is


@pytest.mark.parametrize("scaling", SCALINGS)
def test_transformer_engines_own_recipe_classes_take_what_we_say(
    scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ones, read from the package's file: importing the package itself needs its compiled part."""
    found = (
        importlib.util.find_spec("transformer_engine")
        if "transformer_engine" not in sys.modules
        else None
    )
    if found is None or not found.submodule_search_locations:
        pytest.skip("transformer_engine is not installed")
    file = Path(found.submodule_search_locations[0]) / "common" / "recipe" / "__init__.py"
    spec = importlib.util.spec_from_file_location("recipes_of_transformer_engine", file)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, library)
    spec.loader.exec_module(library)
    monkeypatch.setattr("plugins.te_fp8.layers.recipes", lambda: library)
    for gradients, scales in (("e4m3", "ue8m0"), ("e5m2", "fp32")):
        made = ScalingRecipe(scaling, gradients=gradients, scales=scales, history=7).make()
        assert type(made).__name__ == SCALINGS[scaling].recipe
        assert made.fp8_format.name == {"e4m3": "E4M3", "e5m2": "HYBRID"}[gradients]
        assert isinstance(made, library.Recipe)
        assert getattr(made, "amax_history_len", 7) == 7
        if scaling == "block":
            assert made.fp8_quant_fwd_inp.power_2_scale == (scales == "ue8m0")
            assert (
                made.x_block_scaling_dim,
                made.w_block_scaling_dim,
                made.grad_block_scaling_dim,
            ) == (1, 2, 1)
        repr(made)  # Transformer Engine distinguishes contexts by it


# Recomputation


def test_a_recomputed_product_is_fp8_too(lab: Lab, state: type[State]) -> None:
    layer = precision(lab).linear(32, 48, "ffn.gate_up", std=0.1)
    x = random(16, 32).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert [which for which, _ in state.products] == ["forward", "forward", "backward"]
    assert None not in [recipe for _, recipe in state.products]


@pytest.mark.full
def test_a_model_with_recomputation_takes_the_same_steps(lab: Lab, state: type[State]) -> None:
    """Bit for bit, on one batch, with losses, routing and both kinds of layers."""
    weights, counts = [], []
    for blocks in ("[]", "[dense, moe]"):
        state.products.clear()
        module = lab.train(*TE, f"recompute.blocks={blocks}", "budget.steps=2")
        assert None not in [recipe for _, recipe in state.products]
        weights.append(
            {
                name: parameter.detach().clone()
                for name, parameter in module.model.named_parameters()
            }
        )
        counts.append([which for which, _ in state.products].count("forward"))
    assert counts[1] > counts[0]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


# Weights and states are those of every other precision


def test_names_weights_and_initial_values_are_those_of_fp32(lab: Lab, state: type[State]) -> None:
    here, there = build(lab.recipe(*TE)), build(lab.recipe(*SIXTEENS))
    assert list(here.state_dict()) == list(there.state_dict())
    assert not [name for name in here.state_dict() if name.endswith("_extra_state")]
    for name, value in there.state_dict().items():
        assert torch.equal(here.state_dict()[name], value), name
    assert [name for name, _ in here.named_parameters()] == [
        name for name, _ in there.named_parameters()
    ]


def test_a_used_model_is_still_the_same_module_tree(lab: Lab, state: type[State]) -> None:
    """The modules that are lent weights stay out of it, and a copy of a used model is whole."""
    model = build(lab.recipe(*TE))
    before = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    layer: Any = next(m for m in model.modules() if type(m).__name__ == "TEGroupedLinear")
    layer(random(16, layer.inputs), torch.full((layer.groups,), 16))
    assert state.products
    assert [name for name, _ in model.named_modules()] == before
    assert list(model.state_dict()) == keys
    again = deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert layer.weight.shape == (layer.groups, layer.outputs, layer.inputs)


@pytest.mark.parametrize(
    ("first", "second"),
    first_by_default([("fp32", "te_fp8"), ("te_fp8", "fp32")], several=True),
)
def test_checkpoints_go_both_ways_with_optimizer_state(
    lab: Lab, state: type[State], tmp_path: Path, first: str, second: str
) -> None:
    """What a run of one precision wrote is loaded, bit for bit, by model and optimizer of the other."""
    precisions = {"te_fp8": TE, "fp32": SIXTEENS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.run.training.check_environment", lambda recipe: None)
        lab.fit(tmp_path / "run", *precisions[first], "budget.steps=2", "checkpoint.every_steps=2")
    assert bool(state.products) == (first == "te_fp8")
    written = last_checkpoint(tmp_path / "run")
    recipe = lab.recipe(*precisions[second])
    model = build(recipe)
    saved = {name.removeprefix("model."): value for name, value in written["state_dict"].items()}
    model.load_state_dict(saved)
    optimizer = make(recipe.optimizer).make(named_parameters(model))
    optimizer.load_state_dict(written["optimizer_states"][0])
    held, right = (
        flat(optimizer.state_dict()["state"]),
        flat(written["optimizer_states"][0]["state"]),
    )
    assert held.keys() == right.keys()
    assert any("exp_avg" in path for path in held)
    for path, value in right.items():
        assert torch.equal(held[path], value), path
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_run_says_which_code_took_its_products(lab: Lab, state: type[State]) -> None:
    module = lab.train(*TE, "budget.steps=1")
    table = module.model.kernels_used().table()
    assert table["experts.gate_up"] == "Transformer Engine, Float8BlockScaling"
    assert table["ffn.down"] == "Transformer Engine, Float8BlockScaling"
    assert table["head"] == "float32 product"


def test_on_a_cpu_products_are_plain_and_say_so(lab: Lab) -> None:
    """A sample after the run, or a checkpoint on a laptop: neither a GPU nor Transformer Engine is needed."""
    made = precision(lab)
    layer, experts = (
        made.linear(32, 48, "ffn.down", std=0.1),
        made.grouped_linear(2, 32, 48, "experts.down", std=0.1),
    )
    x = random(6, 32)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    torch.testing.assert_close(
        experts(x, torch.tensor([2, 6]))[:2], F.linear(x[:2], experts.weight[0])
    )
    assert made.kernels_used.table() == {
        "ffn.down": "float32 product",
        "experts.down": "float32 product",
    }
    assert made.path("ffn.down") == "Transformer Engine, Float8BlockScaling"


# Delayed scaling remembers


def test_the_memory_of_delayed_scaling_reaches_the_checkpoint_and_comes_back(
    lab: Lab, state: type[State]
) -> None:
    made = precision(lab, "precision.scaling=delayed", "precision.history=4")

    def layers() -> list[Any]:
        torch.manual_seed(0)
        both = [
            made.linear(32, 48, "ffn.down", std=0.1),
            made.grouped_linear(2, 32, 48, "experts.down", std=0.1),
        ]
        for layer in both:
            layer.reset_parameters()
        return both

    def run(layer: Any, step: int) -> Tensor:
        x = random(32, 32, seed=step) * 3.0**step
        y: Tensor = (
            layer(x) if type(layer).__name__ == "TELinear" else layer(x, torch.tensor([16, 32]))
        )
        return y

    for whole, resumed in zip(layers(), layers(), strict=True):
        assert whole.step_state() == {}
        for step in range(3):
            run(whole, step)
        kept = whole.step_state()
        assert {name.partition(".")[2] for name in kept} == {"scale", "amax_history"}
        assert {
            value.shape[0] for name, value in kept.items() if name.endswith("amax_history")
        } == {4}
        fresh = run(deepcopy(resumed), 3)
        resumed.load_step_state(kept)
        assert resumed.step_state().keys() == kept.keys()  # also before its first product
        assert torch.equal(run(resumed, 3), right := run(whole, 3))
        assert not torch.equal(fresh, right)


@pytest.mark.parametrize("before", [0, 2])
def test_delayed_scaling_forgets_a_skipped_step(lab: Lab, state: type[State], before: int) -> None:
    """The first of all, and a later one: what follows is as if its products had not been; so is a checkpoint."""
    made = precision(lab, "precision.scaling=delayed", "precision.history=4")

    def run(*skips: int) -> list[Tensor]:
        """Memory and products of some steps; one that is skipped comes after so many others."""
        state.remembering.clear()  # leaving the context rolls the history of every module, and each run is alone
        torch.manual_seed(0)
        layer: Any = made.linear(32, 48, "ffn.down", std=0.1)
        layer.reset_parameters()
        found = []
        for step in range(4):
            if step in skips:
                layer(1e4 * random(32, 32, seed=7))
                layer.end_step(done=False)
            found += layer.step_state().values()
            found.append(layer(3.0**step * random(32, 32, seed=step)))
            layer.end_step(done=True)
        return found

    plain, skipped = run(), run(before)
    assert len(plain) == len(skipped) > 4
    for one, two in zip(plain, skipped, strict=True):
        assert torch.equal(one, two)


def test_other_scalings_remember_nothing(lab: Lab, state: type[State]) -> None:
    layer: Any = precision(lab).linear(32, 48, "ffn.down", std=0.1)
    for done in (True, False):
        layer(random(16, 32))
        layer.end_step(done=done)
        assert layer.step_state() == {}
    layer.load_step_state({})
    layer(random(16, 32))


def test_a_block_rolls_the_history_once(
    lab: Lab, state: type[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = precision(lab, "precision.scaling=delayed", "precision.history=4")
    rolled: list[int] = []
    monkeypatch.setattr(te_standin._Module, "roll", lambda self: rolled.append(1))
    layer = made.linear(32, 32, "ffn.down", std=0.1)
    with made.context():
        layer(layer(random(16, 32)))
        assert not rolled
    assert len(rolled) == 1
