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
