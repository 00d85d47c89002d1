"""Optimizers whose moments are kept in bf16, beside weights of at least fp32 (DeepSeek-V3 report, section 3.3.3).

A step widens the moments of one weight to the weight's format, updates, and rounds them to the nearest bf16 value
again. The weight moves by the moments as they were before that rounding, so what is stored costs precision and what
is computed does not. The arithmetic of AdamW is torch's fused one.

What bf16 can follow. A significand of 8 bits puts neighbouring values of v between 2^-8 and 2^-7 of v apart, and a
change of less than half that gap is rounded away. Where gradients vanish, v should become beta v: it falls from
every value only if 1 - beta reaches the widest half gap, just under 2^-8 of v. Beyond `LARGEST_BETA` a moment
can stay constant for ever; at 0.999 it never falls from any value, the narrowest half gap being 2^-9.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

LARGEST_BETA = 1 - 2**-8
"""The largest decay under which a bf16 moment falls from every value once gradients have vanished."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of the two moments; kept, so that states are read by the same names whatever their format."""


def keep_bf16(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
    """Makes moments bf16 again after torch has cast what it loaded to the parameters' format, which loses nothing.

    Args:
        optimizer: one that has just loaded a state.
        names: the moments' names in it.
    """
    for state in optimizer.state.values():
        for name in names:
            if name in state:
                state[name] = state[name].to(torch.bfloat16)


class AdamWBF16(torch.optim.Optimizer):
    """AdamW with bf16 moments.

    State of each parameter, as torch's AdamW names it: `step` (fp32 scalar), `exp_avg` and `exp_avg_sq` (bf16).

    Args:
        parameters: groups, as every torch optimizer takes them; at least fp32.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, parameters: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, one at a time: only one pair of moments is widened at once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Widens the moments of one parameter, takes torch's step, and rounds them again."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        wide = [state[name].to(parameter.dtype) for name in MOMENTS]
        beta1, beta2 = group["betas"]
        gradient: Any = parameter.grad  # not None, as `step` has checked
        adamw(
            [parameter],
            [gradient],
            [wide[0]],
            [wide[1]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in zip(MOMENTS, wide, strict=True):
            state[name].copy_(moment)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as torch does, and makes the moments bf16 again."""
        super().load_state_dict(state_dict)
        keep_bf16(self, MOMENTS)
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(torch.float32).to(parameter.device)
