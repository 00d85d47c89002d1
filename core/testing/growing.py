"""Checks of what a layer and a router say about themselves so that larger layers can be made from them."""

import torch

from core.contracts.ffn import Networks
from core.testing import bench
from core.testing.clauses import check, require, skip_unless
from core.testing.routing import kept, routed
from core.testing.subject import Subject, perturbed

NETWORKS = "core/contracts/ffn.py, Networks"
ROUTER = "core/contracts/router.py, Router"


@check(
    "ffn", clause="the tensors that `networks` names have the sizes that it states", where=NETWORKS
)
def networks_are_as_stated(subject: Subject) -> None:
    """Compares the shapes in the state dict."""
    module = subject.made()
    networks = module.networks()
    skip_unless(networks is not None, "no other experts are made of its networks")
    state = module.state_dict()
    for name, shape in _stated(networks, bench.WIDTH):
        found = tuple(state[name].shape) if name in state else None
        require(found == shape, f"{name} is {found}, and must be {shape}")
    for name in networks.by_expert:
        found = tuple(state[name].shape) if name in state else ()
        counts = found[:1] == (networks.experts,)
        require(counts, f"{name} is {found}, and must have an entry for each expert")
    require(networks.experts == module.experts, "networks and the layer disagree about experts")


def _stated(networks: Networks, width: int) -> list[tuple[str, tuple[int, ...]]]:
    """The shapes of the matrices that `networks` names, one after the other: a name may be stated twice."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if networks.always is not None:
        first, second = networks.always
        shapes.append((first, (2 * networks.hidden, width)))
        shapes.append((second, (width, networks.hidden)))
    if networks.routed is not None:
        first, second = networks.routed
        shapes.append((first, (networks.experts, 2 * networks.expert_hidden, width)))
        shapes.append((second, (networks.experts, width, networks.expert_hidden)))
    return shapes


@check("router", clause="a token's gates add up to `gate_sum`, if it is stated", where=ROUTER)
def gates_add_up_as_stated(subject: Subject) -> None:
    """Adds up the gates of each token that keeps all its experts."""
    module = perturbed(subject.made())
    total = module.gate_sum
    skip_unless(total is not None, "no sum is stated")
    context = bench.tokens()
    routing = routed(module, context)
    tokens = context.tokens_BL.numel()
    sums_T = torch.zeros(tokens, dtype=torch.float64)
    lost_T = torch.zeros(tokens, dtype=torch.bool)
    lost_T[routing.token_A[~kept(routing)]] = True
    sums_T.index_add_(0, routing.token_A, routing.gate_A.detach().double())
    off = (sums_T[~lost_T] - total).abs().max()
    require(bool(off < 1e-5 * max(total, 1.0)), f"gates are off their sum {total} by {off:.3g}")
