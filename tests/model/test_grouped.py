"""The grouped product against a loop, and as a torch op: autograd, compile, meta, FLOPs (P32)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.numerics.grouped import grouped_product

ENDS = {
    "every expert busy": [3, 5, 9, 12],
    "empty experts": [0, 5, 5, 12],
    "one expert has all": [0, 0, 12, 12],
    "rows past the last end": [2, 2, 7, 9],
    "no expert owns a row": [0, 0, 0, 0],
}
WIDTHS = [(8, 16), (7, 5), (1, 3)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
every_case = pytest.mark.parametrize("name", ENDS)


def operands(
    inputs: int = 7, outputs: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_AI = torch.randn(12, inputs, dtype=torch.float64, generator=generator).to(dtype)
    weight_EOI = torch.randn(4, outputs, inputs, dtype=torch.float64, generator=generator).to(dtype)
    return x_AI.requires_grad_(), weight_EOI.requires_grad_()


def spans(ends: list[int]) -> Iterator[tuple[int, int]]:
    return zip([0, *ends], ends, strict=False)


def looped(x_AI: Tensor, weight_EOI: Tensor, ends: list[int]) -> Tensor:
    """The products one row at a time; rows of no expert are 0."""
    rows = [
        weight_EOI[expert] @ x_AI[row]
        for expert, (begin, end) in enumerate(spans(ends))
        for row in range(begin, end)
    ]
    rest = x_AI.new_zeros(len(x_AI) - len(rows), weight_EOI.shape[1])
    return torch.cat([torch.stack(rows), rest]) if rows else rest


@every_case
def test_P32_the_kernel_equals_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.grouped_mm` in fp32 on this device: output, dX and dW, through the same guard as on a GPU."""
    x_AI, weight_EOI = operands(16, 8, torch.float32)
    ends_E = torch.tensor(ENDS[name])
    calls: list[int] = []
    kernel = torch.nn.functional.grouped_mm

    def spy(*args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    results = []
    for pays in (False, True):
        monkeypatch.setattr("core.numerics.grouped._kernel_pays", lambda _, pays=pays: pays)
        monkeypatch.setattr("core.numerics.grouped.F.grouped_mm", spy)
        y_AO = grouped_product(x_AI, weight_EOI, ends_E)
        slopes = torch.autograd.grad(y_AO, (x_AI, weight_EOI), torch.ones(1).expand_as(y_AO))
        results.append((y_AO.detach(), *slopes))
        assert len(calls) == (3 if pays else 0)
    for loop, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, loop, rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_P32_equals_a_loop_forward_and_backward(
    name: str, widths: tuple[int, int], dtype: torch.dtype, index: torch.dtype
) -> None:
    """Output, dX and dW; rows past the last end are 0 and get no gradient; empty experts get none."""
    x_AI, weight_EOI = operands(*widths, dtype)
    y_AO = grouped_product(x_AI, weight_EOI, torch.tensor(ENDS[name], dtype=index))
    dy_AO = torch.randn_like(y_AO)
    own = (y_AO, *torch.autograd.grad(y_AO, (x_AI, weight_EOI), dy_AO))
    expected = looped(x_AI, weight_EOI, ENDS[name])
    slopes = (torch.zeros_like(x_AI), torch.zeros_like(weight_EOI))
    if expected.requires_grad:
        slopes = torch.autograd.grad(expected, (x_AI, weight_EOI), dy_AO)
    for actual, wanted in zip(own, (expected, *slopes), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE[dtype] * 20)
    last = ENDS[name][-1]
    assert not own[0][last:].any()
    assert not own[1][last:].any()
    for expert, (begin, end) in enumerate(spans(ENDS[name])):
        assert own[2][expert].any() == (end > begin)


def test_garbage_in_rows_of_nobody_stays_there() -> None:
    """A NaN in a padded row reaches neither outputs nor gradients."""
    x_AI, weight_EOI = operands()
    with torch.no_grad():
        x_AI[9:] = torch.nan
    y_AO = grouped_product(x_AI, weight_EOI, torch.tensor([2, 2, 7, 9]))
    dx, dw = torch.autograd.grad(y_AO.sum(), (x_AI, weight_EOI))
    assert all(t.isfinite().all() for t in (y_AO, dx, dw))


def test_no_rows_at_all() -> None:
    x_AI, weight_EOI = (
        torch.zeros(0, 7, requires_grad=True),
        torch.ones(4, 5, 7, requires_grad=True),
    )
    y_AO = grouped_product(x_AI, weight_EOI, torch.zeros(4, dtype=torch.int32))
    assert y_AO.shape == (0, 5)
    y_AO.sum().backward()
    assert not weight_EOI.grad.any()


def test_expanded_and_strided_operands() -> None:
    """Gradients of a sum have stride 0; rows and weights may be views."""
    x_AI, weight_EOI = operands()
    ends = torch.tensor(ENDS["empty experts"])
    (expanded,) = torch.autograd.grad(grouped_product(x_AI, weight_EOI, ends).sum(), x_AI)
    (dense,) = torch.autograd.grad(looped(x_AI, weight_EOI, ENDS["empty experts"]).sum(), x_AI)
    torch.testing.assert_close(expanded, dense, rtol=0, atol=1e-13)
    views = (
        x_AI.detach().t().contiguous().t(),
        weight_EOI.detach().transpose(1, 2).contiguous().transpose(1, 2),
    )
    torch.testing.assert_close(
        grouped_product(*views, ends), grouped_product(x_AI, weight_EOI, ends), rtol=0, atol=1e-13
    )
    wide = x_AI.detach().repeat(1, 2)[:, :7]
    torch.testing.assert_close(
        grouped_product(wide, weight_EOI, ends), grouped_product(x_AI, weight_EOI, ends)
    )


@every_case
def test_gradcheck(name: str) -> None:
    x_AI, weight_EOI = operands(3, 2)
    ends = torch.tensor(ENDS[name], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, ends), (x_AI, weight_EOI))


@pytest.mark.full
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("op", ["grouped_product", "grouped_outer"])
def test_opcheck(op: str, clean: bool) -> None:
    """Schema, autograd registration, fake implementation and aot dispatch, as torch checks them."""
    x_AI, weight_EOI = operands()
    ends = torch.tensor(ENDS["rows past the last end"], dtype=torch.int32)
    if op == "grouped_product":
        torch.library.opcheck(
            torch.ops.moeloom.grouped_product.default, (x_AI, weight_EOI, ends, clean)
        )
    else:
        dy_AO = torch.randn(12, 5, dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.moeloom.grouped_outer.default, (dy_AO, x_AI.detach(), ends, clean)
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiles_as_one_graph(dtype: torch.dtype) -> None:
    """Forward and backward, with other loads than those it was compiled with."""
    compiled = torch.compile(grouped_product, fullgraph=True, backend="aot_eager")
    for name in ("every expert busy", "rows past the last end", "no expert owns a row"):
        ends = torch.tensor(ENDS[name], dtype=torch.int32)
        results = []
        for function in (compiled, grouped_product):
            x_AI, weight_EOI = operands(dtype=dtype)
            y_AO = function(x_AI, weight_EOI, ends)
            y_AO.square().sum().backward()
            results.append((y_AO.detach(), x_AI.grad, weight_EOI.grad))
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


def test_flops_are_counted_forward_and_backward() -> None:
    """2 A O I for the product, and twice that again for dX and dW."""
    x_AI, weight_EOI = operands()
    with FlopCounterMode(display=False) as counter:
        y_AO = grouped_product(x_AI, weight_EOI, torch.tensor(ENDS["every expert busy"]))
    assert counter.get_total_flops() == 2 * 12 * 5 * 7
    with FlopCounterMode(display=False) as counter:
        y_AO.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 12 * 5 * 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_works_on_the_meta_device(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        x_AI = torch.empty(12, 7, dtype=dtype, requires_grad=True)
        weight_EOI = torch.empty(4, 5, 7, dtype=dtype, requires_grad=True)
        y_AO = grouped_product(x_AI, weight_EOI, torch.empty(4, dtype=torch.int32))
    assert y_AO.is_meta
    assert (y_AO.shape, y_AO.dtype) == ((12, 5), dtype)
    y_AO.sum().backward()
    assert x_AI.grad.shape == x_AI.shape
    assert weight_EOI.grad.shape == weight_EOI.shape


def test_bf16_products_match_fp32_to_their_rounding() -> None:
    x_AI, weight_EOI = operands(dtype=torch.bfloat16)
    ends = torch.tensor(ENDS["rows past the last end"])
    y_AO = grouped_product(x_AI, weight_EOI, ends)
    assert y_AO.dtype == torch.bfloat16
    expected = grouped_product(x_AI.float(), weight_EOI.float(), ends)
    torch.testing.assert_close(y_AO.float(), expected, rtol=1e-2, atol=1e-2)
