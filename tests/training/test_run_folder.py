"""The files that a run leaves in its folder, and the values in them."""

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab import MOE, Lab, assert_same, last_checkpoint, loads, rows
from tiers import first_by_default
from torch import Tensor

import core
from core.analysis.budget import plan_of
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.data.tokenizer import Tokenizer
from core.recipe.compose import compose
from core.run.data import text_data
from core.run.summary import finite
from core.training import run_folder as folders
from core.training.throughput import measured_peak_flops

PROMISED = (
    *(
        "steps",
        "tokens",
        "wall_seconds",
        "tokens_per_second",
        "mfu",
        "peak_flops",
        "val_loss",
        "val_bits_per_byte",
    ),
    *(
        "max_vio_global",
        "max_vio_batch",
        "dropped_fraction",
        "mtp_acceptance",
        "params_total",
        "params_active",
    ),
    *("flops_per_token", "peak_memory_bytes"),
)


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    """The summary of the finished run."""
    return dict(json.loads((finished / "summary.json").read_text()))


def test_a_run_folder_holds_what_is_promised(finished: Path) -> None:
    files = {file.name for file in finished.iterdir()}
    assert files == {
        *("recipe.yaml", "tokenizer.json", "provenance.json", "metrics.csv", "loads.safetensors"),
        *(
            "tensorboard",
            "checkpoints",
            "summary.json",
            "sample.txt",
            "SHA256SUMS",
            "documents.txt",
        ),
    }
    kept = {file.name for file in (finished / "checkpoints").iterdir()}
    assert kept == {"best.ckpt", "step-00000010.ckpt", "step-00000012.ckpt"}
    assert list((finished / "tensorboard").glob("events.*"))


def test_the_resolved_recipe_composes_to_the_same_recipe(lab: Lab, finished: Path) -> None:
    assert compose(finished / "recipe.yaml").to_dict() == lab.recipe().to_dict()
    # Defaults are written.
    resolved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert resolved["model"]["norm_eps"] == 1e-6


def test_the_summary_has_every_promised_number(summary: dict[str, Any]) -> None:
    assert set(PROMISED) <= summary.keys()
    assert all(
        isinstance(summary[key], int | float) and math.isfinite(summary[key]) for key in PROMISED
    )
    assert (summary["steps"], summary["tokens"]) == (12, 12 * 2 * 4 * 16)
    assert (summary["dropped_fraction"], summary["skipped_steps"], summary["threads"]) == (
        0.0,
        0,
        1,
    )
    assert summary["tokens_per_second"] == pytest.approx(
        summary["tokens"] / summary["train_seconds"]
    )
    work = summary["tokens_per_second"] * summary["flops_per_token"]
    assert summary["mfu"] == pytest.approx(work / summary["peak_flops"])
    assert summary["peak_flops_source"] == "measured"
    assert 0 < summary["mtp_acceptance"] < 1
    assert summary["peak_memory_bytes"] > 50e6


def test_what_is_no_number_is_null_in_json() -> None:
    assert finite({"a": math.nan, "b": math.inf, "c": 1.5, "d": 2, "e": "text", "f": None}) == {
        "a": None,
        "b": None,
        "c": 1.5,
        "d": 2,
        "e": "text",
        "f": None,
    }


def test_a_run_without_validation_documents_has_null_there(lab: Lab, tmp_path: Path) -> None:
    few = f"data.corpus.paths=[{lab.texts}/doc-0*.txt]"
    summary = lab.fit(
        tmp_path / "run",
        few,
        "data.tokenizer.vocab=270",
        "budget.steps=3",
        "checkpoint.every_steps=2",
    )
    assert [
        summary[key]
        for key in ("val_loss", "val_bits_per_byte", "max_vio_global", "mtp_acceptance")
    ] == [None] * 4
    assert [file.name for file in checkpoints_in(tmp_path / "run")] == [
        "step-00000002.ckpt",
        "step-00000003.ckpt",
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_bits_per_byte_by_hand_from_logits(
    lab: Lab, finished: Path, summary: dict[str, Any]
) -> None:
    """Every token of the held-out documents but the first marker is predicted once, in windows of 16."""
    model = core.load(finished)
    tokenizer = Tokenizer.load(finished / "tokenizer.json")
    texts = [(lab.texts / f"doc-{number}.txt").read_text() for number in (10, 30)]
    stream = [token for text in texts for token in [0, *tokenizer.encode(text)]]
    nats = 0.0
    for begin in range(0, len(stream) - 1, 16):
        window = stream[begin : begin + 17]
        with torch.no_grad():
            logits_LV = model.logits(torch.tensor([window[:-1]]))[0].double()
        for logits_V, target in zip(logits_LV, window[1:], strict=True):
            nats -= float(logits_V.log_softmax(dim=0)[target])
    size = sum(len(text.encode()) for text in texts)
    assert summary["validation_bytes"] == size
    assert summary["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert summary["val_loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-6)


def test_mtp_acceptance_by_hand(lab: Lab, finished: Path, summary: dict[str, Any]) -> None:
    """Counts how often the first depth predicts what the main model predicts one token later."""
    model = core.load(finished)
    data = text_data(lab.recipe(), plan_of(lab.recipe()))
    data.prepare()
    head = model.heads["mtp"]
    agree = counted = 0
    logits: list[Tensor] = []
    output = model.output.forward

    def listen(x: Tensor) -> Tensor:
        logits.append(output(x))
        return logits[-1]

    model.output.forward = listen  # type: ignore[method-assign]
    for batch in data.val_dataloader():
        tokens_BL, targets_BL, valid_BL, *_ = batch
        context = SequenceContext.of(tokens_BL, targets_BL=targets_BL, valid_BL=valid_BL)
        with torch.no_grad():
            hidden_BLD, _ = model.hidden(context)
            logits.clear()
            head(hidden_BLD, context, model.shared())
            main_BL = model.output(hidden_BLD).argmax(dim=-1)
        draft_BL = next(s for s in logits if s.dim() == 3 and s.shape[1] == 15).argmax(dim=-1)
        both_BL = valid_BL[:, 1:] & valid_BL[:, :-1]
        agree += int(((draft_BL == main_BL[:, 1:]) & both_BL).sum())
        counted += int(both_BL.sum())
    assert summary["mtp_acceptance"] == pytest.approx(agree / counted, rel=1e-12)


def test_max_vio_global_is_that_of_the_whole_validation_split(
    lab: Lab, finished: Path, summary: dict[str, Any]
) -> None:
    model = core.load(finished)
    data = text_data(lab.recipe("validation.sequences=100"), plan_of(lab.recipe()))
    data.prepare()
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        context = SequenceContext.of(
            batch.tokens_BL, targets_BL=batch.targets_BL, valid_BL=batch.valid_BL
        )
        records = model(context).expert_records()
    of_layers = []
    for path in MOE:
        load = records[path].load_E.tolist()
        of_layers.append(max(load) / (sum(load) / 8) - 1)
    assert summary["max_vio_global"] == pytest.approx(sum(of_layers) / 2, rel=1e-12)


def test_metrics_have_every_promised_column(finished: Path) -> None:
    header = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        *("step", "tokens", "lr", "grad_norm", "skipped_steps", "tokens_per_second", "mfu"),
        *("loss/total", "loss/next_token", "loss/mtp/depth_1", "loss/balance/sequence"),
        *(
            "load/max_vio_batch",
            "load/cv",
            "load/dead_fraction",
            "load/entropy",
            "load/dropped_fraction",
        ),
        *(
            "val_loss",
            "val_bits_per_byte",
            "val_max_vio_global",
            "val/next_token",
            "val/mtp/depth_1",
        ),
        *("val/mtp/acceptance_1", "balance/bias_spread"),
    } <= set(header)
    assert len(set(header)) == len(header)


def test_the_log_and_the_summary_agree(finished: Path, summary: dict[str, Any]) -> None:
    steps = [row for row in rows(finished) if "lr" in row]
    last = next(row for row in reversed(rows(finished)) if "val_loss" in row)
    for key in ("val_loss", "val_bits_per_byte"):
        assert float(last[key]) == summary[key]
    mean = sum(float(row["load/max_vio_batch"]) for row in steps) / len(steps)
    assert summary["max_vio_batch"] == pytest.approx(mean, rel=1e-12)
    assert [float(row["tokens"]) for row in steps] == [128.0 * step for step in range(1, 13)]
    assert float(steps[-1]["loss/next_token"]) < float(steps[0]["loss/next_token"])


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(
    lab: Lab, tmp_path: Path
) -> None:
    """Trains with a learning rate that jumps, so that the last steps are the worst ones."""
    jump = "optimizer.lr={unit: steps, start: 0.003, segments: [{until: 6}, {to: 30.0, until: 99}]}"
    lab.fit(tmp_path / "run", jump)
    losses = {
        int(row["step"]): float(row["val_loss"])
        for row in rows(tmp_path / "run")
        if "val_loss" in row
    }
    lowest = min(losses, key=lambda step: losses[step])
    assert lowest == 6
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert best["moeloom"]["windows_done"] == lowest
    assert best["moeloom"]["validated"]["val_loss"] == losses[lowest]


def test_P27_provenance_names_everything_that_shaped_the_run(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = metadata.EntryPoint(
        "spy", "somebody.elses:callbacks", "lightning.pytorch.callbacks_factory"
    )

    def points(*, group: str) -> list[metadata.EntryPoint]:
        return [point] if group == point.group else list(real(group=group))

    real = metadata.entry_points
    monkeypatch.setattr(folders.metadata, "entry_points", points)
    found = folders.provenance(lab.recipe().sections(), data="abc", threads=1)
    assert found["lightning_callback_factories"] == ["spy = somebody.elses:callbacks"]
    named = {(c["slot"], c["name"]) for c in found["components"]}
    assert {
        ("residual", "add"),
        *(("attention", "mla"), ("ffn", "swiglu"), ("ffn", "moe"), ("router", "deepseek_v3")),
        *(
            ("balancer", "bias"),
            ("balancer", "sequence"),
            ("loss_head", "next_token"),
            ("loss_head", "mtp"),
        ),
        *(
            ("dispatcher", "local"),
            ("precision", "fp32"),
            ("corpus", "files"),
            ("optimizer", "adamw"),
        ),
        *(("strategy", "single"), ("logger", "csv"), ("logger", "tensorboard")),
    } == named
    for component in found["components"]:
        assert Path(component["file"]).exists()
        assert component["distribution"]
        assert component["version"]
    assert found["packages"]["torch"] == metadata.version("torch")
    assert (found["data"], found["threads"]) == ("abc", 1)
    assert found["cpu"]
    assert found.keys() >= {"cores", "gpus", "commit", "dirty"}


def test_the_runs_provenance_holds_its_datas_fingerprint(lab: Lab, finished: Path) -> None:
    data = text_data(lab.recipe(), plan_of(lab.recipe()))
    data.prepare()
    assert json.loads((finished / "provenance.json").read_text())["data"] == data.fingerprint


def test_load_gives_the_trained_model(lab: Lab, finished: Path) -> None:
    """Compares its logits with those of the same recipe trained without a folder."""
    trained = lab.train().model.eval()
    tokens_BL = torch.arange(24).view(2, 12) * 7 % 300
    for source in (finished, str(finished), checkpoints_in(finished)[-1]):
        model = core.load(source)
        assert not model.training
        assert_same(model.state_dict(), trained.state_dict())
    with torch.no_grad():
        logits_BLV = model.logits(tokens_BL)
        assert logits_BLV.shape == (2, 12, 300)
        assert torch.equal(logits_BLV, trained.logits(tokens_BL))


def test_initial_weights_are_taken_from_a_run(lab: Lab, finished: Path, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", f"initial_weights={finished}", "optimizer.lr=0.0", "budget.steps=1")
    one, two = (last_checkpoint(run)["state_dict"] for run in (tmp_path / "run", finished))
    biases = {name for name in two if name.endswith(".bias")}
    assert_same(
        {n: t for n, t in one.items() if n not in biases},
        {n: t for n, t in two.items() if n not in biases},
    )
    assert int(loads(tmp_path / "run")["steps"]) == 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    first_by_default(
        [
            ("model.dim=48", r"tensor embedding\.weight is \(300, 32\), the model's \(300, 48\)"),
            ("model.heads.mtp=null", r"tensor heads\.mtp\.depths\.0\..* is not of this model"),
        ],
        several=True,
    ),
)
def test_initial_weights_of_another_shape_are_refused_by_name(
    lab: Lab, finished: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        lab.fit(tmp_path / "run", f"initial_weights={finished}", override, "budget.steps=1")
    lab.fit(tmp_path / "run", "budget.steps=1")


def test_the_peak_is_a_rate_of_products() -> None:
    assert 1e8 < measured_peak_flops(torch.device("cpu"), seconds=0.05, size=256) < 1e14


def test_a_model_without_a_main_head_has_no_best_checkpoint(lab: Lab, tmp_path: Path) -> None:
    summary = lab.fit(tmp_path / "run", "model.heads.next_token=null", "budget.steps=6")
    assert (summary["val_loss"], summary["steps"]) == (None, 6)
    assert {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()} == {
        *("step-00000005.ckpt", "step-00000006.ckpt"),
    }


def test_rows_may_be_thinned(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", "trainer.log_every_n_steps=2", "budget.steps=6")
    assert [row["step"] for row in rows(tmp_path / "run") if "lr" in row] == ["2", "4", "6"]
