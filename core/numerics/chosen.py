"""Products of few rows, each with the matrix of its own expert, without sorting rows by expert.

`grouped_product` is fast where experts have many rows each. In decoding there are a few rows in all, and sorting them,
counting them and putting them back takes longer than the products.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ON_CPU = 32
"""Rows up to which `chosen_products` is faster than sorting on a CPU; above it rows begin to share experts."""


def chosen_products(x_AI: Tensor, weight_EOI: Tensor, expert_A: Tensor) -> Tensor:
    """Each row times the transposed weight of its expert, as `grouped_product` of the sorted rows.

    Args:
        x_AI: rows in any order.
        weight_EOI: one [out, in] matrix for each expert, same format as the rows.
        expert_A: int64, the expert of each row.

    Returns:
        y_AO, same format.
    """
    if not on_host(x_AI):
        weight_AOI = weight_EOI.index_select(0, expert_A)
        return torch.bmm(weight_AOI, x_AI[:, :, None])[:, :, 0]
    rows = zip(x_AI.split(1), expert_A.tolist(), strict=True)
    return torch.cat([F.linear(x_1I, weight_EOI[expert]) for x_1I, expert in rows])


def on_host(tensor: Tensor) -> bool:
    """Whether the host may read numbers without waiting for a device."""
    return tensor.device.type == "cpu"
