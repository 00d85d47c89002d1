"""Routings that the tests of Quantile Balancing share: balancers of any size, affinities, steps by hand."""

from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.record import StepTotals
from core.contracts.router import GroupLimit, Routing
from core.contracts.schedule import Progress
from core.routing.gating import best_experts

from . import tiny

FREE = (f"{tiny.ROUTER}.groups=1", f"{tiny.ROUTER}.group_limit=null")
GROUPED = (f"{tiny.ROUTER}.groups=4", f"{tiny.ROUTER}.group_limit=2")
IN_PAIRS = (
    f"{tiny.ROUTER}.groups=2",
    f"{tiny.ROUTER}.group_limit=1",
    f"{tiny.ROUTER}.group_score=2",
)
LIMITS = {"one group": FREE, "groups": GROUPED, "groups by their two best": IN_PAIRS}
LIMIT = GroupLimit(4, 2, 2)
"""The limit of routings by hand."""


def recipe(**keys: Any) -> tuple[str, ...]:
    """Overrides that balance the tiny model by quantiles alone."""
    written = ", ".join(f"{key}: {value}" for key, value in {"name": "quantile", **keys}.items())
    return (f"{tiny.BALANCE}=[{{{written}}}]",)


def quantile(experts: int = 8, top_k: int = 2, **keys: Any) -> Any:
    """A balancer for any number of experts and choices, with biases of 0."""
    made = tiny.moe(tiny.build(*recipe(**keys))).balancers[0]
    return type(made)(made.config, None, experts=experts, top_k=top_k)


def drawn(tokens: int, experts: int, *, skew: float = 1.0, seed: int = 0) -> Tensor:
    """Sigmoid affinities of which some experts have more than others, fp64."""
    draw = torch.Generator().manual_seed(seed)
    noise_TE = torch.randn(tokens, experts, dtype=torch.float64, generator=draw)
    return (noise_TE + skew * torch.randn(experts, dtype=torch.float64, generator=draw)).sigmoid()


def routed(balancer: Any, scores_TE: Tensor, limit: GroupLimit | None = None) -> Routing:
    """The routing by biased affinities, within groups if there is a limit."""
    selected_by_TE = balancer.adjust_scores(scores_TE)
    of_groups = {} if limit is None else limit._asdict()
    expert_TK = best_experts(selected_by_TE, balancer.top_k, **of_groups)
    gate_TK = scores_TE.gather(1, expert_TK)
    return Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE, limit=limit)


def histogram(
    balancer: Any, routing: Routing, given: SequenceContext | None = None
) -> dict[str, Tensor]:
    """The tally of a micro-batch; by default all of its tokens are valid."""
    if given is None:
        given = SequenceContext.of(torch.zeros(1, len(routing.scores_TE), dtype=torch.int64))
    result: dict[str, Tensor] = balancer.tally(routing, given)
    return result


def end_step(balancer: Any, tallies: dict[str, Tensor], progress: Progress = tiny.START) -> None:
    """Ends a step; the load is not read."""
    balancer.on_step_end(StepTotals(None, tallies), progress)


def update(balancer: Any, scores_TE: Tensor, limit: GroupLimit | None = None) -> Routing:
    """Routes a step's tokens and ends the step; returns how they were routed."""
    routing = routed(balancer, scores_TE, limit)
    end_step(balancer, histogram(balancer, routing))
    return routing


def max_vio(routing: Routing, experts: int) -> float:
    """The largest load over the mean one, minus 1."""
    load_E = routing.expert_A.bincount(minlength=experts).double()
    return float(load_E.max() / load_E.mean() - 1)
