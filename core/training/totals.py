"""What a window's forwards saw, added up over micro-batches and data ranks, and handed to the components at its end.

Loads and tallies are int64 and exact; metrics follow their own reduction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.contracts.record import MaxMetric, MeanMetric, Metric, StepTotals
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import Term
from core.training.ranks import all_reduce_max, total

Owner = tuple[str, str]
"""Who counted or measured: the path of a block with the layer's name in it, or `heads` with a head's name."""

HEADS = "heads"

DROPPED = ("dropped",)
"""The key of the dropped assignments among all integers of a window."""


@dataclass
class WindowTotals:
    """What a window's forwards saw, added up over its micro-batches.

    Args:
        sums: each loss term's sum, detached.
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
        """Add to a term's sum."""
        self.sums[term] = self.sums[term] + value.detach() if term in self.sums else value.detach()

    def add_records(self, losses: Losses) -> None:
        """Add what one micro-batch's layers and heads counted and measured."""
        for path, record in losses.expert_records().items():
            assert record.load_E is not None
            assert record.dropped is not None
            before = self.loads.get(path)
            self.loads[path] = record.load_E if before is None else before + record.load_E
            self.dropped = record.dropped if self.dropped is None else self.dropped + record.dropped
            for index, counted in enumerate(record.balancer_tallies):
                _add_tallies(self.balancer_tallies.setdefault((path, index), {}), counted)
        for path, parts in losses.records.items():
            for name, record in parts.items():
                self._add_own((path, name), record.tallies, record.metrics)
        for name, output in losses.heads.items():
            self._add_own((HEADS, name), output.tallies, output.metrics)

    def _add_own(self, owner: Owner, tallies: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> None:
        if tallies:
            _add_tallies(self.tallies.setdefault(owner, {}), tallies)
        mine = self.metrics.setdefault(owner, {}) if metrics else {}
        for name, metric in metrics.items():
            detached = _mapped(metric, Tensor.detach)
            mine[name] = mine[name].merge(detached) if name in mine else detached  # type: ignore[arg-type]

    def over_ranks(self) -> "WindowTotals":
        """The same over all data ranks; all integers travel as one tensor."""
        flat, put_back = _pack(self._integers())
        sums = {term: total(value) for term, value in self.sums.items()}
        if flat is None:
            return WindowTotals(sums, metrics=self._metrics_over_ranks())
        integers = put_back(total(flat))
        loads = {path: integers["load", path] for path in self.loads}
        dropped = None if self.dropped is None else integers[DROPPED][0]
        return WindowTotals(
            sums,
            loads,
            dropped,
            {key: {n: integers["balancer", key, n] for n in counted} for key, counted in self.balancer_tallies.items()},
            {key: {n: integers["own", key, n] for n in counted} for key, counted in self.tallies.items()},
            self._metrics_over_ranks(),
        )

    def _integers(self) -> dict[Any, Tensor]:
        found: dict[Any, Tensor] = {("load", path): load_E for path, load_E in self.loads.items()}
        if self.dropped is not None:
            found[DROPPED] = self.dropped[None]
        for key, counted in self.balancer_tallies.items():
            found |= {("balancer", key, name): tally for name, tally in counted.items()}
        for owner, own in self.tallies.items():
            found |= {("own", owner, name): tally for name, tally in own.items()}
        return found

    def _metrics_over_ranks(self) -> dict[Owner, dict[str, Metric]]:
        return {
            owner: {name: metric_over_ranks(metric) for name, metric in metrics.items()}
            for owner, metrics in self.metrics.items()
        }

    def of_balancer(self, path: str, index: int) -> StepTotals:
        """What one balancer is handed at the end of the step."""
        return StepTotals(self.loads[path], self.balancer_tallies.get((path, index), {}))

    def of_owner(self, owner: Owner) -> StepTotals:
        """What a layer or a head is handed at the end of the step."""
        path, name = owner
        load_E = self.loads.get(path) if name == "ffn" else None
        return StepTotals(load_E, self.tallies.get(owner, {}), self.metrics.get(owner, {}))


def metric_over_ranks(metric: Metric) -> Metric:
    """A metric over all data ranks, by its own reduction."""
    if isinstance(metric, MaxMetric):
        return MaxMetric(all_reduce_max(metric.maximum))
    return MeanMetric(total(metric.sum), total(metric.count))


def _mapped(metric: Metric, change: Callable[[Tensor], Tensor]) -> Metric:
    if isinstance(metric, MaxMetric):
        return MaxMetric(change(metric.maximum))
    return MeanMetric(change(metric.sum), change(metric.count))


def _add_tallies(to: dict[str, Tensor], counted: Mapping[str, Tensor]) -> None:
    for name, tally in counted.items():
        if tally.dtype != torch.int64:
            raise TypeError(f"the tally {name!r} is {tally.dtype}; tallies are int64, so that they add up exactly")
        to[name] = to[name] + tally if name in to else tally


def _pack(tensors: Mapping[Any, Tensor]) -> tuple[Tensor | None, Callable[[Tensor], dict[Any, Tensor]]]:
    """Some int64 tensors as one flat one, and the way back; None where there is none."""

    def put_back(flat: Tensor) -> dict[Any, Tensor]:
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {key: part.view_as(tensors[key]) for key, part in zip(tensors, parts, strict=True)}

    if not tensors:
        return None, put_back
    return torch.cat([tensor.flatten() for tensor in tensors.values()]), put_back


def call_on_step_end(model: LanguageModel, totals: WindowTotals, progress: Progress) -> None:
    """Call `on_step_end` of every balancer, layer and head with what it, or its layer, saw in the step."""
    for path, layer in model.expert_layers().items():
        for index, balancer in enumerate(layer.balancers):
            balancer.on_step_end(totals.of_balancer(path, index), progress)
    for path, name, component in model.block_layers():
        component.on_step_end(totals.of_owner((path, name)), progress)
    for name, head in model.loss_heads():
        head.on_step_end(totals.of_owner((HEADS, name)), progress)
