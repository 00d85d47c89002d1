"""Checks of precisions: the layers that hold weights and compute matrix products."""

import itertools
from typing import Any

import torch
from torch import Tensor

from core.contracts.precision import ROLES, Precision, StepState
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import Subject, distance, equal_bits, snapshot, written

PRECISION = "core/contracts/precision.py, Precision"
HIGH = ("router", "norm")
"""Roles that are computed in fp32 or wider."""
INPUTS = 32
OUTPUTS = 48
GROUPS = 4
ROWS = 40


@check(
    "precision",
    clause="weights are [out, in] and [groups, out, in], named `weight`, in `param_dtype(role)`",
    where=PRECISION,
)
def weights_have_one_layout(subject: Subject) -> None:
    """Builds a plain and a grouped layer for every role that the contract names."""
    precision = subject.precision()
    for role in ROLES:
        plain = precision.linear(INPUTS, OUTPUTS, role, std=0.1)
        grouped = precision.grouped_linear(GROUPS, INPUTS, OUTPUTS, role, std=0.1)
        for layer, shape in ((plain, (OUTPUTS, INPUTS)), (grouped, (GROUPS, OUTPUTS, INPUTS))):
            named = dict(layer.named_parameters())
            require(list(named) == ["weight"], f"{role}: parameters are {sorted(named)}")
            saved = sorted(layer.state_dict())
            require(saved == ["weight"], f"{role}: the state dict holds {saved}")
            weight = named["weight"]
            require(tuple(weight.shape) == shape, f"{role}: the weight is {tuple(weight.shape)}")
            kept = weight.dtype == precision.param_dtype(role)
            require(kept, f"{role}: kept in {weight.dtype}")


@check(
    "precision",
    clause="products are within the error of `compute_dtype(role)`; the router and norms stay in fp32 or wider",
    where=PRECISION,
)
def products_are_as_exact_as_declared(subject: Subject) -> None:
    """Compares with fp64: every element relative to |x| |W|, and below fp32 also all elements together."""
    precision = subject.precision()
    for role in ROLES:
        computed = precision.compute_dtype(role)
        require(role not in HIGH or computed.itemsize >= 4, f"{role} is computed in {computed}")
        layer, grouped = _layers(precision, role)
        x = _inputs(precision, role)
        ends_E = _ends()
        bound = 2 * torch.finfo(computed).eps + 4 * INPUTS**0.5 * torch.finfo(_wide(computed)).eps
        for y, exact, size in (_product(layer, x), _grouped(grouped, x, ends_E)):
            error = float(((y.detach().double() - exact).abs() / size).max())
            found = f"an error of {error:.1e} of |x| |W|, but {computed} allows {bound:.1e}"
            require(error <= bound, f"{role}: {found}")
            _require_small_difference(role, y.detach(), exact, [computed, computed])


def calc_diff(one: Tensor, two: Tensor) -> float:
    """Half the squared relative error, 1 - 2 <x, y> / (|x|^2 + |y|^2), as DeepGEMM's tests compute it."""
    one = one.double()
    two = two.double()
    return float(1 - 2 * (one * two).sum() / (one.square().sum() + two.square().sum()))


def _require_small_difference(
    what: str, own: Tensor, exact: Tensor, roundings: list[torch.dtype]
) -> None:
    """Requires that `calc_diff` stays within what some roundings allow; formats from fp32 on are not checked.

    Rounding to a format of spacing eps has a squared relative error of about eps^2 / 27, and `calc_diff` counts half
    of it. The limit of eps^2 / 32 for each rounding leaves a margin. For two roundings to E4M3 it is the 1e-3 that the
    report's kernels must keep.
    """
    if any(dtype.itemsize >= 4 for dtype in roundings):
        return
    limit = sum(torch.finfo(dtype).eps ** 2 for dtype in roundings) / 32
    difference = calc_diff(own, exact)
    formats = " and ".join(str(dtype) for dtype in dict.fromkeys(roundings))
    found = f"calc_diff is {difference:.1e}, but {formats} allows {limit:.1e}"
    require(difference <= limit, f"{what}: {found}")


def _ends() -> Tensor:
    """The ends of four groups among `ROWS` rows; the second is empty."""
    return torch.tensor([10, 10, 25, ROWS], dtype=torch.int32)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The format in which a product of this format is summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layers(precision: Precision, role: str) -> tuple[Any, Any]:
    """A plain and a grouped layer with initial weights."""
    torch.manual_seed(0)
    layers = (
        precision.linear(INPUTS, OUTPUTS, role, std=0.1),
        precision.grouped_linear(GROUPS, INPUTS, OUTPUTS, role, std=0.1),
    )
    for layer in layers:
        layer.reset_parameters()  # type: ignore[operator]
    return layers


def _inputs(precision: Precision, role: str) -> Tensor:
    """Rows in the format of the residual stream, or in that of the product if it is wider."""
    draw = torch.Generator().manual_seed(1)
    stream = precision.compute_dtype("embedding")
    computed = precision.compute_dtype(role)
    dtype = stream
    if computed.itemsize > 1:
        dtype = torch.promote_types(stream, computed)
    return torch.randn(ROWS, INPUTS, dtype=torch.float64, generator=draw).to(dtype)


def _product(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's product, the same in fp64, and |x| |W|."""
    weight = layer.weight.detach().double()
    return layer(x), x.double() @ weight.T, x.double().abs() @ weight.abs().T


def _grouped(layer: Any, x: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A grouped layer's product, the same in fp64, and |x| |W|."""
    exact = []
    size = []
    bounds = itertools.pairwise([0, *ends_E.tolist()])
    for weight, (start, end) in zip(layer.weight.detach().double(), bounds, strict=True):
        rows = x[start:end].double()
        exact.append(rows @ weight.T)
        size.append(rows.abs() @ weight.abs().T)
    return layer(x, ends_E), torch.cat(exact), torch.cat(size)


@check(
    "precision",
    clause="empty groups and rows past the last end are allowed: the rows give 0 and get no gradient",
    where="core/numerics/grouped.py",
)
def empty_groups_are_groups(subject: Subject) -> None:
    """Puts all rows into one group, none into any, and few into the last; gradients must be finite."""
    precision = subject.precision()
    role = "experts.down"
    _, layer = _layers(precision, role)
    for ends in ([0, 0, 0, 0], [0, ROWS, ROWS, ROWS], [5, 5, 5, 9]):
        x = _inputs(precision, role).requires_grad_()
        y = layer(x, torch.tensor(ends, dtype=torch.int32))
        require(not y[ends[-1] :].any(), "a row of no group is not 0")
        y.float().sum().backward()
        assert x.grad is not None
        require(bool(x.grad.isfinite().all()), "the input's gradient is not finite")
        require(not x.grad[ends[-1] :].any(), "a row of no group has a gradient")
        require(bool(layer.weight.grad.isfinite().all()), "the weight's gradient is not finite")


@check(
    "precision",
    clause="gradients of products are those of the product, within the error of the format",
    where=PRECISION,
)
def product_gradients_are_right(subject: Subject) -> None:
    """Compares dX and dW with fp64, for a plain and a grouped layer."""
    precision = subject.precision()
    role = "ffn.down"
    for layer, ends_E in zip(_layers(precision, role), (None, _ends()), strict=True):
        x = _inputs(precision, role).requires_grad_()
        computed = precision.compute_dtype(role)
        eps = torch.finfo(computed).eps
        y = layer(x) if ends_E is None else layer(x, ends_E)
        draw = torch.Generator().manual_seed(2)
        slope = torch.randn(y.shape, dtype=torch.float64, generator=draw).to(y.dtype)
        y.backward(slope)
        weight = layer.weight.detach().double().requires_grad_()
        wide = x.detach().double().requires_grad_()
        if ends_E is None:
            product = wide @ weight.T
        else:
            bounds = itertools.pairwise([0, *ends_E.tolist()])
            parts = zip(weight, bounds, strict=True)
            product = torch.cat([wide[start:end] @ own.T for own, (start, end) in parts])
        product.backward(slope.double())
        # The output's gradient, the other operand, and once more that operand as it was saved, or the result.
        roundings = [precision.gradient_dtype(role), computed, computed]
        pairs = (("dx", x.grad, wide.grad), ("dweight", layer.weight.grad, weight.grad))
        for name, own, exact in pairs:
            assert own is not None
            assert exact is not None
            difference = distance(own.double(), exact)
            require(difference <= 16 * eps, f"{name} is off by {difference:.1e}")
            _require_small_difference(name, own, exact, roundings)


@check(
    "precision",
    clause="infinities and NaN are not hidden: a row with one gives no finite value",
    where=PRECISION,
)
def infinities_propagate(subject: Subject) -> None:
    """Puts them into inputs and gradients of a plain and a grouped layer; a cast to a small format would saturate."""
    precision = subject.precision()
    role = "ffn.down"
    ends_E = _ends()
    for value in (float("inf"), float("-inf"), float("nan")):
        for layer, more in zip(_layers(precision, role), ((), (ends_E,)), strict=True):
            x = _inputs(precision, role)
            x[3, 5] = value
            y = layer(x.requires_grad_(), *more)
            require(not y[3].isfinite().any(), f"{value} in a row comes out finite")
            slope = torch.ones_like(y)
            slope[4, 7] = value
            y.backward(slope)
            assert x.grad is not None
            require(not x.grad[4].isfinite().any(), f"{value} in a gradient comes out finite")


@check(
    "precision",
    clause="layers record which code computed a product, under their role and in the words of `path(role)`",
    where=PRECISION,
)
def what_ran_is_noted(subject: Subject) -> None:
    """Requires an empty record before a product, and after it the code that `describe` reports."""
    precision = subject.precision()
    for role in ROLES:
        plain, grouped = _layers(precision, role)
        recorded = role in precision.kernels_used.table()
        require(not recorded, f"{role}: something is recorded before anything ran")
        x = _inputs(precision, role)
        plain(x)
        grouped(x, _ends())
        skip_unless(precision.kernels_used.ran, "its layers record nothing")
        ran = precision.kernels_used.table().get(role)
        announced = precision.path(role)
        require(ran == announced, f"{role}: {ran!r} ran, but path says {announced!r}")


@check(
    "precision",
    clause="a product changes nothing, draws no random numbers, and its layer can be made on the meta device",
    where=PRECISION,
)
def products_are_pure(subject: Subject) -> None:
    """Computes a product twice, compares all that the layer holds, and builds a layer through the meta device."""
    precision = subject.precision()
    role = "ffn.down"
    x = _inputs(precision, role)
    ends_E = _ends()
    for layer, more in zip(_layers(precision, role), ((), (ends_E,)), strict=True):
        before = snapshot(layer)
        first = layer(x, *more)
        require(torch.equal(layer(x, *more), first), "a second product gives other bits")
        different = written(layer, before)
        require(not different, f"{', '.join(different)} changed in a product")
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
    weights = {name: value for name, value in direct.state_dict().items() if name == "weight"}
    moved.load_state_dict(weights, strict=False)
    require(torch.equal(moved(x), direct(x)), "made on the meta device it gives other products")


@check(
    "precision",
    clause="only `end_step` changes what layers keep, a skipped step does not, and `step_state` is all of it",
    where="core/contracts/precision.py, StepState",
)
def skipped_steps_are_forgotten(subject: Subject) -> None:
    """Compares the third step's products after plain, repeated and skipped steps, and after loading the state."""
    for grouped in (False, True):
        layer, *others = (_layers(subject.precision(), "ffn.down")[grouped] for _ in range(4))
        skip_unless(_states(layer), "its layers keep nothing between steps")
        expected = [_stepped(layer, grouped, step) for step in range(3)]
        repeated, skipping, loaded = others
        _stepped(skipping, grouped, 5, done=False)
        for step in range(2):
            _stepped(skipping, grouped, step)
            _stepped(skipping, grouped, step + 5, done=False)
            if "remembers_products" not in subject.capabilities:
                _passed(repeated, grouped, step)
            _stepped(repeated, grouped, step)
        states = zip(_states(loaded).values(), _states(skipping).values(), strict=True)
        for own, kept in states:
            own.load_step_state(kept.step_state())
        variants = {"repeated": repeated, "a skipped step": skipping, "loaded": loaded}
        for what, other in variants.items():
            same = equal_bits(_stepped(other, grouped, 2), expected[2])
            require(same, f"{what}: the next step's products have other bits")


def _states(layer: Any) -> dict[str, StepState]:
    """The parts of a layer that keep something between steps, by path."""
    return {path: part for path, part in layer.named_modules() if isinstance(part, StepState)}


def _passed(layer: Any, grouped: bool, step: int) -> list[Tensor]:
    """Y, dX and dW of one forward and backward, with inputs and gradients of a size that depends on the step."""
    draw = torch.Generator().manual_seed(step)
    x = (3.0**step * torch.randn(ROWS, INPUTS, generator=draw)).requires_grad_()
    more: tuple[Tensor, ...] = ()
    if grouped:
        more = (_ends(),)
    layer.zero_grad()
    y = layer(x, *more)
    y.backward(3.0**-step * torch.randn(y.shape, generator=draw).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, layer.weight.grad.clone()]


def _stepped(layer: Any, grouped: bool, step: int, *, done: bool = True) -> list[Tensor]:
    """Y, dX and dW of a step, which is then ended."""
    found = _passed(layer, grouped, step)
    for state in _states(layer).values():
        state.end_step(done=done)
    return found
