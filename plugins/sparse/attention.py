"""DeepSeek Sparse Attention: latent attention to the positions that a lightning indexer chooses (arXiv 2512.02556).

The indexer scores every earlier position, and each query attends to the `top_k` best. The choice has no gradient, so
the indexer learns from a loss of its own: its softmax follows the distribution of the main attention, summed over heads
and normalised. Its inputs and that target are detached: the indexer learns from this loss alone, and everything else
from the other losses alone.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.contracts.attention import Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.record import MeanMetric, Record
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.model.attend import attend, visible_positions
from core.model.latent_attention import LatentAttentionBase, LatentWidths, Projected
from core.numerics.highest import highest
from plugins.sparse.indexer import Indexer
from plugins.sparse.scores import divergence, index_scores, mean_attention

LOSS = "indexer"
"""The name of the indexer's loss."""


class SparseAttention(LatentAttentionBase):
    """Multi-head Latent Attention to the positions that an indexer scores highest."""

    paper = "DeepSeek-V3.2 (arXiv 2512.02556), section 2.1"
    roles = {
        "indexer.q": "from the latent of the queries to the indexer's queries",
        "indexer.k": "to the indexer's key",
        "indexer.weights": "to the weights of the indexer's heads",
    }
    example = {
        "name": "sparse",
        "heads": 4,
        "q_rank": 24,
        "kv_rank": 16,
        "nope_dim": 16,
        "rope_dim": 8,
        "value_dim": 16,
        "index_heads": 8,
        "index_dim": 16,
        "top_k": 4,
    }

    @dataclass(kw_only=True)
    class Config(LatentWidths):
        """Widths of latent attention and of the indexer, and how the indexer learns."""

        index_heads: int = setting(64, doc="heads of the indexer")
        index_dim: int = setting(128, doc="width of the indexer's queries and of its key")
        top_k: int = setting(2048, doc="positions that a query attends to, its own included")
        weight: Scheduled = setting(1.0, doc="coefficient of the indexer's loss")
        warmup_steps: int = setting(
            0, doc="first steps in which every query attends to all positions"
        )
        warmup_main: Literal["frozen", "trained"] = setting(
            "frozen", doc="what all weights but the indexers' do in these steps"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a missing query latent, and for numbers out of range."""
            super().check(parent)
            if self.q_rank is None:
                why = "must be a width: the indexer's queries come from the query latent"
                raise ConfigError("q_rank", why)
            for key in ("index_heads", "top_k"):
                if getattr(self, key) < 1:
                    raise ConfigError(key, "must be at least 1")
            if self.index_dim < self.rope_dim:
                why = (
                    f"must be at least rope_dim = {self.rope_dim}, which is the rotated part of it"
                )
                raise ConfigError("index_dim", why)
            if self.warmup_steps < 0:
                raise ConfigError("warmup_steps", "must be at least 0")
            check_scheduled(self.weight, "weight", low=0)

    config: Config

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        assert config.q_rank is not None, "the section was checked"
        self.indexer = Indexer(
            build,
            heads=config.index_heads,
            head_dim=config.index_dim,
            q_rank=config.q_rank,
            rope_dim=config.rope_dim,
        )
        self.dense: Tensor | None
        stage = torch.empty((), dtype=torch.bool) if config.warmup_steps else None
        self.register_buffer("dense", stage)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts in the warm-up, if there is one."""
        if self.dense is not None:
            self.dense.fill_(True)

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Record]:
        """The outputs B x L x D, with the indexer's loss where records are wanted."""
        if cache is not None:
            return self.decode(x_BLD, context, cache)
        projected = self.project(x_BLD)
        q_BLHX, k_BSHX, v_BSHV = self.expanded(projected, context)
        length = x_BLD.shape[1]
        chosen_BLS: Tensor | None = None
        if context.recorded or length > self.config.top_k:
            keys_BSX = self.indexer.keys(x_BLD.detach(), context, decoding=False)
            scores_BLS = self._scores(x_BLD, projected, keys_BSX, context, decoding=False)
            visible_BLS = visible_positions(None, length, length, context)
            selected_BLS = self._select(scores_BLS, visible_BLS)
            chosen_BLS = self._stage(selected_BLS, visible_BLS)
        o_BLHV = attend(q_BLHX, k_BSHX, v_BSHV, self.scale, context, None, chosen_BLS)
        result: Tensor = self.output(o_BLHV.flatten(-2))
        if not context.recorded:
            return result
        mask_BLS = visible_BLS if chosen_BLS is None else chosen_BLS
        p_BLS = mean_attention(q_BLHX, k_BSHX, self.scale, mask_BLS)
        kl_BL = divergence(p_BLS, scores_BLS, mask_BLS)
        return result, self._record(p_BLS, kl_BL, selected_BLS, visible_BLS, context)

    def attended(self, x_BLD: Tensor, projected: Projected, context: SequenceContext) -> Tensor:
        """The positions that the indexer selects, in the warm-up all visible ones."""
        visible_BLS = super().attended(x_BLD, projected, context)
        keys_BSX = self.indexer.keys(x_BLD, context, decoding=False)
        scores_BLS = self._scores(x_BLD, projected, keys_BSX, context, decoding=False)
        chosen_BLS = self._stage(self._select(scores_BLS, visible_BLS), visible_BLS)
        return visible_BLS if chosen_BLS is None else chosen_BLS

    def _scores(
        self,
        x_BLD: Tensor,
        projected: Projected,
        keys_BSX: Tensor,
        context: SequenceContext,
        *,
        decoding: bool,
    ) -> Tensor:
        """The index scores B x L x S of new tokens; the indexer's inputs are detached."""
        assert projected.q_latent is not None
        q_BLHX = self.indexer.queries(projected.q_latent.detach(), context, decoding=decoding)
        return index_scores(q_BLHX, keys_BSX, self.indexer.head_weights(x_BLD.detach()))

    def _select(self, scores_BLS: Tensor, visible_BLS: Tensor) -> Tensor | None:
        """The visible positions with the `top_k` highest scores, of equal ones the first; None: all of them."""
        if scores_BLS.shape[-1] <= self.config.top_k:
            return None
        masked_BLS = scores_BLS.detach().masked_fill(~visible_BLS, -torch.inf)
        selected_BLS: Tensor = highest(masked_BLS, self.config.top_k)
        return selected_BLS & visible_BLS

    def _stage(self, selected_BLS: Tensor | None, visible_BLS: Tensor) -> Tensor | None:
        """The positions to attend to: those selected, or in the warm-up all that are visible; None: likewise."""
        if selected_BLS is None or self.dense is None:
            return selected_BLS
        return selected_BLS | (visible_BLS & self.dense)

    def _record(
        self,
        p_BLS: Tensor,
        kl_BL: Tensor,
        selected_BLS: Tensor | None,
        visible_BLS: Tensor,
        context: SequenceContext,
    ) -> Record:
        """The sum of the divergences, and the share of attention that the selected positions have in the warm-up."""
        valid_BL = context.valid()
        loss = kl_BL.masked_fill(~valid_BL, 0).sum()
        share = p_BLS.new_zeros(())
        count = valid_BL.new_zeros((), dtype=torch.int64)
        if selected_BLS is not None:
            chooses_BL = valid_BL & (visible_BLS.sum(dim=-1) > self.config.top_k)
            share_BL = (p_BLS * selected_BLS).sum(dim=-1)
            share = share_BL.masked_fill(~chooses_BL, 0).sum()
            count = chooses_BL.sum()
        return Record(terms={LOSS: loss}, metrics={"selected_share": MeanMetric(share, count)})

    def also_cached(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, ...]:
        """The indexer's key of each new token."""
        return (self.indexer.keys(x_BLD, context, decoding=True),)

    def chosen(
        self,
        x_BLD: Tensor,
        projected: Projected,
        cached: list[Tensor],
        slots_BL: Tensor | None,
        context: SequenceContext,
    ) -> Tensor | None:
        """The cached tokens that the indexer chooses for each new token; None while there are at most `top_k`."""
        (keys_BSX,) = cached
        seen = keys_BSX.shape[1]
        if seen <= self.config.top_k:
            return None
        scores_BLS = self._scores(x_BLD, projected, keys_BSX, context, decoding=True)
        visible_BLS = visible_positions(slots_BL, x_BLD.shape[1], seen, context)
        return self._stage(self._select(scores_BLS, visible_BLS), visible_BLS)

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """The indexer's loss is a mean over valid tokens."""
        return {LOSS: context.valid().sum()}

    def coefficient(self, progress: Progress) -> float:
        """The `weight` at this position of the run."""
        return value_at(self.config.weight, progress)

    def on_step_start(self, progress: Progress) -> None:
        """Leaves the warm-up with the first step after it."""
        if self.dense is not None:
            self.dense.fill_(progress.step <= self.config.warmup_steps)

    def added_state(self) -> list[str]:
        """The indexer and the stage: a run may start from weights of `mla`."""
        return [*(f"indexer.{name}" for name in self.indexer.state_dict()), "dense"]

    def learns_alone(self, progress: Progress) -> list[nn.Parameter] | None:
        """The indexer's weights in a warm-up of a frozen model."""
        frozen = self.config.warmup_main == "frozen"
        if frozen and progress.step <= self.config.warmup_steps:
            return list(self.indexer.parameters())
        return None

    def costs(self) -> Costs:
        """The costs of one token, which attends to the selected positions alone; its index scores are of all.

        Query number i attends to min(i, k) positions: k - k^2 / 2L on average, which is L / 2 if k is L.
        """
        config = self.config
        dense = super().costs()
        k = min(config.top_k, self.length)
        attended = k - k * k / (2 * self.length)
        widths = config.nope_dim + config.rope_dim + config.value_dim
        main = 2 * config.heads * widths * attended
        index = 2 * config.index_heads * config.index_dim * self.length / 2
        return replace(dense, attention_flops=main + index, cache=dense.cache + config.index_dim)

    def computed_mixing(self) -> float:
        """All scores are computed and masked: of the main attention, of the indexer, and of the loss's target."""
        config = self.config
        key_dim = config.nope_dim + config.rope_dim
        main = config.heads * (key_dim + config.value_dim)
        index = config.index_heads * config.index_dim
        target = config.heads * key_dim
        return 2.0 * (main + index + target) * self.length
