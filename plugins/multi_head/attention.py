"""Multi-head, grouped-query and multi-query attention: one idea with three numbers of key-value heads.

Attention Is All You Need (arXiv 1706.03762), GQA (arXiv 2305.13245), MQA (arXiv 1911.02150), with rotary
positions on the whole head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.attention import Attention, AttentionTrace, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.schema import setting
from core.model.attend import TensorCache, attend, max_logits, visible_positions
from core.model.rope import rotate, softmax_scale, turn


class _HeadAttention(Attention):
    """Attention with `heads` query heads and `kv_heads` key-value heads of one width."""

    def __init__(
        self, config: Any, build: BuildContext, *, heads: int, kv_heads: int, head_dim: int | None
    ) -> None:
        super().__init__(config, build)
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim or build.dim // heads
        self.rope = build.rope
        self.length = build.length
        self.q = build.linear(build.dim, heads * self.head_dim, "attention.q")
        self.k = build.linear(build.dim, kv_heads * self.head_dim, "attention.k")
        self.v = build.linear(build.dim, kv_heads * self.head_dim, "attention.v")
        width = heads * self.head_dim
        self.output = build.linear(width, build.dim, "attention.output", residual=True)
        self.scale = softmax_scale(self.head_dim, build.rope)

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v, with rotated q and k."""
        heads = (-1, self.head_dim)
        q_BLHR = self.q(x_BLD).unflatten(-1, heads)
        k_BLHR = self.k(x_BLD).unflatten(-1, heads)
        v_BSHV = self.v(x_BLD).unflatten(-1, heads)
        slots_BL = None
        if cache is None:
            q_BLHR = rotate(q_BLHR, self.rope, context.positions_BL)
            k_BSHR = rotate(k_BLHR, self.rope, context.positions_BL)
        else:
            rotated_BLHR = turn(torch.cat([q_BLHR, k_BLHR], dim=2), context, self.rope)
            q_BLHR, k_BSHR = rotated_BLHR.split([self.heads, self.kv_heads], dim=2)
            k_BSHR, v_BSHV = cache.append(k_BSHR, v_BSHV)
            slots_BL = cache.slots(x_BLD.shape[1])
        o_BLHV = attend(q_BLHR, k_BSHR, v_BSHV, self.scale, context, slots_BL)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        return result

    def inspect(self, x_BLD: Tensor, context: SequenceContext) -> AttentionTrace:
        """The largest logit of each query head; there are no latents."""
        heads = (-1, self.head_dim)
        q_BLHR = rotate(self.q(x_BLD).unflatten(-1, heads), self.rope, context.positions_BL)
        k_BSHR = rotate(self.k(x_BLD).unflatten(-1, heads), self.rope, context.positions_BL)
        length = x_BLD.shape[1]
        visible_BLS = visible_positions(None, length, length, context)
        maxima = max_logits(q_BLHR, k_BSHR, self.scale, visible_BLS)
        return AttentionTrace(max_logit_BLH=maxima)

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        """A cache of the keys and values of every key-value head."""
        return TensorCache(rows, capacity, device)

    def costs(self) -> Costs:
        """The costs of one token: all weights are active."""
        return Costs(
            active=sum(p.numel() for p in self.parameters()),
            attention_flops=2 * self.heads * 2 * self.head_dim * self.length / 2,
            cache=2 * self.kv_heads * self.head_dim,
        )


def _check(heads: int, head_dim: int | None, parent: Any) -> None:
    """Raises `ConfigError` if the heads leave no even width for each."""
    if heads < 1:
        raise ConfigError("heads", "must be at least 1")
    dim = getattr(parent, "dim", None)
    if head_dim is None and dim is not None and dim % heads:
        raise ConfigError("heads", f"must divide model.dim = {dim} if head_dim is not given")
    width = head_dim if head_dim is not None else (dim or 0) // heads
    if width % 2:
        key = "heads" if head_dim is None else "head_dim"
        raise ConfigError(key, "must leave an even head width: positions rotate pairs")


class MultiHeadAttention(_HeadAttention):
    """Attention in which every query head has its own keys and values."""

    paper = "Attention Is All You Need (arXiv 1706.03762), section 3.2"
    example = {"name": "mha", "heads": 4}

    @dataclass(kw_only=True)
    class Config:
        """Heads of multi-head attention."""

        heads: int = setting(doc="attention heads")
        head_dim: int | None = setting(None, doc="width per head; null: model.dim / heads")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the heads do not divide the width."""
            _check(self.heads, self.head_dim, parent)

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(
            config, build, heads=config.heads, kv_heads=config.heads, head_dim=config.head_dim
        )


class GroupedQueryAttention(_HeadAttention):
    """Attention in which groups of query heads share keys and values."""

    paper = "GQA (arXiv 2305.13245), section 2.2"
    example = {"name": "gqa", "heads": 4, "kv_heads": 2}

    @dataclass(kw_only=True)
    class Config:
        """Heads of grouped-query attention."""

        heads: int = setting(doc="query heads")
        kv_heads: int = setting(doc="key-value heads; must divide heads")
        head_dim: int | None = setting(None, doc="width per head; null: model.dim / heads")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if heads, groups and width do not divide."""
            _check(self.heads, self.head_dim, parent)
            if self.kv_heads < 1 or self.heads % self.kv_heads:
                raise ConfigError("kv_heads", f"must divide heads = {self.heads}")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(
            config, build, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim
        )


class MultiQueryAttention(_HeadAttention):
    """Attention in which all query heads share one head of keys and values."""

    paper = "Fast Transformer Decoding (arXiv 1911.02150), section 3"
    example = {"name": "mqa", "heads": 4}

    @dataclass(kw_only=True)
    class Config:
        """Heads of multi-query attention."""

        heads: int = setting(doc="query heads")
        head_dim: int | None = setting(None, doc="width per head; null: model.dim / heads")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the heads do not divide the width."""
            _check(self.heads, self.head_dim, parent)

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build, heads=config.heads, kv_heads=1, head_dim=config.head_dim)
