"""The callback `ema`: its average is the loop's, training reaches the same bits, and a killed run continues with it.

The small run has 12 steps, checkpoints after steps 5, 10 and 12, and validations after steps 6 and 12.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab import Lab, assert_same, last_checkpoint, rows
from rank_runs import cut_after
from safetensors.torch import load_file
from tiers import first_by_default
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.analysis.describe import document_of
from core.assemble import build
from core.contracts.errors import UserError
from core.contracts.training import NamedParameter
from core.run.loading import load
from plugins.ema.callback import EmaCallback
from plugins.ema.factory import ExponentialMovingAverage

DECAY = 0.9
KEEP = "checkpoint.keep=9"


def section(**given: Any) -> str:
    """The override that adds the callback."""
    keys = {"decay": DECAY, **given}
    text = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return f"callbacks=[{{name: ema, {text}}}]"


def without_averages(values: dict[str, str]) -> dict[str, str]:
    """A row of the log without the columns of the average."""
    return {key: value for key, value in values.items() if not key.startswith("ema/")}


def ema_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged tensors in the content of a checkpoint."""
    tensors: dict[str, Tensor] = checkpoint["averages"]["ema"]["weights"]
    return tensors


@pytest.fixture(scope="module")
def averaged(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the small recipe with an average; tests must only read it."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    lab.fit(folder, section(), KEEP)
    return folder


# ---- the average


class Weights(L.Callback):
    """Keeps a copy of all weights after each step, and whether it was skipped."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.skipped: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Copies the weights."""
        found = dict(pl_module.model.named_parameters())
        self.after.append({name: weight.detach().clone() for name, weight in found.items()})
        self.skipped.append(pl_module.skipped_in_a_row > 0)


def slow_average(
    after: Sequence[dict[str, Tensor]],
    skipped: Sequence[bool],
    *,
    first_step: int = 1,
    every_steps: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[int, dict[str, Tensor]]:
    """The number of updates and the average of every weight, by the definition, one step after the other."""
    updates = 0
    average: dict[str, Tensor] = {}
    for step, (weights, skip) in enumerate(zip(after, skipped, strict=True), start=1):
        if skip or step < first_step or (step - first_step) % every_steps:
            continue
        for name, weight in weights.items():
            now = weight.to(dtype)
            if updates == 0:
                average[name] = now.clone()
            elif dtype == torch.float64:
                average[name] = DECAY * average[name] + (1 - DECAY) * now
            else:
                average[name] = torch.lerp(average[name], now, 1 - DECAY)
        updates += 1
    return updates, average


def made(**given: Any) -> EmaCallback:
    """The callback with some keys."""
    keys = ExponentialMovingAverage.Config(**{"decay": DECAY, **given})
    callback = ExponentialMovingAverage(keys).make(Path())
    assert isinstance(callback, EmaCallback)
    return callback


@pytest.mark.parametrize(
    ("first_step", "every_steps", "device"),
    first_by_default([(3, 4, "cpu"), (1, 1, "same"), (1, 1, "cpu"), (3, 4, "same")], several=True),
)
def test_the_average_is_that_of_a_slow_loop(
    lab: Lab, first_step: int, every_steps: int, device: str
) -> None:
    """In fp64 up to the rounding of 12 updates in fp32, whose relative error is 2^-24 each; in fp32 to the bit."""
    seen = Weights()
    when = {"first_step": first_step, "every_steps": every_steps}
    callback = made(device=device, **when)
    lab.train(callbacks=[seen, callback])
    updates, exact = slow_average(seen.after, seen.skipped, **when)
    assert callback.average.updates == updates == len(range(first_step, 13, every_steps))
    assert list(callback.average.weights) == list(exact)
    for name, value in exact.items():
        largest = max(float(weights[name].abs().max()) for weights in seen.after)
        error = float((callback.average.weights[name] - value).abs().max())
        assert error <= 12 * 2**-23 * largest, name
    _, same = slow_average(seen.after, seen.skipped, **when, dtype=torch.float32)
    assert_same(callback.average.weights, same)


@pytest.mark.full
def test_the_average_is_that_of_torch(lab: Lab) -> None:
    """`AveragedModel` is what Lightning's `WeightAveraging` keeps; a model without hash tables can be copied."""
    seen = Weights()
    callback = made()
    lab.train(callbacks=[seen, callback])
    theirs = build(lab.recipe())
    torchs = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for weights in seen.after:
        theirs.load_state_dict(weights, strict=False)
        torchs.update_parameters(theirs)
    assert_same(callback.average.weights, dict(torchs.module.named_parameters()))


class SkipStep(L.Callback):
    """Makes the gradient of one step not finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes an infinity into a gradient."""
        if pl_module.windows_done == self.step - 1:
            pl_module.model.norm.weight.grad.fill_(float("inf"))


def test_a_skipped_step_is_no_update(lab: Lab) -> None:
    seen = Weights()
    callback = made(first_step=2, every_steps=2)
    lab.train(callbacks=[SkipStep(4), seen, callback])
    assert seen.skipped.index(True) == 3
    updates, same = slow_average(
        seen.after, seen.skipped, first_step=2, every_steps=2, dtype=torch.float32
    )
    assert callback.average.updates == updates == 5
    assert_same(callback.average.weights, same)


def test_an_average_of_bf16_weights_is_kept_in_fp32() -> None:
    """In bf16 an update of a thousandth would be lost."""
    weight = torch.ones(3, dtype=torch.bfloat16)
    callback = made(decay=0.999)
    named = [NamedParameter("w", weight, "", "vector")]
    callback.update(named)
    weight.fill_(2.0)
    for _ in range(3):
        callback.update(named)
    average = callback.average.weights["w"]
    assert average.dtype == torch.float32
    assert average[0] == pytest.approx(2 - 0.999**3, rel=1e-6)


# ---- a run


def test_a_run_with_an_average_reaches_the_same_bits(averaged: Path, finished: Path) -> None:
    one = last_checkpoint(averaged)
    two = last_checkpoint(finished)
    for key in ("state_dict", "optimizer_states", "loops"):
        assert_same(one[key], two[key])
    assert [without_averages(row) for row in rows(averaged)] == rows(finished)
    assert_same(
        load_file(averaged / "loads.safetensors"), load_file(finished / "loads.safetensors")
    )
    assert (averaged / "sample.txt").read_text() == (finished / "sample.txt").read_text()


def test_log_and_summary_have_both_losses(averaged: Path, lab: Lab) -> None:
    validated = [row for row in rows(averaged) if "val_loss" in row]
    assert [row["step"] for row in validated] == ["6", "12"]
    names = {key for key in validated[0] if key.startswith("ema/")}
    assert names == {f"ema/{key}" for key in validated[0] if key.startswith("val")}
    summary = json.loads((averaged / "summary.json").read_text())
    for key in ("val_loss", "val_bits_per_byte"):
        assert summary[f"ema/{key}"] == pytest.approx(float(validated[1][f"ema/{key}"]), rel=1e-6)
        assert summary[f"ema/{key}"] != summary[key]
    assert set(summary) - {"ema/val_loss", "ema/val_bits_per_byte"} == set(summary_keys(lab))


def summary_keys(lab: Lab) -> list[str]:
    """The keys of a summary without an average, from the documented table."""
    from core.run.shift import KEYS as KEYS_OF_A_SHIFT
    from core.study.sweep_schema import METRICS

    about_data = ["epochs", "sources"]
    keys = [*METRICS, *about_data, "peak_flops_source", "precision_paths", "notices"]
    return [key for key in keys if key not in KEYS_OF_A_SHIFT]


def test_a_checkpoint_holds_every_weight_and_its_average(averaged: Path, lab: Lab) -> None:
    content = last_checkpoint(averaged)
    average = content["averages"]["ema"]
    assert average["updates"] == 12
    assert average["settings"] == {"decay": DECAY, "first_step": 1, "every_steps": 1}
    weights = [f"model.{name}" for name, _ in build(lab.recipe()).named_parameters()]
    assert list(average["weights"]) == weights
    assert all(not torch.equal(average["weights"][n], content["state_dict"][n]) for n in weights)


@pytest.mark.full
def test_averaged_weights_come_with_the_current_selection_bias(averaged: Path) -> None:
    content = last_checkpoint(averaged)
    state = load(averaged, weights="ema").state_dict()
    for name, tensor in content["state_dict"].items():
        name = name.removeprefix("model.")
        if name in state:
            expected = ema_of(content).get(f"model.{name}", tensor)
            assert torch.equal(state[name], expected), name
    assert any("bias" in name for name in state)


@pytest.mark.parametrize("step", first_by_default([5, 10]))
def test_a_run_continues_with_its_average_to_the_same_bits(
    lab: Lab, averaged: Path, tmp_path: Path, step: int
) -> None:
    run = cut_after(averaged, step, tmp_path / "run")
    lab.fit(run, section(), KEEP, resume=True)
    one, two = last_checkpoint(run), last_checkpoint(averaged)
    for key in ("state_dict", "optimizer_states", "averages"):
        assert_same(one[key], two[key])
    assert_same(rows(run), rows(averaged))


def test_a_run_does_not_continue_with_another_decay(
    lab: Lab, averaged: Path, tmp_path: Path
) -> None:
    run = cut_after(averaged, 10, tmp_path / "run")
    with pytest.raises(UserError, match=r"ema: decay = 0\.5: the average in .*ckpt has 0\.9$"):
        lab.fit(run, section(decay=0.5), KEEP, resume=True)


# ---- commands


@pytest.mark.full
def test_evaluate_measures_what_the_run_measured(averaged: Path, lab: Lab) -> None:
    printed = lab.command("evaluate", averaged, "--weights", "ema", "--json")
    values = json.loads(printed.out)
    summary = json.loads((averaged / "summary.json").read_text())
    assert values["weights"] == "ema"
    assert values["val_loss"] == summary["ema/val_loss"]
    assert values["val_bits_per_byte"] == summary["ema/val_bits_per_byte"]
    trained = json.loads(lab.command("evaluate", averaged, "--json").out)
    assert "weights" not in trained
    assert trained["val_loss"] == summary["val_loss"]


@pytest.mark.full
def test_the_report_draws_both_losses(averaged: Path) -> None:
    pytest.importorskip("pandas", reason="the extra `report` is not installed")
    from core.reports.page import figures_of
    from core.reports.study_files import read

    figures = {figure.key: figure for figure in figures_of(read(averaged), "bits per byte")}
    lines = [trace for trace in figures["validation"].traces if trace.get("mode") != "none"]
    by_name = {trace["name"]: trace["y"][-1] for trace in lines if trace.get("name")}
    (last,) = [row for row in rows(averaged) if row["step"] == "12" and "val_loss" in row]
    own = next(name for name in by_name if not name.endswith(", ema"))
    expected = {own: "val_bits_per_byte", f"{own}, ema": "ema/val_bits_per_byte"}
    assert by_name.keys() == expected.keys()
    for name, column in expected.items():
        assert by_name[name] == pytest.approx(float(last[column]), rel=1e-3)  # drawn with 4 digits


# ---- memory, and mistakes in the recipe


def test_describe_counts_the_average(lab: Lab) -> None:
    described = document_of(lab.recipe(section()))["memory_bytes"]
    parameters = list(build(lab.recipe(), device="meta").parameters())
    assert described["averages"] == sum(4 * parameter.numel() for parameter in parameters)
    wide = document_of(lab.recipe(section(), "precision.name=fp64"))["memory_bytes"]
    assert wide["averages"] == 2 * described["averages"]
    for override in (section(device="cpu"), "callbacks=[]"):
        assert document_of(lab.recipe(override))["memory_bytes"]["averages"] == 0


@pytest.mark.full
def test_a_rank_holds_its_part_of_the_average(lab: Lab) -> None:
    strategy = "strategy={name: fsdp, ranks: 2}"
    with_average = document_of(lab.recipe(section(), strategy))["rank_memory"]
    without = document_of(lab.recipe(strategy))["rank_memory"]
    assert with_average["averages"] == with_average["weights"]
    assert with_average["total"] == without["total"] + with_average["averages"]


MISTAKES = {
    "decay: 1.0": "decay = 1: must be more than 0 and less than 1",
    "decay: 0.0": "decay = 0: must be more than 0 and less than 1",
    "decay: .nan": "decay = nan: must be finite",
    "decay: .inf": "decay = inf: must be finite",
    "first_step: 0": "first_step = 0: must be at least 1",
    "every_steps: 0": "every_steps = 0: must be at least 1",
    "first_step: 13": "first_step = 13: must be at most 12, the steps of the run",
    "device: gpu": "device = 'gpu'",
}


@pytest.mark.parametrize("keys", MISTAKES)
def test_a_mistake_is_one_sentence(lab: Lab, keys: str) -> None:
    with pytest.raises(UserError) as raised:
        lab.recipe(f"callbacks=[{{name: ema, {keys}}}]")
    assert MISTAKES[keys] in str(raised.value)


def test_two_averages_of_one_name_are_one_sentence(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"callbacks.*two of them keep the average ema: remove one"):
        lab.recipe("callbacks=[{name: ema}, {name: ema, decay: 0.9}]")


@pytest.mark.full
def test_an_average_that_would_begin_after_the_run_is_one_sentence(
    lab: Lab, tmp_path: Path
) -> None:
    """The number of steps of a run in tokens is known when the data are."""
    late = section(first_step=99)
    with pytest.raises(UserError, match="ema: first_step = 99: the average would begin after it"):
        lab.fit(tmp_path / "run", late, "budget={steps: null, tokens: 1024}")
