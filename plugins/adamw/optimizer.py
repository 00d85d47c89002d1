"""AdamW (arXiv 1711.05101), torch's own, with DeepSeek-V3's settings as defaults (report, section 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.errors import ConfigError
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.contracts.training import NamedParameter, OptimizerFactory
from plugins.adamw.moments import LARGEST_BETA, AdamWBF16


class AdamW(OptimizerFactory):
    """torch's AdamW; matrices are decayed, and vectors (norms) are not."""

    paper = "Decoupled Weight Decay Regularization (arXiv 1711.05101)"
    example = {"name": "adamw", "lr": 0.001}

    @dataclass(kw_only=True)
    class Config:
        """Settings of AdamW."""

        lr: Scheduled = setting(doc="learning rate")
        betas: list[float] = setting([0.9, 0.95], doc="decay of the two moments")
        eps: float = setting(1e-8, doc="added to the root of the second moment")
        weight_decay: float = setting(0.1, doc="decoupled weight decay of matrices")
        moments: Literal["weights", "bf16"] = setting(
            "weights", doc="format of both moments: the weights' own, or bf16"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for values outside their ranges."""
            check_scheduled(self.lr, "lr", low=0)
            if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
                raise ConfigError("betas", "must be two numbers in [0, 1)")
            if self.eps <= 0:
                raise ConfigError("eps", "must be more than 0")
            if self.weight_decay < 0:
                raise ConfigError("weight_decay", "must be at least 0")
            if self.moments == "bf16" and max(self.betas) > LARGEST_BETA:
                raise ConfigError(
                    "betas",
                    f"{max(self.betas)} is more than bf16 moments can follow: their 8 significant bits round a change "
                    f"of less than 2^-8 away, so a beta is at most 1 - 2^-8 = {LARGEST_BETA}; or set moments: weights",
                )

    def make(self, parameters: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        """An optimizer with one group that decays and one that does not."""
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for named in parameters:
            if named.kind == "vector":
                vectors.append(named.parameter)
            else:
                matrices.append(named.parameter)
        decay = self.config.weight_decay
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        first, second = self.config.betas
        betas = (first, second)
        eps = self.config.eps
        kept = [group for group in groups if group["params"]]
        if self.config.moments == "bf16":
            return AdamWBF16(kept, lr=0.0, betas=betas, eps=eps)
        return torch.optim.AdamW(kept, lr=0.0, betas=betas, eps=eps, fused=True)

    def state_bytes(self, parameter: Tensor) -> int:
        """The bytes of two moments; torch's step counter, four bytes a tensor, is left out."""
        element = 2 if self.config.moments == "bf16" else parameter.element_size()
        return 2 * parameter.numel() * element

    def learning_rate(self, progress: Progress) -> float:
        """The schedule's value at this position of the run."""
        return value_at(self.config.lr, progress)
