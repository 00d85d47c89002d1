"""Lightning's loggers of Weights & Biases and MLflow, which here go on in the same run after a resume.

The tracker's name of the run is kept in the run folder. It is written by the first rank, when the first number or the
hyper-parameters are logged.
"""

import os
import uuid
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger


class RunId:
    """The tracker's name of a run, in a file of the run folder.

    Args:
        file: the file.
        resumed: whether the run continues; otherwise a name that an abandoned start left is not used.
    """

    def __init__(self, file: Path, *, resumed: bool) -> None:
        self.file = file
        self.resumed = resumed

    def read(self) -> str | None:
        """The name of the run that is continued; None: the tracker has none yet."""
        if not self.resumed or not self.file.is_file():
            return None
        return self.file.read_text(encoding="utf-8").strip() or None

    def write(self, name: str) -> None:
        """Keeps the name, in one move."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_text(f"{name}\n", encoding="utf-8")
        os.replace(temporary, self.file)


class ResumableWandb(WandbLogger):
    """Lightning's logger of Weights & Biases."""

    def __init__(self, folder: Path, config: Any, *, resumed: bool) -> None:
        more = {"entity": config.entity, "group": config.group}
        super().__init__(
            name=folder.name,
            save_dir=folder,
            project=config.project,
            offline=config.mode == "offline",
            **{key: value for key, value in more.items() if value is not None},
        )
        self._wandb_init["mode"] = os.environ.get("WANDB_MODE") or config.mode
        # its value is None here, and newer versions of the package refuse or warn of it
        self._wandb_init.pop("anonymous", None)
        self._run_id = RunId(folder / "wandb_run.txt", resumed=resumed)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of the tracker, begun or continued when it is used for the first time."""
        if self._experiment is None:
            import wandb

            name = self._run_id.read() or uuid.uuid4().hex[:12]
            self._run_id.write(name)
            self._wandb_init["id"] = name
            self._experiment = wandb.init(**self._wandb_init, reinit="create_new")
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the tracker's run, so that the next run of this process begins its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status in ("success", "finished") else 1)
            self._experiment = None
            self._run_id.resumed = True  # a number that still comes belongs to the same run


class ResumableMLflow(MLFlowLogger):
    """Lightning's logger of MLflow."""

    def __init__(self, folder: Path, config: Any, *, resumed: bool) -> None:
        self._kept_id = RunId(folder / "mlflow_run.txt", resumed=resumed)
        uri = config.uri or str(folder / "mlruns")
        if "://" not in uri:
            uri = Path(uri).absolute().as_uri()
        if uri.startswith("file:"):
            # without it MLflow 3 refuses to keep runs in a folder
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._continued = self._kept_id.read()
        super().__init__(
            experiment_name=config.experiment,
            run_name=folder.name,
            tracking_uri=uri,
            run_id=self._continued,
            synchronous=True,
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The tracker's client; the run is begun or continued when it is used for the first time."""
        fresh = not self._initialized
        client = MLFlowLogger.experiment.fget(self)  # type: ignore[attr-defined]
        if fresh and self._run_id is not None:
            self._kept_id.write(self._run_id)
        return client

    def log_hyperparams(self, params: Any) -> None:
        """Logs the hyper-parameters; a continued run has them, and MLflow lets nobody change them."""
        if self._continued is None:
            super().log_hyperparams(params)
