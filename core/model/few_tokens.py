"""Whether Triton's kernels serve decoding on this device: they must be there, and agree with torch."""

import warnings
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from core.model.activation import swiglu

FORMATS = (torch.bfloat16, torch.float16, torch.float32)
"""The formats that the kernels read; their sums are in fp32."""

MOST_ROWS = 256
"""Rows up to which starting kernels takes longer than their work."""

WIDEST = 16384
"""Most elements of a row that one program can hold."""

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Allowed difference from torch in the verification, relative to the largest number."""


def kernels(x: Tensor, rows: int, width: int) -> ModuleType | None:
    """The module `core.numerics.decoding_kernels`, where it serves so many rows of this width; None elsewhere.

    It is for GPUs and without gradients. On the first call of a device the kernels are compiled and compared.
    """
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if x.dtype not in FORMATS or rows > MOST_ROWS or width > WIDEST:
        return None
    return _verified(str(x.device))


@cache
def _verified(device: str) -> ModuleType | None:
    """The kernels, if they run and agree with torch on this device; if not, it warns once."""
    if find_spec("triton") is None:
        return None
    try:
        from core.numerics import decoding_kernels as found

        place = torch.device(device)
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            same = all(agrees(found, place, dtype) for dtype in FORMATS)
        if not same:
            _warn("differ from torch's operations")
            return None
    # Triton raises whatever its compiler, the C compiler, the driver and ctypes raise.
    except Exception as cause:
        first_line = str(cause).strip().partition("\n")[0]
        _warn(f"cannot run ({type(cause).__name__}: {first_line})")
        return None
    return found


def _warn(why: str) -> None:
    """Warns that torch's operations are used."""
    warnings.warn(f"kernels of decoding {why}; torch's operations take their place", stacklevel=4)


def agrees(found: ModuleType, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether each kernel is within rounding of torch's operations, on sizes that are no powers of two."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    x_TD, gate_up_EXD, down_EDI = random(3, 328), random(5, 2 * 40, 328), random(5, 328, 40)
    expert_TK = torch.tensor([[4, 0], [1, 1], [3, 2]], device=device)
    gate_TK = random(3, 2).float()
    one = found.gated_experts(x_TD, gate_up_EXD, down_EDI, expert_TK, gate_TK)
    same = _close(one, gated_experts(x_TD, gate_up_EXD, down_EDI, expert_TK, gate_TK), dtype)
    clamped = (x_TD, gate_up_EXD, down_EDI, expert_TK, gate_TK, 8.0)
    same = same and _close(found.gated_experts(*clamped), gated_experts(*clamped), dtype)
    rows_TD, weight_D = random(3, 400)[:, :328], random(328).float()
    normed = F.rms_norm(rows_TD.float(), (328,), weight_D, 1e-6)
    same = same and _close(found.rms_norm(rows_TD, weight_D, 1e-6), normed, dtype)
    scores_BAS = random(2, 3, 77).float()
    mask_BAS = random(2, 3, 77) > 0
    expected = (scores_BAS * 0.3).masked_fill(~mask_BAS, -torch.inf).softmax(dim=-1)
    same = same and _close(found.masked_softmax(scores_BAS, mask_BAS, 0.3, dtype), expected, dtype)
    expected = (scores_BAS * 0.3).softmax(dim=-1)
    return same and _close(found.masked_softmax(scores_BAS, None, 0.3, dtype), expected, dtype)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether all elements agree relative to the largest."""
    difference = (found.double() - expected.double()).abs().max()
    return bool(difference <= TOLERANCE[dtype] * expected.double().abs().max())


def gated_experts(
    x_TD: Tensor,
    gate_up_EXD: Tensor,
    down_EDI: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    limit: float | None = None,
) -> Tensor:
    """The sum of gate * expert(x) over each token's K experts, by copies of their matrices: the kernels' reference.

    Args:
        x_TD: the tokens, in the format of the matrices.
        gate_up_EXD: the first matrix of every expert, X = 2 I.
        down_EDI: the second matrix of every expert.
        expert_TK: int64, the experts.
        gate_TK: their gates.
        limit: that of their SwiGLU; None: none.
    """
    hidden_TKI = swiglu(torch.einsum("td,tkxd->tkx", x_TD, gate_up_EXD[expert_TK]), limit)
    y_TKD = torch.einsum("tki,tkdi->tkd", hidden_TKI, down_EDI[expert_TK])
    return torch.einsum("tk,tkd->td", gate_TK.to(y_TKD.dtype), y_TKD)
