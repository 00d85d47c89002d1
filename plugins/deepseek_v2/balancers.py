"""DeepSeek-V2's three auxiliary losses (arXiv 2405.04434, eq. 23-31): experts, devices, communication.

T is the number of tokens of one sequence, and a choice is an expert to which the token was routed within its device
limit. Each loss is exactly its alpha where the load is even; communication, where every token also reaches M devices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import Routing
from core.contracts.schedule import Scheduled
from core.contracts.schema import setting
from core.routing.groups import sequence_groups
from core.routing.share_loss import Coefficient, ShareLoss, routed_choices, sum_by_group


class ExpertLoss(ShareLoss):
    """alpha_1 sum_i f_i P_i over experts."""

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 23-25; DeepSeekMoE (arXiv 2401.06066), eq. 12-14"
    example = {"name": "expert", "alpha": 0.003}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of the expert-level loss."""

        alpha: Scheduled = setting(
            0.003, doc="coefficient (V2: 0.003, V2-Lite: 0.001, DeepSeekMoE 2B: 0.01)"
        )

    def chosen(self, routing: Routing) -> Tensor:
        """T x E, 1 where the token was routed to the expert."""
        return routed_choices(routing)


class DeviceLoss(ShareLoss):
    """alpha_2 sum_d f'_d P'_d over devices: f' the mean of their experts' f, P' the sum of their experts' P."""

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 26-28"
    example = {"name": "device", "alpha": 0.05, "devices": 4}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of the device-level loss."""

        alpha: Scheduled = setting(0.05, doc="coefficient (V2: 0.05)")
        devices: int = setting(doc="devices that the experts are divided over (D)")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the devices do not divide the experts or are not the router's."""
            super().check(parent)
            _check_devices(self.devices, parent)

    def chosen(self, routing: Routing) -> Tensor:
        """T x E, 1 where the token was routed to the expert."""
        return routed_choices(routing)

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """sum_d f'_d P'_d of each sequence (eq. 26-28)."""
        f_ND = f_NE.unflatten(1, (self.config.devices, -1)).mean(dim=2)
        p_ND = p_NE.unflatten(1, (self.config.devices, -1)).sum(dim=2)
        result: Tensor = (f_ND * p_ND).sum(dim=1)
        return result


class CommunicationLoss(ShareLoss):
    """alpha_3 sum_d f''_d P''_d: f'' the tokens sent to a device over their even share M T / D, P'' as for devices."""

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 29-31"
    example = {"name": "communication", "alpha": 0.02, "devices": 4, "device_limit": 2}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of the communication loss."""

        alpha: Scheduled = setting(0.02, doc="coefficient (V2: 0.02)")
        devices: int = setting(doc="devices that the experts are divided over (D)")
        device_limit: int = setting(doc="devices that one token may reach (M)")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if devices or their limit are not the router's."""
            super().check(parent)
            _check_devices(self.devices, parent)
            if not 1 <= self.device_limit <= self.devices:
                raise ConfigError("device_limit", f"must be between 1 and devices = {self.devices}")
            grouped = _router_setting(parent, "groups", 1) == self.devices
            router_limit = _router_setting(parent, "reachable_groups", self.device_limit)
            top_k = _router_setting(parent, "top_k", self.device_limit)
            if self.device_limit > top_k:
                why = "no token reaches more devices"
                raise ConfigError("device_limit", f"must be at most top_k = {top_k}: {why}")
            if grouped and self.device_limit != router_limit:
                raise ConfigError("device_limit", f"must be the router's, {router_limit}")

    def chosen(self, routing: Routing) -> Tensor:
        """T x E, 1 where the token was routed to the expert."""
        return routed_choices(routing)

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """The sums of every share loss, and how many tokens of each sequence go to each device."""
        sums = super().observe(routing, context)
        with torch.no_grad():
            per_device_TDX = routed_choices(routing).unflatten(1, (self.config.devices, -1))
            sent_TD = per_device_TDX.amax(dim=2).to(torch.int64)
            valid_T = context.valid().flatten()
            sent_ND = sum_by_group(sent_TD, valid_T, sequence_groups(context))
            return {**sums, "sent_ND": sent_ND}

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """sum_d f''_d P''_d of each sequence (eq. 29-31)."""
        tokens_N1 = sums["tokens_N"].clamp(min=1)[:, None].to(p_NE.dtype)
        sent_ND = sums["sent_ND"].to(p_NE.dtype)
        f_ND = sent_ND * (self.config.devices / self.config.device_limit) / tokens_N1
        p_ND = p_NE.unflatten(1, (self.config.devices, -1)).sum(dim=2)
        result: Tensor = (f_ND * p_ND).sum(dim=1)
        return result


def _check_devices(devices: int, parent: Any) -> None:
    """Raises `ConfigError` unless the devices divide the experts and are the router's groups, if it has any."""
    if devices < 1 or parent.experts % devices:
        raise ConfigError("devices", f"must divide experts = {parent.experts}")
    groups = _router_setting(parent, "groups", 1)
    if groups not in (1, devices):
        raise ConfigError("devices", f"must be the router's groups, {groups}")


def _router_setting(parent: Any, key: str, otherwise: Any) -> Any:
    """A setting of the layer's router; `otherwise` if it has none of that name."""
    return getattr(getattr(getattr(parent, "router", None), "config", None), key, otherwise)
