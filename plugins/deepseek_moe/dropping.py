"""DeepSeek-V2's token dropping (arXiv 2405.04434, section 2.2.4): a budget for each device, in training only."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import Wrong
from core.contracts.router import Routing
from core.contracts.schema import setting
from core.routing.capacity import even_share, running_count


@dataclass(kw_only=True)
class TokenDropping:
    """Each device takes its share of the assignments, best affinities first; some sequences are never dropped."""

    devices: int = setting(doc="devices that the experts are divided over (D)")
    capacity_factor: float = setting(1.0, doc="a device's budget over its even share of the assignments")
    keep_sequences: float = setting(0.1, doc="fraction of the training sequences of which nothing is dropped")

    def check(self, parent: Any) -> None:
        """Raises `Wrong` where the devices do not divide the experts, or for what is no budget or no fraction."""
        if self.devices < 1 or parent.experts % self.devices:
            raise Wrong("devices", f"must divide experts = {parent.experts}")
        if not 0 <= self.capacity_factor < float("inf"):
            raise Wrong("capacity_factor", "must be at least 0 and finite")
        if not 0 <= self.keep_sequences <= 1:
            raise Wrong("keep_sequences", "must be between 0 and 1")


@torch.no_grad()
def drop_over_budget(routing: Routing, config: TokenDropping, context: SequenceContext, drawn_B: Tensor) -> Routing:
    """The routing with every device's assignments past its budget dropped, those of lowest affinity first.

    The budget is ceil(capacity_factor x valid assignments / devices) of this micro-batch. Assignments of protected
    sequences are kept in any case and use the budget up first; of equal affinities the earlier assignment is kept.

    Args:
        routing: of a strategy that drops nothing itself.
        config: the budget.
        context: says what is padding, which takes part in nothing and is not kept.
        drawn_B: a number in [0, 1) for each sequence; those below `keep_sequences` are protected.
    """
    experts = routing.scores_TE.shape[1]
    token_A, expert_A = routing.token_A, routing.expert_A
    valid_A = context.valid().flatten().index_select(0, token_A)
    length = max(context.tokens_BL.shape[1], 1)
    protected_A = (drawn_B < config.keep_sequences).index_select(0, token_A // length)
    affinity_A = routing.scores_TE.flatten().index_select(0, token_A * experts + expert_A)
    order_A = affinity_A.masked_fill(protected_A, torch.inf).argsort(descending=True, stable=True)
    device_A = expert_A // (experts // config.devices)
    rank_A = torch.empty_like(order_A).scatter(
        0,
        order_A,
        running_count(device_A.index_select(0, order_A), valid_A.index_select(0, order_A), config.devices),
    )
    within_A = rank_A < even_share(valid_A.sum(), config.devices, config.capacity_factor)
    return replace(routing, kept_A=valid_A & (within_A | protected_A))
