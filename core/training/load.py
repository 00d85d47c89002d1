"""What the integers say: measures of expert load, all from the same int64 counts that balancers read.

MaxVio (arXiv 2408.15664, section 4.1) of a layer is (max load - mean load) / mean load: 0 where the load is
uniform, E / K - 1 where one expert receives every token. Reported values are means over layers.
"""

import torch
from torch import Tensor


def max_vio(load_E: Tensor) -> Tensor:
    """MaxVio of one layer, fp64 scalar; 0 where nothing was assigned."""
    load = load_E.to(torch.float64)
    mean = load.mean()
    return torch.where(mean > 0, load.max() / mean.clamp(min=1e-300) - 1, torch.zeros_like(mean))


def measures(loads: list[Tensor]) -> dict[str, Tensor]:
    """The load of a step, or of a validation, in four numbers, each the mean over layers.

    Args:
        loads: int64 counts E for each layer, over everything that is meant.

    Returns:
        `max_vio`; `cv`, the coefficient of variation; `dead_fraction`, experts that received nothing;
        `entropy` of the load, 1 where it is uniform.
    """
    rows = [_of_layer(load_E) for load_E in loads]
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]} if rows else {}


def _of_layer(load_E: Tensor) -> dict[str, Tensor]:
    load = load_E.to(torch.float64)
    mean = load.mean().clamp(min=1e-300)
    share = load / load.sum().clamp(min=1e-300)
    entropy = torch.special.entr(share).sum()
    experts = torch.tensor(float(len(load)), dtype=torch.float64, device=load.device)
    return {
        "max_vio": max_vio(load_E),
        "cv": load.std(correction=0) / mean,
        "dead_fraction": (load_E == 0).to(torch.float64).mean(),
        "entropy": entropy / experts.log() if len(load) > 1 else torch.ones_like(entropy),
    }
