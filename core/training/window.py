"""One window's objective: every loss term a mean over the whole window, added up in one place.

The denominators are known from the data before any backward, so the same gradients come out however the
window is split into micro-batches and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.contracts.balancer import Balancer, Scope
from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses
from core.training.ranks import rank_and_world, reduce_sum, total


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


@dataclass(frozen=True)
class Denominators:
    """What is known of a window before its first backward.

    Args:
        counts: what each head's term and each balancer's loss is divided by, over micro-batches and ranks.
        whole: for balancers of scope `batch`, their sums over the whole window; none where it is one micro-batch.
        micro_batches: how many the window has.
    """

    counts: dict[str, Tensor]
    whole: dict[str, dict[str, Tensor]]
    micro_batches: int


def denominators(model: LanguageModel, contexts: Sequence[SequenceContext]) -> Denominators:
    """Count a window; where a loss is formed over the whole batch, read its micro-batches once beforehand."""
    whole = _batch_sums(model, contexts) if len(contexts) > 1 else {}
    return Denominators(window_counts(model, contexts), whole, len(contexts))


def window_counts(model: LanguageModel, contexts: Sequence[SequenceContext]) -> dict[str, Tensor]:
    """The denominators of a window: each head's terms and each balancer's losses, over micro-batches and ranks."""
    found: dict[str, list[Tensor]] = {}
    balancers = _balancers(model)
    for context in contexts:
        for name, count in model.counts(context).items():
            found.setdefault(name, []).append(count)
        seen_by = model.contexts(context)
        for (path, index), balancer in balancers.items():
            mine = balancer.count(seen_by.get(path, context))
            if mine is not None:
                found.setdefault(balance_term(path, index), []).append(mine)
    scopes = {balance_term(*place): balancer.scope for place, balancer in balancers.items()}
    return {name: _joined(total(torch.stack(counts)), scopes.get(name)) for name, counts in found.items()}


def _joined(counts_W: Tensor, scope: Scope | None) -> Tensor:
    """The count of a window from those of its micro-batches over all ranks."""
    if scope == "batch":
        return (counts_W.sum() > 0).to(torch.int64)
    return (counts_W > 0).sum() if scope == "micro_batch" else counts_W.sum()


def _balancers(model: LanguageModel) -> dict[tuple[str, int], Balancer]:
    """Every balancer of every layer by the layer's path and its place in it."""
    layers = model.expert_layers().items()
    return {(path, index): b for path, layer in layers for index, b in enumerate(layer.balancers)}


@torch.no_grad()
def _batch_sums(model: LanguageModel, contexts: Sequence[SequenceContext]) -> dict[str, dict[str, Tensor]]:
    """Over micro-batches and ranks, what balancers of scope `batch` observe; nothing is read where there is none.

    The forward is pure and addresses its random choices, so it sees now what it will see again with gradients.
    """
    wanted = {place for place, balancer in _balancers(model).items() if balancer.scope == "batch"}
    found: dict[str, dict[str, Tensor]] = {}
    for context in contexts if wanted else ():
        records = model(context).records
        for path, index in sorted(wanted):
            sums, name = records[path].sums[index], balance_term(path, index)
            before = found.get(name, {})
            found[name] = {key: value + before[key] if before else value for key, value in sums.items()}
    return {name: {key: total(value) for key, value in sums.items()} for name, sums in found.items()}


def objective(model: LanguageModel, losses: Losses, window: Denominators, progress: Progress, seen: Seen) -> Tensor:
    """One micro-batch's share of the window's objective; its parts are added to `seen` under their names.

    The balance losses of all layers are added, each with its own coefficient, as the released training code
    of DeepSeek-V2 and Switch do; the log shows their mean over layers.

    Raises:
        RuntimeError: a layer with experts was not seen by this forward, so it would not be balanced.
    """
    layers, counts = model.expert_layers(), window.counts
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
            name = balance_term(path, index)
            loss = balancer.loss(_in_scope(balancer.scope, sums, window.whole.get(name)))
            if loss is None:
                continue
            seen.add(name, loss.sum / _times_formed(balancer.scope, window))
            parts.append(balancer.coefficient(progress) * loss.sum / counts[name].clamp(min=1))
    seen.add_losses(losses)
    return torch.stack([part.to(parts[0].dtype) for part in parts]).sum()


def _in_scope(scope: Scope, sums: dict[str, Tensor], whole: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """A micro-batch's sums with the values of the scope and the gradient of its own share."""
    if whole is not None:
        return {name: value + (whole[name] - value).detach() for name, value in sums.items()}
    if scope in ("batch", "micro_batch"):
        return {name: reduce_sum(value) for name, value in sums.items()}
    return sums


def _times_formed(scope: Scope, window: Denominators) -> int:
    """How often a window forms one and the same loss: each rank does, and for `batch` each micro-batch."""
    ranks = rank_and_world()[1] if scope in ("batch", "micro_batch") else 1
    return ranks * (window.micro_batches if scope == "batch" else 1)
