"""Muon as a torch optimizer of matrices and stacks of matrices.

`torch.optim.Muon` (torch 2.13) takes two axes only, one triple of coefficients for all steps, and always iterates in
bf16. Stacks of experts, DeepSeek-V4's two stages, fp32 on a CPU and divided weights need a class of their own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.training import MatrixShard
from core.numerics.moments import keep_bf16
from core.numerics.promotion import at_least_fp32
from plugins.muon.newton_schulz import Coefficients, orthogonalise

MOMENTUM = "momentum_buffer"
"""torch's name of the momentum."""


@dataclass(frozen=True)
class MatrixWeight:
    """A weight that Muon updates.

    Args:
        parameter: matrices as its last two axes; this rank's part if the weight is divided.
        blocks: how many matrices of equal height lie below each other in each of them.
        shard: gathers and divides the matrices; None: they are whole.
        decays: whether it is decayed.
    """

    parameter: Tensor
    blocks: int = 1
    shard: MatrixShard | None = None
    decays: bool = True


@dataclass(frozen=True)
class MuonRule:
    """How a gradient becomes an update.

    Args:
        momentum: decay of the momentum.
        nesterov: whether the update looks one step of the momentum ahead.
        schedule: the coefficients of every Newton-Schulz step.
        update_rms: root mean square of the update of a matrix of full rank, before the learning rate.
        eps: the smallest Frobenius norm that a matrix is divided by.
        products: the format of the iterations on a device; None: that of the weights, at least fp32.
        moments: the format in which the momentum is kept; None: that of the weights.
    """

    momentum: float
    nesterov: bool
    schedule: tuple[Coefficients, ...]
    update_rms: float
    eps: float
    products: Callable[[torch.device], torch.dtype | None]
    moments: torch.dtype | None = None

    def update(self, direction: Tensor, blocks: int) -> Tensor:
        """The update of whole matrices: each block orthogonalised by itself, scaled to `update_rms`.

        An orthogonal M x N matrix has the root mean square 1 / sqrt(max(M, N)), hence the factor.

        Args:
            direction: M x N, or E x M x N; the gradient or its momentum, in fp32 or wider.
            blocks: how many blocks of rows each matrix has.
        """
        rows, columns = direction.shape[-2] // blocks, direction.shape[-1]
        products = self.products(direction.device) or direction.dtype
        stack = direction.reshape(-1, rows, columns)
        update = orthogonalise(stack, self.schedule, eps=self.eps, products=products)
        scale = self.update_rms * math.sqrt(max(rows, columns))
        return update.mul_(scale).view(direction.shape)


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan 2024; arXiv 2502.16982, 2.2; DeepSeek-V4, arXiv 2606.19348): orthogonalised momentum.

    State of each parameter, as torch's Muon names it: `momentum_buffer`.

    Args:
        weights: what is updated, in a group of those that decay and one of those that do not.
        rule: the update.
        weight_decay: decoupled decay of the first group.
    """

    def __init__(
        self, weights: Sequence[MatrixWeight], rule: MuonRule, *, weight_decay: float
    ) -> None:
        self.rule = rule
        self._weights: Mapping[Tensor, MatrixWeight] = {w.parameter: w for w in weights}
        groups = []
        for decays in (True, False):
            chosen = [weight.parameter for weight in weights if weight.decays == decays]
            if chosen:
                decay = weight_decay if decays else 0.0
                groups.append({"params": chosen, "weight_decay": decay})
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, one at a time, so that one divided weight is whole at once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(self._weights[parameter], parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"])
        return loss

    def _update(self, weight: MatrixWeight, gradient: Tensor) -> Tensor:
        """Moves the momentum of a weight, and returns this rank's part of the update."""
        direction = self._direction(weight.parameter, gradient)
        if weight.shard is None:
            return self.rule.update(direction, weight.blocks)
        whole = self.rule.update(weight.shard.gather(direction), weight.blocks)
        return weight.shard.shard_of(whole).to(weight.parameter.device)

    def _direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """What is orthogonalised: the momentum, or with Nesterov's look ahead a mean of it and the gradient.

        Both are means as in torch's Muon: M = mu M + (1 - mu) G. The papers add G whole, which multiplies M and the
        direction by 1 / (1 - mu), and the division by the norm takes that factor out.
        """
        rule = self.rule
        state = self.state[parameter]
        if not state:
            state[MOMENTUM] = torch.zeros_like(parameter, dtype=rule.moments or parameter.dtype)
        gradient = at_least_fp32(gradient)
        mean = state[MOMENTUM].to(gradient.dtype).lerp(gradient, 1 - rule.momentum)
        state[MOMENTUM].copy_(mean)
        return gradient.lerp(mean, rule.momentum) if rule.nesterov else mean

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as torch does, and makes a momentum in bf16 again what it was."""
        super().load_state_dict(state_dict)
        if self.rule.moments == torch.bfloat16:
            keep_bf16(self, [MOMENTUM])
