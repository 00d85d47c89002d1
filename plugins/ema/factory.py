"""The keys of the moving average and their checks; Lightning is imported where the callback is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.contracts.errors import ConfigError
from core.contracts.schema import setting
from core.contracts.training import CallbackFactory

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from torch import Tensor

FP32_BYTES = 4
"""Bytes of a number in the narrowest format of an average."""


class ExponentialMovingAverage(CallbackFactory):
    """Keeps an exponential moving average of the weights, which is validated and saved beside them."""

    paper = (
        "DeepSeek-V3 technical report (arXiv 2412.19437), section 3.2.3: exponential moving average in CPU; "
        "Polyak and Juditsky, 1992"
    )
    average = "ema"
    example = {"name": "ema"}

    @dataclass(kw_only=True)
    class Config:
        """How slowly the average follows, after which steps it does, and where it is kept."""

        decay: float = setting(
            0.999, doc="what an update keeps of the average; the rest comes from the weights"
        )
        first_step: int = setting(
            1,
            doc="the step, counted from 1, after which the average begins as a copy of the weights",
        )
        every_steps: int = setting(1, doc="steps from one update to the next")
        device: Literal["same", "cpu"] = setting(
            "same", doc="where the average is kept: beside the weights, or in the CPU's memory"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a decay outside of (0, 1), and for steps that no run has."""
            if not 0 < self.decay < 1:
                raise ConfigError("decay", "must be more than 0 and less than 1")
            for key in ("first_step", "every_steps"):
                if getattr(self, key) < 1:
                    raise ConfigError(key, "must be at least 1")
            steps = getattr(getattr(parent, "budget", None), "steps", None)
            if steps is not None and self.first_step > steps:
                raise ConfigError("first_step", f"must be at most {steps}, the steps of the run")

    def make(self, folder: Path) -> "Callback":
        """Makes the callback, which writes no file of its own."""
        from plugins.ema.callback import EmaCallback

        return EmaCallback(self.config)

    def average_bytes(self, parameter: "Tensor") -> int:
        """The bytes of the average in fp32 or the weight's wider format; 0 if it is kept on the CPU."""
        if self.config.device == "cpu":
            return 0
        return parameter.numel() * max(parameter.element_size(), FP32_BYTES)
