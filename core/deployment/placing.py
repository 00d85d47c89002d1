"""The option --placement of commands: reads the plan, places the model, and counts what its GPUs receive."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core.deployment.placed import PhysicalLoads, place
from core.deployment.plan import PlacementPlan, read_plan
from core.model.language_model import LanguageModel


class Placing:
    """Places the experts of a model, and counts what physical experts receive until the context ends.

    Args:
        file: the plan; None: nothing is placed or counted.

    Raises:
        UserError: the file is no plan.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._plan: PlacementPlan | None = None
        self._loads: PhysicalLoads | None = None
        self._counting = ExitStack()
        if file is not None:
            self._plan = read_plan(file)

    def place(self, model: LanguageModel) -> None:
        """Places the model's experts, and counts from now on.

        Raises:
            UserError: the plan is another model's.
        """
        if self._plan is None:
            return
        place(model, self._plan, name=f"--placement {self._file}")
        self._loads = PhysicalLoads(model, self._plan)
        self._counting.enter_context(self._loads.counting())

    def __enter__(self) -> "Placing":
        return self

    def __exit__(self, *error: object) -> None:
        self._counting.close()

    def values(self) -> dict[str, Any]:
        """What was counted, under the key `placement`; nothing without a plan."""
        if self._loads is None:
            return {}
        return {"placement": self._loads.document()}


def lines(counted: dict[str, Any]) -> list[str]:
    """What the GPUs of a placement received, a line for each layer.

    Args:
        counted: the value of `placement`.
    """
    found = []
    rows = zip(counted["layers"], counted["load"], counted["balancedness"], strict=True)
    for path, load_G, balance in rows:
        loads = " ".join(map(str, load_G))
        found.append(f"load of GPUs in {path}: {loads} (balancedness {balance:.3f})")
    return found
