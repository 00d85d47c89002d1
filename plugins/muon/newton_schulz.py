"""Newton-Schulz iterations: the nearest orthogonal matrix by matrix products alone.

For G = U S V^T the orthogonal factor is U V^T. A step maps X to a X + b (X X^T) X + c (X X^T)^2 X, which leaves the
singular vectors as they are and maps each singular value s to a s + b s^3 + c s^5. Starting from G divided by its
Frobenius norm, so that no singular value is more than 1, the coefficients of the steps bring the values near 1.

What is reached after all steps, by the smallest singular value divided by the Frobenius norm:

| schedule | from 0.01 | from 0.001 | from 0.0001 |
|---|---|---|---|
| `quintic5` | 0.682 to 1.135 | 0.470 to 1.203 | 0.048 to 1.203 |
| `v4` | 1.0000 to 1.0006 | 1.0000 to 1.0006 | 1.0000 to 1.0021 |
"""

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""The coefficients of Keller Jordan's Muon: the steepest slope at 0 with which values stay near 1, not at 1."""

CUBIC_AT_ONE: Coefficients = (2.0, -1.5, 0.5)
"""The coefficients of DeepSeek-V4's last steps: s = 1 is a fixed point of slope 0, so values converge to it."""

SCHEDULES: dict[str, tuple[Coefficients, ...]] = {
    "v4": (QUINTIC,) * 8 + (CUBIC_AT_ONE,) * 2,
    "quintic5": (QUINTIC,) * 5,
}
"""The coefficients of every step, by the name of the schedule."""

WORKSPACE = 2**26
"""Numbers of a stack that are iterated at once, at least one matrix: it bounds the memory of the products."""


def orthogonalise(
    x_EMN: Tensor, schedule: tuple[Coefficients, ...], *, eps: float, products: torch.dtype
) -> Tensor:
    """The orthogonal factor of every matrix of a stack, each by itself.

    Args:
        x_EMN: the matrices, in fp32 or wider.
        schedule: the coefficients of every step.
        eps: the smallest Frobenius norm that a matrix is divided by, so that a matrix of zeros stays one.
        products: the format of the iterations; the norm is computed in that of `x_EMN`.

    Returns:
        E x M x N in the format of `x_EMN`.
    """
    matrix = x_EMN.shape[1] * x_EMN.shape[2]
    if not x_EMN.numel():
        return x_EMN
    parts = x_EMN.split(max(1, WORKSPACE // matrix))
    return torch.cat([_orthogonalise(part, schedule, eps, products) for part in parts])


def _orthogonalise(
    x_EMN: Tensor, schedule: tuple[Coefficients, ...], eps: float, products: torch.dtype
) -> Tensor:
    """`orthogonalise` of a few matrices, by batched products of the smaller of M x M and N x N."""
    is_tall = x_EMN.shape[1] > x_EMN.shape[2]
    norm_E11 = torch.linalg.matrix_norm(x_EMN, keepdim=True).clamp(min=eps)
    y = (x_EMN / norm_E11).to(products)
    if is_tall:
        y = y.mT
    for a, b, c in schedule:
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    found: Tensor = y.mT if is_tall else y
    return found.to(x_EMN.dtype)
