"""Affinities of tokens to experts, and the gates of the chosen ones.

Where an affinity is used as a share of a token's total (`core.routing.share_loss`), it is divided by the sum over all
experts: only a softmax is a probability by itself. `sqrt_softplus` (DeepSeek-V4, arXiv 2606.19348, section 2.1) has no
upper limit: it grows like the square root of the logit, and falls like exp(logit / 2).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from core.contracts.errors import ConfigError

Affinity = Literal["sigmoid", "softmax", "sqrt_softplus"]

_TAIL = -40.0
"""The logit below which sqrt(log(1 + exp(x))) is exp(x / 2) to the last bit, in fp64 too."""

_LINEAR = 40.0
"""The logit above which log(1 + exp(x)) is x to the last bit, in fp64 too."""


def affinities(logits_TE: Tensor, kind: Affinity) -> Tensor:
    """The affinities T x E of logits T x E, in the format of the logits."""
    if kind == "sigmoid":
        return logits_TE.sigmoid()
    if kind == "softmax":
        return logits_TE.softmax(dim=1)
    return sqrt_softplus(logits_TE)


def sqrt_softplus(x: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x))), with a finite and correct gradient wherever exp(x / 2) is a number of the format.

    Far below zero the softplus is too small for the format before its root is, and the root of 0 has no gradient: the
    root is formed first there.
    """
    tail = (x.clamp(max=_TAIL) / 2).exp()
    rest = F.softplus(x.clamp(min=_TAIL), threshold=_LINEAR).sqrt()
    return torch.where(x < _TAIL, tail, rest)


def chosen_gates(
    scores_TE: Tensor, expert_TK: Tensor, *, normalise: bool = True, scale: float = 1.0
) -> Tensor:
    """The gates T x K: affinities of the chosen experts, divided by their sum if `normalise`, times `scale`.

    1e-20 is added to the sum, as the released code of DeepSeek-V3 does.
    """
    gate_TK = scores_TE.gather(1, expert_TK)
    if normalise:
        gate_TK = gate_TK / (gate_TK.sum(dim=1, keepdim=True) + 1e-20)
    return gate_TK * scale


def check_scale(scale: float) -> None:
    """Raises `ConfigError` unless the factor on the gates is positive and finite."""
    if not 0 < scale < float("inf"):
        raise ConfigError("scale", "must be more than 0 and finite")


def check_gates_learn(top_k: int, *, normalise: bool) -> None:
    """Raises `ConfigError` for one normalised gate, which is a constant."""
    if top_k == 1 and normalise:
        why = "one gate, normalised, is a constant and has no gradient (normalise: false keeps it as it is)"
        raise ConfigError("top_k", f"must be at least 2: {why}")
