"""The precision slot: who makes the matrix products, and in which number format they run."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from core.contracts.component import Component


class Precision(Component, ABC):
    """Makes every matrix-product layer of a model.

    Parameter names are the same in every precision: a layer has one parameter `weight`, in high precision,
    of shape [out, in] or [groups, out, in], which absorption, export and chunked losses may read. A *role*
    says what a layer is for: `attention.q_down`, `attention.q_up`, `attention.q` (no query latent),
    `attention.kv_down`, `attention.kv_up`, `attention.k`, `attention.v`, `attention.output`, `ffn.gate_up`,
    `ffn.down`, `experts.gate_up`, `experts.down`, `shared_experts.gate_up`, `shared_experts.down`, `router`,
    `mtp.projection`, `head`, `embedding`, `norm`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A layer `(..., in) -> (..., out)` without bias whose weight is drawn from N(0, std)."""

    @abstractmethod
    def grouped_linear(self, groups: int, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A layer `(x_AI, offsets_E) -> y_AO`: rows [offsets[e-1], offsets[e]) are multiplied by expert e's weight."""

    @abstractmethod
    def param_dtype(self, role: str) -> torch.dtype:
        """The format in which a role's weight is kept and updated."""

    @abstractmethod
    def compute_dtype(self, role: str) -> torch.dtype:
        """The format in which a role's product is taken; `describe` prints it for every role."""

    def context(self) -> AbstractContextManager[Any]:
        """Entered around each block, inside the function that is recomputed, and around each multi-token module."""
        return nullcontext()
