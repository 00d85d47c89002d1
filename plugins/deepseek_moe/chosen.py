"""The experts of few tokens, in decoding: each chosen expert is called, and no row is sorted."""

import torch
from torch import Tensor

from core.model import few_tokens
from core.model.activation import swiglu
from core.numerics.chosen import FEW_ON_CPU, chosen_products

FEW_COPIES = 16
"""Assignments up to which copying the matrices of their experts takes a GPU less time than sorting, without kernels."""


def are_few(x_TD: Tensor, top_k: int) -> bool:
    """Whether so few tokens are better given to their experts directly."""
    assignments = len(x_TD) * top_k
    if x_TD.device.type == "cpu":
        return assignments <= FEW_ON_CPU
    kernels = few_tokens.kernels(x_TD, assignments, 1)
    return assignments <= FEW_COPIES or kernels is not None


def gated_experts(
    x_TD: Tensor,
    gate_up_EXD: Tensor,
    down_EDI: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    limit: float | None = None,
) -> Tensor:
    """The sum of gate * expert(x) over each token's K experts.

    Args:
        x_TD: the tokens.
        gate_up_EXD: the first matrix of every expert, X = 2 I.
        down_EDI: the second matrix of every expert.
        expert_TK: int64, the experts.
        gate_TK: their gates.
        limit: that of their SwiGLU; None: none.
    """
    tokens, choices = expert_TK.shape
    x_TD = x_TD.to(gate_up_EXD.dtype)
    kernels = few_tokens.kernels(x_TD, tokens * choices, 1)
    if kernels is not None and gate_up_EXD.is_contiguous() and down_EDI.is_contiguous():
        y_TD: Tensor = kernels.gated_experts(
            x_TD.contiguous(),
            gate_up_EXD,
            down_EDI,
            expert_TK.contiguous(),
            gate_TK.contiguous(),
            limit,
        )
        return y_TD
    x_AD = x_TD[:, None].expand(-1, choices, -1).reshape(tokens * choices, -1)
    expert_A = expert_TK.flatten()
    hidden_AI = swiglu(chosen_products(x_AD, gate_up_EXD, expert_A), limit)
    y_AD = chosen_products(hidden_AI, down_EDI, expert_A)
    y_TKD = y_AD.view(tokens, choices, -1)
    return torch.bmm(gate_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]
