"""A small, plain model to put a component into; the parts around the component are the kit's own.

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
from core.contracts.ffn import FeedForward, RoutingProperties
from core.contracts.loss_head import HeadOutput, LossHead, SharedModules
from core.contracts.precision import Precision
from core.contracts.record import Record
from core.contracts.residual import Residual
from core.contracts.router import AdjustScores, Router, Routing
from core.contracts.schedule import Progress
from core.contracts.schema import Child, Provenance, Section, child, children, setting
from core.model.attend import TensorCache
from core.model.block import Block
from core.model.language_model import Embedding, LanguageModel
from core.model.norm import RMSNorm
from core.numerics.linear import GroupedLinear, Linear
from core.routing.gating import LearnedRouter, best_experts

WIDTH = 32
EXPERTS = 8
LENGTH = 16
VOCABULARY = 64
OWNER = Provenance("moeloom", "kit", "core.testing", "core.testing.bench")
START = Progress(step=1, tokens=128, total_steps=100, total_tokens=12800)


class KitPrecision(Precision):
    """One format for weights and one for products; router and norms compute in the format of the weights."""

    def __init__(self, kept: torch.dtype, computed: torch.dtype | None = None) -> None:
        self.kept = kept
        self.computed = computed or kept

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        return Linear(inputs, outputs, std=std, **self._formats(role))

    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        return GroupedLinear(groups, inputs, outputs, std=std, **self._formats(role))

    def _formats(self, role: str) -> dict[str, Any]:
        formats = {"param_dtype": self.param_dtype(role), "compute_dtype": self.compute_dtype(role)}
        return {**formats, "role": role, "kernels_used": self.kernels_used}

    def param_dtype(self, role: str) -> torch.dtype:
        return self.kept

    def compute_dtype(self, role: str) -> torch.dtype:
        return self.kept if role in ("router", "norm") else self.computed


class RunData:
    """Token counts of a run's data, which no copy of a module may copy as well."""

    def __call__(self) -> Tensor:
        return torch.arange(VOCABULARY)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunData":
        raise TypeError("the data of the run are copied with the module")

    def __reduce__(self) -> str:
        raise TypeError("the data of the run are pickled with the module")


def build_context(precision: Precision, *, seed: int = 0) -> BuildContext:
    """The kit's `BuildContext`, with initial weights that are large enough to matter."""
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
        token_counts=RunData(),
    )
    context = replace(context, residual=section("residual", KitResidual))
    attention = section("attention", KitAttention)
    return replace(context, block=lambda inner: Block(attention, dense(), inner))


def section(slot: str, component: Any, **settings: Any) -> Section:
    """A recipe's section for a component of the kit."""
    return Section(slot, component.__name__, component, component.Config(**settings), OWNER)


def dense() -> Section:
    """The section of a layer without experts."""
    return section("ffn", KitDense)


def tokens(batch: int = 3, length: int = 8, *, seed: int = 0, **rest: Any) -> SequenceContext:
    """Random tokens with their targets."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BM = torch.randint(VOCABULARY, (batch, length + 1), generator=draw)
    return SequenceContext.of(tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:], **{"step": 2, **rest})


def padded(lengths: Sequence[int], length: int = 8, *, seed: int = 0) -> SequenceContext:
    """Random sequences of which only the first tokens, as many as `lengths` says, are not padding."""
    valid_BL = torch.arange(length)[None, :] < torch.tensor(lengths)[:, None]
    return tokens(len(lengths), length, seed=seed, valid_BL=valid_BL)


def select_rows(context: SequenceContext, part: slice) -> SequenceContext:
    """Some sequences of a micro-batch, with the places that they have in it."""
    cut: dict[str, Any] = {}
    for name in ("tokens_BL", "targets_BL", "valid_BL", "documents_BM", "learned_BM", "source_B"):
        value = getattr(context, name)
        cut[name] = None if value is None else value[part]
    return replace(context, first_sequence=context.first_sequence + part.start, **cut)


def states(context: SequenceContext, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random hidden states for a context."""
    batch, length = context.tokens_BL.shape
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=draw).to(dtype)


def change_padding(x_BLD: Tensor, context: SequenceContext) -> Tensor:
    """The same states with other values at padded places."""
    return torch.where(context.valid()[:, :, None], x_BLD, 5 * x_BLD.flip(2))


class KitAttention(Attention):
    """Averages the projected states of a document so far."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.value = build.linear(build.dim, build.dim, "attention.v")

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor:
        value_BLD = self.value(x_BLD)
        new = x_BLD.shape[1]
        slots_BL = None
        if cache is not None:
            (value_BLD,) = cache.append(value_BLD)
            slots_BL = cache.slots(new)
        length = value_BLD.shape[1]
        if slots_BL is None:
            slots_L = torch.arange(length - new, length, device=x_BLD.device)
            slots_BL = slots_L.expand(len(x_BLD), -1)
        attended = slots_BL[:, :, None] >= torch.arange(length, device=x_BLD.device)
        if context.documents_BM is not None:
            documents_BL = context.documents_BM[:, :new]
            attended = attended & (documents_BL[:, :, None] == documents_BL[:, None, :])
        weights = attended.to(value_BLD.dtype)
        mean: Tensor = weights @ value_BLD / weights.sum(dim=2, keepdim=True)
        return mean

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        return TensorCache(rows, capacity, device)

    def costs(self) -> Costs:
        return Costs(active=WIDTH * WIDTH, attention_flops=WIDTH * LENGTH, cache=WIDTH)


class KitDense(FeedForward):
    """A dense layer of one matrix and a ReLU."""

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
    """The residual instances of a model and of the layers of one block, and a forward through all of them."""

    def __init__(self, build: BuildContext) -> None:
        super().__init__()
        self.model: Residual = build.stream("model")
        self.attention: Residual = build.stream("attention")
        self.ffn: Residual = build.stream("ffn")

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """The states after two layers that compute the sine of what they read, and the stream."""
        stream = self.model.expand(x_BLD)
        for layer in (self.attention, self.ffn):
            stream = layer.write(stream, layer.read(stream).sin())
        return self.model.collapse(stream), stream


class KitRouter(LearnedRouter):
    """Sigmoid affinities as gates; the two experts with the best adjusted scores are selected."""

    capabilities = frozenset({"selects_with_bias", "causal", "learned", "token_choice", "groups"})

    @dataclass(kw_only=True)
    class Config:
        """Settings with fixed values, for components that read them."""

        top_k: int = setting(2, doc="experts per token")
        groups: int = setting(1, doc="number of groups; with one every expert can be reached")
        reachable_groups: int = setting(1, doc="groups that a token may reach")

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        scores_TE = logits_TE.sigmoid()
        with torch.no_grad():
            expert_TK = best_experts(adjust_scores(scores_TE.detach()), self.top_k)
        return Routing.top_k(expert_TK, scores_TE.gather(1, expert_TK), scores_TE, logits_TE)


class KitExperts(FeedForward):
    """Experts of one matrix each; every expert is computed for every token, which is slow but simple."""

    @dataclass(kw_only=True)
    class Config:
        """The number of experts, the router and the balancers."""

        experts: int = setting(EXPERTS, doc="experts")
        router: Child = child("router", doc="the router")
        balance: Child = children("balancer", "list", doc="the balancers")

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
    def routing_properties(self) -> RoutingProperties:
        router = self.config.router
        capabilities = router.component.capabilities_of(router.config)
        return RoutingProperties(
            top_k=self.router.top_k,
            token_choice="token_choice" in capabilities,
            drops="drops" in capabilities,
            causal="causal" in capabilities,
            batch_dependent="batch_dependent" in capabilities,
        )

    def adjust_scores(self, scores_TE: Tensor) -> Tensor:
        for balancer in self.balancers:
            scores_TE = balancer.adjust_scores(scores_TE)
        return scores_TE

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record]:
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(x_TD, self.adjust_scores, context)
        kept_A = routing.kept_A
        if kept_A is None:
            kept_A = torch.ones_like(routing.token_A, dtype=torch.bool)
        gate_A = (routing.gate_A * kept_A).to(x_TD.dtype)
        place_A = routing.token_A * EXPERTS + routing.expert_A
        zeros = x_TD.new_zeros(len(x_TD) * EXPERTS)
        gate_TE = zeros.index_add(0, place_A, gate_A).view(-1, EXPERTS)
        y_TED = torch.einsum("td,efd->tef", x_TD, self.weight.weight.to(x_TD.dtype))  # type: ignore[union-attr,operator]
        y_TD = (gate_TE[:, :, None] * y_TED).sum(dim=1)
        valid_T = context.valid().flatten()
        sums = [balancer.observe(routing, context) for balancer in self.balancers]
        tallies = [balancer.tally(routing, context) for balancer in self.balancers]
        record = Record(routing.load(valid_T), routing.dropped(valid_T), sums, tallies)
        return y_TD.view_as(x_BLD), record

    def costs(self) -> Costs:
        return self.router.costs() + Costs(active=self.router.top_k * WIDTH * WIDTH)


class KitHead(LossHead):
    """Predicts the next token; the loss is its cross-entropy."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def forward(
        self, hidden_BLD: Tensor, context: SequenceContext, shared: SharedModules
    ) -> HeadOutput:
        assert context.targets_BL is not None
        logits_TV = shared.logits(hidden_BLD).flatten(0, 1)
        losses_T = F.cross_entropy(logits_TV, context.targets_BL.flatten(), reduction="none")
        counted_T = context.predicted().flatten()
        return HeadOutput({"loss": (losses_T * counted_T).sum()})

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        return {"loss": context.predicted().sum()}

    def coefficient(self, progress: Progress) -> float:
        return 1.0

    def costs(self) -> Costs:
        return Costs()


def language_model(build: BuildContext, ffn: Section, *, recompute: bool = False) -> LanguageModel:
    """Builds a language model of two blocks with the layer under test; all other parts are the kit's own."""
    precision = build.precision
    formats = {
        "param_dtype": precision.param_dtype("embedding"),
        "compute_dtype": precision.compute_dtype("embedding"),
    }
    attention = section("attention", KitAttention)
    blocks = []
    for layer in range(2):
        place = replace(build, layer=layer, block=None)
        blocks.append(Block(attention, ffn, place, recompute=recompute))
    return LanguageModel(
        embedding=Embedding(VOCABULARY, WIDTH, std=0.5, **formats),
        blocks=blocks,
        residual=build.stream("model"),
        norm=RMSNorm(WIDTH, build),
        output=build.linear(WIDTH, VOCABULARY, "head"),
        heads={"next_token": build.make(section("loss_head", KitHead))},
        max_length=build.rope.max_length,
    )
