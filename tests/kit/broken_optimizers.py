"""Optimizers with one error each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.schedule import LearningRateSettings
from core.contracts.training import NamedParameter, OptimizerFactory


class SmallLedger(OptimizerFactory):
    """Counts one moment of the two that Adam keeps."""

    example = {"name": "small_ledger", "lr": 0.1}

    @dataclass(kw_only=True)
    class Config(LearningRateSettings):
        """The learning rate."""

    def make(self, parameters: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam([named.parameter for named in parameters])

    def state_bytes(self, parameter: Tensor) -> int:
        return parameter.numel() * parameter.element_size()


class _NormedSGD(torch.optim.SGD):
    """Divides each gradient by its norm."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        super().step(closure)


class HalvesOnly(OptimizerFactory):
    """Claims to gather matrices, and takes the norm of the part that a rank owns."""

    example = {"name": "halves_only", "lr": 0.1}
    gathers_matrices = True
    needs_whole_matrices = True

    @dataclass(kw_only=True)
    class Config(LearningRateSettings):
        """The learning rate."""

    def make(self, parameters: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        return _NormedSGD([named.parameter for named in parameters])


class NormOfParts(OptimizerFactory):
    """Takes the norm of the part that a rank owns, and does not say that it needs the whole."""

    example = {"name": "norm_of_parts", "lr": 0.1}

    @dataclass(kw_only=True)
    class Config(LearningRateSettings):
        """The learning rate."""

    def make(self, parameters: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        return _NormedSGD([named.parameter for named in parameters])


OPTIMIZERS = {
    SmallLedger: "optimizer_states_are_counted",
    HalvesOnly: "divided_matrices_are_updated_as_whole",
    NormOfParts: "parts_are_updated_as_the_whole",
}
"""The one check that each must fail."""
