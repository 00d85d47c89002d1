"""Multi-head Latent Attention, shared by the plugins that have latents (DeepSeek-V2, eq. 37-47; report, eq. 1-11).

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

from core.contracts.attention import Attention, AttentionTrace, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.record import Record
from core.contracts.schema import setting
from core.model.absorbed import absorption_pays, attend_to_latents
from core.model.attend import (
    TensorCache,
    attend,
    attention_mask,
    max_logits,
    visible_positions,
)
from core.model.norm import RMSNorm
from core.model.rope import rotate, softmax_scale, turn
from core.numerics.linear import ProductLayer


@dataclass(kw_only=True)
class LatentWidths:
    """The keys of every attention with latents: derive its `Config` from this class."""

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


@dataclass(frozen=True)
class Projected:
    """The projections of an input.

    Args:
        q_latent: the normed latent of the queries; None where queries come straight from the input.
        q_BLHN: queries without position.
        q_BLHR: the part of the queries that is to be rotated.
        latent_BLC: the normed key-value latent.
        k_BLR: the shared key that is to be rotated.
    """

    q_latent: Tensor | None
    q_BLHN: Tensor
    q_BLHR: Tensor
    latent_BLC: Tensor
    k_BLR: Tensor


class LatentAttentionBase(Attention):
    """Multi-head Latent Attention, with norms on the two latents only, not on the rotated key or single heads.

    A subclass may let each query attend to some of the tokens before it: `also_cached` is what it keeps of each token
    beside latent and key, and `chosen` is the mask in decoding.
    """

    def __init__(self, config: LatentWidths, build: BuildContext) -> None:
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
    ) -> Tensor | tuple[Tensor, Record]:
        """The outputs u_t of eq. 11, B x L x D."""
        if cache is not None:
            return self.decode(x_BLD, context, cache)
        q_BLHX, k_BSHX, v_BSHV = self.expanded(self.project(x_BLD), context)
        o_BLHV = attend(q_BLHX, k_BSHX, v_BSHV, self.scale, context)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        return result

    def inspect(self, x_BLD: Tensor, context: SequenceContext) -> AttentionTrace:
        """The latents `key_value` and, where there is one, `query`, as they are expanded; and the largest logits."""
        projected = self.project(x_BLD)
        q_BLHX, k_BSHX, _ = self.expanded(projected, context)
        latents = {"key_value": projected.latent_BLC}
        if projected.q_latent is not None:
            latents["query"] = projected.q_latent
        attended_BLS = self.attended(x_BLD, projected, context)
        return AttentionTrace(latents, max_logits(q_BLHX, k_BSHX, self.scale, attended_BLS))

    def attended(self, x_BLD: Tensor, projected: Projected, context: SequenceContext) -> Tensor:
        """The positions that each query of whole sequences attends to, bool B x L x S, where B may be 1."""
        length = x_BLD.shape[1]
        return visible_positions(None, length, length, context)

    def project(self, x_BLD: Tensor) -> Projected:
        """The projections of an input, before any rotation."""
        config = self.config
        q_latent: Tensor | None = None
        if config.q_rank is None:
            q_BLD = self.q(x_BLD)
        else:
            q_latent = self.q_norm(self.q_down(x_BLD))
            q_BLD = self.q_up(q_latent)
        q_BLHX = q_BLD.unflatten(-1, (config.heads, -1))
        q_BLHN, q_BLHR = q_BLHX.split([config.nope_dim, config.rope_dim], dim=-1)
        latent_BLC, k_BLR = self.kv_down(x_BLD).split([config.kv_rank, config.rope_dim], dim=-1)
        return Projected(q_latent, q_BLHN, q_BLHR, self.kv_norm(latent_BLC), k_BLR)

    def expanded(
        self, projected: Projected, context: SequenceContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys of every head, and values: B x L x H x (N + R), the same, B x L x H x V."""
        k_BSR = rotate(projected.k_BLR[:, :, None], self.rope, context.positions_BL)[:, :, 0]
        q_BLHR = rotate(projected.q_BLHR, self.rope, context.positions_BL)
        q_BLHX = torch.cat([projected.q_BLHN, q_BLHR], dim=-1)
        k_BSHX, v_BSHV = self._keys_and_values(projected.latent_BLC, k_BSR)
        return q_BLHX, k_BSHX, v_BSHV

    def _keys_and_values(self, latent_BSC: Tensor, k_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that latents and the shared rotated keys are expanded to."""
        config = self.config
        kv_BSHX = self.kv_up(latent_BSC).unflatten(-1, (config.heads, -1))
        k_BSHN, v_BSHV = kv_BSHX.split([config.nope_dim, config.value_dim], dim=-1)
        k_BSHR = k_BSR[:, :, None].expand(-1, -1, config.heads, -1)
        return torch.cat([k_BSHN, k_BSHR], dim=-1), v_BSHV

    def decode(self, x_BLD: Tensor, context: SequenceContext, cache: Cache) -> Tensor:
        """The outputs of new tokens, whose latents and rotated keys the cache keeps side by side."""
        config = self.config
        new = x_BLD.shape[1]
        projected = self.project(x_BLD)
        q_BLHN = projected.q_BLHN
        both_BLHR = torch.cat([projected.q_BLHR, projected.k_BLR[:, :, None]], dim=2)
        rotated_BLHR = turn(both_BLHR, context, self.rope)
        q_BLHR = rotated_BLHR[:, :, :-1]
        new_BLX = torch.cat([projected.latent_BLC, rotated_BLHR[:, :, -1]], dim=-1)
        cached_BSX, *others = cache.append(new_BLX, *self.also_cached(x_BLD, context))
        slots_BL = cache.slots(new)
        seen = cached_BSX.shape[1]
        chosen_BLS = self.chosen(x_BLD, projected, others, slots_BL, context)
        up_HWC = self._absorbable(new, seen, context)
        if up_HWC is not None:
            mask_BAS = self._mask(slots_BL, new, seen, context, chosen_BLS)
            o_BLHV = attend_to_latents(q_BLHN, q_BLHR, cached_BSX, up_HWC, self.scale, mask_BAS)
        else:
            latent_BSC, k_BSR = cached_BSX.split([config.kv_rank, config.rope_dim], dim=-1)
            q_BLHX = torch.cat([q_BLHN, q_BLHR], dim=-1)
            k_BSHX, v_BSHV = self._keys_and_values(latent_BSC, k_BSR)
            o_BLHV = attend(q_BLHX, k_BSHX, v_BSHV, self.scale, context, slots_BL, chosen_BLS)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        return result

    def also_cached(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, ...]:
        """What a subclass keeps of each new token beside its latent and key, each B x L x ...; by default nothing."""
        return ()

    def chosen(
        self,
        x_BLD: Tensor,
        projected: Projected,
        cached: list[Tensor],
        slots_BL: Tensor | None,
        context: SequenceContext,
    ) -> Tensor | None:
        """The cached tokens that new tokens attend to, bool B x L x S; None: all before them and themselves.

        Args:
            x_BLD: the layer's input.
            projected: its projections.
            cached: what the cache returned for `also_cached`.
            slots_BL: see `Cache.slots`.
            context: the new tokens.
        """
        return None

    def _absorbable(self, new: int, seen: int, context: SequenceContext) -> Tensor | None:
        """The up-projection by head, H x (N + V) x C; None where the latents are to be expanded.

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
        self,
        slots_BL: Tensor | None,
        new: int,
        seen: int,
        context: SequenceContext,
        chosen_BLS: Tensor | None,
    ) -> Tensor | None:
        """The mask B x A x S of A = L x H queries; None: every query sees all. Without a choice it is made once."""
        if chosen_BLS is not None:
            return chosen_BLS.repeat_interleave(self.config.heads, dim=1)

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
