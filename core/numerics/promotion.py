"""The one rule of numbers: norms, rotations, router and losses compute in fp32 *or wider*."""

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
"""The formats that are wide enough; decoding asks so often that looking it up counts."""


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in its own format if that is wider, so that fp64 references stay fp64."""
    if x.dtype in WIDE:
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_product(a_BXY: Tensor, b_BYZ: Tensor) -> Tensor:
    """The batched product of two tensors of one format, B x X x Z in fp32 or wider.

    On a GPU and without gradients operands of 16 bits stay as they are, and the sums are in fp32.
    """
    short = a_BXY.dtype in (torch.bfloat16, torch.float16)
    if a_BXY.is_cuda and short and not torch.is_grad_enabled():
        return torch.bmm(a_BXY, b_BYZ, out_dtype=torch.float32)
    return torch.bmm(at_least_fp32(a_BXY), at_least_fp32(b_BYZ))
