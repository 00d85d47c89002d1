"""The ledger of loss terms: every term of a model's objective once, with its owner, layer, scope and coefficient.

The objective and its denominators, logs, validation and `describe` read this list and key what they add up by its
entries, so no name is parsed anywhere. Terms are added in this order: heads, then the balancers
of every layer with experts, then the losses of layers themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.attention import Attention
from core.contracts.balancer import Balancer, Scope
from core.contracts.context import SequenceContext
from core.contracts.ffn import FeedForward
from core.contracts.loss_head import LossHead
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses


@dataclass(frozen=True, eq=False)
class Term(ABC):
    """One loss term; hashed by identity, so that it can be a key.

    Args:
        label: its name in logs, after `loss/`.
        layer: the path of the block that it belongs to; None for the term of a loss head.
    """

    label: str
    layer: str | None

    @property
    @abstractmethod
    def owner(self) -> LossHead | Balancer | Attention | FeedForward:
        """The component whose loss it is."""

    @property
    def scope(self) -> Scope:
        """The tokens over which the loss is formed."""
        return "token"

    @abstractmethod
    def count(
        self, context: SequenceContext, inner: Mapping[str, SequenceContext]
    ) -> Tensor | None:
        """The term's denominator for one micro-batch, from the data alone; None if it has none.

        Args:
            context: the micro-batch.
            inner: what the heads' own blocks see of it, by the block's path.
        """

    def is_in(self, losses: Losses) -> bool:
        """Whether a forward ran the layer that the term belongs to; another rank may hold it."""
        return self.layer in losses.records

    def coefficient(self, progress: Progress) -> float:
        """The factor of the mean loss at this position of the run."""
        return self.owner.coefficient(progress)


@dataclass(frozen=True, eq=False)
class HeadTerm(Term):
    """A loss of a loss head."""

    head: LossHead
    head_name: str
    name: str

    @property
    def owner(self) -> LossHead:
        """The loss head that owns the term."""
        return self.head

    def count(
        self, context: SequenceContext, inner: Mapping[str, SequenceContext]
    ) -> Tensor | None:
        """The head's denominator for one micro-batch."""
        return self.head.counts(context)[self.name]

    def is_in(self, losses: Losses) -> bool:
        """Whether a forward ran the head."""
        return self.head_name in losses.heads

    def sum_in(self, losses: Losses) -> Tensor:
        """The term's sum over a micro-batch."""
        return losses.heads[self.head_name].terms[self.name]


@dataclass(frozen=True, eq=False)
class LayerTerm(Term):
    """A loss of an attention or a feed-forward layer itself."""

    component: Attention | FeedForward
    part: str
    name: str

    @property
    def owner(self) -> Attention | FeedForward:
        """The layer that owns the term."""
        return self.component

    def count(
        self, context: SequenceContext, inner: Mapping[str, SequenceContext]
    ) -> Tensor | None:
        """The layer's denominator for one micro-batch, from the context that its block sees."""
        assert self.layer is not None
        return self.component.counts(inner.get(self.layer, context))[self.name]

    def sum_in(self, losses: Losses) -> Tensor:
        """The term's sum over a micro-batch."""
        assert self.layer is not None
        return losses.records[self.layer][self.part].terms[self.name]


@dataclass(frozen=True, eq=False)
class BalanceTerm(Term):
    """The loss of one balancer of one layer.

    Args:
        balancer: the method.
        index: its place among the layer's balancers.
    """

    balancer: Balancer
    index: int

    @property
    def owner(self) -> Balancer:
        """The balancer that owns the term."""
        return self.balancer

    @property
    def scope(self) -> Scope:
        """The tokens over which the balancer forms its loss."""
        return self.balancer.scope

    def count(
        self, context: SequenceContext, inner: Mapping[str, SequenceContext]
    ) -> Tensor | None:
        """The balancer's denominator for one micro-batch, from the context that its block sees."""
        assert self.layer is not None
        return self.balancer.count(inner.get(self.layer, context))

    def observed_in(self, losses: Losses) -> dict[str, Tensor]:
        """The sums of a micro-batch from which the loss is formed."""
        assert self.layer is not None
        return losses.records[self.layer]["ffn"].sums[self.index]


@dataclass(frozen=True)
class Ledger:
    """All terms of a model, in the order in which they are added."""

    heads: tuple[HeadTerm, ...]
    balance: tuple[BalanceTerm, ...]
    layers: tuple[LayerTerm, ...]

    def __iter__(self) -> Iterator[Term]:
        yield from self.heads
        yield from self.balance
        yield from self.layers

    @classmethod
    def of(cls, model: LanguageModel) -> "Ledger":
        """The ledger of a model, on any device, the meta device included."""
        heads = []
        for name, head in model.loss_heads():
            for term in _term_names(head):
                heads.append(HeadTerm(head_label(name, term), None, head, name, term))
        balance = []
        for path, layer in model.expert_layers().items():
            for index, balancer in enumerate(layer.balancers):
                balance.append(BalanceTerm(f"balance/{balancer.label}", path, balancer, index))
        layers = []
        for path, part, component in model.block_layers():
            if part not in ("attention", "ffn") and _term_names(component):
                raise TypeError(
                    f"{path}.{part} is inside another layer, so no record of its losses reaches a block"
                )
            for term in _term_names(component):
                layers.append(LayerTerm(f"{part}/{term}", path, component, part, term))
        return cls(tuple(heads), tuple(balance), tuple(layers))


def head_label(head: str, term: str) -> str:
    """The name of a head's term or metric in logs: `next_token`, `mtp/depth_1`."""
    return head if term == head else f"{head}/{term}"


def _term_names(component: LossHead | Attention | FeedForward) -> list[str]:
    """The names of a component's terms, which are the same for every micro-batch: those for a single token."""
    one_token = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return list(component.counts(SequenceContext.of(one_token, targets_BL=one_token)))
