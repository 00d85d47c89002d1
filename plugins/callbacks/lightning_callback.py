"""Any callback of Lightning, or of a plugin's package, by its import path; its arguments are checked before a run."""

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts.component import Environment
from core.contracts.errors import ConfigError, nearest
from core.contracts.schema import setting
from core.contracts.training import CallbackFactory

if TYPE_CHECKING:
    from lightning.pytorch import Callback

LIGHTNING = "lightning.pytorch.callbacks"
REFUSED = {
    "BaseFinetuning": "moves weights between optimizer groups, which the recipe's optimizer forms",
    "BasePredictionWriter": "writes predictions, and a run makes none",
    "BatchSizeFinder": "changes the batch before the run, whose size the recipe sets under batch",
    "Checkpoint": "saves checkpoints, which the run does itself (keys under checkpoint)",
    "EarlyStopping": "is the callback early_stopping here, which a resumed run continues",
    "GradientAccumulationScheduler": "changes the window of a step, which batch.accumulate sets, also as a ramp",
    "LambdaCallback": "takes functions, which a recipe cannot hold",
    "LearningRateFinder": "changes the learning rate, which the optimizer's schedule sets",
    "ModelPruning": "replaces weights by masked ones, which checkpoints and optimizers do not know",
    "ProgressBar": "draws a second progress line over the run's own",
    "WeightAveraging": "counts a step once for every optimizer and hides the trained weights; use ema",
    "StochasticWeightAveraging": "replaces the weights and the schedule of the optimizer; use ema",
}
"""The classes of Lightning that a run cannot keep its promises with, subclasses included, each with the reason."""


class LightningCallback(CallbackFactory):
    """Runs a callback of Lightning, or of a package that the recipe names under `plugins`."""

    caveat = "a callback from elsewhere may change what is trained, which moeloom cannot check"
    example = {
        "name": "lightning",
        "callback": "DeviceStatsMonitor",
        "arguments": {"cpu_stats": False},
    }

    @dataclass(kw_only=True)
    class Config:
        """The class and its arguments."""

        callback: str = setting(
            doc="a class of lightning.pytorch.callbacks, such as Timer, or module:Class of a package under plugins"
        )
        arguments: dict[str, Any] = setting({}, doc="its arguments by name")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for something that is no import path, or a module that may not be imported."""
            module, name = import_path(self.callback)
            if not re.fullmatch(r"[A-Za-z_][\w.]*", module) or not name.isidentifier():
                allowed = "must be a class of lightning.pytorch.callbacks, or read module:Class"
                raise ConfigError("callback", f"is {self.callback!r}, and {allowed}")
            package = module.partition(".")[0]
            named = {entry.partition(".")[0] for entry in getattr(parent, "plugins", ())}
            if package != "lightning" and package not in named:
                why = "is imported only from lightning, or from a package that the recipe names under plugins"
                raise ConfigError("callback", f"is {self.callback!r}: a class {why}")
            same = [
                other
                for other in getattr(parent, "callbacks", ())
                if getattr(getattr(other, "config", None), "callback", None) == self.callback
            ]
            if len(same) > 1:
                why = "stands twice, and checkpoints could not tell the two states apart"
                raise ConfigError("callback", f"{self.callback} {why}")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        make_callback(config.callback, config.arguments)

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """Returns why the callback cannot be made with these arguments; None if it can."""
        try:
            make_callback(config.callback, config.arguments)
        except ConfigError as error:
            return str(error)
        return None

    def make(self, folder: Path) -> "Callback":
        """Makes the callback; Lightning keeps its state in checkpoints, and restores it."""
        return make_callback(self.config.callback, self.config.arguments)


def import_path(callback: str) -> tuple[str, str]:
    """The module and the name of a class; without a module it is one of Lightning's callbacks."""
    if ":" in callback:
        module, _, name = callback.partition(":")
    elif "." in callback:
        module, _, name = callback.rpartition(".")
    else:
        module, name = LIGHTNING, callback
    return module, name


def checked_class(callback: str, arguments: Mapping[str, Any]) -> Any:
    """Imports the class of a callback and compares the arguments with its signature.

    Raises:
        ConfigError: there is no such class, it is no callback, a run cannot have it, or it takes other arguments.
    """
    from lightning.pytorch import Callback

    module_name, name = import_path(callback)
    try:
        module = importlib.import_module(module_name)
    except Exception as cause:
        raise ConfigError("callback", f"{module_name} cannot be imported: {cause}") from cause
    cls = getattr(module, name, None)
    if cls is None:
        known = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(
            "callback", f"{module_name} has no class {name!r}; {nearest(name, known)}"
        )
    if not (inspect.isclass(cls) and issubclass(cls, Callback)):
        raise ConfigError("callback", f"{callback} is no subclass of lightning.pytorch.Callback")
    for base in cls.__mro__:
        if base.__name__ in REFUSED and base.__module__.startswith(f"{LIGHTNING}."):
            why = REFUSED[base.__name__]
            raise ConfigError("callback", f"{callback} cannot be used in a run: it {why}")
    _check_arguments(cls, callback, arguments)
    return cls


def _check_arguments(cls: Any, callback: str, arguments: Mapping[str, Any]) -> None:
    signature = inspect.signature(cls)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    for name in arguments:
        if name not in signature.parameters and not takes_any:
            known = nearest(name, list(signature.parameters))
            raise ConfigError("arguments", f"{callback} has no argument {name!r}; {known}")
    try:
        signature.bind(**arguments)
    except TypeError as cause:
        raise ConfigError("arguments", f"{callback}: {cause}") from cause


def make_callback(callback: str, arguments: Mapping[str, Any]) -> "Callback":
    """Makes a callback.

    Raises:
        ConfigError: what `checked_class` finds, or the class does not take a value.
    """
    cls = checked_class(callback, arguments)
    try:
        made: Callback = cls(**arguments)
    except Exception as cause:
        why = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise ConfigError("arguments", f"{callback} refuses them: {why}") from cause
    return made
