"""The values of a step that are logged: losses of the ledger's terms, and metrics of balancers, layers and heads."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from core.contracts.record import MeanMetric, Metric
from core.contracts.schedule import Progress
from core.model.by_source import SOURCE
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger, Term, head_label
from core.training.totals import HEADS, WindowTotals
from core.training.window import contribution

EXCHANGED = ("bytes_between_nodes", "bytes_inside_nodes", "remote_nodes")
"""Tallies of `core.contracts.dispatcher.Dispatcher.tallies`."""


def loss_metrics(
    ledger: Ledger, totals: WindowTotals, counts: Mapping[Term, Tensor], progress: Progress
) -> dict[str, Tensor]:
    """Every term's mean under its own name, and the one sum that was minimised, in fp64.

    Terms of layers are logged with their coefficient, as means over layers. A head's mean is rounded to the
    format of its loss before it enters the total, because the log shows it by itself.

    Args:
        ledger: the terms of the objective.
        totals: their sums over the window and over all ranks.
        counts: their denominators over the window.
        progress: the step, for the coefficients.
    """
    values: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    for term in ledger.heads:
        mean = (totals.sums[term] / counts[term].clamp(min=1)).double()
        values[f"loss/{term.label}"] = mean
        parts.append(term.coefficient(progress) * mean)
    by_label: dict[str, list[Tensor]] = {}
    for layer_term in (*ledger.balance, *ledger.layers):
        if layer_term in totals.sums:
            total = totals.sums[layer_term].double()
            scaled = contribution(layer_term.coefficient(progress), total, counts[layer_term])
            by_label.setdefault(f"loss/{layer_term.label}", []).append(scaled)
            parts.append(scaled)
    values.update(_means(by_label))
    values["loss/total"] = torch.stack(parts).sum()
    return values


def balancer_metrics(model: LanguageModel) -> dict[str, Tensor]:
    """Each balancer's own metrics, as means over layers."""
    found: dict[str, list[Tensor]] = {}
    for layer in model.expert_layers().values():
        for balancer in layer.balancers:
            for name, value in balancer.metrics().items():
                found.setdefault(f"balance/{name}", []).append(value)
    return _means(found)


def component_metrics(totals: WindowTotals) -> dict[str, Tensor]:
    """Metrics of layers and heads in the step; a layer's are taken over all layers of its slot, by their reduction."""
    found: dict[str, Metric] = {}
    for (path, name), metrics in totals.metrics.items():
        for metric_name, metric in metrics.items():
            if path == HEADS:
                label = head_label(name, metric_name)
            else:
                label = f"{name}/{metric_name}"
            before = found.setdefault(label, metric)
            if type(before) is not type(metric):
                raise TypeError(f"layers report the metric {label} by different reductions")
            if before is not metric:
                found[label] = before.merge(metric)  # type: ignore[arg-type]
    return {label: _value_of(label, metric) for label, metric in found.items()}


def _value_of(label: str, metric: Metric) -> Tensor:
    """The value of a metric; NaN for a source of which the step has no sequence."""
    value = metric.value()
    if SOURCE in label and isinstance(metric, MeanMetric):
        value = value.masked_fill(metric.count == 0, math.nan)
    return value


def exchange_metrics(totals: WindowTotals) -> dict[str, Tensor]:
    """What dispatchers moved between ranks in the step, added up over layers; empty where nothing is moved."""
    found: dict[str, list[Tensor]] = {}
    for tallies in totals.tallies.values():
        for name in EXCHANGED:
            if name in tallies:
                found.setdefault(f"exchange/{name}", []).append(tallies[name])
    return {label: torch.stack(values).sum() for label, values in found.items()}


def as_scalar(value: Tensor | float) -> Tensor:
    """A scalar for the loggers: a tensor as fp32, a number as fp64 with NaN if it is not finite."""
    if isinstance(value, Tensor):
        return value.detach().float()
    if not math.isfinite(value):
        value = float("nan")
    return torch.tensor(value, dtype=torch.float64)


def _means(by_label: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {label: torch.stack(values).mean() for label, values in by_label.items()}
