"""The lightning indexer (arXiv 2512.02556, eq. 1): which earlier positions a query attends to.

A few small heads score every earlier token by one key, I_ts = sum over heads of w_th relu(q_th . k_s). Queries come
from the query latent of the main attention, the key and the weights of the heads from the layer's input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.model.rope import pairs_of_halves, rotate, turn
from core.numerics.promotion import at_least_fp32

KEY_EPS = 1e-6
"""Epsilon of the key's LayerNorm in the released code, whatever the model's is."""


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias, computed in fp32 or wider and returned in the format of x.

    Args:
        dim: width of the last axis.
        build: the model around the norm: the format in which weights are kept.
    """

    def __init__(self, dim: int, build: BuildContext) -> None:
        super().__init__()
        self.role = "norm"
        self.dim = dim
        dtype = build.precision.param_dtype("norm")
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones and the bias to zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = at_least_fp32(x)
        weight = self.weight.to(wide.dtype)
        bias = self.bias.to(wide.dtype)
        return F.layer_norm(wide, (self.dim,), weight, bias, KEY_EPS).to(x.dtype)


class Indexer(nn.Module):
    """Queries, weights and keys of the index scores.

    Args:
        build: the model around the layer.
        heads: its heads.
        head_dim: width of their queries and of the key.
        q_rank: width of the query latent.
        rope_dim: how many of the first elements of a query or key are rotated, as many as in the main attention.
    """

    def __init__(
        self, build: BuildContext, *, heads: int, head_dim: int, q_rank: int, rope_dim: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.rope = build.rope
        self.rope_dim = rope_dim
        self.scale: float = heads**-0.5 * head_dim**-0.5
        self.q = build.linear(q_rank, heads * head_dim, "indexer.q")
        self.k = build.linear(build.dim, head_dim, "indexer.k")
        self.k_norm = LayerNorm(head_dim, build)
        self.weights = build.linear(build.dim, heads, "indexer.weights")

    def queries(self, q_latent: Tensor, context: SequenceContext, *, decoding: bool) -> Tensor:
        """The rotated queries of every head, B x L x H x X, from the query latent B x L x Q."""
        q_BLHX = self.q(q_latent).unflatten(-1, (self.heads, -1))
        return self._rotated(q_BLHX, context, decoding)

    def keys(self, x_BLD: Tensor, context: SequenceContext, *, decoding: bool) -> Tensor:
        """The normed and rotated key of each token, B x L x X."""
        k_BLX = self.k_norm(self.k(x_BLD))
        return self._rotated(k_BLX[:, :, None], context, decoding)[:, :, 0]

    def head_weights(self, x_BLD: Tensor) -> Tensor:
        """The weights of the heads, B x L x H, in fp32 or wider.

        The factors 1/sqrt(heads) and 1/sqrt(head_dim) of weights and products are both in them, because the ReLU lets a
        positive factor pass.
        """
        weights_BLH: Tensor = self.weights(x_BLD)
        return at_least_fp32(weights_BLH) * self.scale

    def _rotated(self, x_BLHX: Tensor, context: SequenceContext, decoding: bool) -> Tensor:
        """Rotates the first `rope_dim` elements, whose pairs are in halves; they are then in pairs side by side."""
        first = pairs_of_halves(x_BLHX[..., : self.rope_dim])
        if decoding:
            first = turn(first, context, self.rope)
        else:
            first = rotate(first, self.rope, context.positions_BL)
        return torch.cat([first, x_BLHX[..., self.rope_dim :]], dim=-1)
