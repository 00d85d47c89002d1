"""The objective of one window: every loss term is a mean over the whole window, and all are added up here.

The denominators are known from the data before any backward, so the same gradients come out however the
window is split into micro-batches and ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.contracts.balancer import Scope
from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import BalanceTerm, HeadTerm, LayerTerm, Ledger, Term
from core.training.ranks import (
    all_reduce_sum,
    differentiable_all_reduce_sum,
    rank_and_world,
)
from core.training.totals import WindowTotals


@dataclass(frozen=True)
class Window:
    """The part of a window's objective that is known before its first backward.

    Args:
        counts: each term's denominator, over micro-batches and data ranks.
        whole: sums of balancers of scope `batch` over the whole window; none if it is one micro-batch.
        micro_batches: how many the window has.
        coefficients: the terms' factors as scalars of fp64, for graphs that read them; empty: those of the progress.
    """

    counts: dict[Term, Tensor]
    whole: dict[Term, dict[str, Tensor]]
    micro_batches: int
    coefficients: Mapping[Term, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        ledger: Ledger,
        contexts: Sequence[SequenceContext],
        coefficients: Mapping[Term, Tensor] | None = None,
        *,
        run: Callable[[LanguageModel, SequenceContext], Losses] = LanguageModel.__call__,
    ) -> "Window":
        """Counts a window; if a loss is formed over the whole batch, its micro-batches run once beforehand.

        Args:
            model: the model.
            ledger: its loss terms.
            contexts: the micro-batches.
            coefficients: the terms' factors, for graphs that read them.
            run: runs a micro-batch forwards; through the layers that this rank holds, if other ranks hold the rest.
        """
        whole: dict[Term, dict[str, Tensor]] = {}
        if len(contexts) > 1:
            whole = _batch_sums(model, ledger, contexts, run)
        counts = window_counts(model, ledger, contexts)
        return cls(counts, whole, len(contexts), coefficients or {})

    def coefficient(self, term: Term, progress: Progress, dtype: torch.dtype) -> float | Tensor:
        """A term's factor; as a tensor it is in the format of the loss, as if it had been a number."""
        if term in self.coefficients:
            return self.coefficients[term].to(dtype)
        return term.coefficient(progress)


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of a window, and how one is run.

    Args:
        contexts: the micro-batches of this data rank, in their order.
        loss_of: returns the loss of what a forward returned, be it of the whole model or of some of its layers, and
            adds what was counted to the totals of the window. The gradients of these losses add up.
        run: runs one micro-batch forwards and backwards through the whole model, by its number.
    """

    contexts: Sequence[SequenceContext]
    loss_of: Callable[[Losses], Tensor]
    run: Callable[[int], None]


def window_counts(
    model: LanguageModel, ledger: Ledger, contexts: Sequence[SequenceContext]
) -> dict[Term, Tensor]:
    """Every term's denominator over a window's micro-batches and data ranks; none for a balancer without a loss."""
    counts: dict[Term, list[Tensor]] = {}
    for context in contexts:
        inner = model.contexts(context)
        for term in ledger:
            count = term.count(context, inner)
            if count is not None:
                counts.setdefault(term, []).append(count)
    window = {}
    for term, micro_batches in counts.items():
        counts_W = all_reduce_sum(torch.stack(micro_batches))
        window[term] = _window_count(counts_W, term.scope)
    return window


def _window_count(counts_W: Tensor, scope: Scope) -> Tensor:
    """The count of a window from those of its micro-batches, each over all ranks."""
    if scope == "batch":
        return (counts_W.sum() > 0).to(torch.int64)
    if scope == "micro_batch":
        return (counts_W > 0).sum()
    return counts_W.sum()


@torch.no_grad()
def _batch_sums(
    model: LanguageModel,
    ledger: Ledger,
    contexts: Sequence[SequenceContext],
    run: Callable[[LanguageModel, SequenceContext], Losses],
) -> dict[Term, dict[str, Tensor]]:
    """Sums that balancers of scope `batch` observe over micro-batches and ranks; without such, no forward is run.

    The forward is pure and addresses its random choices, so it computes the same now as later with gradients.
    """
    terms = [term for term in ledger.balance if term.scope == "batch"]
    if not terms:
        return {}
    observed: dict[Term, dict[str, Tensor]] = {}
    for context in contexts:
        losses = run(model, context)
        for term in terms:
            if term.layer not in losses.records:  # another rank holds the layer
                continue
            sums = term.observed_in(losses)
            if term in observed:
                before = observed[term]
                sums = {key: value + before[key] for key, value in sums.items()}
            observed[term] = sums
    return {term: _all_reduced(sums) for term, sums in observed.items()}


def _all_reduced(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: all_reduce_sum(value) for key, value in sums.items()}


def objective(
    model: LanguageModel,
    ledger: Ledger,
    losses: Losses,
    window: Window,
    progress: Progress,
    totals: WindowTotals,
) -> Tensor:
    """One micro-batch's share of the window's objective; its parts are added to `totals`.

    Where other ranks hold some of the layers (`LanguageModel.absent`), the terms are those of the layers and heads in
    `losses`; without any the share is 0.

    The balance losses of all layers are added, each with its own coefficient, as the released training code
    of DeepSeek-V2 and Switch do; the log shows their mean over layers.

    Raises:
        RuntimeError: this forward left out a layer with experts, which would therefore not be balanced.
    """
    differing = set(model.expert_layers()) ^ set(losses.expert_records())
    if differing and not model.absent:
        paths = ", ".join(sorted(differing))
        raise RuntimeError(f"layers with experts and records of the forward differ: {paths}")
    parts: list[Tensor] = []
    for term, value in _term_sums(ledger, losses, window):
        totals.add_sum(term, value / replication(term.scope, window))
        coefficient = window.coefficient(term, progress, value.dtype)
        parts.append(contribution(coefficient, value, window.counts[term]))
    totals.add_records(losses)
    if not parts:
        return torch.zeros((), device=next(iter(window.counts.values())).device)
    return torch.stack([part.to(parts[0].dtype) for part in parts]).sum()


def contribution(coefficient: float | Tensor, value: Tensor, count: Tensor) -> Tensor:
    """A term's share of the objective: coefficient x sum / denominator; 0 if there is nothing to average."""
    return coefficient * value / count.clamp(min=1)


def _term_sums(ledger: Ledger, losses: Losses, window: Window) -> Iterator[tuple[Term, Tensor]]:
    """Each term with its sum over a micro-batch, in the ledger's order; a balancer without a loss has none."""
    for term in ledger:
        if not term.is_in(losses):
            continue
        if isinstance(term, HeadTerm | LayerTerm):
            yield term, term.sum_in(losses)
        elif isinstance(term, BalanceTerm):
            sums = sum_over_scope(term.scope, term.observed_in(losses), window.whole.get(term))
            loss = term.balancer.loss(sums)
            if loss is not None:
                yield term, loss


def sum_over_scope(
    scope: Scope, sums: dict[str, Tensor], whole: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """A micro-batch's sums with the values of the scope and the gradient of its own share."""
    if whole is not None:
        return {name: value + (whole[name] - value).detach() for name, value in sums.items()}
    if scope in ("batch", "micro_batch"):
        return {name: differentiable_all_reduce_sum(value) for name, value in sums.items()}
    return sums


def replication(scope: Scope, window: Window) -> int:
    """How often a window forms one and the same loss: once on each rank, for `batch` also in each micro-batch."""
    if scope == "batch":
        return rank_and_world()[1] * window.micro_batches
    if scope == "micro_batch":
        return rank_and_world()[1]
    return 1


def step_loss(
    model: LanguageModel,
    context: SequenceContext,
    progress: Progress,
    totals: WindowTotals | None = None,
) -> Tensor:
    """The objective of an optimizer step that reads one micro-batch; its parts are added to `totals`."""
    if totals is None:
        totals = WindowTotals()
    ledger = Ledger.of(model)
    window = Window.of(model, ledger, [context])
    return objective(model, ledger, model(context), window, progress, totals)
