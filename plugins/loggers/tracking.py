"""The keys of loggers for experiment trackers; each needs a package that is imported where the logger is made."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.contracts.component import Environment
from core.contracts.errors import ConfigError
from core.contracts.schema import setting
from core.contracts.training import LoggerFactory

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class WeightsAndBiases(LoggerFactory):
    """Logs metrics and the recipe to Weights & Biases; `offline` keeps them in the run folder's `wandb/`."""

    example = {"name": "wandb", "mode": "offline"}

    @dataclass(kw_only=True)
    class Config:
        """Where the run appears."""

        project: str = setting("moeloom", doc="the project that the run belongs to")
        entity: str | None = setting(
            None, doc="the user or team that owns the project; null: the one who is logged in"
        )
        group: str | None = setting(None, doc="a name that several runs share; null: none")
        mode: Literal["online", "offline"] = setting(
            "online", doc="send metrics as they come, or keep them for `wandb sync`"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for an empty name."""
            _check_names(self, "project", "entity", "group")

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """Returns what to install; None if the package is there."""
        return _missing("wandb", "wandb")

    def make(self, folder: Path, *, resumed_at: int | None) -> "Logger":
        """Makes the logger; a resumed run goes on in its run of the tracker, where no row can be removed."""
        _check_installed(_missing("wandb", "wandb"))
        from plugins.loggers.resumable_tracking import ResumableWandb

        return ResumableWandb(folder, self.config, resumed=resumed_at is not None)


class MLflow(LoggerFactory):
    """Logs metrics and the recipe to MLflow: to a server, or to a local folder or database."""

    example = {"name": "mlflow"}

    @dataclass(kw_only=True)
    class Config:
        """Where the run appears."""

        experiment: str = setting("moeloom", doc="the experiment that the run belongs to")
        uri: str | None = setting(
            None,
            doc="a server (http://...), a folder, or a database (sqlite:///...); null: `mlruns/` in the run folder",
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for an empty name."""
            _check_names(self, "experiment", "uri")

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """Returns what to install; None if the package is there."""
        return _missing("mlflow", "mlflow-skinny")

    def make(self, folder: Path, *, resumed_at: int | None) -> "Logger":
        """Makes the logger; a resumed run goes on in its run of the tracker, where no row can be removed."""
        _check_installed(_missing("mlflow", "mlflow-skinny"))
        from plugins.loggers.resumable_tracking import ResumableMLflow

        return ResumableMLflow(folder, self.config, resumed=resumed_at is not None)


def _check_names(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is not None and not value.strip():
            raise ConfigError(key, f"is {value!r}, and must not be empty")


def _missing(module: str, package: str) -> str | None:
    """A sentence that names the package to install; None if its module is found."""
    if find_spec(module) is not None:
        return None
    return f"the logger {module} needs the package {package}: pip install {package}"


def _check_installed(missing: str | None) -> None:
    if missing:
        raise ConfigError("name", missing)
