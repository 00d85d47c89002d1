"""What validation adds up: loss, bits per byte, load over the whole split, and metrics of heads and layers."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from core.contracts.context import SequenceContext
from core.contracts.record import MaxMetric, MeanMetric
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import Ledger, head_label
from core.training.load import measures


class ValidationTotals(Metric):
    """Sums over the validation split and over ranks; every state is an exact count or an fp64 sum.

    Args:
        model: whose heads and layers are counted.
        ledger: the model's loss terms.
        validation_bytes: of the validation documents' text, the denominator of bits per byte.
    """

    full_state_update = False

    def __init__(self, model: LanguageModel, ledger: Ledger, validation_bytes: int) -> None:
        super().__init__()
        self.bytes = validation_bytes
        self.terms = ledger.heads
        self.main = next((term.label for term in self.terms if "next_token" in term.head.capabilities), None)
        self.layers = {path: layer.experts for path, layer in model.expert_layers().items()}
        for index, experts in enumerate(self.layers.values()):
            self.add_state(f"load {index}", torch.zeros(experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.names: list[str] = []
        self.maxima: list[str] = []

    def update(self, losses: Losses, context: SequenceContext) -> None:
        """Add one batch: what the model gave for a context."""
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
            load_E, dropped = records[path].load_E, records[path].dropped
            assert load_E is not None
            assert dropped is not None
            self._state(f"load {index}").add_(load_E)
            self._state("dropped").add_(dropped)

    def compute(self) -> dict[str, float]:
        """`val_loss` and `val_bits_per_byte` of the main head, `val/<term>` and `val/<metric>`, load over the split."""
        sums = {name: float(self._state(f"sum {name}")) for name in self.names}
        means = {name: value / max(int(self._state(f"count {name}")), 1) for name, value in sums.items()}
        values = {f"val/{name}": mean for name, mean in means.items()}
        values.update({f"val/{name}": float(self._state(f"maximum {name}")) for name in self.maxima})
        if self.main is not None and self.main in means:
            values["val_loss"] = means[self.main]
            if self.bytes:
                values["val_bits_per_byte"] = sums[self.main] / math.log(2) / self.bytes
        loads = [self._state(f"load {index}") for index in range(len(self.layers))]
        if loads:
            assigned = sum(int(load_E.sum()) for load_E in loads)
            values["val_dropped_fraction"] = int(self._state("dropped")) / max(assigned, 1)
        for name, value in measures(loads).items():
            values[f"val_{name}_global"] = float(value)
        return values

    def _add_mean(self, name: str, value: Tensor, count: Tensor) -> None:
        """Add to a mean; its states are made when the first batch names it, in the same order on every rank."""
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
        if name not in self.maxima:
            self.maxima.append(name)
            self._make_state(f"maximum {name}", torch.full((), -math.inf, dtype=torch.float64), "max")
        state = self._state(f"maximum {name}")
        state.copy_(torch.maximum(state, metric.value()))

    def _make_state(self, name: str, start: Tensor, reduction: str) -> None:
        self.add_state(name, start, dist_reduce_fx=reduction)
        setattr(self, name, self._state(name).to(self.device))

    def _state(self, name: str) -> Tensor:
        state: Tensor = getattr(self, name)
        return state
