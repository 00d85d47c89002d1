"""DeepSeek-V2's three auxiliary losses (arXiv 2405.04434, eq. 23-31): experts, devices, communication.

T is the tokens of one sequence, and a choice is what the token was routed to within its device limit. Each is exactly
its alpha where the load is even; communication, where every token also reaches M devices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import Wrong
from core.contracts.router import Routing
from core.contracts.schedule import Scheduled
from core.contracts.schema import setting
from core.routing.capacity import pieces_of
from core.routing.share_loss import ShareLoss, Weighted, routed_choices, sum_by_piece


class ExpertLoss(ShareLoss):
    """alpha_1 sum_i f_i P_i over experts."""

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 23-25; DeepSeekMoE (arXiv 2401.06066), eq. 12-14"
    example = {"name": "expert", "alpha": 0.003}

    @dataclass(kw_only=True)
    class Config(Weighted):
        """Settings of the expert-level loss."""

        alpha: Scheduled = setting(0.003, doc="coefficient (V2: 0.003, V2-Lite: 0.001, DeepSeekMoE 2B: 0.01)")

    def chosen(self, routing: Routing) -> Tensor:
        """Where the token was routed."""
        return routed_choices(routing)


class DeviceLoss(ShareLoss):
    """alpha_2 sum_d f'_d P'_d over devices: f' the mean of their experts' f, P' the sum of their experts' P."""

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 26-28"
    example = {"name": "device", "alpha": 0.05, "devices": 4}

    @dataclass(kw_only=True)
    class Config(Weighted):
        """Settings of the device-level loss."""

        alpha: Scheduled = setting(0.05, doc="coefficient (V2: 0.05)")
        devices: int = setting(doc="devices that the experts are divided over (D)")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` where the devices do not divide the experts or are not the router's."""
            super().check(parent)
            _check_devices(self.devices, parent)

    def chosen(self, routing: Routing) -> Tensor:
        """Where the token was routed."""
        return routed_choices(routing)

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """Eq. 26."""
        f_ND = f_NE.unflatten(1, (self.config.devices, -1)).mean(dim=2)
        p_ND = p_NE.unflatten(1, (self.config.devices, -1)).sum(dim=2)
        result: Tensor = (f_ND * p_ND).sum(dim=1)
        return result


class CommunicationLoss(ShareLoss):
    """alpha_3 sum_d f''_d P''_d: f'' the tokens sent to a device over their even share M T / D, P'' as for devices."""

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 29-31"
    example = {"name": "communication", "alpha": 0.02, "devices": 4, "device_limit": 2}

    @dataclass(kw_only=True)
    class Config(Weighted):
        """Settings of the communication loss."""

        alpha: Scheduled = setting(0.02, doc="coefficient (V2: 0.02)")
        devices: int = setting(doc="devices that the experts are divided over (D)")
        device_limit: int = setting(doc="devices that one token may reach (M)")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` where devices or their limit are not the router's."""
            super().check(parent)
            _check_devices(self.devices, parent)
            if not 1 <= self.device_limit <= self.devices:
                raise Wrong("device_limit", f"must be between 1 and devices = {self.devices}")
            grouped = _of_router(parent, "groups", 1) == self.devices
            reach = _of_router(parent, "reach", self.device_limit)
            most = _of_router(parent, "top_k", self.device_limit)
            if self.device_limit > most:
                raise Wrong("device_limit", f"must be at most top_k = {most}: no token reaches more devices")
            if grouped and self.device_limit != reach:
                raise Wrong("device_limit", f"must be the router's, {reach}")

    def chosen(self, routing: Routing) -> Tensor:
        """Where the token was routed."""
        return routed_choices(routing)

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """Beside the usual sums, how many tokens of each piece go to each device."""
        sums = super().observe(routing, context)
        with torch.no_grad():
            per_device_TDX = routed_choices(routing).unflatten(1, (self.config.devices, -1))
            sent_TD = per_device_TDX.amax(dim=2).to(torch.int64)
            return {**sums, "sent_ND": sum_by_piece(sent_TD, context.valid().flatten(), pieces_of(context))}

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """Eq. 29."""
        tokens_N1 = sums["tokens_N"].clamp(min=1)[:, None].to(p_NE.dtype)
        f_ND = sums["sent_ND"].to(p_NE.dtype) * (self.config.devices / self.config.device_limit) / tokens_N1
        p_ND = p_NE.unflatten(1, (self.config.devices, -1)).sum(dim=2)
        result: Tensor = (f_ND * p_ND).sum(dim=1)
        return result


def _check_devices(devices: int, parent: Any) -> None:
    """The router's groups are the devices, where it has any."""
    if devices < 1 or parent.experts % devices:
        raise Wrong("devices", f"must divide experts = {parent.experts}")
    groups = _of_router(parent, "groups", 1)
    if groups not in (1, devices):
        raise Wrong("devices", f"must be the router's groups, {groups}")


def _of_router(parent: Any, key: str, otherwise: Any) -> Any:
    """A setting of the layer's router, where it has one of that name."""
    return getattr(getattr(getattr(parent, "router", None), "config", None), key, otherwise)
