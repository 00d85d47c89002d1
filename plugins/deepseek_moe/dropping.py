"""DeepSeek-V2's token dropping (arXiv 2405.04434, section 2.2.4): a budget for each device, in training only."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import Routing
from core.contracts.schema import setting
from core.routing.groups import even_share, running_count


@dataclass(kw_only=True)
class TokenDropping:
    """Settings of the device budget: each device takes its share of the assignments, best affinities first."""

    devices: int = setting(doc="devices that the experts are divided over (D)")
    capacity_factor: float = setting(
        1.0, doc="a device's budget over its even share of the assignments"
    )
    keep_sequences: float = setting(
        0.1, doc="fraction of the training sequences of which nothing is dropped"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` if the devices do not divide the experts, or a factor or fraction is out of range."""
        if self.devices < 1 or parent.experts % self.devices:
            raise ConfigError("devices", f"must divide experts = {parent.experts}")
        if not 0 <= self.capacity_factor < float("inf"):
            raise ConfigError("capacity_factor", "must be at least 0 and finite")
        if not 0 <= self.keep_sequences <= 1:
            raise ConfigError("keep_sequences", "must be between 0 and 1")


@torch.no_grad()
def drop_over_budget(
    routing: Routing, config: TokenDropping, context: SequenceContext, drawn_B: Tensor
) -> Routing:
    """The routing with every device's assignments past its budget dropped, those of lowest affinity first.

    The budget is ceil(capacity_factor x valid assignments / devices) of this micro-batch. Assignments of protected
    sequences are kept in any case and use the budget up first; of equal affinities the earlier assignment is kept.

    Args:
        routing: the routing of a strategy that drops nothing itself.
        config: the budget.
        context: says which tokens are padding; they use no budget and are not kept.
        drawn_B: a number in [0, 1) for each sequence; those below `keep_sequences` are protected.
    """
    experts = routing.scores_TE.shape[1]
    token_A = routing.token_A
    expert_A = routing.expert_A
    valid_A = context.valid().flatten().index_select(0, token_A)
    length = max(context.tokens_BL.shape[1], 1)
    protected_A = (drawn_B < config.keep_sequences).index_select(0, token_A // length)
    affinity_A = routing.scores_TE.flatten().index_select(0, token_A * experts + expert_A)
    order_A = affinity_A.masked_fill(protected_A, torch.inf).argsort(descending=True, stable=True)
    device_A = expert_A // (experts // config.devices)
    sorted_device_A = device_A.index_select(0, order_A)
    sorted_valid_A = valid_A.index_select(0, order_A)
    sorted_rank_A = running_count(sorted_device_A, sorted_valid_A, config.devices)
    rank_A = torch.empty_like(order_A).scatter(0, order_A, sorted_rank_A)
    within_A = rank_A < even_share(valid_A.sum(), config.devices, config.capacity_factor)
    return replace(routing, kept_A=valid_A & (within_A | protected_A))
