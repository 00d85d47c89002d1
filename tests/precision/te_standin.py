"""A small Transformer Engine for machines without a GPU: the names that plugins/te_fp8 uses, with their behaviour.

Modules own a weight for each expert, keep an extra state, raise the errors of the real ones, and multiply in FP8 only
inside `autocast`. FP8 here is one power-of-two scale for a whole operand: what matters is which products were FP8.
"""

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Format(Enum):
    """Formats of operands and of gradients."""

    E4M3 = (448.0, 448.0)
    HYBRID = (448.0, 57344.0)


@dataclass(frozen=True)
class QParams:
    """How one operand is quantised."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Float8BlockScaling:
    """Blocks; the scales' kind is no argument, as in the real one."""

    tile = 16
    fp8_quant_fwd_inp = fp8_quant_fwd_weight = fp8_quant_bwd_grad = QParams(power_2_scale=True)

    def __init__(self, fp8_format: Format = Format.E4M3) -> None:
        self.fp8_format = fp8_format


class Float8CurrentScaling(Float8BlockScaling):
    """A scale for each tensor."""


class MXFP8BlockScaling(Float8BlockScaling):
    """1x32."""

    tile = 32


class DelayedScaling:
    """Scales from a history."""

    tile = 16

    def __init__(
        self,
        fp8_format: Format = Format.HYBRID,
        amax_history_len: int = 1024,
        amax_compute_algo: str = "max",
    ) -> None:
        self.fp8_format, self.amax_history_len, self.amax_compute_algo = (
            fp8_format,
            amax_history_len,
            amax_compute_algo,
        )


class State:
    """What the real one keeps in a global: the context, and for these tests what happened in it."""

    recipe: Any = None
    depth = 0
    products: list[tuple[str, Any]] = []
    remembering: list["_Module"] = []


class autocast:
    """Products inside are FP8; leaving the outermost one rolls every history."""

    def __init__(self, enabled: bool = True, recipe: Any = None) -> None:
        assert recipe is not None, "without a recipe the real one would choose DelayedScaling"
        self.recipe = recipe if enabled else None

    def __enter__(self) -> None:
        self.before = State.recipe
        State.recipe = self.recipe
        State.depth += 1

    def __exit__(self, *_: object) -> None:
        State.recipe = self.before
        State.depth -= 1
        if State.depth == 0 and torch.is_grad_enabled():
            for module in State.remembering:
                module.roll()


def quantised(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Rounded to E4M3 under one scale: the given one, or the power of two below 448 / |x|.

    NaN stays, infinities become the largest number, as they do on an H100.
    """
    if scale is None:
        largest = x.detach().float().nan_to_num(0, 0, 0).abs().amax()
        scale = torch.exp2(torch.floor(torch.log2(448 / largest.clamp(min=1e-30))))
    return ((x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale).to(
        x.dtype
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Any, scale: Tensor | None) -> Tensor:
        if recipe is not None:
            assert x.shape[0] % 8 == 0
            assert x.shape[1] % 16 == weight.shape[0] % 16 == 0
            x, weight = quantised(x, scale), quantised(weight).to(x.dtype)
        State.products.append(("forward", recipe))
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        State.products.append(("backward", ctx.recipe))
        dy = dy if ctx.recipe is None else quantised(dy)
        return (
            dy @ weight.to(dy.dtype),
            dy.T @ x,
            None,
            None,
        )  # both in the format of the activations


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        if isinstance(State.recipe, DelayedScaling) and not self.fp8_meta:
            for half, count in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
                history = torch.zeros(State.recipe.amax_history_len, count)
                self.fp8_meta[half] = SimpleNamespace(scale=torch.ones(count), amax_history=history)
            State.remembering.append(self)

    def roll(self) -> None:
        half = self.fp8_meta["scaling_fwd"]
        most = half.amax_history.amax(0)
        half.scale.copy_(torch.where(most > 0, 448 / most, half.scale))
        half.amax_history.copy_(half.amax_history.roll(-1, 0))
        half.amax_history[0] = 0

    def _own(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
        setattr(self, name, nn.Parameter(torch.empty(*shape, dtype=dtype, device=device)))
        setattr(self, name.replace("weight", "bias"), torch.Tensor().to(dtype=dtype, device=device))

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor, index: int) -> Tensor:
        assert weight.device == x.device == bias.device, "an operand was left on the meta device"
        scale = None
        if self.fp8_meta:
            half = self.fp8_meta["scaling_fwd"]
            scale = half.scale[3 * index].clone()
            half.amax_history[0, 3 * index] = torch.maximum(
                half.amax_history[0, 3 * index], x.detach().abs().max()
            )
        return _Product.apply(x, weight, State.recipe, scale)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass


class Linear(_Module):
    """One weight."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, params_dtype: Any, device: str
    ) -> None:
        super().__init__()
        assert not bias
        self._own("weight", (out_features, in_features), params_dtype, device)

    def forward(self, inp: Tensor) -> Tensor:
        self.init_fp8_metadata()
        assert inp.shape[0] % getattr(State.recipe, "tile", 1) == 0
        return self._multiply(inp, self.weight, self.bias, 0)


class GroupedLinear(_Module):
    """A weight for each expert."""

    splits: list[list[int]] = []

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        params_dtype: Any,
        device: str,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            self._own(f"weight{index}", (out_features, in_features), params_dtype, device)

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        self.init_fp8_metadata(self.num_gemms)
        GroupedLinear.splits.append(list(m_splits))
        assert len(m_splits) == self.num_gemms
        assert sum(m_splits) == inp.shape[0]
        assert all(size % State.recipe.tile == 0 for size in m_splits)
        parts = []
        for index, rows in enumerate(inp.split(m_splits)):
            names = (f"weight{index}", f"bias{index}")
            parts.append(self._multiply(rows, *(getattr(self, name) for name in names), index))
        return torch.cat(parts)


def install(patch: pytest.MonkeyPatch) -> type[State]:
    """Installs the stand-in as Transformer Engine, and makes layers take tensors as if they were on a GPU."""
    recipe = ModuleType("transformer_engine.common.recipe")
    for thing in (
        Format,
        QParams,
        Float8BlockScaling,
        Float8CurrentScaling,
        MXFP8BlockScaling,
        DelayedScaling,
    ):
        setattr(recipe, thing.__name__, thing)
    pytorch = ModuleType("transformer_engine.pytorch")
    for thing in (autocast, Linear, GroupedLinear):
        setattr(pytorch, thing.__name__, thing)
    packages = {"transformer_engine": {}, "transformer_engine.common": {}}
    for name in packages:
        patch.setitem(sys.modules, name, ModuleType(name))
    patch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    patch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    patch.setattr("plugins.te_fp8.layers._LentWeights.takes", lambda self, x: True)
    patch.setattr(State, "products", [])
    patch.setattr(State, "remembering", [])
    patch.setattr(GroupedLinear, "splits", [])
    return State
