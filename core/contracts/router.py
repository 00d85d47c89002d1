"""The router slot, and the one form in which every routing strategy states its decision."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.counting import count
from core.contracts.record import as_pytree

AdjustScores = Callable[[Tensor], Tensor]
"""Maps scores T x E to those that experts are selected by; balancers supply it, and without one it is the identity."""


class GroupLimit(NamedTuple):
    """A limit on the groups of experts that a token reaches: the first arguments of `core.routing.gating.best_experts`.

    Args:
        groups: equal groups of neighbouring experts.
        group_limit: groups that a token reaches, those with the highest scores.
        experts_per_group_score: how many of a group's best adjusted affinities are added up to its score.
    """

    groups: int
    group_limit: int
    experts_per_group_score: int = 1


@as_pytree
@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert: a list of assignments whose length no data changes, for every strategy.

    T tokens, E experts, A assignments. Top-k strategies give A = T x K in token-major order; expert choice
    gives A = E x C.

    Args:
        token_A: int64, the index of the token.
        expert_A: int64, the index of its expert.
        gate_A: the weight of that expert's output; it carries the router's gradient.
        choice_A: int64, which choice of the token this is (0 the first).
        scores_TE: affinities, without any bias.
        logits_TE: what the affinities were computed from.
        kept_A: bool, False for an assignment that is not carried out; None: all are.
        choices: K where the list is token-major with K choices for every token, else 0.
        limit: the groups within which the K best adjusted affinities were selected; None: among all experts.
    """

    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    choice_A: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    kept_A: Tensor | None = None
    choices: int = 0
    limit: GroupLimit | None = None

    @classmethod
    def top_k(
        cls,
        expert_TK: Tensor,
        gate_TK: Tensor,
        scores_TE: Tensor,
        logits_TE: Tensor,
        kept_TK: Tensor | None = None,
        limit: GroupLimit | None = None,
    ) -> "Routing":
        """Makes the routing of K choices for every token."""
        tokens, choices = expert_TK.shape
        device = expert_TK.device
        kept_A = None if kept_TK is None else kept_TK.reshape(-1)
        return cls(
            token_A=torch.arange(tokens, device=device).repeat_interleave(choices),
            expert_A=expert_TK.reshape(-1),
            gate_A=gate_TK.reshape(-1),
            choice_A=torch.arange(choices, device=device).repeat(tokens),
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            kept_A=kept_A,
            choices=choices,
            limit=limit,
        )

    def load(self, valid_T: Tensor) -> Tensor:
        """The number of assignments of valid tokens to each expert, before drops: int64 E."""
        return count(self.expert_A, self.scores_TE.shape[1], valid_T[self.token_A])

    def dropped(self, valid_T: Tensor) -> Tensor:
        """The number of assignments of valid tokens that are not kept: int64, a scalar."""
        if self.kept_A is None:
            return torch.zeros((), dtype=torch.int64, device=self.expert_A.device)
        return (valid_T[self.token_A] & ~self.kept_A).sum()


CAPABILITIES = {
    "selects_with_bias": "selects through the balancers' bias",
    "groups": "limits the groups of experts that a token reaches",
    "capacity": "limits how many tokens an expert takes",
    "causal": "lets no token's output depend on what a later token is",
    "batch_dependent": "lets a token's output depend on the other sequences of its micro-batch",
    "learned": "learns which experts to choose",
    "drops": "drops some of its assignments",
    "ordered": "treats experts differently by their index",
    "token_choice": "gives every token the same number of experts",
}
"""What a router may declare, as the end of a sentence that begins with "a router that"."""


class Router(nn.Module, Component, ABC):
    """Chooses experts for tokens: `(x_TD, adjust_scores, context) -> Routing`.

    Logits and affinities are computed in fp32 or wider, whatever the model's precision and also under
    autocast. `adjust_scores` changes which experts are selected, never a gate. The result depends on nothing but the
    arguments, `context.step` and whether the module trains. Padding takes part in nothing: it takes no capacity and
    no place in an expert's choice. No gradient goes through selection. Experts have no order, unless they form
    groups or `ordered` is declared. A batch without any token is valid.

    `capabilities` are words of `CAPABILITIES`. The `Config` of a router with `groups` has `groups`, their number, and
    `reachable_groups`, how many of them a token may use; if that limits it and balancers bias it, its routings have a
    `limit`.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        super().__init__()
        self.experts = experts

    @property
    @abstractmethod
    def top_k(self) -> int:
        """The number of assignments per token (on average where the strategy does not fix it)."""

    @property
    def capacity_factor(self) -> float | None:
        """The most that an expert takes in training, over its even share of the assignments; None: no limit."""
        return None

    @property
    def gate_sum(self) -> float | None:
        """The sum of a token's gates, if it is the same for every token whose experts are all kept; None otherwise."""
        return None

    @abstractmethod
    def forward(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """Routes the tokens of a micro-batch; T = B x L."""

    def choices(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> tuple[Tensor, Tensor] | None:
        """The experts T x K and gates T x K of tokens in decoding, the same as those of `forward`.

        None where a token does not always have the same number of experts, or this form saves nothing: `forward` is
        then called.
        """
        return None

    @abstractmethod
    def costs(self) -> Costs:
        """The costs of one token."""
