"""Clauses about what layers, heads and balancers count and measure beside their results."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.loss_head import HeadOutput
from core.contracts.record import MaxMetric, MeanMetric, Metric
from core.testing import bench
from core.testing.calls import plain_routing, shared
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import Subject, perturbed


@check(
    "attention",
    "ffn",
    "loss_head",
    "balancer",
    clause="tallies are int64, metrics single numbers without a gradient, and no batch changes their names",
    where="core/contracts/record.py, Record; core/contracts/balancer.py, Balancer: `tally`",
)
def tallies_and_metrics_are_well_formed(subject: Subject) -> None:
    """Compares a batch with the same one whose padding is changed, and with one of nothing but padding."""
    module = perturbed(subject.made()).eval()
    context = bench.padded([8, 3, 0])
    x_BLD = bench.states(context)
    tallies, metrics = _counted(subject, module, x_BLD, context)
    skip_unless(tallies or metrics, "it counts and measures nothing")
    for name, tally in tallies.items():
        require(tally.dtype == torch.int64, f"the tally {name} is {tally.dtype}")
    for name, metric in metrics.items():
        require(
            isinstance(metric, MeanMetric | MaxMetric), f"the metric {name} is a {type(metric)}"
        )
        for value in vars(metric).values():
            single = value.ndim == 0 and not value.requires_grad
            require(single, f"the metric {name} holds {tuple(value.shape)}, or a gradient")
    moved = bench.change_padding(x_BLD, context)
    tallies_again, _ = _counted(subject, module, moved, context)
    for name, tally in tallies.items():
        require(torch.equal(tally, tallies_again[name]), f"padding changes the tally {name}")
    nothing = bench.padded([0, 0])
    empty, unmeasured = _counted(subject, module, bench.states(nothing), nothing)
    require(set(empty) == set(tallies), "a batch of padding has other tallies")
    require(set(unmeasured) == set(metrics), "a batch of padding has other metrics")
    for name, tally in empty.items():
        require(
            tally.shape == tallies[name].shape, f"the tally {name} has another shape for padding"
        )
        require(not tally.any(), f"the tally {name} counts padding")
    for name, metric in unmeasured.items():
        require(type(metric) is type(metrics[name]), f"the metric {name} has another reduction")
        if isinstance(metric, MeanMetric):
            require(not metric.count.any(), f"the metric {name} counts padding")


def _counted(
    subject: Subject, module: Any, x_BLD: Tensor, context: SequenceContext
) -> tuple[Mapping[str, Tensor], Mapping[str, Metric]]:
    """The tallies and metrics of one micro-batch."""
    if subject.entry.slot == "balancer":
        return module.tally(plain_routing(x_BLD, context), context), {}
    if subject.entry.slot == "loss_head":
        found: HeadOutput = module(x_BLD, context, shared(module, x_BLD))
        return found.tallies, found.metrics
    result = module(x_BLD, context)
    if not isinstance(result, tuple) or result[1] is None:
        return {}, {}
    return result[1].tallies, result[1].metrics
