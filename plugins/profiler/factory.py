"""The profiler's keys and their checks; Lightning, which takes seconds to import, is imported where it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.contracts.errors import ConfigError
from core.contracts.schema import setting
from core.contracts.training import CallbackFactory

if TYPE_CHECKING:
    from lightning.pytorch import Callback


class Profiler(CallbackFactory):
    """Profiles a few steps of a run into the run folder's `profile/`: traces, and how the time of a step is spent."""

    example = {"name": "profiler"}

    @dataclass(kw_only=True)
    class Config:
        """Which steps are profiled, on which ranks, and what is recorded of them."""

        first_step: int = setting(
            10, doc="the first profiled step, counted from 1; the steps before it warm up"
        )
        steps: int = setting(3, doc="how many steps are profiled")
        ranks: Literal["first", "all"] = setting("first", doc="the ranks that are profiled")
        memory: bool = setting(
            False, doc="also record allocations, which makes steps slower; a snapshot on GPUs"
        )
        shapes: bool = setting(False, doc="also record the shapes of operators' inputs")
        stacks: bool = setting(
            False, doc="also record the lines of Python that called each operator; slow"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for steps that no run has, or that this one does not reach."""
            for key in ("first_step", "steps"):
                if getattr(self, key) < 1:
                    raise ConfigError(key, "must be at least 1")
            run_steps = steps_of(parent)
            last = self.first_step + self.steps - 1
            if run_steps is not None and last > run_steps:
                why = f"the profile would end with step {last}, and the run has {run_steps}"
                raise ConfigError("first_step", f"{why}: profile earlier or fewer steps")
            trainer = getattr(parent, "trainer", None) or {}
            if trainer.get("profiler") == "pytorch":
                why = "the callback profiler needs torch's profiler, which trainer.profiler = pytorch uses"
                raise ConfigError("first_step", f"{why}: set trainer.profiler to null or simple")

    def make(self, folder: Path) -> "Callback":
        """Makes the callback."""
        from plugins.profiler.callback import ProfilerCallback

        return ProfilerCallback(self.config, folder / "profile")


def steps_of(recipe: Any) -> int | None:
    """The number of steps of a run if the recipe alone says it; None with a batch ramp or a budget in FLOPs.

    Args:
        recipe: the recipe, or something without these sections.
    """
    budget = getattr(recipe, "budget", None)
    if budget is None:
        return None
    if budget.steps is not None:
        return int(budget.steps)
    accumulate = recipe.batch.accumulate
    if budget.tokens is None or not isinstance(accumulate, int | float):
        return None
    tokens = int(accumulate) * recipe.batch.sequences * recipe.data.sequence_length
    return int(-(-budget.tokens // tokens))
