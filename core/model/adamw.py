"""AdamW (arXiv 1711.05101) over named weights: the settings and groups that optimizers with AdamW in them share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.bounds import not_negative, positive
from core.contracts.errors import ConfigError
from core.contracts.precision import roles_matching
from core.contracts.schema import setting
from core.contracts.training import NamedParameter
from core.numerics.moments import LARGEST_BETA, AdamWBF16

MomentFormat = Literal["weights", "bf16"]
"""The format of an optimizer's moments: the weights' own, or bf16."""


@dataclass(kw_only=True)
class AdamWSettings:
    """The keys of AdamW but the learning rate: derive a `Config` or one of its sections from this class."""

    betas: list[float] = setting([0.9, 0.95], doc="decay of the two moments")
    eps: float = setting(1e-8, doc="added to the root of the second moment")
    weight_decay: float = setting(0.1, doc="decoupled weight decay of matrices")
    no_decay: list[str] = setting(
        [], doc="roles whose matrices are not decayed, as vectors (norms, biases) never are"
    )
    moments: MomentFormat = setting(
        "weights", doc="format of both moments: the weights' own, or bf16"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for values outside their ranges; roles are checked where the model is known."""
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", "must be two numbers in [0, 1)")
        positive(self, "eps")
        not_negative(self, "weight_decay")
        if self.moments == "bf16":
            check_bf16_decay("betas", max(self.betas))


def check_bf16_decay(key: str, decay: float) -> None:
    """Raises `ConfigError` for a decay that moments in bf16 cannot follow (`core.numerics.moments`)."""
    if decay > LARGEST_BETA:
        raise ConfigError(
            key,
            f"{decay} is more than bf16 moments can follow: their 8 significant bits round a change of less than 2^-8 "
            f"away, so it is at most 1 - 2^-8 = {LARGEST_BETA}; or set moments: weights",
        )


def check_roles(key: str, patterns: Iterable[str], known: Mapping[str, str]) -> None:
    """Raises `ConfigError` for a pattern of a setting that names no role."""
    for pattern in patterns:
        try:
            roles_matching([pattern], known)
        except ConfigError as error:
            raise ConfigError(key, f"{pattern!r} {error.why}") from error


def has_role(named: NamedParameter, patterns: Iterable[str]) -> bool:
    """Whether some pattern names the role of a weight."""
    return any(fnmatchcase(named.role, pattern) for pattern in patterns)


def moment_bytes(parameter: Tensor, moments: MomentFormat) -> int:
    """The bytes of one moment of a parameter."""
    return parameter.numel() * (2 if moments == "bf16" else parameter.element_size())


def adamw(
    parameters: Sequence[NamedParameter], settings: AdamWSettings, *, lr_scale: float = 1.0
) -> torch.optim.Optimizer:
    """An optimizer with a group of the weights that decay, and one of vectors (norms) and of the roles in `no_decay`.

    Args:
        parameters: the weights; at least one.
        settings: a `Config`, or a section of one.
        lr_scale: the factor of the schedule's learning rate in both groups.
    """
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for named in parameters:
        is_other = named.kind == "vector" or has_role(named, settings.no_decay)
        (others if is_other else decayed).append(named.parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    if lr_scale != 1:
        for group in kept:
            group["lr_scale"] = lr_scale
    first, second = settings.betas
    if settings.moments == "bf16":
        return AdamWBF16(kept, lr=0.0, betas=(first, second), eps=settings.eps)
    return torch.optim.AdamW(kept, lr=0.0, betas=(first, second), eps=settings.eps, fused=True)
