"""The tiny model of these tests, batches for it, and what it gives beside what the reference gives."""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from reference import Line, Settings, Yarn
from torch import Tensor, nn

import core
from core.contracts.context import SequenceContext
from core.contracts.record import StepTotals
from core.contracts.router import Routing
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import Ledger
from core.recipe.compose import Recipe

TINY = Path(__file__).with_name("tiny.yaml")
VOCABULARY = 300
FFN, ROUTER, BALANCE = (f"model.blocks.moe.ffn{key}" for key in ("", ".router", ".balance"))
DENSE = ("model.blocks.moe.count=0",)
MTP = ("model.heads.mtp={name: mtp, depth: 2, weight: 0.3}",)
FP32 = ("precision.name=fp32",)
SMALLEST = 1e-6  # a gradient whose largest element is below this is held to the absolute error of one of this size
START = Progress(step=1, tokens=32, total_steps=100, total_tokens=3200)

ATTENTIONS: dict[str, tuple[str, ...]] = {
    "mla": (),
    "mla without query latent": ("model.attention.q_rank=null",),
    "mha": ("model.attention={name: mha, heads: 4}",),
    "gqa": ("model.attention={name: gqa, heads: 4, kv_heads: 2}",),
    "mqa": ("model.attention={name: mqa, heads: 4}",),
}

SPARSE = (
    "model.attention={name: sparse, heads: 4, q_rank: 24, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 6, "
    "index_heads: 3, index_dim: 10, top_k: 3}",
)


@cache
def compose(*overrides: str) -> Recipe:
    """The tiny recipe with overrides."""
    return core.compose(TINY, overrides)


def build(*overrides: str) -> LanguageModel:
    """A copy of the tiny model with random norms and biases too, so that leaving one out shows."""
    return deepcopy(_built(overrides))


@cache
def _built(overrides: tuple[str, ...]) -> LanguageModel:
    model: LanguageModel = core.build(compose(*overrides))
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Norm weights in (0.5, 1.5), selection biases in (-0.5, 0.5)."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for bias in biases(model).values():
        bias.uniform_(-0.5, 0.5, generator=generator)


def biases(model: nn.Module) -> dict[str, Tensor]:
    """Every selection bias by its name."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(".bias")}


def moe(model: LanguageModel, path: str = "blocks.1") -> Any:
    """The mixture-of-experts layer of a block."""
    return model.get_submodule(f"{path}.ffn")


def context(batch: int = 2, length: int = 8, seed: int = 0, **rest: Any) -> SequenceContext:
    """Random tokens with their targets."""
    tokens_BM = torch.randint(
        VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return SequenceContext.of(tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:], **rest)


def part(whole: SequenceContext, rows: slice) -> SequenceContext:
    """Some sequences of a batch."""
    names = ("tokens_BL", "targets_BL", "valid_BL", "documents_BM")
    return replace(
        whole, **{n: None if getattr(whole, n) is None else getattr(whole, n)[rows] for n in names}
    )


def lines(given: SequenceContext) -> list[Line]:
    """The same batch for the reference."""
    assert given.targets_BL is not None
    batch, length = given.tokens_BL.shape
    documents_BM = (
        torch.zeros(batch, length + 1) if given.documents_BM is None else given.documents_BM
    )
    columns = (given.tokens_BL, given.targets_BL, given.valid(), documents_BM)
    return [Line(*(column[row].tolist() for column in columns)) for row in range(batch)]


def settings(recipe: Recipe) -> Settings:
    """The settings of the reference that a recipe implies."""
    attention, ffn = recipe.model.attention.config, recipe.model.blocks["moe"].ffn.config
    router, yarn = ffn.router.config, recipe.model.rope.yarn
    return Settings(
        heads=attention.heads,
        kv_rank=getattr(attention, "kv_rank", 0),
        nope=getattr(attention, "nope_dim", 0),
        rope=getattr(attention, "rope_dim", 0),
        value=getattr(attention, "value_dim", 0),
        top_k=router.top_k,
        groups=router.groups,
        group_limit=router.groups if router.group_limit is None else router.group_limit,
        scale=router.scale,
        theta=recipe.model.rope.theta,
        eps=recipe.model.norm_eps,
        yarn=None if yarn is None else Yarn(**vars(yarn)),
    )


def totals(load: Sequence[int] | Tensor) -> StepTotals:
    """The end of a step with this load and nothing else."""
    return StepTotals(torch.as_tensor(load))


class Calls:
    """Counts the calls of a function."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.function(*arguments)


@dataclass(frozen=True)
class Term:
    """A loss as a sum, and the count of what it is a sum over."""

    sum: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """sum / count; 0 where nothing was counted."""
        return self.sum / self.count.clamp(min=1)


@dataclass(frozen=True)
class Observed:
    """Every loss term, the heads' and the balancers', and every layer's load."""

    terms: dict[str, Term]
    loads: dict[str, Tensor]

    def total(self) -> Tensor:
        """All means added up with weights of the same size, so that no gradient hides behind another."""
        return weighted({name: term.mean() for name, term in self.terms.items()})

    def summed(self) -> Tensor:
        """All sums added up: what a window is made of."""
        return weighted({name: term.sum for name, term in self.terms.items()})


def weighted(values: dict[str, Tensor]) -> Tensor:
    """The sum of named values, each times a number of its own between 1 and 2."""
    return torch.stack(
        [value * (1 + i / len(values)) for i, (_, value) in enumerate(sorted(values.items()))]
    ).sum()


def see(model: LanguageModel, given: SequenceContext) -> Observed:
    """One forward; balance losses are named `balance/<path>`."""
    return seen(model, given, model(given))


def seen(model: LanguageModel, given: SequenceContext, losses: Losses) -> Observed:
    """The terms and loads of a forward that was made: sums from the forward, counts from the context alone."""
    ledger, inner = Ledger.of(model), model.contexts(given)
    sums = {term: (term.label, term.sum_in(losses)) for term in ledger.heads}
    for term in ledger.balance:
        loss = term.balancer.loss(term.observed_in(losses))
        assert (loss is None) == (term.count(given, inner) is None)
        if loss is not None:
            sums[term] = (f"balance/{term.layer}", loss)
    terms = {name: Term(value, term.count(given, inner)) for term, (name, value) in sums.items()}
    return Observed(
        terms, {path: record.load_E for path, record in losses.expert_records().items()}
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; zeros where none came."""
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def backward(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of one loss alone."""
    model.zero_grad()
    loss.backward()
    return gradients(model)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-9
) -> None:
    """Every tensor agrees relative to the largest element of its counterpart."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        allowed = relative * max(float(value.abs().max()), SMALLEST) if value.numel() else 0.0
        difference = float((actual[name] - value).abs().max()) if value.numel() else 0.0
        assert difference <= allowed, f"{name}: {difference:.3e} > {allowed:.3e}"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor is bitwise the same."""
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different


def routing(
    expert_TK: Tensor,
    gate_TK: Tensor | None = None,
    scores_TE: Tensor | None = None,
    experts: int = 8,
) -> Routing:
    """A top-k routing by hand."""
    scores_TE = (
        torch.rand(len(expert_TK), experts, dtype=torch.float64) if scores_TE is None else scores_TE
    )
    gate_TK = scores_TE.gather(1, expert_TK) if gate_TK is None else gate_TK
    return Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE.logit())


def expert_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Every [E, out, in] weight."""
    for name, parameter in model.named_parameters():
        if re.search(r"routed\.(gate_up|down)\.weight$", name):
            yield name, parameter
