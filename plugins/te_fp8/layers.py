"""Layers with one packed fp32 weight whose products Transformer Engine takes.

Its own modules own a weight for each expert and put an `_extra_state` into the state dict. Here they own nothing.
Such a module is made without storage at the first product, is hidden from `nn.Module`, and is lent views of our
weight for one call. So parameters, state dict and optimizer state are those of every other precision.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from core.contracts.precision import StepState, plain_path
from core.numerics.grouped import grouped_product
from core.numerics.linear import GroupedLinear, Linear, LinearOptions
from core.numerics.padded import PaddedGroups
from plugins.te_fp8.engine import SCALINGS, pytorch, recipes

HALVES = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
"""Keys under which a module of Transformer Engine keeps the memory of delayed scaling."""


class ScalingRecipe:
    """The scaling of operands, and the context in which products are taken with it.

    Args:
        scaling: one of `SCALINGS`.
        gradients: e4m3 or e5m2, the format of the output's gradient.
        scales: ue8m0 (powers of two) or fp32; used by block scaling only.
        history: steps of the largest values that delayed scaling remembers.
    """

    def __init__(self, scaling: str, *, gradients: str, scales: str, history: int) -> None:
        self.scaling = scaling
        self.gradients = gradients
        self.scales = scales
        self.history = history
        self.tile = SCALINGS[scaling].tile
        self.path = f"Transformer Engine, {SCALINGS[scaling].recipe}"
        if gradients == "e5m2":
            self.path += ", E5M2 gradients"
        if scaling == "block" and scales == "fp32":
            self.path += ", fp32 scales"
        self._made: Any = None

    def make(self) -> Any:
        """Transformer Engine's own recipe; one object for all layers, because its buffers are keyed by it."""
        if self._made is None:
            library = recipes()
            chosen: dict[str, Any] = {"fp8_format": getattr(library.Format, self._format())}
            if self.scaling == "delayed":
                chosen |= {"amax_history_len": self.history, "amax_compute_algo": "max"}
            made = getattr(library, SCALINGS[self.scaling].recipe)(**chosen)
            if self.scaling == "block":
                # Set explicitly, because the defaults depend on an environment variable.
                params = library.QParams(power_2_scale=self.scales == "ue8m0", amax_epsilon=0.0)
                made.fp8_quant_fwd_inp = params
                made.fp8_quant_fwd_weight = params
                made.fp8_quant_bwd_grad = params
            self._made = made
        return self._made

    def _format(self) -> str:
        return "HYBRID" if self.gradients == "e5m2" else "E4M3"

    def context(self) -> AbstractContextManager[Any]:
        """A context in which products are taken in FP8."""
        entered: AbstractContextManager[Any] = pytorch().autocast(enabled=True, recipe=self.make())
        return entered


class _InfinitiesToNaN(torch.autograd.Function):
    """Replaces infinities by NaN: those of a value in the forward pass, or of its gradient in the backward pass.

    Transformer Engine lets NaN through; infinities it rounds to the largest number (seen on an H100, 2.20.2), and an
    overflow would not be noticed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, of_value: bool) -> Tensor:
        ctx.of_value = of_value
        return _nan_for_infinite(x) if of_value else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy if ctx.of_value else _nan_for_infinite(dy), None


def _nan_for_infinite(x: Tensor) -> Tensor:
    """x, with NaN where it is infinite."""
    return x + (x - x)


def infinities_to_nan(x: Tensor, *, of_value: bool) -> Tensor:
    """x, whose infinities become NaN (`of_value`), or whose gradient's do; see `_InfinitiesToNaN`."""
    found: Tensor = _InfinitiesToNaN.apply(x, of_value)  # type: ignore[no-untyped-call]
    return found


class _LentWeights(StepState):
    """Mixed into a layer: a module of Transformer Engine that is lent weights, and the memory of delayed scaling.

    `module` makes the module, and `names` are the attributes in which it looks for weights.
    """

    recipe: ScalingRecipe
    names: list[str]

    def adopt(self, recipe: ScalingRecipe, stream: torch.dtype, names: list[str]) -> None:
        """Sets the attributes that every such layer has."""
        self.recipe = recipe
        self.stream = stream
        self.names = names
        # Not registered as a submodule: it has neither parameters nor a place in the state dict.
        self.__dict__["_module"] = None
        self._settled: dict[str, Tensor] = {}  # the memory after the last step that was done
        self._waiting: dict[str, Tensor] | None = None  # a memory that the next product restores

    def module(self) -> Any:
        """A new module on the meta device."""
        raise NotImplementedError

    @contextmanager
    def lent(self, weights: list[Tensor]) -> Iterator[Any]:
        """The module in FP8, which uses these weights for as long as the context lasts."""
        with self.recipe.context():
            module = self.__dict__["_module"]
            if module is None:
                module = self._without_parameters(weights[0])
                self.__dict__["_module"] = module
            if self._waiting is not None:
                self._restore(module, self._waiting)
                self._waiting = None
            vars(module).update(zip(self.names, weights, strict=True))
            try:
                yield module
            finally:
                vars(module).update(dict.fromkeys(self.names))

    def _without_parameters(self, like: Tensor) -> Any:
        """A module without parameters; its empty biases are on the device of `like`, not on meta."""
        module = self.module()
        for name in self.names:
            del module._parameters[name]
        for name, value in list(vars(module).items()):
            if name.startswith("bias") and isinstance(value, Tensor):
                vars(module)[name] = like.new_empty(0)
        return module

    def takes(self, x: Tensor) -> bool:
        """Whether Transformer Engine takes a product: on a GPU; elsewhere (samples, a laptop) it is a plain one."""
        return x.is_cuda

    def end_step(self, *, done: bool) -> None:
        """Keeps the step's memory, or restores the one before a skipped step.

        Transformer Engine moves it on at every block, whether or not the step is skipped.
        """
        if done:
            self._settled = self.step_state()
        else:
            self.load_step_state(self._settled)

    def step_state(self) -> dict[str, Tensor]:
        """Scales and largest values of delayed scaling; empty before the first product, and under other scalings."""
        module = self.__dict__["_module"]
        if self._waiting is not None or module is None or self.recipe.scaling != "delayed":
            return dict(self._waiting or {})
        return {f"{half}.{name}": kept.detach().clone() for half, name, kept in _memories(module)}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Keeps a memory until the next product restores it: the module has none before its first."""
        if self.recipe.scaling == "delayed":
            self._waiting = self._settled = dict(state)

    def _restore(self, module: Any, state: dict[str, Tensor]) -> None:
        """Writes a memory into the module's tensors in place, since its own lists hold them; what it lacks is reset."""
        module.init_fp8_metadata(num_gemms=len(self.names))
        for half, name, kept in _memories(module):
            stored = state.get(f"{half}.{name}")
            if stored is None:
                value = 1.0 if name == "scale" else 0.0
                stored = torch.full_like(kept, value)
            kept.copy_(stored)


def _memories(module: Any) -> list[tuple[str, str, Tensor]]:
    """The tensors of a module's delayed scaling: forward or backward, name, tensor."""
    found = []
    for half, key in HALVES.items():
        if key in module.fp8_meta:
            for name in ("scale", "amax_history"):
                found.append((half, name, getattr(module.fp8_meta[key], name)))
    return found


class TELinear(_LentWeights, Linear):
    """x W^T by `te.Linear`, with rows padded to whole tiles; arguments are those of `core.numerics.linear.Linear`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        recipe: ScalingRecipe,
        stream: torch.dtype,
        **formats: Unpack[LinearOptions],
    ) -> None:
        super().__init__(inputs, outputs, **formats)
        self.adopt(recipe, stream, ["weight"])

    def module(self) -> Any:
        """A `te.Linear` without bias or storage."""
        shape = (self.inputs, self.outputs)
        return pytorch().Linear(*shape, bias=False, params_dtype=self.weight.dtype, device="meta")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., inputs) -> (..., outputs), in the stream's format."""
        x = x.to(self.stream)
        if not self.takes(x) or x.numel() == 0:
            if x.numel():
                self.note(plain_path(self.stream))
            return F.linear(x, self.weight.to(self.stream))
        self.note(self.recipe.path)
        x_TI = x.reshape(-1, self.inputs)
        rows = len(x_TI)
        if missing := -rows % self.recipe.tile:
            x_TI = F.pad(x_TI, (0, 0, 0, missing))
        with self.lent([self.weight]) as module:
            y_TO = module(infinities_to_nan(x_TI, of_value=True))
            y_TO = infinities_to_nan(y_TO, of_value=False)
        y: Tensor = y_TO[:rows].view(*x.shape[:-1], self.outputs)
        return y


class TEGroupedLinear(_LentWeights, GroupedLinear):
    """One x W^T for each group by `te.GroupedLinear`; arguments are those of `core.numerics.linear.GroupedLinear`."""

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        *,
        recipe: ScalingRecipe,
        stream: torch.dtype,
        **formats: Unpack[LinearOptions],
    ) -> None:
        super().__init__(groups, inputs, outputs, **formats)
        self.adopt(recipe, stream, [f"weight{index}" for index in range(groups)])

    def module(self) -> Any:
        """A `te.GroupedLinear` without bias or storage."""
        shape = (self.groups, self.inputs, self.outputs)
        return pytorch().GroupedLinear(
            *shape, bias=False, params_dtype=self.weight.dtype, device="meta"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """The products [A, outputs] of rows sorted by group, in the stream's format; `ends_E` says where groups end."""
        x_AI = x_AI.to(self.stream)
        if not self.takes(x_AI):
            self.note(plain_path(self.stream))
            return grouped_product(x_AI, self.weight.to(self.stream), ends_E)
        self.note(self.recipe.path)
        groups = PaddedGroups.of(ends_E, len(x_AI), self.recipe.tile)
        with self.lent(list(self.weight.unbind(0))) as module:
            x_PI = infinities_to_nan(groups.pad(x_AI), of_value=True)
            y_PO = module(x_PI, groups.sizes)
        return groups.cut(infinities_to_nan(y_PO, of_value=False))
