"""The limit: the matrix products of one training step and nothing else, back to back.

Every product is computed with its input's and its weight's gradient; the logits are among them. Experts take the rows
that were really routed to them, in one call of `F.grouped_mm` or one expert after the other, whichever is faster here.
Attention over the sequence is torch's fused kernel, forward and backward. Outputs of products with one matrix go into
buffers that are reused, and layers of one shape share operands, so that no step with these products can be faster.
"""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from core.speed.product_shapes import AttentionShape, ExpertsShape, LinearShape, ProductShape
from core.speed.turns import seconds_of

Work = Callable[[], object]
Operands = tuple[Tensor, Tensor, Tensor]
"""Rows, weights and the gradients of outputs of a product of experts."""

TRIALS = 3
"""Runs of each way to compute a product, of which the median decides."""


class Limit:
    """All products of a step, ready to run.

    Args:
        shapes: the products.
        device: where.

    Attributes:
        flops: the floating-point operations of one run.
        ways: how often each way was chosen for a product of experts: `grouped` or `one by one`.
    """

    def __init__(self, shapes: list[ProductShape], device: torch.device) -> None:
        self.device = device
        self.flops = sum(shape.flops for shape in shapes)
        self.ways = {"grouped": 0, "one by one": 0}
        prepared: dict[ProductShape, list[Work]] = {}
        self._work: list[Work] = []
        for shape in shapes:
            if shape not in prepared:
                prepared[shape] = self._prepared(shape)
            self._work += prepared[shape]

    def run(self) -> None:
        """Computes every product once."""
        for work in self._work:
            work()

    def _prepared(self, shape: ProductShape) -> list[Work]:
        """The work of one product and its gradients."""
        if isinstance(shape, LinearShape):
            return [_linear(shape, self.device)]
        if isinstance(shape, AttentionShape):
            ways = [_attention(shape, self.device, width) for width in _value_widths(shape)]
            return [ways[self._fastest(ways)]]
        chosen = []
        operands = expert_operands(shape, self.device)
        one_by_one = _one_by_one(operands, shape)
        for single, together in zip(one_by_one, grouped(operands, shape), strict=True):
            fastest = self._fastest([single, together])
            self.ways["grouped" if fastest else "one by one"] += 1
            chosen.append(together if fastest else single)
        return chosen

    def _fastest(self, ways: list[Work]) -> int:
        """The index of the fastest way; one that does not run here has lost."""
        times = []
        for way in ways:
            try:
                way()
                runs = [seconds_of(way, self.device) for _ in range(TRIALS)]
            except (RuntimeError, NotImplementedError):
                times.append(float("inf"))
            else:
                times.append(median(runs))
        return times.index(min(times))


def _linear(shape: LinearShape, device: torch.device) -> Work:
    """A product with one matrix, and its two gradients."""
    x_TI = torch.randn(shape.rows, shape.inputs, device=device).to(shape.dtype)
    w_OI = torch.randn(shape.outputs, shape.inputs, device=device).to(shape.dtype)
    dy_TO = torch.randn(shape.rows, shape.outputs, device=device).to(shape.dtype)
    y_TO = torch.empty_like(dy_TO)
    dx_TI = torch.empty_like(x_TI)
    dw_OI = torch.empty_like(w_OI)

    def work() -> None:
        torch.mm(x_TI, w_OI.t(), out=y_TO)
        torch.mm(dy_TO, w_OI, out=dx_TI)
        torch.mm(dy_TO.t(), x_TI, out=dw_OI)

    return work


def expert_operands(shape: ExpertsShape, device: torch.device) -> Operands:
    """Rows, weights and gradients of outputs."""
    rows = sum(shape.loads)
    experts = len(shape.loads)
    x_AI = torch.randn(rows, shape.inputs, device=device).to(shape.dtype)
    w_EOI = torch.randn(experts, shape.outputs, shape.inputs, device=device).to(shape.dtype)
    dy_AO = torch.randn(rows, shape.outputs, device=device).to(shape.dtype)
    return x_AI, w_EOI, dy_AO


def _one_by_one(operands: Operands, shape: ExpertsShape) -> list[Work]:
    """The product of experts and its two gradients, one expert after the other; experts without rows are left out."""
    x_AI, w_EOI, dy_AO = operands
    y_AO = torch.empty_like(dy_AO)
    dx_AI = torch.empty_like(x_AI)
    dw_EOI = torch.empty_like(w_EOI)
    experts: list[tuple[Tensor, ...]] = []
    begin = 0
    for expert, load in enumerate(shape.loads):
        end = begin + load
        if load:
            rows = slice(begin, end)
            weight = (w_EOI[expert], dw_EOI[expert])
            experts.append((x_AI[rows], dy_AO[rows], y_AO[rows], dx_AI[rows], *weight))
        begin = end

    def forward() -> None:
        for x_RI, _, y_RO, _, w_OI, _ in experts:
            torch.mm(x_RI, w_OI.t(), out=y_RO)

    def inputs() -> None:
        for _, dy_RO, _, dx_RI, w_OI, _ in experts:
            torch.mm(dy_RO, w_OI, out=dx_RI)

    def weights() -> None:
        for x_RI, dy_RO, _, _, _, dw_OI in experts:
            torch.mm(dy_RO.t(), x_RI, out=dw_OI)

    return [forward, inputs, weights]


def grouped(operands: Operands, shape: ExpertsShape) -> list[Callable[[], Tensor]]:
    """The product of experts and its two gradients, each in one call."""
    x_AI, w_EOI, dy_AO = operands
    ends_E = torch.tensor(shape.loads, device=x_AI.device).cumsum(0).to(torch.int32)

    def forward() -> Tensor:
        return F.grouped_mm(x_AI, w_EOI.transpose(1, 2), offs=ends_E)

    def inputs() -> Tensor:
        return F.grouped_mm(dy_AO, w_EOI, offs=ends_E)

    def weights() -> Tensor:
        return F.grouped_mm(dy_AO.t(), x_AI, offs=ends_E)

    return [forward, inputs, weights]


def _value_widths(shape: AttentionShape) -> list[int]:
    """The widths of values to try: their own, and the keys', which torch's fused kernel on CPUs needs."""
    return sorted({shape.value, max(shape.value, shape.key)})


def _attention(shape: AttentionShape, device: torch.device, value: int) -> Work:
    """Causal attention by torch's kernel, forward and backward, with values of some width."""

    def heads(count: int, width: int) -> Tensor:
        made = torch.randn(shape.sequences, shape.length, count, width, device=device)
        return made.to(shape.dtype).transpose(1, 2).requires_grad_()

    q_BHLK = heads(shape.heads, shape.key)
    k_BHLK = heads(shape.key_heads, shape.key)
    v_BHLV = heads(shape.key_heads, value)
    dy_BHLV = heads(shape.heads, value).detach()
    is_shared = shape.key_heads != shape.heads

    def work() -> None:
        y_BHLV = F.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLV, is_causal=True, enable_gqa=is_shared
        )
        torch.autograd.grad(y_BHLV, (q_BHLK, k_BHLK, v_BHLV), dy_BHLV)

    return work
