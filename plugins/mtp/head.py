"""Multi-token prediction (report, section 2.2, eq. 21-25).

Depth k combines, at position i, the state of depth k - 1 with the embedding of token i + k, runs one
transformer block, and predicts token i + k + 1 through the model's own embedding and output:

    h'_i = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i^{k-1})],   h^k = block(h'),   p = output(RMSNorm(h^k))

The order of the two halves is the released weights' (the paper prints the reverse). As in every released
implementation the state of depth 0 is the main model's after its final norm, and each depth hands on its
normed output. The loss of a depth has L - k terms and the divisor of the main loss (eq. 24: T); their mean
over depths is multiplied by `weight`.

With `reads: streams` the state of a depth is a whole residual stream, the main model's before it is collapsed: each of
its states is normed and joined with the embedding in the same way, the results are the block's stream, and depth k
hands on its block's stream. So it is in DeepSeek-V4, whose stream has four states.

In decoding the depths draft (section 5.4.3): depth 1 the token after the next one, depth k the k-th after it, from the
states and the caches of its own block, and the last depth all further ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from core.contracts.attention import Attention, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.loss_head import Draft, HeadOutput, LossHead, SharedModules
from core.contracts.record import MeanMetric, Metric, Record
from core.contracts.residual import Residual
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.model.loss import cross_entropy_sum
from core.model.norm import RMSNorm

MOST_DEPTHS = 1000
"""Most depths; DeepSeek-V3 has one."""


class DepthOutput(NamedTuple):
    """What a multi-token module returns.

    Args:
        normed_BLD: the normed state, from which the shared output predicts.
        state: what the next depth reads: the same, or the stream.
        records: what the block's layers saw.
    """

    normed_BLD: Tensor
    state: Tensor
    records: dict[str, Record]


class Depth(nn.Module):
    """One multi-token module: two norms, the projection M, a block, and the norm before the shared output.

    Args:
        build: the model around it.
        reads_streams: whether the states that it reads and hands on are residual streams.
    """

    def __init__(self, build: BuildContext, *, reads_streams: bool) -> None:
        super().__init__()
        self.reads_streams = reads_streams
        assert build.block is not None
        self.precision = build.precision
        self.embedding_norm = RMSNorm(build.dim, build)
        self.hidden_norm = RMSNorm(build.dim, build)
        self.projection = build.linear(2 * build.dim, build.dim, "mtp.projection")
        self.residual: Residual = build.stream("model")
        self.block = build.block(build)
        self.norm = RMSNorm(build.dim, build)

    def forward(
        self,
        state: Tensor,
        embedded_BLD: Tensor,
        context: SequenceContext,
        cache: Cache | None = None,
    ) -> DepthOutput:
        """Runs the module on a state B x L x D or a stream; `cache` is the block's, in decoding."""
        embedding = self.embedding_norm(embedded_BLD)
        if self.reads_streams:
            embedding = self.residual.expand(embedding)
        joined = torch.cat([embedding, self.hidden_norm(state)], dim=-1)
        with self.precision.context():
            stream = self.projection(joined)
        if not self.reads_streams:
            stream = self.residual.expand(stream)
        stream, records = self.block(stream, context, cache)
        normed_BLD = self.norm(self.residual.collapse(stream))
        return DepthOutput(normed_BLD, stream if self.reads_streams else normed_BLD, records)

    def costs(self) -> Costs:
        """The costs of one token: each weight once, and the projection once more for every further state."""
        in_block = sum(p.numel() for p in self.block.parameters())
        in_residual = sum(p.numel() for p in self.residual.parameters())
        own = sum(p.numel() for p in self.parameters()) - in_block - in_residual
        again = 0
        if self.reads_streams:
            again = (self.residual.streams - 1) * 2 * self.norm.dim**2
        own_costs = Costs(active=own, other_flops=2.0 * again) + self.residual.costs()
        costs: Costs = self.block.costs() + own_costs  # type: ignore[operator]
        return costs


class MultiTokenPrediction(LossHead):
    """Predicts further tokens from a complete causal chain, with one term for each depth."""

    drafts = True
    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.2"
    example = {"name": "mtp", "depth": 1, "weight": 0.3}

    @dataclass(kw_only=True)
    class Config:
        """Settings of multi-token prediction."""

        depth: int = setting(1, doc="number of further tokens to predict (D)")
        weight: Scheduled = setting(
            0.3, doc="coefficient (lambda; DeepSeek-V3: 0.3, then 0.1 after 10T tokens)"
        )
        reads: Literal["collapsed", "streams"] = setting(
            "collapsed",
            doc="what depth 1 reads; collapsed: the main model's states after its final norm; streams: its residual "
            "stream before it is collapsed (DeepSeek-V4)",
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for no depth or a negative weight."""
            if self.depth < 1:
                raise ConfigError("depth", "must be at least 1; leave the head out for none")
            if self.depth > MOST_DEPTHS:
                raise ConfigError("depth", f"must be at most {MOST_DEPTHS}: each is a module")
            check_scheduled(self.weight, "weight", low=0)

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        if config.depth >= build.length:
            why = f"must be less than data.sequence_length = {build.length}"
            raise ConfigError("depth", f"{why}: depth k has sequence_length - k tokens to predict")
        self.config = config
        self.reads_streams = config.reads == "streams"
        self.output_size = build.vocabulary * build.dim
        self.depths = nn.ModuleList(
            Depth(replace(build, layer=build.layer + k), reads_streams=self.reads_streams)
            for k in range(config.depth)
        )

    def forward(
        self, hidden_BLD: Tensor, context: SequenceContext, shared: SharedModules
    ) -> HeadOutput:
        """The terms `depth_1`, `depth_2`, ...; in evaluation also how often each depth agrees with the main model."""
        assert context.targets_BL is not None
        terms: dict[str, Tensor] = {}
        records: dict[str, dict[str, Record]] = {}
        metrics: dict[str, Metric] = {}
        main_BL = None
        if not self.training:
            main_BL = shared.logits(hidden_BLD).argmax(dim=-1)
        state = hidden_BLD
        if self.reads_streams:
            assert shared.stream is not None
            state = shared.stream
        for k, depth in enumerate(self.depths, start=1):
            inner = _shifted(context, k)
            embedded_BLD = shared.embed(inner.tokens_BL)
            output: DepthOutput = depth(state[:, : inner.tokens_BL.shape[1]], embedded_BLD, inner)
            state = output.state
            records[block_path(k)] = output.records
            counted_BL = context.predicted(k)
            targets_BL = context.targets_BL[:, k:]
            loss = cross_entropy_sum(shared.logits, output.normed_BLD, targets_BL, counted_BL)
            terms[f"depth_{k}"] = loss
            if main_BL is not None:
                own_BL = shared.logits(output.normed_BLD).argmax(dim=-1)
                agree_BL = (own_BL == main_BL[:, k:]) & counted_BL
                metrics[f"acceptance_{k}"] = MeanMetric(agree_BL.sum(), counted_BL.sum())
        return HeadOutput(terms, records, metrics)

    @property
    def draft_depths(self) -> int:
        """The number of depths."""
        return self.config.depth

    def draft(
        self,
        state_BLD: Tensor,
        context: SequenceContext,
        shared: SharedModules,
        caches: Sequence[Cache],
        depth: int = 1,
    ) -> Draft:
        """Drafts with the module of a depth, from the states before some tokens and these tokens."""
        module = self.depths[depth - 1]
        embedded_BLD = shared.embed(context.tokens_BL)
        output: DepthOutput = module(state_BLD, embedded_BLD, context, caches[0])
        return Draft(shared.logits(output.normed_BLD), output.state)

    def new_draft_caches(
        self, rows: int, capacity: int, device: torch.device | None = None, depth: int = 1
    ) -> list[Cache]:
        """The cache of the block of one depth."""
        module = self.depths[depth - 1]
        assert isinstance(module, Depth)
        attention: Attention = module.block.attention  # type: ignore[assignment]
        return [attention.new_cache(rows, capacity, device)]

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """The number of the main loss's predicted positions, for every depth (eq. 24)."""
        return {f"depth_{k}": context.predicted().sum() for k in range(1, self.config.depth + 1)}

    def contexts(self, context: SequenceContext) -> dict[str, SequenceContext]:
        """The context of each depth's block: depth k sees the sequence from its k-th token on."""
        return {block_path(k): _shifted(context, k) for k in range(1, self.config.depth + 1)}

    def coefficient(self, progress: Progress) -> float:
        """The coefficient of each depth, lambda / D."""
        return value_at(self.config.weight, progress) / self.config.depth

    def costs(self) -> Costs:
        """The costs of one token: every depth's own weights that it uses, and the shared output once more for each."""
        total = Costs()
        for depth in self.depths:
            assert isinstance(depth, Depth)
            total = total + depth.costs() + Costs(active=self.output_size)
        return total


def block_path(depth: int) -> str:
    """The path in the head of a depth's block, counted from 1."""
    return f"depths.{depth - 1}.block"


def _shifted(context: SequenceContext, k: int) -> SequenceContext:
    """The context of depth k's block: position i holds token i + k and the state of position i.

    A row whose two halves come from different documents keeps the document of its state. No later row of
    that document exists, so no row whose loss counts can read it.
    """
    assert context.targets_BL is not None
    length = context.tokens_BL.shape[1] - k
    documents_BM = context.documents_BM
    if documents_BM is not None:
        documents_BM = documents_BM[:, : length + 1]
    learned_BM = context.learned_BM
    if learned_BM is not None:
        learned_BM = learned_BM[:, k:]
    return replace(
        context,
        tokens_BL=context.tokens_BL[:, k:],
        positions_BL=context.positions_BL[:, k:],
        targets_BL=context.targets_BL[:, k:],
        valid_BL=context.within(k),
        documents_BM=documents_BM,
        learned_BM=learned_BM,
    )
