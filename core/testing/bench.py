"""A small, plain model to put a component into: everything around it is the kit's own, slow and obvious.

An `example` section must fit these sizes: it is checked and built in a layer of 8 experts, in a model of width 32 with
64 tokens in its vocabulary, and costs are stated for sequences of 16 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.attention import Attention, Cache
from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext, Init, Rope
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.ffn import FeedForward, Traits
from core.contracts.loss_head import HeadOutput, LossHead, Shared
from core.contracts.precision import Precision
from core.contracts.record import Record
from core.contracts.residual import Residual
from core.contracts.router import Adjust, Router, Routing
from core.contracts.schedule import Progress
from core.contracts.schema import Child, Provenance, Section, child, children, setting
from core.model.attend import TensorCache
from core.model.block import Block
from core.model.language_model import Embedding, LanguageModel
from core.model.norm import RMSNorm
from core.numerics.linear import GroupedLinear, Linear
from core.routing.gating import LearnedRouter, best_experts

WIDTH, EXPERTS, LENGTH, VOCABULARY = 32, 8, 16, 64
OWNER = Provenance("moeloom", "kit", "core.testing", "core.testing.bench")
START = Progress(step=1, tokens=128, total_steps=100, total_tokens=12800)


class KitPrecision(Precision):
    """One format for weights, and one for products; those of the router and the norms stay in the weights' format."""

    def __init__(self, kept: torch.dtype, computed: torch.dtype | None = None) -> None:
        self.kept, self.computed = kept, computed or kept

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        return Linear(inputs, outputs, std=std, **self._formats(role))

    def grouped_linear(self, groups: int, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        return GroupedLinear(groups, inputs, outputs, std=std, **self._formats(role))

    def _formats(self, role: str) -> dict[str, Any]:
        formats = {"param_dtype": self.param_dtype(role), "compute_dtype": self.compute_dtype(role)}
        return {**formats, "role": role, "paths": self.paths}

    def param_dtype(self, role: str) -> torch.dtype:
        return self.kept

    def compute_dtype(self, role: str) -> torch.dtype:
        return self.kept if role in ("router", "norm") else self.computed


def build_context(precision: Precision, *, seed: int = 0) -> BuildContext:
    """What components are told about the model around them; weights large enough to matter."""
    context = BuildContext(
        dim=WIDTH,
        vocabulary=VOCABULARY,
        length=LENGTH,
        layer=1,
        precision=precision,
        init=Init(0.2),
        rope=Rope(10000.0, 4 * LENGTH),
        norm_eps=1e-6,
        seed=seed,
        token_counts=lambda: torch.arange(VOCABULARY),
    )
    context = replace(context, residual=section("residual", KitResidual))
    return replace(context, block=lambda inner: Block(section("attention", KitAttention), dense(), inner))


def section(slot: str, component: Any, **settings: Any) -> Section:
    """A section of the kit's own component."""
    return Section(slot, component.__name__, component, component.Config(**settings), OWNER)


def dense() -> Section:
    """A layer without experts."""
    return section("ffn", KitDense)


def tokens(batch: int = 3, length: int = 8, *, seed: int = 0, **rest: Any) -> SequenceContext:
    """Random tokens with their targets."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BM = torch.randint(VOCABULARY, (batch, length + 1), generator=draw)
    return SequenceContext.of(tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:], **{"step": 2, **rest})


def padded(lengths: Sequence[int], length: int = 8, *, seed: int = 0) -> SequenceContext:
    """Sequences of which only the first so many tokens are real."""
    valid_BL = torch.arange(length)[None, :] < torch.tensor(lengths)[:, None]
    return tokens(len(lengths), length, seed=seed, valid_BL=valid_BL)


def rows(context: SequenceContext, part: slice) -> SequenceContext:
    """Some sequences of a micro-batch, with their places in it."""
    names = ("tokens_BL", "targets_BL", "valid_BL", "documents_BM", "learned_BM", "source_B")
    cut: dict[str, Any] = {n: None if getattr(context, n) is None else getattr(context, n)[part] for n in names}
    return replace(context, first_sequence=context.first_sequence + part.start, **cut)


def states(context: SequenceContext, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random hidden states for a context."""
    batch, length = context.tokens_BL.shape
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=draw).to(dtype)


class KitAttention(Attention):
    """The mean of the projected states so far, of the same document."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.value = build.linear(build.dim, build.dim, "attention.v")

    def forward(self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None) -> Tensor:
        value_BLD = self.value(x_BLD)
        new, slots_BL = x_BLD.shape[1], None
        if cache is not None:
            (value_BLD,) = cache.append(value_BLD)
            slots_BL = cache.slots(new)
        seen = value_BLD.shape[1]
        if slots_BL is None:
            slots_BL = torch.arange(seen - new, seen, device=x_BLD.device).expand(len(x_BLD), -1)
        near = slots_BL[:, :, None] >= torch.arange(seen, device=x_BLD.device)
        if context.documents_BM is not None:
            documents_BL = context.documents_BM[:, :new]
            near = near & (documents_BL[:, :, None] == documents_BL[:, None, :])
        weights = near.to(value_BLD.dtype)
        mean: Tensor = weights @ value_BLD / weights.sum(dim=2, keepdim=True)
        return mean

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        return TensorCache(rows, capacity, device)

    def costs(self) -> Costs:
        return Costs(active=WIDTH * WIDTH, mixing=WIDTH * LENGTH, cache=WIDTH)


class KitDense(FeedForward):
    """One matrix and a ReLU."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.product = build.linear(build.dim, build.dim, "ffn.down")

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, None]:
        return self.product(x_BLD).relu(), None

    def costs(self) -> Costs:
        return Costs(active=WIDTH * WIDTH)


class KitResidual(Residual):
    """Adds each output to the stream."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def expand(self, embedded_BLD: Tensor) -> Tensor:
        return embedded_BLD

    def read(self, stream: Tensor) -> Tensor:
        return stream

    def write(self, stream: Tensor, output_BLD: Tensor) -> Tensor:
        return stream + output_BLD

    def collapse(self, stream: Tensor) -> Tensor:
        return stream


class Streams(nn.Module):
    """A residual's instances for a model and for the layers of one block, and a pass through all of them."""

    def __init__(self, build: BuildContext) -> None:
        super().__init__()
        self.model: Residual = build.stream("model")
        self.attention: Residual = build.stream("attention")
        self.ffn: Residual = build.stream("ffn")

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """The states after two layers that are nonlinear in what they read, and the stream."""
        stream = self.model.expand(x_BLD)
        for layer in (self.attention, self.ffn):
            stream = layer.write(stream, layer.read(stream).sin())
        return self.model.collapse(stream), stream


class KitRouter(LearnedRouter):
    """Sigmoid affinities, the best two by what the balancers say, gates as they are."""

    capabilities = frozenset({"selects_with_bias", "causal", "learned", "token_choice", "groups"})

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set that matters."""

        top_k: int = setting(2, doc="experts per token")
        groups: int = setting(1, doc="one: every expert can be reached")
        reach: int = setting(1, doc="and it is")

    def route(self, logits_TE: Tensor, adjust: Adjust, context: SequenceContext) -> Routing:
        scores_TE = logits_TE.sigmoid()
        with torch.no_grad():
            expert_TK = best_experts(adjust(scores_TE.detach()), self.top_k)
        return Routing.top_k(expert_TK, scores_TE.gather(1, expert_TK), scores_TE, logits_TE)


class KitExperts(FeedForward):
    """One matrix for each expert, every expert computed for every token: slow, and hard to get wrong."""

    @dataclass(kw_only=True)
    class Config:
        """Who routes and who balances."""

        experts: int = setting(EXPERTS, doc="experts")
        router: Child = child("router", doc="who chooses")
        balance: Child = children("balancer", "list", doc="who balances")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config
        self.router: Router = build.make(config.router, experts=EXPERTS)
        self.weight = build.grouped_linear(EXPERTS, build.dim, build.dim, "experts.down")
        made = [build.make(s, experts=EXPERTS, top_k=self.router.top_k) for s in config.balance]
        self.balance = nn.ModuleList(made)

    @property
    def balancers(self) -> Sequence[Balancer]:
        return list(self.balance)  # type: ignore[arg-type]

    @property
    def experts(self) -> int:
        return EXPERTS

    @property
    def traits(self) -> Traits:
        able = self.config.router.component.capabilities_of(self.config.router.config)
        return Traits(
            top_k=self.router.top_k,
            token_choice="token_choice" in able,
            drops="drops" in able,
            causal="causal" in able,
            batch_dependent="batch_dependent" in able,
        )

    def adjust(self, scores_TE: Tensor) -> Tensor:
        for balancer in self.balancers:
            scores_TE = balancer.adjust(scores_TE)
        return scores_TE

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record]:
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(x_TD, self.adjust, context)
        kept_A = torch.ones_like(routing.token_A, dtype=torch.bool) if routing.kept_A is None else routing.kept_A
        place_A = routing.token_A * EXPERTS + routing.expert_A
        gate_A = (routing.gate_A * kept_A).to(x_TD.dtype)
        gate_TE = x_TD.new_zeros(len(x_TD) * EXPERTS).index_add(0, place_A, gate_A).view(-1, EXPERTS)
        y_TED = torch.einsum("td,efd->tef", x_TD, self.weight.weight.to(x_TD.dtype))  # type: ignore[union-attr,operator]
        y_TD = (gate_TE[:, :, None] * y_TED).sum(dim=1)
        valid_T = context.valid().flatten()
        sums = [balancer.observe(routing, context) for balancer in self.balancers]
        tallies = [balancer.tally(routing, context) for balancer in self.balancers]
        return y_TD.view_as(x_BLD), Record(routing.load(valid_T), routing.dropped(valid_T), sums, tallies)

    def costs(self) -> Costs:
        return self.router.costs() + Costs(active=self.router.top_k * WIDTH * WIDTH)


class KitHead(LossHead):
    """The next token's cross-entropy."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def forward(self, hidden_BLD: Tensor, context: SequenceContext, shared: Shared) -> HeadOutput:
        assert context.targets_BL is not None
        losses_T = F.cross_entropy(
            shared.logits(hidden_BLD).flatten(0, 1), context.targets_BL.flatten(), reduction="none"
        )
        counted_T = context.predicted().flatten()
        return HeadOutput({"loss": (losses_T * counted_T).sum()})

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        return {"loss": context.predicted().sum()}

    def coefficient(self, progress: Progress) -> float:
        return 1.0

    def costs(self) -> Costs:
        return Costs()


def language_model(build: BuildContext, ffn: Section, *, recompute: bool = False) -> LanguageModel:
    """Two blocks with the layer under test, and the kit's own everything else."""
    precision = build.precision
    formats = {"param_dtype": precision.param_dtype("embedding"), "compute_dtype": precision.compute_dtype("embedding")}
    attention = section("attention", KitAttention)
    blocks = [Block(attention, ffn, replace(build, layer=layer, block=None), recompute=recompute) for layer in range(2)]
    return LanguageModel(
        embedding=Embedding(VOCABULARY, WIDTH, std=0.5, **formats),
        blocks=blocks,
        residual=build.stream("model"),
        norm=RMSNorm(WIDTH, build),
        output=build.linear(WIDTH, VOCABULARY, "head"),
        heads={"next_token": build.make(section("loss_head", KitHead))},
        max_length=build.rope.max_length,
    )
