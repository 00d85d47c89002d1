"""fp8_native where its kernels cannot run, and how they are launched; none of them is run here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plugins.fp8_native import fused, operand
from plugins.fp8_native.rounding import TILES

from .layers import drawn


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler.\nSpecify"), ImportError("libcuda.so")]
)
def test_kernels_that_cannot_be_built_or_launched_are_not_used(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(fused, "kernels", lambda: SimpleNamespace(quantise_rows=failing))
    why = f"cannot run ({type(error).__name__}: {str(error).splitlines()[0]}) on this device"
    with pytest.warns(UserWarning, match=re.escape(why)) as caught:
        assert not fused.faithful.__wrapped__("cpu", False)
    assert len(caught) == 1
    monkeypatch.setattr(fused, "kernels", failing)
    with pytest.warns(UserWarning, match=re.escape(why)):
        assert not fused.faithful.__wrapped__("cpu", False)


def test_without_triton_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(fused, "kernels", lambda: None)
    assert not fused.faithful.__wrapped__("cpu", False)
    assert not recwarn


def test_kernels_are_launched_on_the_device_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be that of x."""
    inside: list[Tensor] = []
    launched: list[str] = []

    @contextmanager
    def entered(x: Tensor) -> Iterator[None]:
        inside.append(x)
        yield
        inside.pop()

    def stub(name: str, *results: Tensor) -> Any:
        def kernel(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
            assert inside == [x]
            launched.append(name)
            return results

        return kernel

    x = torch.ones(2, 3)
    names = ("quantise_rows", "quantise_transposed", "quantise_blocks", "transpose_blocks")
    monkeypatch.setattr(
        fused, "kernels", lambda: SimpleNamespace(**{name: stub(name, x, x) for name in names})
    )
    monkeypatch.setattr(torch.cuda, "device_of", entered)
    rounding = fused.FusedRounding(3, TILES["tile"], torch.float32)
    rounding._rows(x, None)
    rounding._turned(x, None, 2, 3, None)
    rounding._blocks(x)
    rounding._flipped(x, x)
    assert launched == list(names)


def test_without_a_gpu_torch_quantises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is known of kernels: a checkpoint on a CPU beside a GPU."""
    monkeypatch.setattr(fused, "faithful", lambda device, power_of_two: True)
    rounding, x = fused.FusedRounding(130, TILES["tile"], torch.float32), drawn(20, 130)
    rows, kept = rounding.activation(x, None)
    matrix, kept_w = rounding.weight(x)
    again = (rounding.activation_again(kept, None), rounding.weight_again(kept_w))
    made = (
        rows,
        matrix,
        rounding.gradient(x, None),
        again[1],
        rounding.gradient_again(x, None),
        again[0],
    )
    assert [type(part) for part in made] == [operand.Operand, list] * 2 + [list] * 2
    assert rounding.path(x) == "torch scaled_mm, e4m3 1x128 / 128x128, operands by torch"
