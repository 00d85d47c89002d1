"""The router slot, and the one form that every routing strategy's decision takes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.record import as_pytree

Adjust = Callable[[Tensor], Tensor]
"""Scores for selection from scores: the balancers' say in who is chosen, identity without one."""


@as_pytree
@dataclass(frozen=True)
class Routing:
    """Who goes where: a static-length list of assignments, for every strategy.

    T tokens, E experts, A assignments. Top-k strategies give A = T x K in token-major order; expert choice
    gives A = E x C.

    Args:
        token_A: int64, which token.
        expert_A: int64, to which expert.
        gate_A: the weight of that expert's output; it carries the router's gradient.
        choice_A: int64, which choice of the token this is (0 the first).
        scores_TE: affinities, without any bias.
        logits_TE: what the affinities were computed from.
        kept_A: bool, False for a dropped assignment; None: nothing is dropped.
        choices: K where the list is token-major with K choices for every token, else 0.
    """

    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    choice_A: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    kept_A: Tensor | None = None
    choices: int = 0

    @classmethod
    def top_k(cls, expert_TK: Tensor, gate_TK: Tensor, scores_TE: Tensor, logits_TE: Tensor) -> "Routing":
        """The routing of K choices for every token."""
        tokens, choices = expert_TK.shape
        device = expert_TK.device
        return cls(
            token_A=torch.arange(tokens, device=device).repeat_interleave(choices),
            expert_A=expert_TK.reshape(-1),
            gate_A=gate_TK.reshape(-1),
            choice_A=torch.arange(choices, device=device).repeat(tokens),
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            choices=choices,
        )

    def load(self, valid_T: Tensor) -> Tensor:
        """int64 assignments of valid tokens to each expert, before drops."""
        load_E = torch.zeros(self.scores_TE.shape[1], dtype=torch.int64, device=self.expert_A.device)
        return load_E.index_add(0, self.expert_A, valid_T[self.token_A].to(torch.int64))

    def dropped(self, valid_T: Tensor) -> Tensor:
        """int64 scalar: assignments of valid tokens that are not kept."""
        if self.kept_A is None:
            return torch.zeros((), dtype=torch.int64, device=self.expert_A.device)
        return (valid_T[self.token_A] & ~self.kept_A).sum()


class Router(nn.Module, Component, ABC):
    """Chooses experts for tokens: `(x_TD, adjust, context) -> Routing`.

    Logits and affinities are computed in fp32 or wider, whatever the model's precision and also under
    autocast. `adjust` changes who is selected, never a gate. Everything is a function of its arguments and
    `context.step`.

    Capabilities: `selects_with_bias` (selection goes through `adjust`), `groups`, `capacity`, `causal` (a
    token's experts depend on no later token), `batch_dependent`, `learned`, `drops`.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        super().__init__()
        self.experts = experts

    @property
    @abstractmethod
    def top_k(self) -> int:
        """Assignments per token (on average where the strategy does not fix them)."""

    @abstractmethod
    def forward(self, x_TD: Tensor, adjust: Adjust, context: SequenceContext) -> Routing:
        """Route the tokens of a micro-batch; T = B x L."""

    @abstractmethod
    def costs(self) -> Costs:
        """For one token."""
