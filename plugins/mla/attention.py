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
from core.contracts.errors import Wrong
from core.contracts.schema import setting
from core.model.attend import TensorCache, attend
from core.model.norm import RMSNorm
from core.model.rope import rotate, softmax_scale


class LatentAttention(Attention):
    """MLA; the norms are on the two latents only, never on the rotated key or per head."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.1"
    example = {"name": "mla", "heads": 4, "q_rank": 24, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}

    @dataclass(kw_only=True)
    class Config:
        """Widths of Multi-head Latent Attention."""

        heads: int = setting(doc="attention heads")
        kv_rank: int = setting(doc="width of the key-value latent (d_c)")
        nope_dim: int = setting(doc="width per head of the part without position (d_h)")
        rope_dim: int = setting(doc="width per head of the rotated part (d_h^R)")
        value_dim: int = setting(doc="width per head of the values")
        q_rank: int | None = setting(None, doc="width of the query latent (d'_c); null: queries come straight from x")
        norm_eps: float | None = setting(None, doc="epsilon of the latents' norms; null: the model's norm_eps")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` for widths that make no attention."""
            for key in ("heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank"):
                value = getattr(self, key)
                if value is not None and value < 1:
                    raise Wrong(key, "must be at least 1")
            if self.norm_eps is not None and not 0 < self.norm_eps < float("inf"):
                raise Wrong("norm_eps", "must be positive and finite")
            if self.rope_dim % 2:
                raise Wrong("rope_dim", "must be even, because positions rotate pairs")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config, self.rope, self.length = config, build.rope, build.length
        heads, key_dim = config.heads, config.nope_dim + config.rope_dim
        norms = build if config.norm_eps is None else replace(build, norm_eps=config.norm_eps)
        if config.q_rank is None:
            self.q = build.linear(build.dim, heads * key_dim, "attention.q")
        else:
            self.q_down = build.linear(build.dim, config.q_rank, "attention.q_down")
            self.q_norm = RMSNorm(config.q_rank, norms)
            self.q_up = build.linear(config.q_rank, heads * key_dim, "attention.q_up")
        self.kv_down = build.linear(build.dim, config.kv_rank + config.rope_dim, "attention.kv_down")
        self.kv_norm = RMSNorm(config.kv_rank, norms)
        self.kv_up = build.linear(config.kv_rank, heads * (config.nope_dim + config.value_dim), "attention.kv_up")
        self.output = build.linear(heads * config.value_dim, build.dim, "attention.output", residual=True)
        self.scale = softmax_scale(key_dim, build.rope)

    def forward(self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None) -> Tensor:
        """u_t of eq. 11."""
        config = self.config
        q_BLD = self.q(x_BLD) if config.q_rank is None else self.q_up(self.q_norm(self.q_down(x_BLD)))
        q_BLHN, q_BLHR = q_BLD.unflatten(-1, (config.heads, -1)).split([config.nope_dim, config.rope_dim], dim=-1)
        latent_BLC, k_BLR = self.kv_down(x_BLD).split([config.kv_rank, config.rope_dim], dim=-1)
        latent_BSC = self.kv_norm(latent_BLC)
        k_BSR = rotate(k_BLR[:, :, None], self.rope, context.positions_BL)[:, :, 0]
        slots_BL = None
        if cache is not None:
            latent_BSC, k_BSR = cache.append(latent_BSC, k_BSR)
            slots_BL = cache.slots(x_BLD.shape[1])
        kv_BSHX = self.kv_up(latent_BSC).unflatten(-1, (config.heads, -1))
        k_BSHN, v_BSHV = kv_BSHX.split([config.nope_dim, config.value_dim], dim=-1)
        q = torch.cat([q_BLHN, rotate(q_BLHR, self.rope, context.positions_BL)], dim=-1)
        k = torch.cat([k_BSHN, k_BSR[:, :, None].expand(-1, -1, config.heads, -1)], dim=-1)
        o_BLHV = attend(q, k, v_BSHV, self.scale, context, slots_BL)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        return result

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        """Keeps (kv_rank + rope_dim) elements per token."""
        return TensorCache(rows, capacity, device)

    def costs(self) -> Costs:
        """All weights are active; mixing is heads x (key width + value width) per position attended to."""
        config = self.config
        widths = config.nope_dim + config.rope_dim + config.value_dim
        return Costs(
            active=sum(p.numel() for p in self.parameters()),
            mixing=2 * config.heads * widths * self.length / 2,
            cache=config.kv_rank + config.rope_dim,
        )
