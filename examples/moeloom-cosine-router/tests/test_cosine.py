"""Tests of cosine routing itself; `pytest --moeloom-plugin moeloom_cosine_router` checks its contract."""

import math

import pytest
import torch
from torch import Tensor

import core
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Router, Routing

SMALL = ("model.dim=32", "model.blocks.moe.count=1", "model.heads.mtp=null", "precision.name=fp64")
ROUTER = "model.blocks.moe.ffn.router"


def router(*overrides: str) -> Router:
    """The router of a small model in fp64."""
    recipe = core.compose(
        "dsv3_small", [*SMALL, f"{ROUTER}={{name: cosine, top_k: 4, scale: 1.0}}", *overrides]
    )
    (layer,) = core.build(recipe).expert_layers().values()
    found = layer.router
    assert isinstance(found, Router)
    return found


def route(of: Router, x_TD: Tensor) -> Routing:
    """Routes tokens without a balancer."""
    context = SequenceContext.of(torch.zeros(1, len(x_TD), dtype=torch.int64))
    routing = of(x_TD, lambda scores_TE: scores_TE, context)
    assert isinstance(routing, Routing)
    return routing


def tokens() -> Tensor:
    return torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_affinities_are_those_of_a_loop() -> None:
    one, x_TD = router(f"{ROUTER}.temperature=3"), tokens()
    routing, weights = route(one, x_TD), one.centroids.weight.detach()
    for t, x in enumerate(x_TD):
        for e, w in enumerate(weights):
            cosine = float(x @ w) / (float(x.norm()) * float(w.norm()))
            assert float(routing.scores_TE[t, e]) == pytest.approx(
                1 / (1 + math.exp(-3 * cosine)), abs=1e-12
            )
    torch.testing.assert_close(
        routing.gate_A.view(20, 4).sum(dim=1), torch.ones(20, dtype=torch.float64)
    )


def test_lengths_do_not_matter() -> None:
    one, x_TD = router(), tokens()
    factors_T1 = torch.logspace(-3, 3, 20, dtype=torch.float64)[:, None]
    expected, scaled = route(one, x_TD), route(one, x_TD * factors_T1)
    assert torch.equal(scaled.expert_A, expected.expert_A)
    torch.testing.assert_close(scaled.gate_A, expected.gate_A, rtol=1e-10, atol=0)


def test_the_temperature_is_learned() -> None:
    one = router()
    (route(one, tokens()).gate_A * torch.linspace(1, 2, 80, dtype=torch.float64)).sum().backward()
    assert float(one.log_temperature.grad.abs()) > 1e-6


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (f"{ROUTER}={{name: cosine, top_k: 1}}", "must be between 2 and experts = 16"),
        (
            f"{ROUTER}={{name: cosine, top_k: 4, groups: 4}}",
            "cosine lets a token reach every expert",
        ),
        (f"{ROUTER}.temperature=0", "must be more than 0 and finite"),
    ],
)
def test_mistakes_are_reported(override: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        router(override)
