"""Checks of balancers, and of the loads and counts that they read."""

from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.router import CAPABILITIES
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger
from core.testing import bench
from core.testing.calls import end_step
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import (
    Subject,
    all_finite,
    changed,
    distance,
    perturbed,
    require_close,
    snapshot,
    state,
    written,
)
from core.training.totals import WindowTotals, call_on_step_end
from core.training.window import Window, objective

CONTRACT = "core/contracts/balancer.py, Balancer"
LAYERS = ("router", "balancer", "ffn")
"""Slots whose components make a layer with experts."""


@check(
    "balancer", clause="`needs` are capabilities that the router contract defines", where=CONTRACT
)
def needs_are_known(subject: Subject) -> None:
    """Compares with the words of the router contract; no router could fulfil another need."""
    unknown = subject.component.needs - set(CAPABILITIES)
    require(not unknown, f"unknown: {', '.join(sorted(unknown))}")


@check("balancer", clause="`adjust_scores` gives finite scores of the same shape", where=CONTRACT)
def adjust_is_for_selection(subject: Subject) -> None:
    """Adjusts scores after a step without load and after one with all load on one expert."""
    balancer = perturbed(subject.made())
    scores_TE = torch.rand(5, bench.EXPERTS, dtype=torch.float64)
    for load in ([0] * 8, [80, 0, 0, 0, 0, 0, 0, 0]):
        end_step("balancer", balancer, load)
        adjusted = balancer.adjust_scores(scores_TE)
        require(adjusted.shape == scores_TE.shape, f"adjusted scores are {tuple(adjusted.shape)}")
        require(all_finite([adjusted]), "adjusted scores are not finite")


@check(
    "balancer",
    clause="`count` depends on the data alone and is the number of units that the loss sums over",
    where=CONTRACT,
)
def counts_are_known_beforehand(subject: Subject) -> None:
    """Tries full, padded and all-masked batches; scope `none` means no loss and no count."""
    layer = perturbed(subject.layer())
    (balancer,) = layer.balancers
    for lengths in ([8, 8, 8], [8, 3, 0], [0, 0], [1]):
        context = bench.padded(lengths)
        loss = _observed(layer, context)
        count = balancer.count(context)
        agree = (loss is None) == (count is None) == (balancer.scope == "none")
        require(agree, "count, loss and scope disagree")
        if loss is not None:
            units = {"token": sum(lengths), "sequence": len([n for n in lengths if n > 0])}
            expected = units.get(balancer.scope, int(sum(lengths) > 0))
            found = f"count is {int(count)}, and the scope {balancer.scope} counts {expected}"
            require(int(count) == expected, found)
            require(bool(loss.isfinite()), "the loss is not finite")


@check(
    "balancer",
    clause="padding counts nowhere; a batch of nothing but padding has loss 0 and gradient 0",
    where=CONTRACT,
)
def padding_balances_nothing(subject: Subject) -> None:
    """Changes the states at padded places, and reads loss and gradient of a batch of padding alone."""
    layer = perturbed(subject.layer())
    context = bench.padded([8, 3, 0])
    skip_unless(layer.balancers[0].scope != "none", "no loss")
    x_BLD = bench.states(context)
    other = bench.change_padding(x_BLD, context)
    one = _observed(layer, context, x_BLD)
    two = _observed(layer, context, other)
    require_close(two, one, "padding changes the loss")
    nothing = bench.states(bench.padded([0, 0])).requires_grad_()
    empty = _observed(layer, bench.padded([0, 0]), nothing)
    require(not empty.any(), f"the loss of nothing is {empty.detach():g}")
    if empty.requires_grad:
        empty.backward()
        for tensor in (nothing, *layer.parameters()):
            unmoved = tensor.grad is None or not tensor.grad.any()
            require(unmoved, "the loss of nothing has a gradient")


@check(
    "balancer",
    clause="the loss gives the router a gradient, and nothing else of the layer",
    where=CONTRACT,
)
def the_loss_teaches_the_router(subject: Subject) -> None:
    """Requires a finite, non-zero gradient of the centroids and none of the experts."""
    layer = perturbed(subject.layer())
    skip_unless(layer.balancers[0].scope != "none", "no loss")
    _observed(layer, bench.tokens()).backward()
    gradients = {}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            gradients[name] = parameter.grad
    require("router.centroids.weight" in gradients, "the router gets no gradient")
    require(all_finite(gradients.values()), "a gradient is not finite")
    experts_move = any(name.startswith("weight") for name in gradients)
    require(not experts_move, "experts get a gradient from a balance loss")


@check(
    "balancer",
    clause="scopes `token` and `sequence`: the loss is a sum over them, so splitting a batch changes nothing",
    where=CONTRACT,
)
def scope_is_as_declared(subject: Subject) -> None:
    """Compares the loss of a batch with the sum of its sequences' losses."""
    layer = perturbed(subject.layer())
    context = bench.padded([8, 5, 8])
    skip_unless(layer.balancers[0].scope in ("token", "sequence"), "another scope")
    x_BLD = bench.states(context)
    alone = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        part = slice(row, row + 1)
        alone = alone + _observed(layer, bench.select_rows(context, part), x_BLD[part])
    whole = _observed(layer, context, x_BLD)
    require_close(alone, whole, "the loss of a batch is not that of its sequences")


@check(
    "balancer",
    clause="`on_step_end` reads int64 loads; state keeps its format, and any load leaves it finite",
    where=CONTRACT,
)
def state_is_exact(subject: Subject) -> None:
    """Casts the balancer to bf16 and ends steps with no load, all on one expert, and even ones (P1)."""
    balancer = subject.made()
    formats = {name: tensor.dtype for name, tensor in balancer.state_dict().items()}
    balancer.to(torch.bfloat16)
    now = {name: tensor.dtype for name, tensor in balancer.state_dict().items()}
    advice = "derive from core.numerics.exact.ExactState"
    require(now == formats, f"a cast of the model changes the format of the state: {advice}")
    loads = ([0] * 8, [80, 0, 0, 0, 0, 0, 0, 0], [10] * 8, [2**40 + 1] + [2**40] * 7)
    for load in loads:
        end_step("balancer", balancer, load)
        tensors = [*balancer.state_dict().values(), *balancer.metrics().values()]
        found = f"state or metrics are not finite after a load of {load}"
        require(all_finite(tensors), found)
    small, large = (_moved_by(subject, [n + 1, n - 1] + [n] * 6) for n in (1, 2**40))
    found = "one token more moves the state after a small load and not after a large one"
    require(small == large, found)


def _moved_by(subject: Subject, load: list[int]) -> dict[str, list[int]]:
    """The sign of the change that a load makes to each number of the state."""
    balancer = subject.made()
    before = state(balancer)
    end_step("balancer", balancer, load)
    signs = {}
    for name, now in balancer.state_dict().items():
        change = now.double() - before[name].double()
        signs[name] = change.sign().flatten().int().tolist()
    return signs


@check("balancer", clause="a coefficient is a finite number that is not negative", where=CONTRACT)
def coefficients_are_finite(subject: Subject) -> None:
    """Reads it at the beginning, in the middle and at the end of a run."""
    balancer = subject.made()
    for step in (1, 50, 100):
        value = balancer.coefficient(Progress(step, step * 128, 100, 12800))
        usable = isinstance(value, float | int) and 0 <= value < float("inf")
        require(usable, f"coefficient {value!r} at step {step}")


@check(
    *LAYERS,
    clause="loads are int64 and exact: recomputation and accumulation count nothing twice",
    where="docs/architecture.md, Purity and records",
)
def loads_are_exact(subject: Subject) -> None:
    """Trains a window in one, two and four micro-batches, recomputed or not (P1, P2, P4)."""
    skip_unless(_has_experts(subject), "a layer without experts")
    loads = {}
    for recompute in (False, True):
        for pieces in (1, 2, 4):
            model = perturbed(subject.model(recompute=recompute))
            loads[pieces, recompute] = _train_window(model, pieces)[0]
    expected = loads[1, False]
    for own in loads.values():
        for path, load_E in own.items():
            require(load_E.dtype == torch.int64, f"the load is {load_E.dtype}")
            if not _batch_dependent(model):
                same = torch.equal(load_E, expected[path])
                require(same, "the load depends on how a window is split or recomputed")
    for path, load_E in expected.items():
        same = torch.equal(load_E, loads[1, True][path])
        require(same, "recomputing activations changes the load of the same micro-batch")
    properties = next(iter(model.expert_layers().values())).routing_properties
    if properties is not None and properties.token_choice:
        for load_E in expected.values():
            assigned = int(load_E.sum())
            found = f"{assigned} assignments of {sum(WINDOW)} valid tokens"
            require(assigned == properties.top_k * sum(WINDOW), found)


@check(
    *LAYERS,
    clause="1 x N equals N x 1: unless it is declared, splitting a window changes no gradient and no state",
    where="core/contracts/balancer.py, Balancer: `scope`; core/contracts/router.py, CAPABILITIES: `batch_dependent`",
)
def splitting_a_window_changes_nothing(subject: Subject) -> None:
    """Compares gradients of the whole objective, and the balancers' state after the step."""
    model = perturbed(subject.model())
    skip_unless(not _batch_dependent(model), "declared to depend on how a batch is split")
    _, expected = _train_window(model, 1)
    for pieces, recompute in ((2, False), (4, False), (1, True)):
        again = perturbed(subject.model(recompute=recompute))
        _, got = _train_window(again, pieces, evaluate=True)
        worst = max(distance(got[name], value) for name, value in expected.items())
        require(worst < 1e-8, f"gradients differ by {worst:.1e} in {pieces} micro-batches")
        require(not changed(again, state(model)), "balancers' state differs")


@check(
    *LAYERS, clause="evaluation changes nothing", where="docs/architecture.md, Purity and records"
)
def evaluation_changes_nothing(subject: Subject) -> None:
    """Compares all that the model around the component holds before and after a forward in evaluation."""
    model = perturbed(subject.model()).eval()
    before = snapshot(model)
    with torch.no_grad():
        model(bench.tokens())
    different = written(model, before)
    require(not different, f"{', '.join(different)} changed in evaluation")


def _has_experts(subject: Subject) -> bool:
    return bool(subject.layer().experts)


def _batch_dependent(model: LanguageModel) -> bool:
    """Whether a layer or a balancer of the model is declared to depend on how a batch is split."""
    for layer in model.expert_layers().values():
        properties = layer.routing_properties
        if properties is not None and properties.batch_dependent:
            return True
        if any(balancer.scope == "micro_batch" for balancer in layer.balancers):
            return True
    return False


def _observed(layer: Any, context: SequenceContext, x_BLD: Tensor | None = None) -> Any:
    """The loss of the layer's only balancer, for some states or for random ones."""
    if x_BLD is None:
        x_BLD = bench.states(context)
    _, record = layer(x_BLD, context)
    return layer.balancers[0].loss(record.sums[0])


WINDOW = [8, 5, 8, 2]
"""Valid tokens of the four sequences of a step."""


def _train_window(
    model: LanguageModel, pieces: int, *, evaluate: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs one step over four sequences in some micro-batches; returns loads and gradients after balancers ended it.

    Args:
        pieces: the number of micro-batches.
        evaluate: run a forward in evaluation before the step ends, which must change nothing.
    """
    whole = bench.padded(WINDOW)
    size = 4 // pieces
    contexts = [bench.select_rows(whole, slice(start, start + size)) for start in range(0, 4, size)]
    ledger = Ledger.of(model)
    totals = WindowTotals()
    window = Window.of(model, ledger, contexts)
    model.zero_grad()
    for context in contexts:
        loss = objective(model, ledger, model(context), window, bench.START, totals)
        loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if evaluate:
            model.eval()(bench.tokens(seed=7))
            model.train()
        call_on_step_end(model, totals, bench.START)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return totals.loads, gradients
