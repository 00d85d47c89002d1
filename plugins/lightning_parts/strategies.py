"""On which devices a run works: one, or several that each hold the whole model."""

from dataclasses import dataclass
from typing import Any

from core.contracts.errors import Wrong
from core.contracts.schema import setting
from core.contracts.training import StrategyFactory


class Single(StrategyFactory):
    """One device: the GPU where there is one, else the CPU."""

    example = {"name": "single"}

    @dataclass(kw_only=True)
    class Config:
        """Which device."""

        accelerator: str = setting("auto", doc="auto, cpu or cuda")

    def trainer_arguments(self) -> dict[str, Any]:
        """One device and no process group."""
        return {"accelerator": self.config.accelerator, "devices": 1, "strategy": "auto"}


class DataParallel(StrategyFactory):
    """torch's DistributedDataParallel: every rank reads its rows of the same global micro-batch."""

    example = {"name": "ddp", "ranks": 2}

    @dataclass(kw_only=True)
    class Config:
        """How many ranks."""

        ranks: int = setting(doc="processes on this machine, one device each")
        accelerator: str = setting("auto", doc="auto, cpu or cuda")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` where the ranks cannot share a micro-batch evenly."""
            sequences = parent.batch.sequences if parent is not None and parent.batch is not None else self.ranks
            if self.ranks < 1 or sequences % self.ranks:
                raise Wrong("ranks", f"must divide batch.sequences = {sequences}")

    def trainer_arguments(self) -> dict[str, Any]:
        """Buffers are not broadcast: every rank updates its bias from the same reduced counts."""
        from lightning.pytorch.strategies import DDPStrategy

        strategy = DDPStrategy(broadcast_buffers=False)
        return {"accelerator": self.config.accelerator, "devices": self.config.ranks, "strategy": strategy}
