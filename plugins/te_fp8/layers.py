"""Layers with one packed fp32 weight whose products Transformer Engine takes.

Its own modules own a weight for each expert and put an `_extra_state` into the state dict. Here they own nothing:
such a module is made without storage at the first product, is hidden from `nn.Module`, and is lent views of our
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
from core.numerics.linear import Formats, GroupedLinear, Linear
from core.numerics.padded import PaddedGroups
from plugins.te_fp8.engine import SCALINGS, pytorch, recipes

HALVES = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
"""Where a module of Transformer Engine keeps what delayed scaling remembers."""


class Recipe:
    """How operands are scaled, and the context in which products are taken so.

    Args:
        scaling: one of `SCALINGS`.
        gradients: e4m3 or e5m2, the format of the output's gradient.
        scales: ue8m0 (powers of two) or fp32; of block scaling, the others have a kind of their own.
        history: steps of the largest values that delayed scaling remembers.
    """

    def __init__(self, scaling: str, *, gradients: str, scales: str, history: int) -> None:
        self.scaling, self.gradients, self.scales, self.history = scaling, gradients, scales, history
        self.tile = SCALINGS[scaling].tile
        told = [", E5M2 gradients"] if gradients == "e5m2" else []
        told += [", fp32 scales"] if scaling == "block" and scales == "fp32" else []
        self.path = f"Transformer Engine, {SCALINGS[scaling].recipe}{''.join(told)}"
        self._made: Any = None

    def make(self) -> Any:
        """Transformer Engine's own object; one for all layers, because its buffers go by it."""
        if self._made is None:
            library = recipes()
            chosen: dict[str, Any] = {"fp8_format": getattr(library.Format, self._format())}
            if self.scaling == "delayed":
                chosen |= {"amax_history_len": self.history, "amax_compute_algo": "max"}
            made = getattr(library, SCALINGS[self.scaling].recipe)(**chosen)
            if self.scaling == "block":  # said outright, since an environment variable sets its default
                said = library.QParams(power_2_scale=self.scales == "ue8m0", amax_epsilon=0.0)
                made.fp8_quant_fwd_inp = made.fp8_quant_fwd_weight = made.fp8_quant_bwd_grad = said
            self._made = made
        return self._made

    def _format(self) -> str:
        return "HYBRID" if self.gradients == "e5m2" else "E4M3"

    def context(self) -> AbstractContextManager[Any]:
        """Products inside are taken in FP8."""
        entered: AbstractContextManager[Any] = pytorch().autocast(enabled=True, recipe=self.make())
        return entered


class _Poison(torch.autograd.Function):
    """Infinities become NaN, of a value on its way in, or of a gradient on its way back.

    Transformer Engine lets NaN through; infinities it rounds to the largest number (seen on an H100, 2.20.2), and an
    overflow would not be noticed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, going_in: bool) -> Tensor:
        ctx.coming_back = not going_in
        return _nan_for_infinite(x) if going_in else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _nan_for_infinite(dy) if ctx.coming_back else dy, None


def _nan_for_infinite(x: Tensor) -> Tensor:
    return x + (x - x)


def poisoned(x: Tensor, *, going_in: bool) -> Tensor:
    """See `_Poison`."""
    found: Tensor = _Poison.apply(x, going_in)  # type: ignore[no-untyped-call]
    return found


class _Lent(StepState):
    """A module of Transformer Engine that is lent weights, and the memory of delayed scaling.

    Mixed into a layer; `module` makes the module, `names` are those under which it looks for weights.
    """

    recipe: Recipe
    names: list[str]

    def adopt(self, recipe: Recipe, stream: torch.dtype, names: list[str]) -> None:
        """Set what every such layer has."""
        self.recipe, self.stream, self.names = recipe, stream, names
        self.__dict__["_module"] = None  # not registered: it has neither parameters nor a place in the state dict
        self._settled: dict[str, Tensor] = {}  # the memory after the last step that was done
        self._waiting: dict[str, Tensor] | None = None  # a memory that the next product begins with

    def module(self) -> Any:
        """A new module on the meta device."""
        raise NotImplementedError

    @contextmanager
    def lent(self, weights: list[Tensor]) -> Iterator[Any]:
        """The module in FP8, looking at these weights for as long as the context lasts."""
        with self.recipe.context():
            module = self.__dict__["_module"]
            if module is None:
                module = self.__dict__["_module"] = self._owning_nothing(weights[0])
            if self._waiting is not None:
                self._recall(module, self._waiting)
                self._waiting = None
            vars(module).update(zip(self.names, weights, strict=True))
            try:
                yield module
            finally:
                vars(module).update(dict.fromkeys(self.names))

    def _owning_nothing(self, like: Tensor) -> Any:
        """A module without parameters; the biases that it has in name only are on our device, not on meta."""
        module = self.module()
        for name in self.names:
            del module._parameters[name]
        for name, value in list(vars(module).items()):
            if name.startswith("bias") and isinstance(value, Tensor):
                vars(module)[name] = like.new_empty(0)
        return module

    def takes(self, x: Tensor) -> bool:
        """Whether a product goes to Transformer Engine: on a GPU. Elsewhere (samples, a laptop) it is a plain one."""
        return x.is_cuda

    def end_step(self, *, done: bool) -> None:
        """Transformer Engine rolls its history at every block, whatever becomes of the step; it is put back."""
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
        """Kept until the next product, because the module has no memory before its first."""
        if self.recipe.scaling == "delayed":
            self._waiting = self._settled = dict(state)

    def _recall(self, module: Any, state: dict[str, Tensor]) -> None:
        """Into the tensors themselves, which Transformer Engine's own lists hold too; what is not told starts anew."""
        module.init_fp8_metadata(num_gemms=len(self.names))
        for half, name, kept in _memories(module):
            told = state.get(f"{half}.{name}")
            kept.copy_(told if told is not None else torch.full_like(kept, 1.0 if name == "scale" else 0.0))


def _memories(module: Any) -> list[tuple[str, str, Tensor]]:
    kinds = ((half, module.fp8_meta[key]) for half, key in HALVES.items() if key in module.fp8_meta)
    return [(half, name, getattr(kind, name)) for half, kind in kinds for name in ("scale", "amax_history")]


class TELinear(_Lent, Linear):
    """x W^T by `te.Linear`; rows are padded with zeros to whole tiles. Arguments as `core.numerics.linear.Linear`."""

    def __init__(
        self, inputs: int, outputs: int, *, recipe: Recipe, stream: torch.dtype, **formats: Unpack[Formats]
    ) -> None:
        super().__init__(inputs, outputs, **formats)
        self.adopt(recipe, stream, ["weight"])

    def module(self) -> Any:
        """Without bias or storage."""
        shape = (self.inputs, self.outputs)
        return pytorch().Linear(*shape, bias=False, params_dtype=self.weight.dtype, device="meta")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in the stream's format."""
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
            y_TO = poisoned(module(poisoned(x_TI, going_in=True)), going_in=False)
        y: Tensor = y_TO[:rows].view(*x.shape[:-1], self.outputs)
        return y


class TEGroupedLinear(_Lent, GroupedLinear):
    """One x W^T for each group by `te.GroupedLinear`. Arguments as `core.numerics.linear.GroupedLinear`."""

    def __init__(
        self, groups: int, inputs: int, outputs: int, *, recipe: Recipe, stream: torch.dtype, **formats: Unpack[Formats]
    ) -> None:
        super().__init__(groups, inputs, outputs, **formats)
        self.adopt(recipe, stream, [f"weight{index}" for index in range(groups)])

    def module(self) -> Any:
        """Without bias or storage."""
        shape = (self.groups, self.inputs, self.outputs)
        return pytorch().GroupedLinear(*shape, bias=False, params_dtype=self.weight.dtype, device="meta")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by group, and where each group ends; in the stream's format."""
        x_AI = x_AI.to(self.stream)
        if not self.takes(x_AI):
            self.note(plain_path(self.stream))
            return grouped_product(x_AI, self.weight.to(self.stream), ends_E)
        self.note(self.recipe.path)
        groups = PaddedGroups.of(ends_E, len(x_AI), self.recipe.tile)
        with self.lent(list(self.weight.unbind(0))) as module:
            y_PO = module(poisoned(groups.pad(x_AI), going_in=True), groups.sizes)
        return groups.cut(poisoned(y_PO, going_in=False))
