"""AdamW (arXiv 1711.05101), torch's own, with DeepSeek-V3's settings as defaults (report, section 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.precision import weight_roles
from core.contracts.schedule import LearningRateSettings
from core.contracts.training import NamedParameter, OptimizerFactory
from core.model.adamw import AdamWSettings, adamw, check_roles, moment_bytes


class AdamW(OptimizerFactory):
    """torch's AdamW; matrices are decayed, and vectors (norms) and the roles in `no_decay` are not."""

    paper = "Decoupled Weight Decay Regularization (arXiv 1711.05101)"
    example = {"name": "adamw", "lr": 0.001}

    @dataclass(kw_only=True)
    class Config(AdamWSettings, LearningRateSettings):
        """Settings of AdamW."""

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for values outside their ranges, and for roles that do not exist."""
            LearningRateSettings.check(self, parent)
            AdamWSettings.check(self, parent)
            check_roles("no_decay", self.no_decay, weight_roles(parent))

    def make(self, parameters: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        """An optimizer with one group that decays and one that does not."""
        return adamw(parameters, self.config)

    def state_bytes(self, parameter: Tensor) -> int:
        """The bytes of two moments; torch's step counter, four bytes a tensor, is left out."""
        return 2 * moment_bytes(parameter, self.config.moments)
