"""Caveats are printed wherever results are read; and strategies that need more than a recipe."""

import json
from pathlib import Path

import pytest
import torch
from lab import Lab
from tiers import first_by_default

from core.analysis.budget import plan_of
from core.run.data import text_data
from core.run.loading import load

FFN = "model.blocks.moe.ffn"
EXPERT_CHOICE = (f"{FFN}.router={{name: expert_choice, top_k: 2}}", f"{FFN}.balance=[]")
FORCED = (f"{FFN}.router={{name: forced_balance, top_k: 2}}", f"{FFN}.balance=[]")
BALANCED = (f"{FFN}.router={{name: hash, map: balanced}}", f"{FFN}.balance=[]")
QUICK = ("budget.steps=2",)


@pytest.mark.full
@pytest.mark.parametrize(
    ("overrides", "words"),
    first_by_default(
        [(EXPERT_CHOICE, "is not causal"), (FORCED, "say nothing about")], several=True
    ),
)
def test_a_notice_is_reported_at_every_command_and_kept(
    lab: Lab, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    run = tmp_path / "run"
    result = lab.command("fit", lab.file, *overrides, *QUICK, "--out", run, "--json")
    assert result.code == 0, result.err
    assert words in result.err
    (notice,) = json.loads(result.out)["notices"]
    assert words in notice
    for command, *arguments in (
        ("evaluate", run),
        ("generate", run, "--prompt", "a", "--tokens", "2"),
    ):
        result = lab.command(command, *arguments)
        assert result.code == 0, result.err
        assert words in result.err
        assert words not in result.out
        result = lab.command(command, *arguments, "--json")
        (notice,) = json.loads(result.out)["notices"]
        assert words in notice
    finished = lab.command("fit", lab.file, *overrides, *QUICK, "--resume", run)
    assert words in finished.out
    assert words in lab.command("describe", lab.file, *overrides).out


def test_no_notice_where_there_is_nothing_to_say(lab: Lab, finished: Path) -> None:
    assert json.loads((finished / "summary.json").read_text())["notices"] == []
    assert "note:" not in lab.command("evaluate", finished).err


def test_the_catalog_marks_what_needs_a_notice(lab: Lab) -> None:
    listed = json.loads(lab.command("catalog", "--json").out)
    assert {row["name"] for row in listed if row["notice"]} == {
        "early_stopping",
        "expert_choice",
        "forced_balance",
        "gshard",
        "lightning",
        "switch",
    }
    assert "not causal" in lab.command("catalog").out
    assert "not causal" in lab.command("catalog", "show", "router", "expert_choice").out


def test_a_balanced_hash_is_even_on_the_training_text_and_travels_with_the_weights(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = lab.command("fit", lab.file, *BALANCED, *QUICK, "--out", run, "--json")
    assert result.code == 0, result.err
    tables = [layer.router.table for layer in load(run).expert_layers().values()]
    recipe = lab.recipe(*BALANCED, *QUICK)
    data = text_data(recipe, plan_of(recipe))
    counts_V = data.token_counts()
    assert int(counts_V.sum()) == data.train_tokens
    for table in tables:
        text_E = torch.zeros(8, dtype=torch.int64).index_add(0, table, counts_V)
        assert int(text_E.max() - text_E.min()) <= int(counts_V.max())
        ids_E = table.bincount(minlength=8)
        assert int(ids_E.sum()) == 300
    assert lab.command("evaluate", run).code == 0


@pytest.mark.parametrize(
    "router",
    first_by_default(["{name: gshard, capacity_factor: 0.8}", "{name: switch, jitter: 0.1}"]),
)
def test_a_run_and_its_evaluation_agree_where_routing_draws_and_drops(
    lab: Lab, tmp_path: Path, router: str
) -> None:
    """Whatever step the run ended at; and the size of a validation batch changes nothing for groups of one sequence."""
    run = tmp_path / "run"
    drawn = (f"{FFN}.router={router}", f"{FFN}.balance=[]", "precision.name=fp64", *QUICK)
    summary = json.loads(lab.command("fit", lab.file, *drawn, "--out", run, "--json").out)
    evaluated = json.loads(lab.command("evaluate", run, "--json").out)
    assert evaluated["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-12)
    assert 0 < evaluated["val_dropped_fraction"] < 1
    if "gshard" in router:
        recipe = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(recipe.replace("sequences: 8\n", "sequences: 2\n"))
        smaller = json.loads(lab.command("evaluate", run, "--json").out)
        assert smaller["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-9)
