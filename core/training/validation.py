"""What validation adds up: loss, bits per byte, load over the whole split, agreement of the draft heads."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from core.model.language_model import LanguageModel, Losses
from core.training.load import measures


class ValidationTotals(Metric):
    """Sums over the validation split and over ranks; every state is an exact count or an fp64 sum.

    Args:
        model: whose heads and layers are counted.
        validation_bytes: of the validation documents' text, the denominator of bits per byte.
    """

    full_state_update = False

    def __init__(self, model: LanguageModel, validation_bytes: int) -> None:
        super().__init__()
        self.bytes = validation_bytes
        heads = dict(model.loss_heads())
        self.main = next((n for n, head in heads.items() if "next_token" in head.capabilities), None)
        self.layers = {path: layer.experts for path, layer in model.expert_layers().items()}
        for index, experts in enumerate(self.layers.values()):
            self.add_state(f"load {index}", torch.zeros(experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.names: list[str] = []

    def update(self, losses: Losses) -> None:
        """Add one batch."""
        for name, term in {**losses.terms, **losses.metrics}.items():
            if name not in self.names:
                self._add_term(name)
            self._state(f"sum {name}").add_(term.sum.double())
            self._state(f"count {name}").add_(term.count.to(torch.int64))
        for index, path in enumerate(self.layers):
            self._state(f"load {index}").add_(losses.records[path].load_E)
            self._state("dropped").add_(losses.records[path].dropped)

    def compute(self) -> dict[str, float]:
        """`val_loss` and `val_bits_per_byte` of the main head, `val/<term>` of all, load over the whole split."""
        sums = {name: float(self._state(f"sum {name}")) for name in self.names}
        means = {name: value / max(int(self._state(f"count {name}")), 1) for name, value in sums.items()}
        values = {f"val/{name}": mean for name, mean in means.items()}
        main = next((n for n in self.names if n == self.main or n.partition("/")[0] == self.main), None)
        if main is not None:
            values["val_loss"] = means[main]
            if self.bytes:
                values["val_bits_per_byte"] = sums[main] / math.log(2) / self.bytes
        loads = [self._state(f"load {index}") for index in range(len(self.layers))]
        if loads:
            assigned = sum(int(load_E.sum()) for load_E in loads)
            values["val_dropped_fraction"] = int(self._state("dropped")) / max(assigned, 1)
        for name, value in measures(loads).items():
            values[f"val_{name}_global"] = float(value)
        return values

    def _add_term(self, name: str) -> None:
        """States for a term that the first batch names; every rank meets the terms in the same order."""
        self.names.append(name)
        self.add_state(f"sum {name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(f"count {name}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for kind in ("sum", "count"):
            setattr(self, f"{kind} {name}", self._state(f"{kind} {name}").to(self.device))

    def _state(self, name: str) -> Tensor:
        state: Tensor = getattr(self, name)
        return state
