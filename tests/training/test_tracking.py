"""The loggers `wandb` and `mlflow`, offline and in local folders; tests of a package that is missing are skipped."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lab import Lab

from core.contracts.component import Environment
from core.contracts.errors import ConfigError
from plugins.loggers import tracking
from plugins.loggers.tracking import MLflow, WeightsAndBiases

WANDB = "loggers=[{name: csv}, {name: wandb, mode: offline, project: tests}]"
MLFLOW = "loggers=[{name: csv}, {name: mlflow, experiment: tests}]"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent anywhere."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(
    ("factory", "module", "command"),
    [
        (WeightsAndBiases, "wandb", "pip install wandb"),
        (MLflow, "mlflow", "pip install mlflow-skinny"),
    ],
)
def test_a_missing_package_is_one_sentence_that_says_what_to_install(
    factory: type, module: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    why = factory.requires(None, Environment("cpu"))  # type: ignore[attr-defined]
    assert command in why
    with pytest.raises(ConfigError, match=command):
        factory(SimpleNamespace()).make(tmp_path, resumed_at=None)


def test_trackers_are_not_imported_before_a_logger_is_made() -> None:
    code = "import sys, plugins.loggers.tracking; print({'wandb', 'mlflow'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.full
def test_mlflow_has_the_metrics_and_the_recipe_and_a_resumed_run_is_the_same_one(
    lab: Lab, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    folder = tmp_path / "run"
    lab.fit(folder, MLFLOW)
    name = (folder / "mlflow_run.txt").read_text().strip()
    (folder / "summary.json").unlink()
    newest = max((folder / "checkpoints").glob("step-*"))
    newest.unlink()
    lab.fit(folder, MLFLOW, resume=True)
    assert (folder / "mlflow_run.txt").read_text().strip() == name
    client = mlflow.tracking.MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tests")
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [name]
    run = client.get_run(name)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.003"
    history = client.get_metric_history(name, "loss/total")
    assert {point.step for point in history} == set(range(1, 13))
    summary = json.loads((folder / "summary.json").read_text())
    assert run.data.metrics["val_loss"] == pytest.approx(summary["val_loss"])
    assert run.data.metrics["val_bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"])


@pytest.mark.full
def test_wandb_keeps_everything_offline_and_a_resumed_run_has_the_same_name(
    lab: Lab, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = tmp_path / "run"
    lab.fit(folder, WANDB)
    name = (folder / "wandb_run.txt").read_text().strip()
    (folder / "summary.json").unlink()
    newest = max((folder / "checkpoints").glob("step-*"))
    newest.unlink()
    lab.fit(folder, WANDB, resume=True)
    kept = list((folder / "wandb").glob(f"offline-run-*-{name}"))
    assert kept
    assert len(list((folder / "wandb").glob("offline-run-*"))) == len(kept)
    written = b"".join(file.read_bytes() for place in kept for file in place.glob("*.wandb"))
    for word in (b"loss/total", b"val_bits_per_byte", b"optimizer"):
        assert word in written


@pytest.mark.full
def test_two_wandb_runs_of_one_process_are_two_runs(lab: Lab, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    lab.fit(tmp_path / "one", WANDB, "budget.steps=2")
    assert wandb.run is None
    lab.fit(tmp_path / "two", WANDB, "budget.steps=2")
    names = {(tmp_path / run / "wandb_run.txt").read_text() for run in ("one", "two")}
    assert len(names) == 2
