"""The contract of balancers, and of the counts that they live on."""

from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.router import CAPABILITIES
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger
from core.testing import bench
from core.testing.clauses import check, hold, spare
from core.testing.common import end_step
from core.testing.subject import Subject, changed, distance, perturbed, snapshot, state, written
from core.training.totals import WindowTotals, call_on_step_end
from core.training.window import Window, objective, step_loss

CONTRACT = "core/contracts/balancer.py, Balancer"
LAYERS = ("router", "balancer", "ffn")
"""Slots whose components make a layer with experts."""


@check("balancer", clause="`needs` are capabilities that the router contract knows", where=CONTRACT)
def needs_are_known(subject: Subject) -> None:
    """Otherwise no router could ever serve it."""
    unknown = subject.component.needs - set(CAPABILITIES)
    hold(not unknown, f"unknown: {', '.join(sorted(unknown))}")


@check("balancer", clause="`adjust` gives finite scores of the same shape", where=CONTRACT)
def adjust_is_for_selection(subject: Subject) -> None:
    """Before and after a step."""
    balancer = perturbed(subject.made())
    scores_TE = torch.rand(5, bench.EXPERTS, dtype=torch.float64)
    for load in ([0] * 8, [80, 0, 0, 0, 0, 0, 0, 0]):
        end_step("balancer", balancer, load)
        adjusted = balancer.adjust(scores_TE)
        hold(adjusted.shape == scores_TE.shape, f"adjusted scores are {tuple(adjusted.shape)}")
        hold(bool(adjusted.isfinite().all()), "adjusted scores are not finite")


@check("balancer", clause="`count` is known from the data alone and equals the loss's own", where=CONTRACT)
def counts_are_known_beforehand(subject: Subject) -> None:
    """Full, padded and all-masked; None for a method without a loss, which has scope none."""
    layer = perturbed(subject.layer())
    (balancer,) = layer.balancers
    for lengths in ([8, 8, 8], [8, 3, 0], [0, 0], [1]):
        given = bench.padded(lengths)
        loss, count = _observed(layer, given), balancer.count(given)
        hold((loss is None) == (count is None) == (balancer.scope == "none"), "count, loss and scope disagree")
        if loss is not None:
            units = {"token": sum(lengths), "sequence": sum(n > 0 for n in lengths)}
            expected = units.get(balancer.scope, int(sum(lengths) > 0))
            hold(int(count) == expected, f"count says {int(count)} where a {balancer.scope} is a unit: {expected}")
            hold(bool(loss.isfinite()), "the loss is not finite")


@check(
    "balancer",
    clause="padding counts nowhere; a batch of nothing but padding has loss 0 and gradient 0",
    where=CONTRACT,
)
def padding_balances_nothing(subject: Subject) -> None:
    """Other values of padded states change no loss."""
    layer, given = perturbed(subject.layer()), bench.padded([8, 3, 0])
    spare(layer.balancers[0].scope != "none", "no loss")
    x_BLD = bench.states(given)
    other = torch.where(given.valid()[:, :, None], x_BLD, 5 * x_BLD.flip(2))
    one, two = _observed(layer, given, x_BLD), _observed(layer, given, other)
    hold(distance(two, one) < 1e-10, "padding changes the loss")
    nothing = bench.states(bench.padded([0, 0])).requires_grad_()
    empty = _observed(layer, bench.padded([0, 0]), nothing)
    hold(not empty.any(), f"the loss of nothing is {empty.detach():g}")
    if empty.requires_grad:
        empty.backward()
        slopes = [nothing.grad, *(p.grad for p in layer.parameters())]
        hold(not any(g is not None and g.any() for g in slopes), "the loss of nothing has a gradient")


@check("balancer", clause="the loss teaches the router and nothing else of the layer", where=CONTRACT)
def the_loss_teaches_the_router(subject: Subject) -> None:
    """A finite, non-zero gradient of the centroids; none for experts."""
    layer = perturbed(subject.layer())
    spare(layer.balancers[0].scope != "none", "no loss")
    _observed(layer, bench.tokens()).backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    hold("router.centroids.weight" in grads, "the router gets no gradient")
    hold(all(bool(g.isfinite().all()) for g in grads.values()), "a gradient is not finite")
    hold(not any(name.startswith("weight") for name in grads), "experts get a gradient from a balance loss")


@check(
    "balancer",
    clause="scopes `token` and `sequence`: each by itself, so splitting a batch changes nothing",
    where=CONTRACT,
)
def scope_is_as_declared(subject: Subject) -> None:
    """The sum over a batch is the sum over its sequences."""
    layer, given = perturbed(subject.layer()), bench.padded([8, 5, 8])
    spare(layer.balancers[0].scope in ("token", "sequence"), "another scope")
    x_BLD = bench.states(given)
    parts = [slice(row, row + 1) for row in range(3)]
    alone = sum(_observed(layer, bench.rows(given, part), x_BLD[part]) for part in parts)
    whole = _observed(layer, given, x_BLD)
    hold(distance(torch.as_tensor(alone), whole) < 1e-10, "the loss of a batch is not that of its sequences")


@check(
    "balancer",
    clause="`on_step_end` reads int64 loads; state keeps its format, and any load leaves it finite",
    where=CONTRACT,
)
def state_is_exact(subject: Subject) -> None:
    """No load, all on one expert, an even one; after a cast to bf16 too (P1)."""
    balancer = subject.made()
    formats = {name: t.dtype for name, t in balancer.state_dict().items()}
    balancer.to(torch.bfloat16)
    now = {name: t.dtype for name, t in balancer.state_dict().items()}
    hold(
        now == formats,
        "a cast of the model changes the format of the state: derive from core.numerics.exact.ExactState",
    )
    loads = ([0] * 8, [80, 0, 0, 0, 0, 0, 0, 0], [10] * 8, [2**40 + 1] + [2**40] * 7)
    for load in loads:
        end_step("balancer", balancer, load)
        tensors = [*balancer.state_dict().values(), *balancer.metrics().values()]
        hold(all(bool(t.isfinite().all()) for t in tensors), f"state or metrics are not finite after a load of {load}")
    moved = [_moved_by(subject, [n + 1, n - 1] + [n] * 6) for n in (1, 2**40)]
    hold(moved[0] == moved[1], "one token more moves the state after a small load and not after a large one")


def _moved_by(subject: Subject, load: list[int]) -> dict[str, list[int]]:
    """In which direction a load moves each number of the state."""
    balancer = subject.made()
    before = state(balancer)
    end_step("balancer", balancer, load)
    now = balancer.state_dict()
    return {name: (now[name].double() - old.double()).sign().flatten().int().tolist() for name, old in before.items()}


@check("balancer", clause="a coefficient is a finite number that is not negative", where=CONTRACT)
def coefficients_are_finite(subject: Subject) -> None:
    """At the beginning, in the midst and at the end of a run."""
    balancer = subject.made()
    for step in (1, 50, 100):
        value = balancer.coefficient(Progress(step, step * 128, 100, 12800))
        hold(isinstance(value, float | int) and 0 <= value < float("inf"), f"coefficient {value!r} at step {step}")


@check(
    *LAYERS,
    clause="loads are int64 and exact: recomputation and accumulation count nothing twice",
    where="docs/architecture.md, Purity and records",
)
def loads_are_exact(subject: Subject) -> None:
    """Over a window in one, two and four micro-batches, recomputed or not (P1, P2, P4)."""
    spare(_has_experts(subject), "a layer without experts")
    found = []
    for recompute in (False, True):
        for pieces in (1, 2, 4):
            model = perturbed(subject.model(recompute=recompute))
            found.append(_window(model, pieces)[0])
    for loads in found:
        for path, load_E in loads.items():
            hold(load_E.dtype == torch.int64, f"the load is {load_E.dtype}")
            if not _batch_dependent(model):
                hold(torch.equal(load_E, found[0][path]), "the load depends on how a window is split or recomputed")
    hold(
        all(torch.equal(found[0][p], found[3][p]) for p in found[0]),
        "recomputing activations changes the load of the same micro-batch",
    )
    traits = next(iter(model.expert_layers().values())).traits
    for load_E in found[0].values() if traits is not None and traits.token_choice else ():
        expected = traits.top_k * sum(WINDOW)
        hold(int(load_E.sum()) == expected, f"{int(load_E.sum())} assignments of {sum(WINDOW)} valid tokens")


@check(
    *LAYERS,
    clause="1 x N equals N x 1: unless it is declared, splitting a window changes no gradient and no state",
    where="core/contracts/balancer.py, Balancer: `scope`; core/contracts/router.py, CAPABILITIES: `batch_dependent`",
)
def splitting_a_window_changes_nothing(subject: Subject) -> None:
    """Gradients of the whole objective, and balancers' state after the step."""
    model = perturbed(subject.model())
    spare(not _batch_dependent(model), "declared to depend on how a batch is split")
    _, expected = _window(model, 1)
    for pieces, recompute in ((2, False), (4, False), (1, True)):
        again = perturbed(subject.model(recompute=recompute))
        _, got = _window(again, pieces, evaluate=True)
        worst = max(distance(got[name], value) for name, value in expected.items())
        hold(worst < 1e-8, f"gradients differ by {worst:.1e} in {pieces} micro-batches")
        hold(not changed(again, state(model)), "balancers' state differs")


@check(*LAYERS, clause="evaluation changes nothing", where="docs/architecture.md, Purity and records")
def evaluation_changes_nothing(subject: Subject) -> None:
    """Of the whole model around the component."""
    model = perturbed(subject.model()).eval()
    before = snapshot(model)
    with torch.no_grad():
        model(bench.tokens())
    different = written(model, before)
    hold(not different, f"{', '.join(different)} changed in evaluation")


def _has_experts(subject: Subject) -> bool:
    return bool(subject.layer().experts)


def _batch_dependent(model: LanguageModel) -> bool:
    layers = model.expert_layers().values()
    declared = any(layer.traits is not None and layer.traits.batch_dependent for layer in layers)
    return declared or any(b.scope == "micro_batch" for layer in layers for b in layer.balancers)


def _layers(model: LanguageModel) -> list[Any]:
    return list(model.expert_layers().values())


def _observed(layer: Any, given: SequenceContext, x_BLD: Tensor | None = None) -> Any:
    """The loss of the layer's one balancer."""
    record = layer(bench.states(given) if x_BLD is None else x_BLD, given)[1]
    return layer.balancers[0].loss(record.sums[0])


def _loss(model: LanguageModel, given: SequenceContext) -> Tensor:
    return step_loss(model, given, bench.START)


WINDOW = [8, 5, 8, 2]
"""Valid tokens of the four sequences of a step."""


def _window(
    model: LanguageModel, pieces: int, *, evaluate: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step over four sequences in so many micro-batches: loads, and gradients; balancers end their step.

    Args:
        evaluate: read something in evaluation before the step ends, which must change nothing.
    """
    whole, size = bench.padded(WINDOW), 4 // pieces
    contexts = [bench.rows(whole, slice(start, start + size)) for start in range(0, 4, size)]
    ledger, totals = Ledger.of(model), WindowTotals()
    window = Window.of(model, ledger, contexts)
    model.zero_grad()
    for context in contexts:
        objective(model, ledger, model(context), window, bench.START, totals).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if evaluate:
            model.eval()(bench.tokens(seed=7))
            model.train()
        call_on_step_end(model, totals, bench.START)
    return totals.loads, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
