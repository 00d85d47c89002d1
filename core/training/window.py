"""One window's objective: every loss term a mean over the whole window, added up in one place.

The denominators are known from the data before any backward, so the same gradients come out however the
window is split into micro-batches and ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses
from core.training.ranks import reduce_sum, total


@dataclass
class Seen:
    """What a window's forwards saw, added up over its micro-batches.

    Args:
        sums: each term's sum, detached.
        loads: int64 load of each expert layer, by the block's path.
        dropped: int64 assignments that were dropped.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)
    dropped: Tensor | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Add to a term's sum."""
        self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()

    def add_losses(self, losses: Losses) -> None:
        """Add one micro-batch's records."""
        for path, record in losses.records.items():
            before = self.loads.get(path)
            self.loads[path] = record.load_E if before is None else before + record.load_E
            self.dropped = record.dropped if self.dropped is None else self.dropped + record.dropped

    def over_ranks(self) -> "Seen":
        """The same over all data ranks; the loads of all layers travel as one tensor of integers."""
        if not self.loads:
            return Seen({name: total(value) for name, value in self.sums.items()})
        sizes = [len(load_E) for load_E in self.loads.values()]
        assert self.dropped is not None
        stacked = total(torch.cat([*self.loads.values(), self.dropped[None]]))
        parts = stacked.split([*sizes, 1])
        sums = {name: total(value) for name, value in self.sums.items()}
        return Seen(sums, dict(zip(self.loads, parts[:-1], strict=True)), parts[-1][0])


def balance_term(path: str, index: int) -> str:
    """The name under which one balancer of one layer is counted."""
    return f"{path}:{index}"


def window_counts(model: LanguageModel, contexts: Sequence[SequenceContext]) -> dict[str, Tensor]:
    """The denominators of a window: each head's terms and each balancer's losses, over micro-batches and ranks."""
    counts: dict[str, Tensor] = {}

    def add(name: str, count: Tensor) -> None:
        counts[name] = counts[name] + count if name in counts else count

    layers = model.expert_layers()
    for context in contexts:
        for name, count in model.counts(context).items():
            add(name, count)
        seen_by = model.contexts(context)
        for path, layer in layers.items():
            for index, balancer in enumerate(layer.balancers):
                mine = balancer.count(seen_by.get(path, context))
                if mine is not None:
                    add(balance_term(path, index), mine)
    shared = {
        balance_term(path, index)
        for path, layer in layers.items()
        for index, balancer in enumerate(layer.balancers)
        if balancer.scope == "micro_batch"
    }
    return {name: count if name in shared else total(count) for name, count in counts.items()}


def objective(
    model: LanguageModel, losses: Losses, counts: Mapping[str, Tensor], progress: Progress, seen: Seen
) -> Tensor:
    """One micro-batch's share of the window's objective; its parts are added to `seen` under their names.

    The balance losses of all layers are added, each with its own coefficient, as the released training code
    of DeepSeek-V2 and Switch do; the log shows their mean over layers.

    Raises:
        RuntimeError: a layer with experts was not seen by this forward, so it would not be balanced.
    """
    layers = model.expert_layers()
    if set(losses.records) != set(layers):
        missing = sorted(set(layers) ^ set(losses.records))
        raise RuntimeError(f"layers with experts and records of the forward differ: {', '.join(missing)}")
    parts: list[Tensor] = []
    heads = dict(model.loss_heads())
    for name, term in losses.terms.items():
        seen.add(name, term.sum)
        parts.append(heads[name.partition("/")[0]].coefficient(progress) * term.sum / counts[name].clamp(min=1))
    for path, record in losses.records.items():
        for index, (balancer, sums) in enumerate(zip(layers[path].balancers, record.sums, strict=True)):
            if balancer.scope == "micro_batch":
                sums = {name: reduce_sum(value) for name, value in sums.items()}
            loss = balancer.loss(sums)
            if loss is None:
                continue
            name = balance_term(path, index)
            seen.add(name, loss.sum)
            parts.append(balancer.coefficient(progress) * loss.sum / counts[name].clamp(min=1))
    seen.add_losses(losses)
    return torch.stack([part.to(parts[0].dtype) for part in parts]).sum()
