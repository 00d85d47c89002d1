"""Totals of a window: what its forwards recorded, added up over micro-batches and data ranks.

At the end of the step each component is handed its own part of them.
Loads and tallies are int64 and exact; metrics follow their own reduction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.contracts.record import MaxMetric, MeanMetric, Metric, StepTotals
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import Term
from core.model.parameters import named_parameters
from core.training.ranks import all_reduce_max, all_reduce_sum

Owner = tuple[str, str]
"""The part of the model that counted or measured: a block's path with the layer's name in it, or `heads` with a
head's name."""

HEADS = "heads"

DROPPED = ("dropped",)
"""The key under which a window's integers hold the dropped assignments."""


@dataclass
class WindowTotals:
    """What a window's forwards recorded, added up over its micro-batches.

    Args:
        sums: the sum of each loss term, detached.
        loads: int64 load of each layer with experts, by the block's path.
        dropped: int64 assignments that were dropped; None without experts.
        balancer_tallies: each balancer's int64 counts.
        tallies: int64 counts of layers and heads.
        metrics: metrics of layers and heads.
    """

    sums: dict[Term, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)
    dropped: Tensor | None = None
    balancer_tallies: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)
    tallies: dict[Owner, dict[str, Tensor]] = field(default_factory=dict)
    metrics: dict[Owner, dict[str, Metric]] = field(default_factory=dict)

    def add_sum(self, term: Term, value: Tensor) -> None:
        """Adds one micro-batch's sum of a loss term."""
        value = value.detach()
        if term in self.sums:
            value = self.sums[term] + value
        self.sums[term] = value

    def add_records(self, losses: Losses) -> None:
        """Adds what one micro-batch's layers and heads counted and measured."""
        for path, record in losses.expert_records().items():
            assert record.load_E is not None
            assert record.dropped is not None
            self._add_load(path, record.load_E, record.dropped)
            for index, counted in enumerate(record.balancer_tallies):
                _add_tallies(self.balancer_tallies.setdefault((path, index), {}), counted)
        for path, parts in losses.records.items():
            for name, record in parts.items():
                self._add_own((path, name), record.tallies, record.metrics)
        for name, output in losses.heads.items():
            self._add_own((HEADS, name), output.tallies, output.metrics)

    def _add_load(self, path: str, load_E: Tensor, dropped: Tensor) -> None:
        before = self.loads.get(path)
        self.loads[path] = load_E if before is None else before + load_E
        self.dropped = dropped if self.dropped is None else self.dropped + dropped

    def _add_own(
        self, owner: Owner, tallies: Mapping[str, Tensor], metrics: Mapping[str, Metric]
    ) -> None:
        if tallies:
            _add_tallies(self.tallies.setdefault(owner, {}), tallies)
        if metrics:
            _add_metrics(self.metrics.setdefault(owner, {}), metrics)

    def over_ranks(self) -> "WindowTotals":
        """Returns the same totals over all data ranks; all integers are exchanged as one tensor."""
        reduced = WindowTotals()
        for term, value in self.sums.items():
            reduced.sums[term] = all_reduce_sum(value)
        integers = _all_reduce_together(self._integers())
        for path in self.loads:
            reduced.loads[path] = integers["load", path]
        if self.dropped is not None:
            reduced.dropped = integers[DROPPED][0]
        for key, counted in self.balancer_tallies.items():
            reduced.balancer_tallies[key] = {n: integers["balancer", key, n] for n in counted}
        for owner, counted in self.tallies.items():
            reduced.tallies[owner] = {n: integers["own", owner, n] for n in counted}
        for owner, metrics in self.metrics.items():
            reduced.metrics[owner] = {n: metric_over_ranks(m) for n, m in metrics.items()}
        return reduced

    def _integers(self) -> dict[Any, Tensor]:
        """Every integer of the window under a key that says where it belongs."""
        found: dict[Any, Tensor] = {}
        for path, load_E in self.loads.items():
            found["load", path] = load_E
        if self.dropped is not None:
            found[DROPPED] = self.dropped[None]
        for key, counted in self.balancer_tallies.items():
            for name, tally in counted.items():
                found["balancer", key, name] = tally
        for owner, counted in self.tallies.items():
            for name, tally in counted.items():
                found["own", owner, name] = tally
        return found

    def of_balancer(self, path: str, index: int) -> StepTotals:
        """Totals that one balancer is handed at the end of the step."""
        return StepTotals(self.loads[path], self.balancer_tallies.get((path, index), {}))

    def of_owner(self, owner: Owner) -> StepTotals:
        """Totals that a layer or a head is handed at the end of the step."""
        path, name = owner
        load_E = self.loads.get(path) if name == "ffn" else None
        return StepTotals(load_E, self.tallies.get(owner, {}), self.metrics.get(owner, {}))


def metric_over_ranks(metric: Metric) -> Metric:
    """Reduces a metric over all data ranks, by its own reduction."""
    if isinstance(metric, MaxMetric):
        return MaxMetric(all_reduce_max(metric.maximum))
    return MeanMetric(all_reduce_sum(metric.sum), all_reduce_sum(metric.count))


def _detached(metric: Metric) -> Metric:
    if isinstance(metric, MaxMetric):
        return MaxMetric(metric.maximum.detach())
    return MeanMetric(metric.sum.detach(), metric.count.detach())


def _add_metrics(to: dict[str, Metric], metrics: Mapping[str, Metric]) -> None:
    for name, metric in metrics.items():
        metric = _detached(metric)
        if name in to:
            metric = to[name].merge(metric)  # type: ignore[arg-type]
        to[name] = metric


def _add_tallies(to: dict[str, Tensor], counted: Mapping[str, Tensor]) -> None:
    for name, tally in counted.items():
        if tally.dtype != torch.int64:
            raise TypeError(
                f"the tally {name!r} is {tally.dtype}; tallies are int64, so that they add up exactly"
            )
        to[name] = to[name] + tally if name in to else tally


def _all_reduce_together(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Sums int64 tensors over the ranks by one exchange: they travel as one flat tensor."""
    if not tensors:
        return {}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    sizes = [tensor.numel() for tensor in tensors.values()]
    parts = all_reduce_sum(flat).split(sizes)
    summed = {}
    for (key, tensor), part in zip(tensors.items(), parts, strict=True):
        summed[key] = part.view_as(tensor)
    return summed


def call_on_step_start(model: LanguageModel, progress: Progress) -> None:
    """Calls `on_step_start` of every layer."""
    for _, _, layer in model.block_layers():
        layer.on_step_start(progress)


def learning_alone(model: LanguageModel, progress: Progress) -> set[str] | None:
    """The names of the weights that are updated while the rest is frozen; None: every weight is updated."""
    found = [layer.learns_alone(progress) for _, _, layer in model.block_layers()]
    if all(weights is None for weights in found):
        return None
    alone = {id(weight) for weights in found for weight in weights or ()}
    return {named.name for named in named_parameters(model) if id(named.parameter) in alone}


def call_on_step_end(
    model: LanguageModel, totals: WindowTotals, progress: Progress, *, balance: bool = True
) -> None:
    """Calls `on_step_end` of every balancer, layer and head with its own totals of the step.

    Layers whose weights are on other ranks are left out. Their balancers are not: these keep counts and biases only,
    and are the same on every rank.

    Args:
        model: the model.
        totals: those of the step, over all ranks.
        progress: the position of the run at the end of the step.
        balance: False for a frozen model, whose balancers keep their state.
    """
    for path, layer in model.expert_layers().items():
        for index, balancer in enumerate(layer.balancers if balance else ()):
            if not balancer.is_frozen:
                balancer.on_step_end(totals.of_balancer(path, index), progress)
    for path, name, component in model.block_layers():
        if model.holds(path):
            component.on_step_end(totals.of_owner((path, name)), progress)
    for name, head in model.loss_heads():
        head.on_step_end(totals.of_owner((HEADS, name)), progress)
