"""AdamW with bf16 moments: the update by hand, checkpoints, the decays that bf16 can follow, and bytes."""

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same_run, flat, last_checkpoint
from torch import Tensor, nn

from core.assemble import build, make
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import UserError
from core.contracts.training import NamedParameter
from core.model.parameters import kind_of, named_parameters
from core.training.run_folder import RunFolder

BF16 = "optimizer.moments=bf16"
BETA1, BETA2, EPS, DECAY, RATE = 0.9, 0.95, 1e-8, 0.1, 0.01


def nearest_bf16(value: float) -> float:
    """The nearest number with 8 significant bits, ties to the even one (values well inside bf16's range)."""
    if value == 0:
        return 0.0
    fraction, exponent = math.frexp(value)  # 0.5 <= |fraction| < 1
    significand = round(math.ldexp(fraction, 8))  # Python's round goes to even at ties
    return math.ldexp(significand, exponent - 8)


def step_by_hand(
    w: list[float], g: list[float], m: list[float], v: list[float], t: int, decay: float
) -> None:
    """Takes one step of every element in Python's floats, in place."""
    for i in range(len(w)):
        wide_m = BETA1 * m[i] + (1 - BETA1) * g[i]
        wide_v = BETA2 * v[i] + (1 - BETA2) * g[i] ** 2
        w[i] *= 1 - RATE * decay
        w[i] -= RATE * (wide_m / (1 - BETA1**t)) / (math.sqrt(wide_v / (1 - BETA2**t)) + EPS)
        m[i], v[i] = nearest_bf16(wide_m), nearest_bf16(wide_v)


def test_the_reference_rounds_as_bf16_does() -> None:
    bits = torch.arange(0x3F80, 0x4080)  # all of [1, 4)
    for value in bits.tolist():
        low, high = (struct.unpack(">f", struct.pack(">I", (value + up) << 16))[0] for up in (0, 1))
        for part in (0.0, 0.25, 0.5, 0.75):
            between = low + part * (high - low)
            assert nearest_bf16(between) == float(torch.tensor(between).bfloat16())


def optimizer_of(
    lab: Lab, parameters: dict[str, nn.Parameter], *overrides: str
) -> torch.optim.Optimizer:
    """The small recipe's optimizer with one learning rate for all steps."""
    optimizer = make(lab.recipe(*overrides).optimizer).make(
        [NamedParameter(n, p, "", kind_of(p.ndim, "")) for n, p in parameters.items()]
    )
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return optimizer


def some(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """A matrix, which is decayed, and a vector, which is not."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 5), "vector": (6,)}
    return {
        n: nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype))
        for n, s in shapes.items()
    }


def gradients(step: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Random gradients of very different sizes, some of them 0."""
    draw = torch.Generator().manual_seed(step)
    g = torch.randn(shape, generator=draw, dtype=torch.float64) * torch.logspace(
        -4, 1, shape.numel()
    ).view(shape)
    return torch.where(torch.rand(shape, generator=draw) < 0.1, 0.0, g).to(dtype)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 3e-6)])
def test_every_step_is_the_one_by_hand(lab: Lab, dtype: torch.dtype, error: float) -> None:
    """Compares moments with a step by hand: equal bits in fp64; in fp32 one near a tie may be rounded the other way."""
    parameters = some(dtype)
    optimizer = optimizer_of(lab, parameters, BF16)
    for name, parameter in parameters.items():
        w = parameter.detach().double().flatten().tolist()
        m, v = [0.0] * len(w), [0.0] * len(w)
        decay = DECAY if name == "matrix" else 0.0
        for step in range(1, 31):
            g = gradients(step, parameter.shape, dtype)
            optimizer.zero_grad()
            parameter.grad = g
            optimizer.step()
            step_by_hand(w, g.double().flatten().tolist(), m, v, step, decay)
            state = optimizer.state[parameter]
            assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (
                torch.bfloat16,
                torch.bfloat16,
            )
            torch.testing.assert_close(
                parameter.double().flatten(),
                torch.tensor(w, dtype=torch.float64),
                rtol=0,
                atol=error,
            )
            for key, expected in (("exp_avg", m), ("exp_avg_sq", v)):
                exact = torch.tensor(expected, dtype=torch.float64)
                expected_bf16 = exact.bfloat16().view(parameter.shape)
                bits = state[key].view(torch.int16).int()
                gap = (bits - expected_bf16.view(torch.int16).int()).abs()
                assert int(gap.max()) <= (0 if dtype == torch.float64 else 1)
                if dtype == torch.float32:
                    # Continue with the same moments, so that one tie does not hide a second error.
                    state[key].copy_(expected_bf16)


def test_only_what_is_stored_is_rounded(lab: Lab) -> None:
    """Compares with torch's AdamW, whose fp32 moments are rounded after each step, bit by bit."""
    ours, torchs = some(torch.float32), some(torch.float32)
    short, wide = optimizer_of(lab, ours, BF16), optimizer_of(lab, torchs)
    for step in range(1, 31):
        for a, b in zip(ours.values(), torchs.values(), strict=True):
            a.grad = gradients(step, a.shape, a.dtype)
            b.grad = a.grad.clone()
        short.step()
        wide.step()
        for a, b in zip(ours.values(), torchs.values(), strict=True):
            assert torch.equal(a, b)
            for key in ("exp_avg", "exp_avg_sq"):
                wide.state[b][key].copy_(wide.state[b][key].bfloat16())
                assert torch.equal(short.state[a][key].float(), wide.state[b][key])


def test_a_parameter_without_gradient_is_left_alone(lab: Lab) -> None:
    parameters = some(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = optimizer_of(lab, parameters, BF16)
    parameters["vector"].grad = torch.ones(6)
    optimizer.step()
    assert torch.equal(parameters["matrix"], before["matrix"])
    assert not torch.equal(parameters["vector"], before["vector"])
    assert list(optimizer.state) == [parameters["vector"]]


# What a decay does to a moment when gradients have vanished


def falls(lab: Lab, beta2: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Whether a second moment falls in a step whose gradient is 0, for each of the 128 significands."""
    parameter = nn.Parameter(torch.ones(1, 128))
    monkeypatch.setattr("core.model.adamw.LARGEST_BETA", 1.0)
    optimizer = optimizer_of(lab, {"w": parameter}, BF16, f"optimizer.betas=[0.9,{beta2}]")
    parameter.grad = torch.zeros(1, 128)
    optimizer.step()
    every = (torch.arange(0x3F80, 0x4000).to(torch.int16)).view(torch.bfloat16).view(1, 128)
    optimizer.state[parameter]["exp_avg_sq"].copy_(every)
    optimizer.step()
    return optimizer.state[parameter]["exp_avg_sq"] < every


@pytest.mark.parametrize(
    ("beta2", "least", "most"), [(0.99609375, 128, 128), (0.9965, 1, 127), (0.999, 0, 0)]
)
def test_bf16_follows_a_decay_up_to_its_significand(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, beta2: float, least: int, most: int
) -> None:
    assert least <= int(falls(lab, beta2, monkeypatch).sum()) <= most


@pytest.mark.parametrize("betas", ["[0.9,0.999]", "[0.9,0.9961]", "[0.999,0.95]"])
def test_a_decay_that_bf16_cannot_follow_is_refused(lab: Lab, betas: str) -> None:
    with pytest.raises(UserError) as caught:
        lab.recipe(BF16, f"optimizer.betas={betas}")
    assert "optimizer.betas" in str(caught.value)
    assert "more than bf16 moments can follow" in str(caught.value)
    assert "at most 1 - 2^-8 = 0.99609375" in str(caught.value)
    lab.recipe(f"optimizer.betas={betas}")


def test_the_largest_decay_that_bf16_can_follow_is_taken(lab: Lab) -> None:
    lab.recipe(BF16, "optimizer.betas=[0.99609375,0.99609375]")


# Checkpoints


def moments(content: dict[str, Any]) -> dict[str, Tensor]:
    """The moments of a checkpoint."""
    state = flat(content["optimizer_states"][0]["state"])
    return {path: value for path, value in state.items() if "exp_avg" in path}


def test_loading_keeps_the_moments_bit_for_bit(lab: Lab) -> None:
    """Loads them as bf16, where torch would convert them to fp32."""
    first, second = some(torch.float32), some(torch.float32)
    one, two = optimizer_of(lab, first, BF16), optimizer_of(lab, second, BF16)
    for parameter in first.values():
        parameter.grad = gradients(1, parameter.shape, parameter.dtype)
    one.step()
    two.load_state_dict(one.state_dict())
    for a, b in zip(first.values(), second.values(), strict=True):
        for key, value in one.state[a].items():
            assert two.state[b][key].dtype == value.dtype, key
            assert torch.equal(two.state[b][key], value), key


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(lab: Lab, tmp_path: Path, precision: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    overrides = (BF16, f"precision.name={precision}", "model.blocks.moe.count=1", "budget.steps=7")
    lab.fit(whole, *overrides)
    shutil.copytree(whole, stopped)
    checkpoints_in(stopped)[-1].unlink()
    assert read_checkpoint(checkpoints_in(stopped)[-1])["moeloom"]["windows_done"] == 5
    RunFolder(stopped).summary.unlink()
    lab.fit(stopped, *overrides, resume=True)
    kept = moments(last_checkpoint(stopped))
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert any(bool(value.abs().max() > 0) for value in kept.values())
    assert_same_run(stopped, whole)


def test_the_option_belongs_to_the_run(lab: Lab, finished: Path) -> None:
    with pytest.raises(
        UserError, match=r"optimizer\.moments = bf16 here, but the run was started with weights"
    ):
        lab.fit(finished, BF16, resume=True)


# Bytes


@pytest.mark.parametrize(
    ("overrides", "each"),
    [((), 8), ((BF16,), 4), (("precision.name=fp64",), 16), ((BF16, "precision.name=fp64"), 4)],
)
def test_describe_counts_the_bytes_that_the_moments_take(
    lab: Lab, overrides: tuple[str, ...], each: int
) -> None:
    recipe = lab.recipe(*overrides)
    model = build(recipe)
    optimizer = make(recipe.optimizer).make(named_parameters(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    taken = [
        value for state in optimizer.state.values() for key, value in state.items() if key != "step"
    ]
    measured = sum(value.untyped_storage().nbytes() for value in taken)
    assert measured == each * sum(parameter.numel() for parameter in model.parameters())
    result = lab.command("describe", lab.file, *overrides, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["memory_bytes"]["optimizer"] == measured
