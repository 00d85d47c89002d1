"""The positions of the highest scores as a mask: one operator, whose result a recomputed block keeps.

What is chosen is defined to the last bit: of equal scores those at lower positions come first. As an operator it is
opaque to compilers, and recomputation keeps one byte for each score instead of sorted scores and their indices.
"""

import torch
from torch import Tensor


@torch.library.custom_op("moeloom::highest", mutates_args=())
def highest(scores_XS: Tensor, k: int) -> Tensor:
    """Marks the k highest scores of the last axis.

    Args:
        scores_XS: scores of any format and any number of axes; minus infinity is lower than all others.
        k: how many; all, if there are no more.

    Returns:
        A mask, bool, of the same shape; k in every row are True. None of a row's scores is marked if k are NaN.
    """
    if k >= scores_XS.shape[-1]:
        return torch.ones_like(scores_XS, dtype=torch.bool)
    lowest_X1 = scores_XS.topk(k, dim=-1).values[..., -1:]
    above_XS = scores_XS > lowest_X1
    equal_XS = scores_XS == lowest_X1
    left_X1 = k - above_XS.sum(dim=-1, keepdim=True)
    place_XS = equal_XS.cumsum(dim=-1, dtype=torch.int32)
    return above_XS | (equal_XS & (place_XS <= left_X1))


@highest.register_fake
def _(scores_XS: Tensor, k: int) -> Tensor:
    return torch.empty_like(scores_XS, dtype=torch.bool)


OPERATORS = (torch.ops.moeloom.highest.default,)
"""The operators whose results a recomputed block keeps."""
