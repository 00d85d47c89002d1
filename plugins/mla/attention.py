"""Multi-head Latent Attention (DeepSeek-V2, eq. 37-47; DeepSeek-V3 report, eq. 1-11).

Queries and keys-values go through low-rank latents, each with an RMSNorm. Position enters only through a
rotated part: one per query head, and one key part shared by all heads. The cache keeps the normed
key-value latent and the rotated shared key: kv_rank + rope_dim elements per token.

Weight layout is the released checkpoint's: `q_up` rows are [nope | rope] per head, `kv_up` rows are
[key nope | value] per head, `kv_down` rows are [latent | rope key].
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.contracts.attention import Attention, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.schema import setting
from core.model.attend import TensorCache, attend, attention_mask
from core.model.norm import RMSNorm
from core.model.rope import rotate, softmax_scale, turn
from core.numerics.linear import ProductLayer
from plugins.mla.absorbed import absorption_pays, attend_to_latents


class LatentAttention(Attention):
    """Multi-head Latent Attention, with norms on the two latents only, not on the rotated key or single heads."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.1"
    example = {
        "name": "mla",
        "heads": 4,
        "q_rank": 24,
        "kv_rank": 16,
        "nope_dim": 16,
        "rope_dim": 8,
        "value_dim": 16,
    }

    @dataclass(kw_only=True)
    class Config:
        """Widths of Multi-head Latent Attention."""

        heads: int = setting(doc="attention heads")
        kv_rank: int = setting(doc="width of the key-value latent (d_c)")
        nope_dim: int = setting(doc="width per head of the part without position (d_h)")
        rope_dim: int = setting(doc="width per head of the rotated part (d_h^R)")
        value_dim: int = setting(doc="width per head of the values")
        q_rank: int | None = setting(
            None, doc="width of the query latent (d'_c); null: queries come straight from x"
        )
        norm_eps: float | None = setting(
            None, doc="epsilon of the latents' norms; null: the model's norm_eps"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for widths below 1, an odd `rope_dim` or an epsilon out of range."""
            for key in ("heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank"):
                value = getattr(self, key)
                if value is not None and value < 1:
                    raise ConfigError(key, "must be at least 1")
            if self.norm_eps is not None and not 0 < self.norm_eps < float("inf"):
                raise ConfigError("norm_eps", "must be more than 0 and finite")
            if self.rope_dim % 2:
                raise ConfigError("rope_dim", "must be even, because positions rotate pairs")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config
        self.rope = build.rope
        self.length = build.length
        heads = config.heads
        key_dim = config.nope_dim + config.rope_dim
        norms = build
        if config.norm_eps is not None:
            norms = replace(build, norm_eps=config.norm_eps)
        if config.q_rank is None:
            self.q = build.linear(build.dim, heads * key_dim, "attention.q")
        else:
            self.q_down = build.linear(build.dim, config.q_rank, "attention.q_down")
            self.q_norm = RMSNorm(config.q_rank, norms)
            self.q_up = build.linear(config.q_rank, heads * key_dim, "attention.q_up")
        down_width = config.kv_rank + config.rope_dim
        up_width = heads * (config.nope_dim + config.value_dim)
        output_width = heads * config.value_dim
        self.kv_down = build.linear(build.dim, down_width, "attention.kv_down")
        self.kv_norm = RMSNorm(config.kv_rank, norms)
        self.kv_up = build.linear(config.kv_rank, up_width, "attention.kv_up")
        self.output = build.linear(output_width, build.dim, "attention.output", residual=True)
        self.scale = softmax_scale(key_dim, build.rope)

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor:
        """The outputs u_t of eq. 11, B x L x D."""
        if cache is not None:
            return self._decode(x_BLD, context, cache)
        config = self.config
        q_BLHX = self._queries(x_BLD)
        q_BLHN, q_BLHR = q_BLHX.split([config.nope_dim, config.rope_dim], dim=-1)
        latent_BLC, k_BLR = self.kv_down(x_BLD).split([config.kv_rank, config.rope_dim], dim=-1)
        latent_BSC = self.kv_norm(latent_BLC)
        k_BSR = rotate(k_BLR[:, :, None], self.rope, context.positions_BL)[:, :, 0]
        q_BLHR = rotate(q_BLHR, self.rope, context.positions_BL)
        q_BLHX = torch.cat([q_BLHN, q_BLHR], dim=-1)
        o_BLHV = self._attend_expanded(q_BLHX, latent_BSC, k_BSR, context)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        return result

    def _queries(self, x_BLD: Tensor) -> Tensor:
        """The queries of all heads before rotation, B x L x H x (N + R)."""
        if self.config.q_rank is None:
            q_BLD = self.q(x_BLD)
        else:
            q_BLD = self.q_up(self.q_norm(self.q_down(x_BLD)))
        q_BLHX: Tensor = q_BLD.unflatten(-1, (self.config.heads, -1))
        return q_BLHX

    def _attend_expanded(
        self,
        q_BLHX: Tensor,
        latent_BSC: Tensor,
        k_BSR: Tensor,
        context: SequenceContext,
        slots_BL: Tensor | None = None,
    ) -> Tensor:
        """Attention over the keys and values that the latents are expanded to."""
        config = self.config
        kv_BSHX = self.kv_up(latent_BSC).unflatten(-1, (config.heads, -1))
        k_BSHN, v_BSHV = kv_BSHX.split([config.nope_dim, config.value_dim], dim=-1)
        k_BSHR = k_BSR[:, :, None].expand(-1, -1, config.heads, -1)
        k_BSHX = torch.cat([k_BSHN, k_BSHR], dim=-1)
        return attend(q_BLHX, k_BSHX, v_BSHV, self.scale, context, slots_BL)

    def _decode(self, x_BLD: Tensor, context: SequenceContext, cache: Cache) -> Tensor:
        """The outputs of new tokens, whose latents and rotated keys the cache keeps side by side."""
        config = self.config
        q_BLHX = self._queries(x_BLD)
        q_BLHN, q_BLHR = q_BLHX.split([config.nope_dim, config.rope_dim], dim=-1)
        latent_BLC, k_BLR = self.kv_down(x_BLD).split([config.kv_rank, config.rope_dim], dim=-1)
        rotated_BLHR = turn(torch.cat([q_BLHR, k_BLR[:, :, None]], dim=2), context, self.rope)
        q_BLHR = rotated_BLHR[:, :, :-1]
        new_BLX = torch.cat([self.kv_norm(latent_BLC), rotated_BLHR[:, :, -1]], dim=-1)
        (cached_BSX,) = cache.append(new_BLX)
        slots_BL = cache.slots(x_BLD.shape[1])
        up_HWC = self._absorbable(x_BLD.shape[1], cached_BSX.shape[1], context)
        if up_HWC is not None:
            mask_BAS = self._mask(slots_BL, x_BLD.shape[1], cached_BSX.shape[1], context)
            o_BLHV = attend_to_latents(q_BLHN, q_BLHR, cached_BSX, up_HWC, self.scale, mask_BAS)
        else:
            latent_BSC, k_BSR = cached_BSX.split([config.kv_rank, config.rope_dim], dim=-1)
            q_BLHX = torch.cat([q_BLHN, q_BLHR], dim=-1)
            o_BLHV = self._attend_expanded(q_BLHX, latent_BSC, k_BSR, context, slots_BL)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        return result

    def _absorbable(self, new: int, seen: int, context: SequenceContext) -> Tensor | None:
        """The up-projection by head, H x (N + V) x C; None where latents are to be expanded.

        That is where many tokens are new, where documents are kept apart, and where the precision's product with this
        matrix is not a plain one (FP8, emulated formats): an absorbed product would be rounded in other places.
        """
        config = self.config
        expanded = config.nope_dim + config.value_dim
        if context.documents_BM is not None or not absorption_pays(
            new, seen, config.kv_rank, expanded
        ):
            return None
        up: Tensor | None = self.kv_up.matrix() if isinstance(self.kv_up, ProductLayer) else None
        return None if up is None else up.unflatten(0, (config.heads, -1))

    def _mask(
        self, slots_BL: Tensor | None, new: int, seen: int, context: SequenceContext
    ) -> Tensor | None:
        """The mask B x A x S of A = L x H queries, once for all layers; None: every query sees all."""

        def compute() -> Tensor | None:
            mask = attention_mask(slots_BL, new, seen, context)
            if mask is None:
                return None
            mask_BLS = mask[:, 0] if mask.ndim == 4 else mask[None]
            return mask_BLS.repeat_interleave(self.config.heads, dim=1)

        return context.once(("absorbed mask", new, seen, self.config.heads), compute)

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        """A cache of kv_rank + rope_dim elements per token."""
        return TensorCache(rows, capacity, device)

    def costs(self) -> Costs:
        """The costs of one token: all weights are active, and scores and outputs take key and value widths per head."""
        config = self.config
        widths = config.nope_dim + config.rope_dim + config.value_dim
        return Costs(
            active=sum(p.numel() for p in self.parameters()),
            attention_flops=2 * config.heads * widths * self.length / 2,
            cache=config.kv_rank + config.rope_dim,
        )
