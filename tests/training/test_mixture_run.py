"""A run on a mixture: losses and bits per byte by source in the log and in the summary, and the same bits on resume."""

import json
import math
import shutil
from pathlib import Path

import pytest
from lab import Lab, assert_same_run, rows
from rank_runs import assert_same_end, cut_after, fit_on_ranks

from core.checkpoints.listing import checkpoints_in
from core.contracts.errors import UserError
from core.inspection.texts import held_out
from core.inspection.work import Options, inspect
from core.recipe.compose import compose_run
from core.reports.over_training import OverTraining, validation
from core.reports.study_files import read
from core.training.run_folder import RunFolder

MIXED = (
    "data.corpus={{name: mixture, corpora: {{web: {{name: files, paths: ['{texts}/*.txt']}}, "
    "rows: {{name: files, paths: ['{rows}']}}}}, weights: {{web: 3, rows: 1}}}}"
)


@pytest.fixture
def mixed(lab: Lab, tmp_path: Path) -> str:
    """An override with a mixture of the laboratory's texts and a file of rows."""
    lines = [{"text": f"row {index} sings of golden apples"} for index in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return MIXED.format(texts=lab.texts, rows=tmp_path / "rows.jsonl")


def test_losses_by_source_are_in_the_log_and_the_summary(
    lab: Lab, mixed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    lab.fit(run, mixed, "budget.steps=4")
    steps = [row for row in rows(run) if row.get("loss/next_token")]
    for row in steps:
        web, whole = float(row["next_token/source/web"]), float(row["loss/next_token"])
        other = float(row["next_token/source/rows"])
        assert 0.75 * web + 0.25 * other == pytest.approx(whole, rel=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    sources = summary["sources"]
    assert sources.keys() == {"web", "rows"}
    assert [sources[name]["weight"] for name in ("web", "rows")] == [0.75, 0.25]
    last = [row for row in rows(run) if row.get("val_loss")][-1]
    for name in ("web", "rows"):
        assert sources[name]["val_loss"] == pytest.approx(
            float(last[f"val/next_token/source/{name}"])
        )
        bits = float(last[f"val_bits_per_byte/{name}"])
        assert sources[name]["val_bits_per_byte"] == pytest.approx(bits)
        assert math.isfinite(bits)
    assert min(sources[n]["val_bits_per_byte"] for n in sources) <= summary["val_bits_per_byte"]
    assert max(sources[n]["val_bits_per_byte"] for n in sources) >= summary["val_bits_per_byte"]


def test_a_step_without_a_source_has_no_value_of_it(lab: Lab, mixed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rare = mixed.replace("rows: 1}", "rows: 0.01}")
    lab.fit(run, rare, "budget.steps=2")
    steps = [row for row in rows(run) if row.get("loss/next_token")]
    assert len(steps) == 2
    for row in steps:
        assert row["next_token/source/rows"] in ("", "nan", "NaN")
        assert float(row["next_token/source/web"]) == pytest.approx(float(row["loss/next_token"]))


def test_a_mixture_is_resumed_to_the_same_bits(lab: Lab, mixed: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    lab.fit(whole, mixed)
    shutil.copytree(whole, stopped)
    checkpoints_in(stopped)[-1].unlink()
    (stopped / "summary.json").unlink()
    lab.fit(stopped, mixed, resume=True)
    assert_same_run(stopped, whole)


def test_other_weights_are_another_run(lab: Lab, mixed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lab.fit(run, mixed, "budget.steps=2")
    with pytest.raises(UserError, match="the corpus has changed since this run began"):
        lab.fit(run, mixed.replace("web: 3", "web: 2"), "budget.steps=2", resume=True)


def test_a_report_shows_the_parts(lab: Lab, mixed: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    run = tmp_path / "run"
    lab.fit(run, mixed, "budget.steps=4", "validation.every_steps=2")
    over = OverTraining(read(run))
    assert {line.name for line in over.losses()} >= {
        "next_token",
        "next_token/source/web",
        "next_token/source/rows",
    }
    figure = validation(over, "val_bits_per_byte", "bits per byte")
    names = {str(trace.get("name", "")).rpartition(", ")[2] for trace in figure.traces}
    assert {"web", "rows"} <= names


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy", ["{name: ddp, ranks: 2}", "{name: expert_parallel, expert_ranks: 2}"]
)
def test_ranks_see_the_losses_of_one_process(
    lab: Lab, mixed: str, tmp_path: Path, strategy: str
) -> None:
    own = (mixed, "precision.name=fp64", "budget.steps=4", "checkpoint.every_steps=2")
    lab.fit(tmp_path / "one", *own, "batch.accumulate=2")
    own = (*own, f"strategy={strategy}")
    fit_on_ranks(lab, tmp_path / "two", *own)
    one, two = (list(rows(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == len(two)
    names = [name for name in one[0] | one[-1] if "/source/" in name or "bits_per_byte" in name]
    assert len(names) >= 5
    for a, b in zip(one, two, strict=True):
        for name in names:
            if a.get(name):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9, abs=1e-9), name
    stopped = cut_after(tmp_path / "two", 2, tmp_path / "stopped")
    fit_on_ranks(lab, stopped, *own, resume=True)
    assert_same_end(stopped, tmp_path / "two")


@pytest.mark.full
def test_the_inspection_of_a_run_of_two_ranks_counts_the_tokens_of_each_source(
    lab: Lab, mixed: str, tmp_path: Path
) -> None:
    """Every valid token of a source sends two assignments to each layer, with hyper-connections too."""
    run = tmp_path / "run"
    streams = "model.residual={name: hyper_connections, scale: 0.01}"
    mtp = "model.heads.mtp={name: mtp, depth: 1, weight: 0.3, reads: streams}"
    ranks = "strategy={name: expert_parallel, expert_ranks: 2, accelerator: cpu}"
    fit_on_ranks(lab, run, mixed, streams, mtp, ranks, "budget.steps=2")
    found = inspect(run, Options()).document
    folder = RunFolder(run)
    text = held_out(compose_run(folder.recipe), folder, limit=10**6)
    assert found["text"]["sources"] == list(text.sources) == ["web", "rows"]
    sent = [0, 0]
    for context in text.contexts:
        assert context.source_B is not None
        for index in range(2):
            sent[index] += 2 * int(context.valid()[context.source_B == index].sum())
    assert min(sent) > 0
    (layer,) = [layer for layer in found["layers"] if layer["path"] == "blocks.1"]
    assert layer["by_source"] == sent
