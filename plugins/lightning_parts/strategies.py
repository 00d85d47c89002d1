"""On which devices a run works: one, or several that each hold the whole model."""

from dataclasses import dataclass
from typing import Any, Literal

from core.contracts.component import Environment
from core.contracts.errors import Wrong
from core.contracts.schema import setting
from core.contracts.training import StrategyFactory


def _lacking(config: Any, environment: Environment) -> str | None:
    missing = config.accelerator == "cuda" and environment.device != "cuda"
    return "accelerator is cuda, and torch finds no GPU" if missing else None


class Single(StrategyFactory):
    """One device: the GPU where there is one, else the CPU."""

    example = {"name": "single"}

    @dataclass(kw_only=True)
    class Config:
        """Which device."""

        accelerator: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto: a GPU if there is one")

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """A GPU, where one is asked for."""
        return _lacking(config, environment)

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
        accelerator: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto: GPUs if there are any")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` where the ranks cannot share a micro-batch, or one of validation, evenly."""
            for key in ("batch", "validation"):
                section = getattr(parent, key, None)
                sequences = section.sequences if section is not None else self.ranks
                if self.ranks < 1 or sequences % self.ranks:
                    raise Wrong("ranks", f"must divide {key}.sequences = {sequences}")

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """GPUs, where they are asked for."""
        return _lacking(config, environment)

    def trainer_arguments(self) -> dict[str, Any]:
        """Buffers are not broadcast: every rank updates its bias from the same reduced counts."""
        from lightning.pytorch.strategies import DDPStrategy

        strategy = DDPStrategy(broadcast_buffers=False)
        return {"accelerator": self.config.accelerator, "devices": self.config.ranks, "strategy": strategy}
