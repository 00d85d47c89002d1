"""Dispatch within one device: assignments are sorted by expert, and results are put back in token order."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.dispatcher import Dispatcher, Handle
from core.contracts.router import Routing
from core.routing.rows import Done, gated_sums, sort_by_expert


class LocalDispatcher(Dispatcher):
    """Dispatches to experts that are all on this device; rows only move in memory."""

    example = {"name": "local"}
    capabilities = frozenset({"replaceable"})

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)

    @property
    def is_local(self) -> bool:
        """True: there is no other device."""
        return True

    def start(self, x_TD: Tensor, routing: Routing) -> Handle:
        """Sorts rows by expert, stably; dropped assignments go past the last expert's end."""
        return Done(sort_by_expert(x_TD, routing, self.experts))

    def start_combine(self, y_AD: Tensor, state: Any) -> Handle:
        """Puts rows back in the assignments' order, multiplies them by the gates and adds up each token's."""
        return Done(gated_sums(y_AD, state))
