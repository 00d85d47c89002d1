"""SwiGLU (arXiv 2002.05202): silu(gate) * up, for dense layers and experts alike."""

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: ... x 2I -> ... x I; the first half of the last axis is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
