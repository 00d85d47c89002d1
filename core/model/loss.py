"""Cross-entropy as a sum over the positions that count."""

from torch import Tensor
from torch.nn import functional as F

from core.model.numerics import at_least_fp32

IGNORED = -100


def cross_entropy_sum(logits_BLV: Tensor, targets_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over the counted positions, in fp32 or wider; 0 if there is none."""
    targets = targets_BL.masked_fill(~counted_BL, IGNORED)
    wide = at_least_fp32(logits_BLV)
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
