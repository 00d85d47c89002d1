"""Measures of expert load, all computed from the same int64 counts that balancers read.

MaxVio (arXiv 2408.15664, section 4.1) of a layer is (max load - mean load) / mean load: 0 where the load is
uniform, E / K - 1 if one expert receives every token. Reported values are means over layers.
"""

import torch
from torch import Tensor


def max_vio(load_E: Tensor) -> Tensor:
    """MaxVio of one layer, fp64 scalar; 0 if nothing was assigned."""
    load = load_E.to(torch.float64)
    mean = load.mean()
    return torch.where(mean > 0, load.max() / mean.clamp(min=1e-300) - 1, torch.zeros_like(mean))


def measures(loads: list[Tensor]) -> dict[str, Tensor]:
    """Four measures of the load of a step or of a validation, each the mean over layers.

    Args:
        loads: int64 counts E for each layer, over the whole step or the whole split.

    Returns:
        `max_vio`; `cv`, the coefficient of variation; `dead_fraction`, experts that received nothing;
        `entropy` of the load, 1 if it is uniform.
    """
    by_name: dict[str, list[Tensor]] = {}
    for load_E in loads:
        for name, value in _layer_measures(load_E).items():
            by_name.setdefault(name, []).append(value)
    return {name: torch.stack(layers).mean() for name, layers in by_name.items()}


def _layer_measures(load_E: Tensor) -> dict[str, Tensor]:
    load = load_E.to(torch.float64)
    mean = load.mean().clamp(min=1e-300)
    share = load / load.sum().clamp(min=1e-300)
    entropy = torch.special.entr(share).sum()
    if len(load) > 1:
        experts = torch.tensor(float(len(load)), dtype=torch.float64, device=load.device)
        uniformity = entropy / experts.log()
    else:
        uniformity = torch.ones_like(entropy)
    return {
        "max_vio": max_vio(load_E),
        "cv": load.std(correction=0) / mean,
        "dead_fraction": (load_E == 0).to(torch.float64).mean(),
        "entropy": uniformity,
    }
