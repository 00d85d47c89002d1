"""The experts of few tokens, in decoding: each chosen expert is called, and no row is sorted."""

import torch
from torch import Tensor

from core.model.activation import swiglu
from core.numerics.chosen import FEW_ON_CPU, chosen_products


def pays(assignments: int, device: torch.device) -> bool:
    """Whether so many assignments are few on this device."""
    return device.type == "cpu" and assignments <= FEW_ON_CPU


def gated_experts(
    x_TD: Tensor, gate_up_EXD: Tensor, down_EDI: Tensor, expert_TK: Tensor, gate_TK: Tensor
) -> Tensor:
    """The sum of gate * expert(x) over each token's K experts.

    Args:
        x_TD: the tokens.
        gate_up_EXD: the first matrix of every expert, X = 2 I.
        down_EDI: the second matrix of every expert.
        expert_TK: int64, the experts.
        gate_TK: their gates.
    """
    tokens, choices = expert_TK.shape
    x_AD = x_TD.to(gate_up_EXD.dtype)[:, None].expand(-1, choices, -1).reshape(tokens * choices, -1)
    expert_A = expert_TK.flatten()
    hidden_AI = swiglu(chosen_products(x_AD, gate_up_EXD, expert_A))
    y_AD = chosen_products(hidden_AI, down_EDI, expert_A)
    y_TKD = y_AD.view(tokens, choices, -1)
    return torch.bmm(gate_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]
