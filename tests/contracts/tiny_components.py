"""A plugin of the tests' own, for the contracts that 2.0 opens.

A residual of two lanes, an optimizer of two rates, an attention with two ropes whose cache cannot be truncated, a head
that reads the state of a block and drafts, a corpus of token blocks, and a strategy that shards the experts of one
block.
Layers and balancers with losses, tallies and metrics of their own are in `own_parts.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from core.contracts.attention import Attention, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.corpus import Split, TokenBlock, TokenCorpus
from core.contracts.loss_head import Draft, HeadOutput, LossHead, SharedModules
from core.contracts.record import MeanMetric, Metric
from core.contracts.residual import Place, Residual
from core.contracts.schedule import Progress
from core.contracts.schema import setting
from core.contracts.strategy import StrategyFactory
from core.contracts.training import NamedParameter, OptimizerFactory
from core.data.tokenizer import train
from core.extension.hookspec import Registrar, hookimpl
from core.model.attend import TensorCache, attend
from core.model.language_model import LanguageModel
from core.model.rope import rotate

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers all of them."""
    registry.residual("two_lanes", f"{__name__}:TwoLanes")
    registry.optimizer("by_kind", f"{__name__}:ByKind")
    registry.attention("two_ropes", f"{__name__}:TwoRopes")
    registry.loss_head("peek", f"{__name__}:Peek")
    registry.loss_head("by_source", f"{__name__}:BySource")
    registry.corpus("token_blocks", f"{__name__}:Blocks")
    registry.strategy("share_experts", f"{__name__}:ShareExperts")


class TwoLanes(Residual):
    """B x L x 2 x D: layers read a learned mixture of the lanes and write into both with learned weights."""

    example = {"name": "two_lanes"}

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Config, build: BuildContext, *, place: Place) -> None:
        super().__init__(config, build, place=place)
        self.place = place
        dtype = build.precision.param_dtype("norm")
        self.mix_2 = nn.Parameter(torch.empty(2, dtype=dtype))
        if place != "model":
            self.spread_2 = nn.Parameter(torch.empty(2, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first lane is read and written; the second is written by half."""
        with torch.no_grad():
            self.mix_2.copy_(torch.tensor([1.0, 0.25]))
            if self.place != "model":
                self.spread_2.copy_(torch.tensor([1.0, 0.5]))

    @property
    def streams(self) -> int:
        return 2

    def expand(self, embedded_BLD: Tensor) -> Tensor:
        return torch.stack([embedded_BLD, torch.zeros_like(embedded_BLD)], dim=2)

    def read(self, stream: Tensor) -> Tensor:
        return (stream * self.mix_2.to(stream.dtype)[:, None]).sum(dim=2)

    def write(self, stream: Tensor, output_BLD: Tensor) -> Tensor:
        return stream + output_BLD[:, :, None] * self.spread_2.to(stream.dtype)[:, None]

    def collapse(self, stream: Tensor) -> Tensor:
        return self.read(stream)


class ByKind(OptimizerFactory):
    """Matrices and stacks by plain gradient descent at a tenth of the rate, vectors and the table by Adam."""

    needs_whole_matrices = True
    example = {"name": "by_kind", "lr": 0.01}

    @dataclass(kw_only=True)
    class Config:
        """The rate."""

        lr: float = setting(doc="learning rate of vectors and of the table")

    def make(self, parameters: Sequence[NamedParameter]) -> list[torch.optim.Optimizer]:
        wide = [named.parameter for named in parameters if named.kind in ("matrix", "stack")]
        rest = [named.parameter for named in parameters if named.kind in ("vector", "table")]
        return [
            torch.optim.SGD([{"params": wide, "lr_scale": 0.1}], lr=0.0),
            torch.optim.Adam(rest, lr=0.0),
        ]

    def learning_rate(self, progress: Progress) -> float:
        return float(self.config.lr)


SHARDED = "blocks.1.ffn.routed.down.weight"
"""The weight of the small recipe that `ShareExperts` shards."""


class ShareExperts(StrategyFactory):
    """Shards the down projections of the experts of every block, expert by expert."""

    example = {"name": "share_experts"}

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def trainer_arguments(self) -> dict[str, Any]:
        return {"accelerator": "cpu", "devices": 1}

    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        assert isinstance(model, LanguageModel)
        for module in model.blocks.modules():
            if getattr(module, "role", None) == "experts.down":
                fully_shard(module, mesh=mesh)


class ClosedCache(TensorCache):
    """A cache that cannot be truncated, like one that compresses closed windows."""

    truncates = False

    def truncate(self, lengths_B: Tensor) -> None:
        Cache.truncate(self, lengths_B)


class TwoRopes(Attention):
    """One head whose halves turn by the model's rotary positions and by those called `local`."""

    example = {"name": "two_ropes", "width": 8, "second": "local"}
    roles = {"tiny.mixed": "queries, keys and values of the tests' attention"}

    @dataclass(kw_only=True)
    class Config:
        """The head."""

        width: int = setting(doc="width of the head; a multiple of 4")
        second: str | None = setting(
            None, doc="name of the second half's rotary positions; null: the model's own"
        )

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.width, self.length = config.width, build.length
        self.ropes = (build.rope, build.rope_named(config.second))
        self.mixed = build.linear(build.dim, 3 * config.width, "tiny.mixed")
        self.output = build.linear(config.width, build.dim, "attention.output", residual=True)

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor:
        q, k, v = (part[:, :, None] for part in self.mixed(x_BLD).chunk(3, dim=-1))
        q, k = self._turned(q, context), self._turned(k, context)
        slots_BL = None
        if cache is not None:
            k, v = cache.append(k, v)
            slots_BL = cache.slots(x_BLD.shape[1])
        result: Tensor = self.output(
            attend(q, k, v, self.width**-0.5, context, slots_BL).flatten(-2)
        )
        return result

    def _turned(self, x_BLHR: Tensor, context: SequenceContext) -> Tensor:
        halves = zip(x_BLHR.chunk(2, dim=-1), self.ropes, strict=True)
        return torch.cat(
            [rotate(half.contiguous(), rope, context.positions_BL) for half, rope in halves], dim=-1
        )

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        return ClosedCache(rows, capacity, device)

    def costs(self) -> Costs:
        active = sum(p.numel() for p in self.parameters())
        return Costs(
            active=active,
            attention_flops=2 * 2 * self.width * self.length / 2,
            cache=2 * self.width,
        )


class Peek(LossHead):
    """Predicts the next token from the state after one block and the embedding of the last token; drafts so too."""

    drafts = True
    reads_streams = True
    example = {"name": "peek", "block": 0}

    @dataclass(kw_only=True)
    class Config:
        """Which block."""

        block: int = setting(1, doc="index of the block")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config
        self.joined = build.linear(2 * build.dim, build.dim, "mtp.projection")

    @property
    def reads_blocks(self) -> Sequence[int]:
        return (self.config.block,)

    def forward(
        self, hidden_BLD: Tensor, context: SequenceContext, shared: SharedModules
    ) -> HeadOutput:
        assert context.targets_BL is not None
        state_BLD = shared.states[self.config.block]
        logits_BLV = self._logits(state_BLD, context, shared)
        losses_BL = F.cross_entropy(
            logits_BLV.transpose(1, 2), context.targets_BL, reduction="none"
        )
        return HeadOutput({"peek": (losses_BL * context.predicted()).sum()})

    def _logits(self, state_BLD: Tensor, context: SequenceContext, shared: SharedModules) -> Tensor:
        embedded_BLD = shared.embed(context.tokens_BL).to(state_BLD.dtype)
        return shared.logits(self.joined(torch.cat([state_BLD, embedded_BLD], dim=-1)))

    def draft(
        self,
        state_BLD: Tensor,
        context: SequenceContext,
        shared: SharedModules,
        caches: Sequence[Cache],
        depth: int = 1,
    ) -> Draft:
        read_BLD = shared.states[self.config.block]
        return Draft(self._logits(read_BLD, context, shared), state_BLD)

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        return {"peek": context.predicted().sum()}

    def coefficient(self, progress: Progress) -> float:
        return 0.5

    def costs(self) -> Costs:
        return Costs(active=sum(p.numel() for p in self.parameters()))


WORDS = "the quick brown fox jumps over the lazy dog and runs away from one hundred wolves in the dark forest"


class BySource(LossHead):
    """The next token's cross-entropy, reported for each source."""

    example = {"name": "by_source", "sources": 2}

    @dataclass(kw_only=True)
    class Config:
        """How many sources."""

        sources: int = setting(doc="number of sources")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.sources = config.sources

    def forward(
        self, hidden_BLD: Tensor, context: SequenceContext, shared: SharedModules
    ) -> HeadOutput:
        assert context.targets_BL is not None
        logits_BVL = shared.logits(hidden_BLD).transpose(1, 2)
        losses_BL = F.cross_entropy(logits_BVL, context.targets_BL, reduction="none")
        predicted_BL = context.predicted()
        losses_BL = losses_BL * predicted_BL
        source_B = context.source_B
        if source_B is None:
            source_B = torch.zeros(len(losses_BL), dtype=torch.int64)
        metrics: dict[str, Metric] = {}
        for index in range(self.sources):
            rows = source_B == index
            total = losses_BL.detach()[rows].sum()
            metrics[f"source_{index}"] = MeanMetric(total, predicted_BL[rows].sum())
        return HeadOutput({"loss": losses_BL.sum()}, metrics=metrics)

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        return {"loss": context.predicted().sum()}

    def coefficient(self, progress: Progress) -> float:
        return 1.0

    def costs(self) -> Costs:
        return Costs()


class Blocks(TokenCorpus):
    """Conversations: a question that is not learned and an answer that is, from two sources."""

    example = {"name": "token_blocks"}

    @dataclass(kw_only=True)
    class Config:
        """How many."""

        count: int = setting(40, doc="training conversations")
        bad_id: int | None = setting(None, doc="an id to put into the last one")

    @property
    def vocabulary(self) -> int:
        return 270

    def tokenizer_json(self) -> str:
        return train([WORDS] * 3, self.vocabulary).to_json()

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        count = self.config.count if split == "train" else 4
        for index in range(count):
            draw = torch_free_random(index + (10_000 if split == "validation" else 0))
            question = [0] + [next(draw) % 269 + 1 for _ in range(5)]
            answer = [(token * 7) % 269 + 1 for token in question]
            tokens = question + answer
            if self.config.bad_id is not None and split == "train" and index == count - 1:
                tokens[-1] = self.config.bad_id
            learned = [False] * len(question) + [True] * len(answer)
            yield TokenBlock(tokens, learned, source=index % 2, text_bytes=3 * len(answer))


def torch_free_random(seed: int) -> Iterator[int]:
    """Numbers of a linear congruential generator."""
    state = seed * 2654435761 % 2**32 + 12345
    while True:
        state = (1103515245 * state + 12345) % 2**31
        yield state >> 8


def everything() -> dict[str, Any]:
    """Overrides of a small recipe, by the contract that they use."""
    return {
        "residual": ("plugins=[tiny_components]", "model.residual={name: two_lanes}"),
        "optimizer": ("plugins=[tiny_components]", "optimizer={name: by_kind, lr: 0.01}"),
        "attention": (
            "plugins=[tiny_components]",
            "model.attention={name: two_ropes, width: 8, second: local}",
            "model.ropes={local: {theta: 50.0}}",
        ),
        "watched": ("plugins=[own_parts]", "model.attention={name: watched, heads: 4}"),
        "histogram": ("plugins=[own_parts]", "model.blocks.moe.ffn.balance=[{name: histogram}]"),
        "head": ("plugins=[tiny_components]", "model.heads.peek={name: peek, block: 1}"),
        "corpus": (
            "plugins=[tiny_components]",
            "data.corpus={name: token_blocks}",
            "data.tokenizer.vocab=270",
        ),
    }
