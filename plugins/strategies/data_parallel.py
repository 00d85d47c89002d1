"""Strategies with one device, or with several that each hold the whole model."""

from dataclasses import dataclass
from typing import Any, Literal

from core.contracts.component import Environment
from core.contracts.schema import setting
from core.contracts.strategy import StrategyFactory
from plugins.strategies.devices import (
    TIMEOUT,
    TIMEOUT_DOC,
    check_nodes,
    check_share,
    check_timeout,
    device_arguments,
    missing_gpu,
    timeout_of,
)


class Single(StrategyFactory):
    """Trains on one device: the GPU if there is one, else the CPU."""

    example = {"name": "single"}

    @dataclass(kw_only=True)
    class Config:
        """The kind of device."""

        accelerator: Literal["auto", "cpu", "cuda"] = setting(
            "auto", doc="auto: a GPU if there is one"
        )

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """The sentence that a GPU is missing, where `accelerator` is cuda."""
        return missing_gpu(config, environment)

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments for one device and no process group."""
        return {"accelerator": self.config.accelerator, "devices": 1, "strategy": "auto"}


class DataParallel(StrategyFactory):
    """Trains with torch's DistributedDataParallel: every rank reads its rows of the same global micro-batch."""

    example = {"name": "ddp", "ranks": 2}

    @dataclass(kw_only=True)
    class Config:
        """The number of ranks and of nodes, and the kind of device."""

        ranks: int = setting(doc="processes of the run, one device each")
        nodes: int = setting(1, doc="machines, which have ranks / nodes processes each")
        accelerator: Literal["auto", "cpu", "cuda"] = setting(
            "auto", doc="auto: GPUs if there are any"
        )
        timeout_minutes: float = setting(TIMEOUT, doc=TIMEOUT_DOC)

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the ranks cannot share a micro-batch, or one of validation, evenly."""
            check_share(parent, "ranks", self.ranks)
            check_nodes(self.nodes, self.ranks)
            check_timeout(self.timeout_minutes)

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """The sentence that GPUs are missing, where `accelerator` is cuda."""
        return missing_gpu(config, environment)

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments; buffers are not broadcast: every rank updates its bias from the same counts."""
        from lightning.pytorch.strategies import DDPStrategy

        config = self.config
        strategy = DDPStrategy(broadcast_buffers=False, timeout=timeout_of(config))
        devices = device_arguments(config.accelerator, ranks=config.ranks, nodes=config.nodes)
        return {**devices, "strategy": strategy}
