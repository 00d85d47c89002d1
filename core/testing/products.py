"""The contracts of precisions and dispatchers."""

import itertools
from typing import Any

import torch
from torch import Tensor

from core.contracts.precision import ROLES, Precision, StepState
from core.contracts.router import Routing
from core.testing import bench
from core.testing.clauses import check, hold, spare
from core.testing.subject import Subject, distance, snapshot, written

PRECISION, DISPATCHER = "core/contracts/precision.py, Precision", "core/contracts/dispatcher.py, Dispatcher"
HIGH = ("router", "norm")
INPUTS, OUTPUTS, GROUPS, ROWS = 32, 48, 4, 40


@check(
    "precision",
    clause="weights are [out, in] and [groups, out, in], named `weight`, in `param_dtype(role)`",
    where=PRECISION,
)
def weights_have_one_layout(subject: Subject) -> None:
    """For every role that the contract names."""
    precision = subject.precision()
    for role in ROLES:
        plain = precision.linear(INPUTS, OUTPUTS, role, std=0.1)
        grouped = precision.grouped_linear(GROUPS, INPUTS, OUTPUTS, role, std=0.1)
        for layer, shape in ((plain, (OUTPUTS, INPUTS)), (grouped, (GROUPS, OUTPUTS, INPUTS))):
            named = dict(layer.named_parameters())
            hold(list(named) == ["weight"], f"{role}: parameters are {sorted(named)}")
            hold(list(layer.state_dict()) == ["weight"], f"{role}: the state dict holds {sorted(layer.state_dict())}")
            hold(tuple(named["weight"].shape) == shape, f"{role}: the weight is {tuple(named['weight'].shape)}")
            hold(named["weight"].dtype == precision.param_dtype(role), f"{role}: kept in {named['weight'].dtype}")


@check(
    "precision",
    clause="products are within the error of `compute_dtype(role)`; the router and norms stay in fp32 or wider",
    where=PRECISION,
)
def products_are_as_exact_as_declared(subject: Subject) -> None:
    """Against fp64: every element relative to |x| |W|, and below fp32 all of them together."""
    precision = subject.precision()
    for role in ROLES:
        computed = precision.compute_dtype(role)
        hold(role not in HIGH or computed.itemsize >= 4, f"{role} is computed in {computed}")
        layer, grouped = _layers(precision, role)
        x, ends_E = _inputs(precision, role), torch.tensor([10, 10, 25, ROWS], dtype=torch.int32)
        bound = 2 * torch.finfo(computed).eps + 4 * INPUTS**0.5 * torch.finfo(_wide(computed)).eps
        for y, exact, size in (_product(layer, x), _grouped(grouped, x, ends_E)):
            error = float(((y.detach().double() - exact).abs() / size).max())
            hold(error <= bound, f"{role}: an error of {error:.1e} of |x| |W|, where {computed} allows {bound:.1e}")
            _hold_together(role, y.detach(), exact, [computed, computed])


def calc_diff(one: Tensor, two: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2): half the squared relative error, as DeepGEMM's tests take it."""
    one, two = one.double(), two.double()
    return float(1 - 2 * (one * two).sum() / (one.square().sum() + two.square().sum()))


def _hold_together(what: str, own: Tensor, exact: Tensor, roundings: list[torch.dtype]) -> None:
    """Rounding to a format of spacing eps has a squared relative error of about eps^2 / 27, and adds half of it.

    eps^2 / 32 for each rounding leaves room; for two of E4M3 it is the 1e-3 that the report's kernels are held to.
    """
    if any(dtype.itemsize >= 4 for dtype in roundings):
        return
    limit = sum(torch.finfo(dtype).eps ** 2 for dtype in roundings) / 32
    found = calc_diff(own, exact)
    told = " and ".join(str(dtype) for dtype in dict.fromkeys(roundings))
    hold(found <= limit, f"{what}: calc_diff is {found:.1e}, where {told} allows {limit:.1e}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layers(precision: Precision, role: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    layers = (
        precision.linear(INPUTS, OUTPUTS, role, std=0.1),
        precision.grouped_linear(GROUPS, INPUTS, OUTPUTS, role, std=0.1),
    )
    for layer in layers:
        layer.reset_parameters()  # type: ignore[operator]
    return layers


def _inputs(precision: Precision, role: str) -> Tensor:
    """Rows in the format of the residual stream, or in that of the product where it is wider."""
    draw = torch.Generator().manual_seed(1)
    stream, computed = precision.compute_dtype("embedding"), precision.compute_dtype(role)
    dtype = torch.promote_types(stream, computed) if computed.itemsize > 1 else stream
    return torch.randn(ROWS, INPUTS, dtype=torch.float64, generator=draw).to(dtype)


def _product(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = layer.weight.detach().double()
    return layer(x), x.double() @ weight.T, x.double().abs() @ weight.abs().T


def _grouped(layer: Any, x: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, starts = layer.weight.detach().double(), [0, *ends_E.tolist()]
    parts = [slice(a, b) for a, b in itertools.pairwise(starts)]
    exact = torch.cat([x[p].double() @ weight[g].T for g, p in enumerate(parts)])
    size = torch.cat([x[p].double().abs() @ weight[g].abs().T for g, p in enumerate(parts)])
    return layer(x, ends_E), exact, size


@check(
    "precision",
    clause="empty groups and rows past the last end are no error: the latter come out as 0, without gradient",
    where="core/numerics/grouped.py",
)
def empty_groups_are_groups(subject: Subject) -> None:
    """All rows in one group, in none, and none at all; gradients are finite."""
    precision, role = subject.precision(), "experts.down"
    _, layer = _layers(precision, role)
    for ends in ([0, 0, 0, 0], [0, ROWS, ROWS, ROWS], [5, 5, 5, 9]):
        x = _inputs(precision, role).requires_grad_()
        y = layer(x, torch.tensor(ends, dtype=torch.int32))
        hold(not y[ends[-1] :].any(), "a row that belongs to nobody is not 0")
        y.float().sum().backward()
        assert x.grad is not None
        hold(bool(x.grad.isfinite().all()), "the input's gradient is not finite")
        hold(not x.grad[ends[-1] :].any(), "a row that belongs to nobody has a gradient")
        hold(bool(layer.weight.grad.isfinite().all()), "the weight's gradient is not finite")


@check(
    "precision",
    clause="gradients of products are those of the product, within the error of the format",
    where=PRECISION,
)
def product_gradients_are_right(subject: Subject) -> None:
    """dX and dW against fp64, for a plain and a grouped layer."""
    precision, role = subject.precision(), "ffn.down"
    for layer, ends_E in zip(
        _layers(precision, role), (None, torch.tensor([10, 10, 25, ROWS], dtype=torch.int32)), strict=True
    ):
        x, computed = _inputs(precision, role).requires_grad_(), precision.compute_dtype(role)
        eps = torch.finfo(computed).eps
        y = layer(x) if ends_E is None else layer(x, ends_E)
        draw = torch.Generator().manual_seed(2)
        slope = torch.randn(y.shape, dtype=torch.float64, generator=draw).to(y.dtype)
        y.backward(slope)
        weight, wide = layer.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
        starts = [0, ROWS] if ends_E is None else [0, *ends_E.tolist()]
        weights = [weight] if ends_E is None else list(weight)
        parts = [wide[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weights, strict=False)]
        torch.cat(parts).backward(slope.double())
        for name, own, exact in (("x", x.grad, wide.grad), ("weight", layer.weight.grad, weight.grad)):
            assert own is not None and exact is not None  # noqa: PT018
            hold(distance(own.double(), exact) <= 16 * eps, f"d{name} is off by {distance(own.double(), exact):.1e}")
            # the output's gradient, the other operand, and once more that operand as it was saved, or the result
            _hold_together(f"d{name}", own, exact, [precision.gradient_dtype(role), computed, computed])


@check(
    "precision",
    clause="what is not finite is not hidden: a row with an infinity or NaN gives no finite row",
    where=PRECISION,
)
def infinities_propagate(subject: Subject) -> None:
    """In a plain and a grouped layer, forward and backward: a cast to a small format would saturate."""
    precision, role = subject.precision(), "ffn.down"
    ends_E = torch.tensor([10, 10, 25, ROWS], dtype=torch.int32)
    for value in (float("inf"), float("-inf"), float("nan")):
        for layer, more in zip(_layers(precision, role), ((), (ends_E,)), strict=True):
            x = _inputs(precision, role)
            x[3, 5] = value
            y = layer(x.requires_grad_(), *more)
            hold(not y[3].isfinite().any(), f"{value} in a row comes out finite")
            slope = torch.ones_like(y)
            slope[4, 7] = value
            y.backward(slope)
            assert x.grad is not None
            hold(not x.grad[4].isfinite().any(), f"{value} in a gradient comes out finite")


@check(
    "precision",
    clause="layers note which code took a product, under their role and in the words of `path(role)`",
    where=PRECISION,
)
def what_ran_is_noted(subject: Subject) -> None:
    """Before a product nothing is noted, after it what `describe` announced."""
    precision = subject.precision()
    for role in ROLES:
        layers = _layers(precision, role)
        hold(role not in precision.paths.table(), f"{role}: something is noted before anything ran")
        x = _inputs(precision, role)
        layers[0](x)
        layers[1](x, torch.tensor([10, 10, 25, ROWS], dtype=torch.int32))
        spare(precision.paths.ran, "its layers note nothing")
        found, announced = precision.paths.table().get(role), precision.path(role)
        hold(found == announced, f"{role}: {found!r} ran, where path says {announced!r}")


@check(
    "precision", clause="a product writes nothing, draws nothing, and can be made on the meta device", where=PRECISION
)
def products_are_pure(subject: Subject) -> None:
    """Twice the same bits; nothing that the layer holds changes; buffers are reset by `reset_parameters`."""
    precision, role = subject.precision(), "ffn.down"
    x, ends_E = _inputs(precision, role), torch.tensor([10, 10, 25, ROWS], dtype=torch.int32)
    for layer, more in zip(_layers(precision, role), ((), (ends_E,)), strict=True):
        before, first = snapshot(layer), layer(x, *more)
        hold(torch.equal(layer(x, *more), first), "a second product gives other bits")
        different = written(layer, before)
        hold(not different, f"{', '.join(different)} changed in a product")
    with torch.device("meta"):
        made = precision.linear(INPUTS, OUTPUTS, role, std=0.1)
    moved = made.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            tensor.fill_(7)
    for part in moved.modules():
        if hasattr(part, "reset_parameters"):
            torch.manual_seed(0)
            part.reset_parameters()  # type: ignore[operator]
    direct, _ = _layers(precision, role)
    moved.load_state_dict(
        {name: direct.state_dict()[name] for name in moved.state_dict() if name == "weight"}, strict=False
    )
    hold(torch.equal(moved(x), direct(x)), "made on the meta device it gives other products")


@check(
    "precision",
    clause="`end_step` alone moves what layers keep, a skipped step does not, and `step_state` is all of it",
    where="core/contracts/precision.py, StepState",
)
def skipped_steps_are_forgotten(subject: Subject) -> None:
    """The products of three steps: as they are, repeated within one, after a skipped one, and after loading."""
    for grouped in (False, True):
        layer, *others = (_layers(subject.precision(), "ffn.down")[grouped] for _ in range(4))
        spare(_states(layer), "its layers keep nothing between steps")
        expected = [_stepped(layer, grouped, step) for step in range(3)]
        repeated, skipping, loaded = others
        _stepped(skipping, grouped, 5, done=False)
        for step in range(2):
            _stepped(skipping, grouped, step)
            _stepped(skipping, grouped, step + 5, done=False)
            if "remembers_products" not in subject.capabilities:
                _passed(repeated, grouped, step)
            _stepped(repeated, grouped, step)
        for (_, own), (_, kept) in zip(_states(loaded).items(), _states(skipping).items(), strict=True):
            own.load_step_state(kept.step_state())
        for what, other in (("repeated", repeated), ("a skipped step", skipping), ("loaded", loaded)):
            found = _stepped(other, grouped, 2)
            same = all(torch.equal(one, two) for one, two in zip(found, expected[2], strict=True))
            hold(same, f"{what}: the next step's products have other bits")


def _states(layer: Any) -> dict[str, StepState]:
    return {path: part for path, part in layer.named_modules() if isinstance(part, StepState)}


def _passed(layer: Any, grouped: bool, step: int) -> list[Tensor]:
    """Y, dX and dW of a step, whose numbers are of a size of their own."""
    draw = torch.Generator().manual_seed(step)
    x = (3.0**step * torch.randn(ROWS, INPUTS, generator=draw)).requires_grad_()
    more = (torch.tensor([10, 10, 25, ROWS], dtype=torch.int32),) if grouped else ()
    layer.zero_grad()
    y = layer(x, *more)
    y.backward(3.0**-step * torch.randn(y.shape, generator=draw).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, layer.weight.grad.clone()]


def _stepped(layer: Any, grouped: bool, step: int, *, done: bool = True) -> list[Tensor]:
    """The same, and the end of the step."""
    found = _passed(layer, grouped, step)
    for state in _states(layer).values():
        state.end_step(done=done)
    return found


def assignments(kept: bool, token_major: bool) -> tuple[Routing, Tensor]:
    """Six tokens with two choices each, one expert empty, and the states that they send."""
    draw = torch.Generator().manual_seed(0)
    expert_TK = torch.tensor([[3, 1], [1, 0], [7, 3], [1, 3], [0, 7], [3, 0]])
    gate_TK = torch.rand(6, 2, dtype=torch.float64, generator=draw)
    scores_TE = torch.rand(6, bench.EXPERTS, dtype=torch.float64, generator=draw)
    kept_TK = torch.tensor([[True, False], [True, True], [False, False]] * 2) if kept else None
    routing = Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE, kept_TK)
    if not token_major:
        order_A = torch.randperm(12, generator=draw)
        columns = {name: getattr(routing, name) for name in ("token_A", "expert_A", "gate_A", "choice_A", "kept_A")}
        moved: dict[str, Any] = {name: None if column is None else column[order_A] for name, column in columns.items()}
        routing = Routing(**moved, scores_TE=scores_TE, logits_TE=scores_TE)
    return routing, torch.randn(6, bench.WIDTH, dtype=torch.float64, generator=draw)


@check(
    "dispatcher",
    clause="rows come sorted by expert; combining gives each token the gated sum of its experts' outputs",
    where=DISPATCHER,
)
def dispatch_equals_a_loop(subject: Subject) -> None:
    """Token-major lists and others, with drops and without; forward and gradients."""
    for kept in (False, True):
        for token_major in (True, False):
            routing, x_TD = assignments(kept, token_major)
            results = []
            for run in (_dispatched, _looped):
                gate_A, x = routing.gate_A.detach().requires_grad_(), x_TD.detach().requires_grad_()
                with_gate = Routing(**{**vars(routing), "gate_A": gate_A})
                y_TD = run(subject, x, with_gate)
                (y_TD * torch.linspace(1, 2, y_TD.numel()).view_as(y_TD)).sum().backward()
                results.append((y_TD, x.grad, gate_A.grad))
            for name, own, exact in zip(
                ("results", "gradients of tokens", "gradients of gates"), *results, strict=True
            ):
                hold(
                    distance(own, exact) < 1e-10,
                    f"{name} differ from a loop's (drops: {kept}, token-major: {token_major})",
                )


def _dispatched(subject: Subject, x_TD: Tensor, routing: Routing) -> Tensor:
    dispatcher = subject.made()
    x_AD, ends_E, state = dispatcher.start(x_TD, routing).wait()
    hold(ends_E.dtype == torch.int32 and len(ends_E) == bench.EXPERTS, "ends_E is not an int32 for each expert")
    factor_A = torch.zeros(len(x_AD), 1, dtype=torch.float64)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        factor_A[start:end], start = expert + 1.0, end
    result: Tensor = dispatcher.start_combine(x_AD.square() * factor_A, state).wait()
    return result


def _looped(subject: Subject, x_TD: Tensor, routing: Routing) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for a, (token, expert) in enumerate(zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)):
        if routing.kept_A is None or routing.kept_A[a]:
            row = routing.gate_A[a] * x_TD[token].square() * (expert + 1)
            y_TD = y_TD.index_add(0, torch.tensor([token]), row[None])
    return y_TD
