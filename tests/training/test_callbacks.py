"""Early stopping, callbacks by import path, and hyper-parameters in TensorBoard.

The small run has 12 steps, checkpoints after steps 5, 10 and 12, and validations after steps 6 and 12.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lab import Lab, last_checkpoint, rows
from rank_runs import assert_same_end, fit_on_ranks

from core.contracts.errors import UserError
from core.training.early_end import why_ended
from core.training.hyper_parameters import flatten
from plugins.callbacks.early_stopping import StopWithoutImprovement
from plugins.callbacks.lightning_callback import REFUSED

FP64 = "precision={name: fp64}"
OFTEN = "validation.every_steps=2"


def stopping(**given: object) -> str:
    """The override that adds early stopping."""
    text = "".join(f", {key}: {value}" for key, value in given.items())
    return f"callbacks=[{{name: early_stopping{text}}}]"


@pytest.fixture(scope="module")
def stopped(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no validation can improve by 5 nats: it waits for two after the first, and ends after step 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    lab.fit(folder, stopping(patience=2, min_delta=5), OFTEN)
    return folder


def test_a_run_without_improvement_ends_with_its_checkpoint_and_says_why(stopped: Path) -> None:
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["val_loss"] is not None
    reasons = [notice for notice in summary["notices"] if "ended after 6 of 12 steps" in notice]
    assert len(reasons) == 1
    assert "val_loss" in reasons[0]
    assert last_checkpoint(stopped)["moeloom"]["windows_done"] == 6
    steps = [int(row["step"]) for row in rows(stopped) if row.get("loss/total")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_that_had_ended_early_trains_no_further_step(lab: Lab, stopped: Path) -> None:
    (stopped / "summary.json").rename(stopped / "summary.bak")
    lab.fit(stopped, stopping(patience=2, min_delta=5), OFTEN, resume=True)
    again = json.loads((stopped / "summary.json").read_text())
    before = json.loads((stopped / "summary.bak").read_text())
    assert again["steps"] == 6
    assert again["notices"] == before["notices"]
    assert again["val_loss"] == before["val_loss"]


@pytest.mark.full
def test_an_improving_run_keeps_its_budget(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", stopping(patience=5), OFTEN)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 12
    assert not [notice for notice in summary["notices"] if "ended after" in notice]


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy",
    [
        "{name: ddp, ranks: 2, accelerator: cpu}",
        "{name: expert_parallel, expert_ranks: 2, accelerator: cpu}",
    ],
)
def test_all_ranks_end_early_after_the_step_of_one_process(
    lab: Lab, stopped: Path, tmp_path: Path, strategy: str
) -> None:
    """Two ranks share the batch of one process, and end with its checkpoint and its reason."""
    run = tmp_path / "run"
    settings = (stopping(patience=2, min_delta=5), OFTEN, FP64, f"strategy={strategy}")
    fit_on_ranks(lab, run, *settings)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    assert [notice for notice in summary["notices"] if "ended after 6 of 12 steps" in notice]
    lab.fit(tmp_path / "one", *settings[:3])
    assert_same_end(run, tmp_path / "one")
    (run / "summary.json").unlink()
    fit_on_ranks(lab, run, *settings, resume=True)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("mode", "delta", "values", "ends"),
    [
        ("min", 0.0, [3, 2, 2, 2], [False, False, False, True]),
        ("max", 0.0, [3, 2, 4, 4, 4], [False, False, False, False, True]),
        ("min", 0.5, [3, 2.6, 2.4, 2.4, 2.4], [False, False, False, False, True]),
        ("min", 0.0, [float("nan"), 3, float("nan"), float("inf")], [False, False, False, True]),
    ],
)
def test_patience_counts_validations_without_improvement(
    mode: str, delta: float, values: list[float], ends: list[bool]
) -> None:
    config = SimpleNamespace(metric="x", patience=2, min_delta=delta, mode=mode)
    callback = StopWithoutImprovement(config)
    found = []
    for value in values:
        copied = StopWithoutImprovement(config)
        copied.load_state_dict(callback.state_dict())
        callback = copied
        found.append(callback._is_over(value))
    assert found == ends


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([stopping(patience=0)], ["patience", "at least 1"]),
        ([stopping(min_delta=".nan")], ["min_delta", "nan"]),
        ([stopping(min_delta=-1)], ["min_delta", "-1"]),
        ([stopping(), "validation.every_steps=null"], ["validation.every_steps"]),
        (["callbacks=[{name: lightning, callback: 'os:system'}]"], ["callback", "'os:system'"]),
        (["callbacks=[{name: lightning, callback: 'no path'}]"], ["callback", "module:Class"]),
    ],
)
def test_mistakes_are_found_in_the_recipe(lab: Lab, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        lab.recipe(*overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("callback", "arguments", "words"),
    [
        ("Timr", "{}", ["no class 'Timr'", "Timer"]),
        ("Timer", "{duraton: 1}", ["no argument 'duraton'", "duration"]),
        ("LearningRateMonitor", "{logging_interval: never}", ["arguments", "logging_interval"]),
        ("GradientAccumulationScheduler", "{scheduling: {0: 2}}", ["batch.accumulate"]),
        ("StochasticWeightAveraging", "{swa_lrs: 0.1}", ["ema"]),
        ("ModelCheckpoint", "{}", ["checkpoint"]),
        ("EarlyStopping", "{monitor: val_loss}", ["early_stopping"]),
        ("lightning.pytorch:Trainer", "{}", ["no subclass"]),
    ],
)
def test_a_callback_that_cannot_be_used_is_refused_before_the_run(
    lab: Lab, tmp_path: Path, callback: str, arguments: str, words: list[str]
) -> None:
    section = f"{{name: lightning, callback: '{callback}', arguments: {arguments}}}"
    with pytest.raises(UserError) as error:
        lab.fit(tmp_path / "run", f"callbacks=[{section}]")
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run/recipe.yaml").exists()


def test_every_refused_class_is_one_of_lightning() -> None:
    from lightning.pytorch import callbacks

    assert [name for name in REFUSED if not hasattr(callbacks, name)] == []


@pytest.mark.full
def test_a_lightning_callback_runs_and_its_state_is_in_the_checkpoints(
    lab: Lab, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    timer = "callbacks=[{name: lightning, callback: Timer, arguments: {duration: '00:01:00:00'}}]"
    lab.fit(folder, timer)
    assert "Timer" in last_checkpoint(folder)["callbacks"]


def test_an_end_that_gives_no_reason_is_still_said() -> None:
    assert why_ended(12, 12, []) is None
    assert "a callback stopped" in str(why_ended(5, 12, [object()]))


@pytest.mark.full
def test_tensorboard_has_the_recipe_as_hyper_parameters_and_no_made_up_result(
    lab: Lab, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    lab.fit(tmp_path / "run", "loggers=[{name: tensorboard}]")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    values = start.session_start_info.hparams
    assert values["optimizer.lr"].number_value == 0.003
    assert values["model.attention.name"].string_value == "mla"
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"val_loss", "val_bits_per_byte"}
    assert [event.step for event in events.Scalars("val_loss")] == [6, 12]


def test_nested_sections_become_dotted_names() -> None:
    values = {"a": {"b": [1, {"c": None}]}, "d": [], "e": True}
    assert flatten(values) == {"a.b.0": 1, "a.b.1.c": "null", "d": "[]", "e": True}
