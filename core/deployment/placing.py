"""The options --placement and --drop-free of commands: how experts run that are not trained any more.

Started by torchrun with a rank for each GPU of the plan, `core.evaluate` divides the experts over the ranks.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from core.assemble import build
from core.contracts.errors import UserError
from core.deployment.placed import PhysicalLoads, check_plan, place
from core.deployment.plan import PlacementPlan, read_plan
from core.extension.loader import installed_registry
from core.model.drop_free import drop_nothing
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe


class Placing:
    """Places the experts of a model, and counts what physical experts receive until the context ends.

    Args:
        file: the plan; None: nothing is placed or counted.
        divides: whether experts are divided over the ranks that a launcher has started; False: one process has all.
        drop_free: whether every assignment to an expert is carried out.

    Attributes:
        dispatcher: the name of a dispatcher between ranks, if experts are divided; None: that of the recipe.

    Raises:
        UserError: the file is no plan, or there is not one rank for each GPU.
    """

    def __init__(
        self, file: Path | None, *, divides: bool = False, drop_free: bool = False
    ) -> None:
        self.dispatcher: str | None = None
        self.drop_free = drop_free
        self._file = file
        self._plan: PlacementPlan | None = None
        self._loads: PhysicalLoads | None = None
        self._mesh: DeviceMesh | None = None
        self._open = ExitStack()
        if file is None:
            return
        self._plan = read_plan(file)
        started = os.environ.get("WORLD_SIZE", "1")
        if not started.isdecimal() or len(started) > 9:
            raise UserError(f"WORLD_SIZE = {started!r} in the environment: must be a whole number")
        ranks = int(started)
        if ranks <= 1:
            return
        if not divides:
            raise UserError(
                f"--placement {file}: {ranks} ranks were started, and only core.evaluate without --text and --tasks "
                "divides experts over ranks"
            )
        if self._plan.gpus != ranks:
            raise UserError(
                f"--placement {file}: has gpus = {self._plan.gpus}, and {ranks} ranks were started: must be equal"
            )
        self.dispatcher = between_ranks()
        dist.init_process_group("gloo")
        self._open.callback(dist.destroy_process_group)
        self._mesh = init_device_mesh("cpu", (ranks,))

    def check(self, recipe: Recipe) -> None:
        """Checks the options against the model of a recipe, which is not loaded for it.

        Raises:
            UserError: the plan is another model's, or experts choose tokens and none can be kept.
        """
        if self._plan is None and not self.drop_free:
            return
        model = build(recipe, device="meta")
        if self.drop_free:
            drop_nothing(model)
        if self._plan is not None:
            check_plan(model, self._plan, name=f"--placement {self._file}")

    def place(self, model: LanguageModel) -> None:
        """Makes the model drop nothing where that was asked for, places its experts, and counts from now on.

        Raises:
            UserError: as `check`.
        """
        if self.drop_free:
            drop_nothing(model)
        if self._plan is None:
            return
        place(model, self._plan, mesh=self._mesh, name=f"--placement {self._file}")
        self._loads = PhysicalLoads(model, self._plan)
        self._open.enter_context(self._loads.counting())

    def __enter__(self) -> "Placing":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def values(self) -> dict[str, Any]:
        """What was counted, under the key `placement`; nothing without a plan. All ranks call it within the context."""
        if self._loads is None:
            return {}
        return {"placement": self._loads.document()}


def between_ranks() -> str:
    """The name of the first dispatcher of this environment that can be bound to several ranks.

    Raises:
        UserError: there is none.
    """
    registry = installed_registry()
    for name in registry.names("dispatcher"):
        component, _ = registry.find("dispatcher", name).load()
        if "between_ranks" in component.capabilities_of(component.Config()):
            return name
    raise UserError("no installed dispatcher moves tokens between ranks")


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
