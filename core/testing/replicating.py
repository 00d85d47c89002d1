"""Checks of layers that run on physical experts."""

import torch

from core.contracts.errors import UserError
from core.contracts.ffn import FeedForward
from core.testing import bench
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import Subject, perturbed, require_close

REPLICATE = "core/contracts/ffn.py, FeedForward: `replicate`"


@check(
    "ffn",
    clause="on physical experts outputs and counts are the same, every copy has a part, and training is refused",
    where=REPLICATE,
)
def copies_compute_the_same(subject: Subject) -> None:
    """Gives half of the experts three copies, out of order, and compares with the layer as it was."""
    module = perturbed(subject.made()).eval()
    skip_unless(module.experts > 0, "it has no experts")
    own = type(module).replicate is not FeedForward.replicate
    skip_unless(own, "it cannot have replicas")
    context = bench.tokens(8, 8)
    x_BLD = bench.states(context)
    with torch.no_grad():
        before_BLD, before = module(x_BLD, context)
    require(not module.is_replicated, "it is replicated from the start")
    experts = list(range(module.experts))
    expert_P = [*reversed(experts), *experts[::2], *experts[::2]]
    module.replicate(expert_P, range(len(expert_P)))
    require(module.is_replicated, "it does not say that it is replicated")
    with torch.no_grad():
        after_BLD, after = module(x_BLD, context)
    require_close(after_BLD, before_BLD, "copies of experts compute something else")
    require(torch.equal(after.load_E, before.load_E), "the load of logical experts has changed")
    load_P = after.tallies.get("physical_load")
    require(load_P is not None, "the record has no tally physical_load")
    index_P = torch.tensor(expert_P)
    sums_E = torch.zeros_like(after.load_E).index_add(0, index_P, load_P)
    require(torch.equal(sums_E, after.load_E), "copies do not add up to the load of their expert")
    busy_P = after.load_E[index_P] >= 24
    require(bool((load_P[busy_P] > 0).all()), "a copy of a busy expert received nothing")
    try:
        module.train()(x_BLD, context)
    except UserError:
        return
    require(False, "it trains on copies of experts, which would part")
