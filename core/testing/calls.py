"""Calls a component's forward, and ends its step, as the contract of its slot says."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from core.contracts.context import SequenceContext
from core.contracts.loss_head import HeadOutput, LossHead, SharedModules
from core.contracts.record import Record, StepTotals
from core.testing import bench
from core.testing.subject import Subject


def results(subject: Subject, module: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Calls a component's forward with one fixed micro-batch; returns every tensor that it returns."""
    slot = subject.entry.slot
    return call(slot, module, *call_arguments(slot, module, bench.padded([8, 5, 8]), dtype))


def call_arguments(
    slot: str, module: Any, context: SequenceContext, dtype: torch.dtype, nudge: float = 0.0
) -> tuple[Any, ...]:
    """The arguments of a forward of the slot's kind, for random states.

    Args:
        nudge: the size of a change of the states.
    """
    x_BLD = bench.states(context, dtype) + nudge * bench.states(context, dtype, seed=5)
    if slot == "router":
        return x_BLD.flatten(0, 1), context
    if slot == "loss_head":
        return x_BLD, context, shared(module, x_BLD)
    if slot == "balancer":
        return plain_routing(x_BLD, context), context
    return x_BLD, context


def call(slot: str, module: Any, *arguments: Any) -> list[Tensor]:
    """Calls a component's forward; returns every tensor that it returns."""
    if slot == "router":
        x_TD, context = arguments
        found = module(x_TD, _as_it_is, context)
    elif slot == "balancer":
        routing, context = arguments
        found = [module.adjust_scores(routing.scores_TE), module.observe(routing, context)]
    else:
        found = module(*arguments)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _as_it_is(scores_TE: Tensor) -> Tensor:
    return scores_TE


def plain_routing(x_BLD: Tensor, context: SequenceContext) -> Any:
    """The routing of some states by the kit's router."""
    build = bench.build_context(bench.KitPrecision(x_BLD.dtype))
    torch.manual_seed(0)
    router: Any = build.make(bench.section("router", bench.KitRouter), experts=bench.EXPERTS)
    return router(x_BLD.flatten(0, 1), _as_it_is, context)


def shared(head: LossHead, x_BLD: Tensor, *, tied: bool = False) -> SharedModules:
    """An embedding and an output to predict with, and states and a stream where the head reads them.

    Args:
        head: the head, whose `reads_blocks` and `reads_streams` say what it reads.
        x_BLD: used as the states after every block, and as the stream.
        tied: whether the output is the embedding.
    """
    draw = torch.Generator().manual_seed(2)
    shape = (bench.VOCABULARY, bench.WIDTH)
    embedding_VD = torch.randn(shape, dtype=torch.float64, generator=draw).to(x_BLD.dtype)
    output_VD = torch.randn(shape, dtype=torch.float64, generator=draw).to(x_BLD.dtype) * 0.1
    if tied:
        output_VD = embedding_VD
    states = dict.fromkeys(head.reads_blocks, x_BLD)
    stream = x_BLD if head.reads_streams else None
    return SharedModules(
        lambda tokens: embedding_VD[tokens], lambda hidden: hidden @ output_VD.T, states, stream
    )


@torch.no_grad()
def end_step(slot: str, module: Any, load: list[int]) -> None:
    """Ends a step with a load, and with the tallies and metrics that the module returns for one micro-batch."""
    if not hasattr(module, "on_step_end"):
        return
    training = module.training
    load_E = torch.tensor(load)
    arguments = call_arguments(slot, module, bench.padded([8, 5, 8]), torch.float64)
    if slot == "balancer":
        totals = StepTotals(load_E, module.tally(*arguments))
    else:
        found = module.train()(*arguments)
        record = found[1] if isinstance(found, tuple) else found
        own: tuple[Any, ...] = ()
        if isinstance(record, Record | HeadOutput):
            own = (record.tallies, record.metrics)
        its_load = load_E if getattr(module, "experts", 0) else None
        totals = StepTotals(its_load, *own)
    module.train(training).on_step_end(totals, bench.START)
