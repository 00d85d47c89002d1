"""Manifold-constrained hyper-connections, the residual of DeepSeek-V4 (arXiv 2606.19348; mHC, arXiv 2512.24880).

Between blocks flow N states of width D for each position. A layer F with its norm reads a mixture of them, its output
is added to each of them in another measure, and they are mixed with each other (mHC, equations 3 and 8):

    x'_k = sum_j comb_jk x_j  +  post_k F(sum_j pre_j x_j)

    pre  = sigmoid(s_0 W_pre v + b_pre) + eps          v = RMSNorm of all N D numbers of the position, without a weight
    post = 2 sigmoid(s_1 W_post v + b_post)
    comb = doubly stochastic, of s_2 W_comb v + b_comb

The maps depend on the position's own states alone. They are computed in fp32 or wider whatever the precision is, and so
are the sums that they take part in. After the last block pre-like weights of the model's own collapse the N states.

Letters in names: B batch, L length, N streams, D width; X = N D.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.errors import ConfigError
from core.contracts.residual import Place, Residual
from core.contracts.schema import setting
from core.numerics.draw import draw_normal
from core.numerics.part_exchange import local_part, local_tensor
from core.numerics.promotion import at_least_fp32
from plugins.hyper_connections.sinkhorn import doubly_stochastic

MOST_STREAMS = 64
"""Most streams; DeepSeek-V4 has four, and the maps of a layer grow with their cube."""

MOST_ROUNDS = 1000
"""Most rounds of Sinkhorn's normalisation; DeepSeek-V4 has 20."""

MOST_EPS = 1e-3
"""Largest epsilon; it is subtracted from the initial `pre` of 1 / streams, which must stay positive."""

MOST_SCALE = 1e3
"""Largest initial scale; the maps saturate far below, as the projections are about init.std sqrt(N D)."""

OWN_STREAM = 8.0
"""Initial logit of a stream's share of itself above the others': e^-8 = 0.0003 of it goes to each of them."""


class HyperConnections(Residual):
    """Several residual streams, with maps between them and the layers that are computed at every position."""

    paper = "DeepSeek-V4 (arXiv 2606.19348); mHC: Manifold-Constrained Hyper-Connections (arXiv 2512.24880)"
    example = {"name": "hyper_connections", "streams": 4}
    weight_roles = {"residual": "the maps of residual streams, always in fp32 or wider"}

    @dataclass(kw_only=True)
    class Config:
        """Settings of hyper-connections; the defaults are DeepSeek-V4's, except for the initial maps."""

        streams: int = setting(4, doc="states of width D between blocks (DeepSeek-V4: 4)")
        rounds: int = setting(20, doc="rounds of Sinkhorn's normalisation (DeepSeek-V4: 20)")
        eps: float = setting(
            1e-6, doc="added to pre and inside Sinkhorn's sums (DeepSeek-V4: 1e-6)"
        )
        start: Literal["add", "zeros"] = setting(
            "add",
            doc="initial biases; add: maps with which the model computes what residual add does; "
            "zeros: those of transformers' DeepSeek-V4",
        )
        scale: float = setting(
            0.0,
            doc="initial factor of the part of the maps that depends on the states (mHC: 0.01; transformers: 1)",
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for values out of range."""
            if not 1 <= self.streams <= MOST_STREAMS:
                raise ConfigError("streams", f"must be from 1 to {MOST_STREAMS}")
            if not 1 <= self.rounds <= MOST_ROUNDS:
                raise ConfigError("rounds", f"must be from 1 to {MOST_ROUNDS}")
            if not 0 < self.eps <= MOST_EPS:
                raise ConfigError("eps", f"must be more than 0 and at most {MOST_EPS:g}")
            if not 0 <= self.scale <= MOST_SCALE:
                raise ConfigError("scale", f"must be from 0 to {MOST_SCALE:g}")

    def __init__(self, config: Config, build: BuildContext, *, place: Place) -> None:
        super().__init__(config, build, place=place)
        self.config = config
        self.role = "residual"
        self.dim = build.dim
        self.norm_eps = build.norm_eps
        self.std = build.init.std
        n = config.streams
        self.is_layer = place != "model"
        self.sizes = [n, n, n * n] if self.is_layer else [n]
        dtype = build.precision.param_dtype("norm")  # never low, as the weights of norms
        rows = sum(self.sizes)
        self.projection = nn.Parameter(torch.empty(rows, n * build.dim, dtype=dtype))
        self.base = nn.Parameter(torch.empty(rows, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(len(self.sizes), dtype=dtype))
        self.reset_parameters()

    @property
    def streams(self) -> int:
        """The number of streams."""
        return self.config.streams

    def reset_parameters(self) -> None:
        """Draws the projection from N(0, std), and sets base and scale.

        With equal streams, as they are at first, the initial base of `start: add` gives what residual `add` does: pre
        sums to 1, post is 1, and any doubly stochastic comb changes nothing. The projection must not start from zero as
        well, because no gradient would then tell one stream from another.
        """
        draw_normal(self.projection, self.std)
        if self.base.is_meta:
            return
        base = self._initial_base()
        if isinstance(self.base, DTensor):
            base = local_part(base, self.base)
        with torch.no_grad():
            local_tensor(self.base).copy_(base)
            self.scale.fill_(self.config.scale)

    def _initial_base(self) -> Tensor:
        """The initial biases, in fp64."""
        n = self.config.streams
        base = torch.zeros(sum(self.sizes), dtype=torch.float64, device="cpu")
        if self.config.start == "zeros":
            return base
        if n > 1:  # a sigmoid is never 1; the norm after it takes the 1/2 of a single stream away
            share = 1 / n - self.config.eps
            base[:n] = math.log(share / (1 - share))
        if self.is_layer:
            own = torch.eye(n, dtype=torch.float64, device="cpu") * OWN_STREAM
            base[2 * n :] = own.flatten()
        return base

    def expand(self, embedded_BLD: Tensor) -> Tensor:
        """The streams B x L x N x D, all of them the embedding."""
        return embedded_BLD[:, :, None].repeat(1, 1, self.config.streams, 1)

    def read(self, stream: Tensor) -> Tensor:
        """The mixture that a layer reads."""
        return self._mixture(stream)

    def write(self, stream: Tensor, output_BLD: Tensor) -> Tensor:
        """The streams mixed with each other, and a layer's output added to each in its own measure."""
        n = self.config.streams
        with torch.autocast(stream.device.type, enabled=False):
            wide_BLND = at_least_fp32(stream)
            post_BLN, comb_BLX = self._logits(wide_BLND, first=1)
            post_BLN = 2 * post_BLN.sigmoid()
            comb_BLNN = doubly_stochastic(
                comb_BLX.unflatten(-1, (n, n)), self.config.rounds, self.config.eps
            )
            mixed_BLND = comb_BLNN.transpose(-1, -2) @ wide_BLND
            added_BLND = post_BLN[..., None] * at_least_fp32(output_BLD)[:, :, None]
            return (mixed_BLND + added_BLND).to(stream.dtype)

    def collapse(self, stream: Tensor) -> Tensor:
        """The mixture that the final norm reads, with weights of the model's own."""
        return self._mixture(stream)

    def _mixture(self, stream: Tensor) -> Tensor:
        """The sum of the streams, each times its `pre`: B x L x D."""
        with torch.autocast(stream.device.type, enabled=False):
            wide_BLND = at_least_fp32(stream)
            (pre_BLN,) = self._logits(wide_BLND, last=1)
            pre_BLN = pre_BLN.sigmoid() + self.config.eps
            return (pre_BLN[:, :, None] @ wide_BLND)[:, :, 0].to(stream.dtype)

    def _logits(
        self, wide_BLND: Tensor, *, first: int = 0, last: int | None = None
    ) -> list[Tensor]:
        """The logits of some of the maps, which are numbered in the order pre, post, comb.

        The norm divides after the product, which is the same and takes a pass less over the streams.
        """
        sizes = self.sizes[first:last]
        start = sum(self.sizes[:first])
        rows = slice(start, start + sum(sizes))
        wide_BLX = wide_BLND.flatten(2)
        norm_BL1 = torch.linalg.vector_norm(wide_BLX, dim=-1, keepdim=True)
        scale_BL1 = (norm_BL1.square() / wide_BLX.shape[-1] + self.norm_eps).rsqrt()
        projected = F.linear(wide_BLX, self.projection[rows].to(wide_BLX.dtype)) * scale_BL1
        parts = projected.split(sizes, dim=-1)
        biases = self.base[rows].to(wide_BLX.dtype).split(sizes)
        scales = self.scale[first:last].to(wide_BLX.dtype)
        logits: list[Tensor] = []
        for part, scale, bias in zip(parts, scales.unbind(), biases, strict=True):
            logits.append(part * scale + bias)
        return logits

    def activation_bytes(self, stream: int, wide: int) -> int:
        """The bytes of the streams, of a layer's output and of the maps' logits, all in fp32 or wider.

        `read` and `write` each make a copy of narrower streams; others are their own copy.
        """
        n = self.config.streams
        states = n if stream == wide else 2 * n
        return (states * self.dim + self.dim + 2 * sum(self.sizes)) * wide

    def costs(self) -> Costs:
        """The costs of one token: the maps' weights, and the sums that the maps take part in."""
        n = self.config.streams
        weights = self.projection.numel() + self.base.numel() + self.scale.numel()
        products = n  # read or collapse: one for each stream
        if self.is_layer:
            products += n * n + n  # comb, post
        return Costs(active=weights, other_flops=2.0 * products * self.dim)
