"""Totals of a validation: loss, bits per byte, load over the whole split, and metrics of heads and layers."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from core.contracts.context import SequenceContext
from core.contracts.record import MaxMetric, MeanMetric
from core.model.by_source import SOURCE
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import Ledger, head_label
from core.training.load import measures


class ValidationTotals(Metric):
    """Sums over the validation split and over ranks; every state is an exact count or an fp64 sum.

    Args:
        model: the model whose heads and layers are counted.
        ledger: the model's loss terms.
        validation_bytes: bytes of the validation documents' text, the denominator of bits per byte.
        source_bytes: the same for each part of a mixture, by its name.
    """

    full_state_update = False

    def __init__(
        self,
        model: LanguageModel,
        ledger: Ledger,
        validation_bytes: int,
        source_bytes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.source_bytes = dict(source_bytes or {})
        self.bytes = validation_bytes
        self.terms = ledger.heads
        self.main: str | None = None
        for term in self.terms:
            if self.main is None and "next_token" in term.head.capabilities:
                self.main = term.label
        self.layers = {path: layer.experts for path, layer in model.expert_layers().items()}
        for index, experts in enumerate(self.layers.values()):
            load_E = torch.zeros(experts, dtype=torch.int64)
            self.add_state(f"load {index}", load_E, dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.names: list[str] = []
        self.maxima: list[str] = []

    def update(self, losses: Losses, context: SequenceContext) -> None:
        """Adds one batch: the losses and records that the model returned for a context."""
        for term in self.terms:
            count = term.count(context, {})
            assert count is not None
            self._add_mean(term.label, term.sum_in(losses), count)
        for head, output in losses.heads.items():
            for name, metric in output.metrics.items():
                self._add_metric(head_label(head, name), metric)
        for parts in losses.records.values():
            for layer, record in parts.items():
                for name, metric in record.metrics.items():
                    self._add_metric(f"{layer}/{name}", metric)
        records = losses.expert_records()
        for index, path in enumerate(self.layers):
            load_E = records[path].load_E
            dropped = records[path].dropped
            assert load_E is not None
            assert dropped is not None
            self._state(f"load {index}").add_(load_E)
            self._state("dropped").add_(dropped)

    def compute(self) -> dict[str, float]:
        """`val_loss` and `val_bits_per_byte` of the main head, `val/<term>` and `val/<metric>`, load over the split."""
        means = {}
        for name in self.names:
            count = int(self._state(f"count {name}"))
            means[name] = float(self._state(f"sum {name}")) / max(count, 1)
        values = {f"val/{name}": mean for name, mean in means.items()}
        for name in self.maxima:
            values[f"val/{name}"] = float(self._state(f"maximum {name}"))
        if self.main is not None and self.main in means:
            values["val_loss"] = means[self.main]
            if self.bytes:
                nats = float(self._state(f"sum {self.main}"))
                values["val_bits_per_byte"] = nats / math.log(2) / self.bytes
            for source, size in self.source_bytes.items():
                label = f"{self.main}/{SOURCE}{source}"
                if size and label in means:
                    nats = float(self._state(f"sum {label}"))
                    values[f"val_bits_per_byte/{source}"] = nats / math.log(2) / size
        loads = [self._state(f"load {index}") for index in range(len(self.layers))]
        if loads:
            assigned = sum(int(load_E.sum()) for load_E in loads)
            values["val_dropped_fraction"] = int(self._state("dropped")) / max(assigned, 1)
        for name, value in measures(loads).items():
            values[f"val_{name}_global"] = float(value)
        return values

    def _add_mean(self, name: str, value: Tensor, count: Tensor) -> None:
        """Adds to a mean; its states are made at the first batch, which has every name (see `Record`)."""
        if name in self.maxima:
            raise TypeError(f"layers report the metric {name} by different reductions")
        if name not in self.names:
            self.names.append(name)
            self._make_state(f"sum {name}", torch.zeros((), dtype=torch.float64), "sum")
            self._make_state(f"count {name}", torch.zeros((), dtype=torch.int64), "sum")
        self._state(f"sum {name}").add_(value.double())
        self._state(f"count {name}").add_(count.to(torch.int64))

    def _add_metric(self, label: str, metric: MeanMetric | MaxMetric) -> None:
        if isinstance(metric, MeanMetric):
            self._add_mean(label, metric.sum, metric.count)
        else:
            self._add_maximum(label, metric)

    def _add_maximum(self, name: str, metric: MaxMetric) -> None:
        if name in self.names:
            raise TypeError(f"layers report the metric {name} by different reductions")
        if name not in self.maxima:
            self.maxima.append(name)
            lowest = torch.full((), -math.inf, dtype=torch.float64)
            self._make_state(f"maximum {name}", lowest, "max")
        state = self._state(f"maximum {name}")
        state.copy_(torch.maximum(state, metric.value()))

    def _make_state(self, name: str, start: Tensor, reduction: str) -> None:
        self.add_state(name, start, dist_reduce_fx=reduction)
        setattr(self, name, self._state(name).to(self.device))

    def _state(self, name: str) -> Tensor:
        state: Tensor = getattr(self, name)
        return state
