"""The kernels of fp8_native against `core.numerics.quantise`, code for code and scale for scale.

On a GPU they are compiled. Elsewhere Triton's interpreter runs them in a process of its own, which proves the layouts
and the rules for tiles; it has no fused multiply-add and casts to FP8 in its own way, so there division and cast are
written out, and those that GPUs run are held to `quantise` on GPUs alone.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from torch import Tensor

from core.assemble import make
from core.numerics.number_formats import E4M3
from core.numerics.quantise import BLOCK, ROW, Quantised, dequantise, quantise
from plugins.fp8_native import fused, operand, precision
from plugins.fp8_native.ends import spans
from plugins.fp8_native.rounding import TILES, NativeRounding

from .layers import drawn
from .native_standin import hopper_scaled_mm

TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and TRITON
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and TRITON
DEVICE = "cpu" if INTERPRETED else "cuda"
compared = pytest.mark.skipif(
    not (INTERPRETED or HOPPER), reason="no Hopper GPU, nor Triton's interpreter"
)
own_process = pytest.mark.skipif(
    INTERPRETED or not TRITON, reason="Triton is not installed, or interprets already"
)

ENDS: dict[str, list[int] | None] = {
    "no experts": None,
    "0, 1, 127, 128, 129": [0, 1, 128, 256, 385, 385],
    "sixteens": [16, 48, 48, 176],
    "one owner, others no expert's": [0, 33, 33],
    "none": [0, 0, 0],
}
ROWS_A, RAGGED, WHOLE = 400, 200, 256
FUSED = [fused.Rows, fused.Blocks] * 2 + [fused.Turned] * 2
kinds = pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32 scales", "ue8m0"])
grouped = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)


@own_process
def test_interpreted() -> None:
    """All of this file with Triton's interpreter on CPUs."""
    hidden = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "full",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    done = subprocess.run(
        command,
        env=hidden,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary, summary
    assert "1 skipped" in summary, summary


def awkward(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of many sizes: zeros, numbers whose scales are subnormal, the largest, quotients at and next to ties."""
    x = drawn(rows, columns, seed=rows + columns)
    x[3::17] = 0
    x[5::19] *= 1e-6
    x[7::23] *= 1e-38
    x[11::29] *= 3e-41
    x[13::31] = x[13::31].clamp(-2, 2) * 1.5e38
    x[1::13, ::3] = -x[1::13, ::3].abs() * 1e-5  # negative, and rounded to 0
    for row in range(2, rows, 11):
        x[row] = near_ties(columns, seed=row)
    return x.to(dtype).to(DEVICE)


def near_ties(count: int, seed: int) -> Tensor:
    """Numbers a few units of the last place around (code + 1/2) times a scale."""
    draw = torch.Generator().manual_seed(seed)
    amax = (1 + torch.rand((), generator=draw)) * 2.0 ** float(
        torch.randint(-30, 30, (), generator=draw)
    )
    scale = amax / 448
    half_way = torch.randint(8, 16, (count,), generator=draw) + 0.5
    codes = torch.ldexp(half_way, torch.randint(-9, 5, (count,), generator=draw))
    bits = (codes * scale).view(torch.int32) + torch.randint(
        -2, 3, (count,), generator=draw, dtype=torch.int32
    )
    x = bits.view(torch.float32) * (1 - 2 * torch.randint(0, 2, (count,), generator=draw))
    x[::128] = amax
    return x


def same(found: Tensor, right: Tensor) -> None:
    """Bit for bit; the code for NaN has two signs, and only on CPUs both come out."""
    if right.dtype == torch.float8_e4m3fn:
        found, right = found.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
        if INTERPRETED:
            found, right = (torch.where(t & 0x7F == 0x7F, 0x7F, t) for t in (found, right))
    else:
        assert found.dtype == right.dtype == torch.float32
        found, right = found.contiguous().view(torch.int32), right.contiguous().view(torch.int32)
    wrong = found.ne(right)
    assert not wrong.any(), (
        int(wrong.sum()),
        wrong.nonzero()[:5].tolist(),
        found[wrong][:5],
        right[wrong][:5],
    )


def on_device(ends: list[int] | None) -> Tensor | None:
    return None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def same_as_laid(laid: operand.Laid, right: Quantised) -> None:
    """What is laid out for `scaled_mm` is these rows; of its padding, columns are 0 (rows may be anything).

    But for a tile that is NaN, which its padding may be too.
    """
    rows, columns = right.codes.shape
    scales = right.scales
    same(laid.codes[:rows, :columns], right.codes)
    padding = laid.codes[:rows, columns:].contiguous().view(torch.uint8)
    assert not padding[scales[:, -1:].isfinite().expand_as(padding)].any()
    same(laid.scales[:rows, : scales.shape[1]], scales)
    padded, k = laid.codes.shape
    assert padded % 16 == k % 128 == 0
    assert laid.scales.stride() == (1, padded) or laid.scales.shape[1] == 1


@compared
@grouped
@pytest.mark.parametrize(  # each combination is a compilation
    ("width", "dtype", "power_of_two"),
    [
        (RAGGED, torch.float32, False),
        (WHOLE, torch.float32, True),
        (RAGGED, torch.bfloat16, True),
        (WHOLE, torch.bfloat16, False),
    ],
    ids=str,
)
def test_rows(width: int, ends: list[int] | None, dtype: torch.dtype, power_of_two: bool) -> None:
    x, ends_E = awkward(ROWS_A, width, dtype), on_device(ends)
    found = fused.Rows(
        *fused._kernels().quantise_rows(x, ends_E, power_of_two=power_of_two), len(x)
    )
    where = spans(len(x), ends_E)
    for (begin, end), laid in zip(where, found.parts(where), strict=True):
        same_as_laid(laid, quantise(x[begin:end], ROW, E4M3, power_of_two=power_of_two))


@compared
@grouped
@pytest.mark.parametrize(
    ("width", "given", "power_of_two"),
    [
        (RAGGED, "fp32", False),
        (WHOLE, "fp32", True),
        (RAGGED, "bf16", True),
        (WHOLE, "bf16", False),
        (RAGGED, "codes", False),
        (WHOLE, "codes", True),
    ],
    ids=str,
)
def test_along_tokens(width: int, ends: list[int] | None, given: str, power_of_two: bool) -> None:
    x, ends_E = (
        awkward(ROWS_A, width, torch.bfloat16 if given == "bf16" else torch.float32),
        on_device(ends),
    )
    options: dict[str, Any] = {"count": len(x), "columns": width, "power_of_two": power_of_two}
    if given == "codes":
        codes, scales = fused._kernels().quantise_rows(x, ends_E, power_of_two=power_of_two)
        kept = quantise(x, ROW, E4M3, power_of_two=power_of_two)
        found, values = (
            fused._kernels().quantise_transposed(codes, scales, ends_E, **options),
            dequantise(kept),
        )
    else:
        found, values = fused._kernels().quantise_transposed(x, None, ends_E, **options), x
    where = spans(len(x), ends_E)
    for (begin, end), laid in zip(
        where, fused.Turned(*found, width, len(x)).parts(where), strict=True
    ):
        if end > begin:
            same_as_laid(
                laid, quantise(values[begin:end].t(), ROW, E4M3, power_of_two=power_of_two)
            )
            assert not laid.codes[width:].contiguous().view(torch.uint8).any()


@compared
@kinds
@pytest.mark.parametrize("shape", [(3, 200, 150), (1, 128, 256), (2, 40, 300)], ids=str)
def test_weights(shape: tuple[int, int, int], power_of_two: bool) -> None:
    weight = awkward(shape[0] * shape[1], shape[2], torch.float32).view(shape)
    weight[-1, :128, :128] = 0
    found = fused._kernels().quantise_blocks(weight, power_of_two=power_of_two)
    codes_t, scales_t = fused._kernels().transpose_blocks(*found, columns=shape[2])
    right = quantise(weight, BLOCK, E4M3, power_of_two=power_of_two)
    each = zip(
        fused.Blocks(*found, shape[1]).parts(),
        fused.Blocks(codes_t, scales_t, shape[2]).parts(),
        strict=True,
    )
    for index, (plain, turned) in enumerate(each):
        for laid, codes, scales in (
            (plain, right.codes[index], right.scales[index]),
            (turned, right.codes[index].t(), right.scales[index].t()),
        ):
            same(laid.codes[: codes.shape[0], : codes.shape[1]], codes)
            bytes_ = laid.codes.contiguous().view(torch.uint8).clone()
            bytes_[: codes.shape[0], : codes.shape[1]] = 0
            assert not bytes_.any()
            same(laid.scales.t()[:, : scales.shape[1]], scales)
            assert (laid.scales.t()[:, scales.shape[1] :] == 1).all()
            assert laid.scales.shape[0] % 4 == 0


@compared
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_tile_that_is_not_finite_becomes_nan_as_a_whole(bad: float) -> None:
    x = drawn(200, 300).to(DEVICE)
    x[7, 130], x[150, 2] = bad, bad
    found = fused.Rows(*fused._kernels().quantise_rows(x, None, power_of_two=False), len(x))
    where = spans(len(x), None)
    right = quantise(x, ROW, E4M3)
    same_as_laid(next(found.parts(where)), right)
    options: dict[str, Any] = {"count": 200, "columns": 300, "power_of_two": False}
    for given, values in (((x, None), x), ((found.codes, found.scales), dequantise(right))):
        laid = next(
            fused.Turned(
                *fused._kernels().quantise_transposed(*given, None, **options), 300, 200
            ).parts(where)
        )
        same_as_laid(laid, quantise(values.t(), ROW, E4M3))
    codes, scales = fused._kernels().quantise_blocks(x[None], power_of_two=False)
    right = quantise(x, BLOCK, E4M3)
    same(codes[0, :200, :300], right.codes)
    same(scales[0, :, :3], right.scales)


def simulated_product(y_MN: Tensor, a: operand.Laid, b: operand.Laid) -> None:
    options = {"output_dtype": y_MN.dtype, "use_fast_accum": False}
    kinds = [operand.ScalingType(laid.recipe[0]) for laid in (a, b)]
    y_MN.copy_(
        hopper_scaled_mm(a.codes, b.codes.t(), a.scales, kinds[0], b.scales, kinds[1], **options)
    )


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's products, simulated where kernels are interpreted; few sizes are tried, because that is slow."""
    if INTERPRETED:
        monkeypatch.setattr(fused, "TRIED", ((144, [0, 131, 140]), (136, [0, 131, 140])))
        monkeypatch.setattr(operand, "multiply_into", simulated_product)
        monkeypatch.setattr(operand.F, "scaled_mm", hopper_scaled_mm)


def verified_anew(power_of_two: bool = False) -> bool:
    """What `faithful` returns without its cache."""
    return bool(fused.faithful.__wrapped__(DEVICE, power_of_two))


@compared
@kinds
@pytest.mark.usefixtures("products")
def test_kernels_are_used_where_they_give_the_bits(power_of_two: bool) -> None:
    assert verified_anew(power_of_two)


@compared
@pytest.mark.parametrize(
    "spoilt",
    [
        "quantise_rows",
        "quantise_transposed",
        "quantise_blocks",
        "transpose_blocks",
        "quantise_rows without experts",
        "quantise_transposed of fp32",
    ],
)
@pytest.mark.usefixtures("products")
def test_a_kernel_that_gives_other_bits_is_not_used(
    monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """One code in thousands is enough to be found out, also in one kind of call alone."""
    kernels, (name, _, only) = fused._kernels(), spoilt.partition(" ")
    real = getattr(kernels, name)

    def spoiling(x: Tensor, *others: Any, **named: Any) -> Any:
        codes, scales = real(x, *others, **named)
        if {
            "": True,
            "without experts": others[-1:] == (None,),
            "of fp32": x.dtype == torch.float32,
        }[only]:
            codes.view(torch.uint8).view(-1)[3::4096] ^= 1
        return codes, scales

    monkeypatch.setattr(kernels, name, spoiling)
    with pytest.warns(UserWarning, match="do not give the bits") as caught:
        assert not verified_anew()
    assert len(caught) == 1


@compared
@pytest.mark.usefixtures("products")
def test_products_that_are_not_those_of_torch_are_found_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = operand.multiply_into

    def spoiling(y_MN: Tensor, a: operand.Laid, b: operand.Laid) -> None:
        real(y_MN, a, b)
        y_MN[5, 5] *= 1.5

    monkeypatch.setattr(operand, "multiply_into", spoiling)
    with pytest.warns(UserWarning, match="do not give the bits"):
        assert not verified_anew()


@compared
@pytest.mark.usefixtures("products")
def test_a_torch_without_the_private_product_uses_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacking(*_: Any) -> None:
        raise AttributeError("module 'torch' has no attribute '_scaled_mm_v2'")

    monkeypatch.setattr(operand, "multiply_into", lacking)
    with pytest.warns(
        UserWarning,
        match="cannot run .AttributeError: module 'torch' has no attribute '_scaled_mm_v2'",
    ):
        assert not verified_anew()


@compared
def test_gradients_of_a_sum_need_no_memory() -> None:
    """Rows that are one row in memory, and columns that are not next to each other."""
    right = quantise(torch.ones(40, 130, device=DEVICE), ROW, E4M3)
    for x in (
        torch.ones((), device=DEVICE).expand(40, 130),
        torch.ones(1, 130, device=DEVICE).expand(40, 130),
    ):
        found = fused.Rows(*fused._kernels().quantise_rows(x, None, power_of_two=False), 40)
        same_as_laid(next(found.parts([(0, 40)])), right)


@compared
@grouped
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("codes_again", [True, False], ids=["paper", "te"])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 128), (70, 37)])
def test_products_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    inputs: int,
    outputs: int,
    codes_again: bool,
    ends: list[int] | None,
) -> None:
    """The same operands in the same products give the same bits: interpreted up to the order of fp64 sums."""
    monkeypatch.setattr(fused, "takes", lambda x, power_of_two: True)
    ends_E, experts = on_device(ends), 1 if ends is None else len(ends)
    x, dy = drawn(ROWS_A, inputs).to(DEVICE), drawn(ROWS_A, outputs, seed=2).to(DEVICE)
    weight = drawn(experts, outputs, inputs, seed=3).to(DEVICE)
    weight = weight[0] if ends is None else weight
    results = []
    for kind in (fused.FusedRounding, NativeRounding):
        rounding = kind(inputs, TILES["tile"], torch.float32, codes_again=codes_again)
        rows, kept_x = rounding.activation(x, ends_E)
        matrix, kept_w = rounding.weight(weight)
        dy_rows, matrix_back = rounding.gradient(dy, ends_E), rounding.weight_again(kept_w)
        dy_tokens, tokens = (
            rounding.gradient_again(dy, ends_E),
            rounding.activation_again(kept_x, ends_E),
        )
        made = [type(part) for part in (rows, matrix, dy_rows, matrix_back, dy_tokens, tokens)]
        assert made == (
            FUSED if kind is fused.FusedRounding else [operand.Operand, list] * 2 + [list] * 2
        )
        y, dx = (
            rounding.product(rows, matrix, ends_E),
            rounding.product_back(dy_rows, matrix_back, ends_E),
        )
        results.append((y, dx, rounding.outer(dy_tokens, tokens, ends_E)))
    for found, right in zip(*results, strict=True):
        assert found.shape == right.shape
        assert found.is_contiguous()
        assert not found._is_view()
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6 * float(right.abs().max()))


def test_ends_are_read_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_E, read = torch.tensor([2, 5, 5]), []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append(1) or real(self))
    assert spans(9, ends_E) == spans(9, ends_E) == [(0, 2), (2, 5), (5, 5)]
    assert len(read) == 1
    ends_E[2] = 7
    assert spans(9, ends_E) == [(0, 2), (2, 5), (5, 7)]
    assert len(read) == 2
    with torch.inference_mode():
        assert spans(4, torch.tensor([1, 4])) == [(0, 1), (1, 4)]
    assert spans(4, None) == [(0, 4)]


@compared
@pytest.mark.usefixtures("products")
def test_layers_note_that_kernels_made_their_operands(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "takes", lambda x, power_of_two: True)
    monkeypatch.setattr(precision, "takes", lambda rounding, x: True)
    made: Any = make(lab.recipe("precision={name: fp8_native, scales: ue8m0}").precision)
    x = drawn(20, 32).to(DEVICE)
    made.linear(32, 16, "ffn.down", std=0.1).to(DEVICE)(x)
    made.grouped_linear(2, 32, 16, "experts.down", std=0.1).to(DEVICE)(x, on_device([3, 20]))
    kernel = "torch scaled_mm, e4m3 1x128 / 128x128, ue8m0 scales"
    assert made.path("ffn.down") == kernel
    assert made.kernels_used.table() == dict.fromkeys(
        ("ffn.down", "experts.down"), f"{kernel}, operands by Triton"
    )
