"""A search before a sweep: equal budgets, the choice, going on after a stop, and errors."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, run_command_here

import core.study.sweep
from core.contracts.errors import UserError
from core.study.matching import match
from core.study.results import search_caveats
from core.study.search import _best, _edges
from core.study.search_budget import budget_sentences, by_variant
from core.study.sweep import run_sweep
from core.study.sweep_file import read_sweep
from core.study.sweep_folder import Job

from .conftest import ForkPool, Write

SEARCH = """\
title: Does weight decay help, each with its own learning rate?
base: {base}
seeds: [3]
baseline: plain
variants:
  plain:
    overrides: {{optimizer.weight_decay: 0.0}}
    search: {{optimizer.lr: [1.0e-9, 0.003, 0.01]}}
  decayed:
    overrides: {{optimizer.weight_decay: 0.5}}
    search: {{optimizer.lr: [1.0e-9, 1.0e-8, 0.003]}}
search: {{seeds: [7]}}
budget: {{steps: 2}}
"""


class LimitedPool(ForkPool):
    """A pool that is interrupted before its run of that number."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        if len(self.commands) == self.limit:
            raise KeyboardInterrupt
        return super().submit(job, command)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def kept(path: Path) -> dict[str, bytes]:
    """The weights, recipes and summaries' losses of every run."""
    found = {}
    for file in sorted(path.rglob("summary.json")):
        name = str(file.parent.relative_to(path))
        found[name] = str(read(file)["val_loss"]).encode()
    for file in sorted((path / "recipes").rglob("*.yaml")):
        found[str(file.relative_to(path))] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def searched(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that has searched and compared; to be read only."""
    path = tmp_path_factory.mktemp("searched")
    file = path / "question.yaml"
    file.write_text(SEARCH.format(base=lab.file), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.study.sweep, "_pool", lambda *_: ForkPool())
        run_sweep(read_sweep(file), path / "out", command="python -m core.sweep question.yaml")
    return path / "out"


@pytest.mark.full
def test_the_value_with_the_lowest_validation_loss_is_compared(searched: Path) -> None:
    found = read(searched / "search.json")
    assert (found["metric"], found["seeds"]) == ("val_loss", [7])
    for row in found["rows"]:
        losses = {}
        for candidate in row["candidates"]:
            summary = read(searched / "search" / candidate["name"] / "seed-7" / "summary.json")
            assert candidate["mean"] == candidate["runs"][0]["value"] == summary["val_loss"]
            losses[candidate["values"]["optimizer.lr"]] = candidate["mean"]
        assert row["chosen"]["optimizer.lr"] == min(losses, key=lambda lr: losses[lr])
    for variant in read(searched / "sweep.json")["variants"]:
        (row,) = [row for row in found["rows"] if row["variant"] == variant["name"]]
        assert f"optimizer.lr={row['chosen']['optimizer.lr']}" in variant["overrides"]
        recipe = (searched / "runs" / variant["name"] / "seed-3" / "recipe.yaml").read_text()
        assert f"lr: {row['chosen']['optimizer.lr']}" in recipe
        assert "seed: 3" in recipe
    assert read(searched / "results.json")["search"] == found


@pytest.mark.full
def test_budgets_are_recorded_and_equal(searched: Path) -> None:
    document = read(searched / "sweep.json")["search"]
    assert document["seeds"] == [7]
    plain, decayed = document["budgets"].values()
    assert plain == decayed
    assert (plain["runs"], plain["steps"], plain["tokens"]) == (3, 6, 6 * 2 * 4 * 16)
    assert document["sentences"][0] == (
        "plain: 3 runs, 6 steps, 768 tokens (3 values of optimizer.lr; seeds 7)"
    )


@pytest.mark.full
def test_a_value_at_the_edge_is_a_caveat_of_the_results_and_of_the_report(searched: Path) -> None:
    results = read(searched / "results.json")
    caveats = [line for line in results["warnings"] if "is at the edge of the values" in line]
    assert len(caveats) == sum(bool(row["edges"]) for row in results["search"]["rows"]) > 0
    assert any(line.startswith("decayed: the chosen optimizer.lr = 0.003") for line in caveats)
    report = searched.parent / "report.html"
    run_command_here("report", searched, "--out", report)
    text = report.read_text(encoding="utf-8")
    assert "is at the edge of the values that were searched" in text
    assert "3 runs, 6 steps, 768 tokens" in text
    assert "no difference can be shown, whatever its size" in text


@pytest.mark.full
@pytest.mark.parametrize("limit", [0, 2, 6, 7])
def test_an_interrupted_search_goes_on_to_the_same_runs(
    limit: int, write: Write, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the first run, in the search, between the stages and in the comparison."""
    sweep = read_sweep(write(SEARCH))
    pools = [LimitedPool(limit if limit < 6 else 6), LimitedPool(limit - 6)]
    monkeypatch.setattr(core.study.sweep, "_pool", lambda *_: pools.pop(0))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path / "out")
    assert (tmp_path / "out/search.json").exists() == (limit >= 6)
    left: list[str] = []
    monkeypatch.setattr(core.study.sweep, "_pool", lambda *_: ForkPool())
    run_sweep(sweep, tmp_path / "out", resume=True, progress=lambda job, *_: left.append(job))
    assert len([job for job in left if job is not None]) == 8 - limit
    assert kept(tmp_path / "out") == kept(searched)
    again: list[Any] = []
    run_sweep(sweep, tmp_path / "out", resume=True, progress=lambda job, *_: again.append(job))
    assert not [job for job in again if job is not None]


def test_candidates_are_every_combination_and_a_variant_has_the_first(write: Write) -> None:
    sweep = read_sweep(write(SEARCH))
    found = {name: [one.name for one in own] for name, own in by_variant(sweep).items()}
    assert found == {
        "plain": ["plain+lr=1e-09", "plain+lr=0.003", "plain+lr=0.01"],
        "decayed": ["decayed+lr=1e-09", "decayed+lr=1e-08", "decayed+lr=0.003"],
    }
    assert [variant.name for variant in sweep.variants] == ["plain", "decayed"]
    assert sweep.variants[0].recipe.optimizer.config.lr == 1e-9
    assert not sweep.variants[0].candidate_of
    matched = match(sweep)
    assert matched.budgets["plain"] == matched.budgets["decayed"]
    assert len(budget_sentences(sweep, matched.budgets)) == 2
    assert matched.not_equal == ["decayed: another optimizer and its schedule than plain"]


def test_a_dry_run_prints_the_budgets_and_what_could_be_shown(lab: Lab, write: Write) -> None:
    result = lab.command("sweep", write(SEARCH), "--dry-run")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "2 runs: 2 variants x 1 seeds, after 6 of a search"
    assert "search: plain+lr=0.003/seed-7" in lines
    assert "could show: 1 seed: no difference can be shown, whatever its size" in lines
    budget = "3 runs, 6 steps, 768 tokens (3 values of optimizer.lr; seeds 7)"
    assert f"budget of the search: plain: {budget}" in lines
    assert f"budget of the search: decayed: {budget}" in lines


def test_the_first_of_equal_losses_is_chosen_and_a_failed_value_never(write: Write) -> None:
    candidates = by_variant(read_sweep(write(SEARCH)))["plain"]
    names = [one.name for one in candidates]
    values = {"optimizer.lr": [1e-9, 0.003, 0.01]}

    def choose(*means: float | None) -> Any:
        return _best(candidates, dict(zip(names, means, strict=True)))

    assert choose(2.0, 1.0, 1.0) is candidates[1]
    assert choose(None, 3.0, 4.0) is candidates[1]
    assert choose(1.0, 1.0, None) is candidates[0]
    assert choose(None, None, None) is None
    assert _edges(candidates[0], values) == ["optimizer.lr"]
    assert _edges(candidates[1], values) == []
    assert _edges(candidates[2], values) == ["optimizer.lr"]
    assert _edges(candidates[0], {"optimizer.lr": [1e-9]}) == [], "one value is no search"


def test_a_failed_run_of_a_search_is_a_caveat() -> None:
    run = {"seed": 7, "state": "failed", "value": None, "reason": "exit code 1: it diverged"}
    row = {
        "variant": "a",
        "chosen": {"optimizer.lr": 0.1},
        "edges": [],
        "candidates": [{"name": "a+lr=1.0", "runs": [run]}],
    }
    assert search_caveats({"rows": [row]}) == [
        "search of a+lr=1.0, seed 7: exit code 1: it diverged; this value cannot be chosen"
    ]


@pytest.mark.full
def test_a_search_without_any_finite_loss_ends_the_sweep_in_one_sentence(
    write: Write, pool: ForkPool, tmp_path: Path
) -> None:
    text = SEARCH.replace("[1.0e-9, 0.003, 0.01]", "[1.0e+28, 1.0e+29, 1.0e+30]")
    with pytest.raises(UserError) as error:
        run_sweep(read_sweep(write(text)), tmp_path / "out")
    assert "no value that plain searches has a finite val_loss with every seed" in str(error.value)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("search: {{seeds: [7]}}", "", "seeds must hold at least one seed: plain searches"),
        ("seeds: [7]", "seeds: [7, 3]", "seeds: 3 is also among the sweep's `seeds`"),
        ("seeds: [7]", "seeds: [7, 7]", "seeds must be different whole numbers"),
        ("seeds: [7]", "seeds: [-7]", "seeds must be different whole numbers"),
        ("[1.0e-9, 1.0e-8, 0.003]", "[0.1, 0.2]", "equally many values, and they have: plain 3"),
        ("[1.0e-9, 1.0e-8, 0.003]", "[0.1, 0.3, 0.2]", "search.optimizer.lr must be numbers that"),
        ("[1.0e-9, 1.0e-8, 0.003]", "[0.1, 0.1, 0.2]", "search.optimizer.lr must be numbers that"),
        ("[1.0e-9, 1.0e-8, 0.003]", "[]", "search.optimizer.lr must have at least one value"),
        ("[1.0e-9, 1.0e-8, 0.003]", "[0.1, -1, 0.2]", "search.optimizer.lr must be numbers that"),
        ("{{optimizer.lr: [1.0e-9, 1.0e-8", "{{seed: [1.0e-9, 1.0e-8", "seed is given by `seeds`"),
        (
            "    search: {{optimizer.lr: [1.0e-9, 1.0e-8, 0.003]}}\n",
            "",
            "equally many values, and they have: plain 3, decayed 0",
        ),
        (
            "budget: {{steps: 2}}",
            "overrides: {{optimizer.lr: 0.1}}",
            "search.optimizer.lr is also set by `overrides` or `grid`",
        ),
    ],
)
def test_a_search_that_cannot_be_right_is_named(
    write: Write, before: str, after: str, expected: str
) -> None:
    assert SEARCH.count(before) == 1
    with pytest.raises(UserError) as error:
        read_sweep(write(SEARCH.replace(before, after)))
    assert expected in str(error.value)


def test_an_empty_list_of_values_is_one_error(write: Write) -> None:
    with pytest.raises(UserError) as error:
        read_sweep(write(SEARCH.replace("[1.0e-9, 1.0e-8, 0.003]", "[]")))
    assert str(error.value).endswith(
        "variants: decayed: search.optimizer.lr must have at least one value"
    )


def test_an_invalid_variant_is_no_error_of_the_search_too(write: Write) -> None:
    text = SEARCH.replace("{{optimizer.lr: [1.0e-9, 0.003, 0.01]}}", "{{optimizer.lr: 0.003}}")
    text = text.replace("{{optimizer.lr: [1.0e-9, 1.0e-8, 0.003]}}", "{{optimizer.lr: 0.003}}")
    with pytest.raises(UserError) as error:
        read_sweep(write(text))
    first, *lines = str(error.value).splitlines()
    assert first.endswith("2 errors:")
    assert [line.partition(":")[0].strip() for line in lines] == [
        "variants.plain.search",
        "variants.decayed.search",
    ]


def test_values_that_would_share_a_folder_are_refused(write: Write) -> None:
    values = "{{data.corpus.paths: [[a b], [a_b]]}}"
    text = SEARCH.replace("{{optimizer.lr: [1.0e-9, 0.003, 0.01]}}", values)
    text = text.replace("{{optimizer.lr: [1.0e-9, 1.0e-8, 0.003]}}", values)
    with pytest.raises(UserError) as error:
        read_sweep(write(text))
    assert "two values that are searched are named 'plain+paths=__a_b__'" in str(error.value)


def test_a_searched_value_whose_text_is_too_long_for_a_folder_is_refused(write: Write) -> None:
    segments = ", ".join(f"{{{{shape: constant, until: 0.{i}}}}}" for i in range(1, 10))
    schedule = f"{{{{start: 0.1, segments: [{segments}, {{{{shape: constant, until: 1.0}}}}]}}}}"
    values = f"[{schedule}, 0.002, 0.003]"
    with pytest.raises(UserError) as error:
        read_sweep(write(SEARCH.replace("[1.0e-9, 1.0e-8, 0.003]", values)))
    assert "decayed: a name with the searched values of" in str(error.value)
    assert str(error.value).endswith("bytes cannot name a folder: at most 200")


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("batch.accumulate", "[1, 2, 3]", "its values change: steps|training tokens"),
        ("model.dim", "[32, 48, 64]", "flops_per_token, params_total"),
    ],
)
def test_a_search_that_changes_what_is_held_equal_is_refused(
    write: Write, key: str, values: str, expected: str
) -> None:
    text = SEARCH.replace("optimizer.lr: [1.0e-9, 0.003, 0.01]", f"{key}: {values}")
    sweep = read_sweep(write(text))
    with pytest.raises(UserError) as error:
        match(sweep)
    assert any(part in str(error.value) for part in expected.split("|"))


def test_searches_of_unequal_tokens_are_refused(write: Write) -> None:
    """Each variant's values are comparable among themselves, but one trains longer."""
    text = SEARCH.replace("budget: {{steps: 2}}\n", "match: {{allow: [steps, training tokens]}}\n")
    text = text.replace("weight_decay: 0.5", "weight_decay: 0.5, budget.steps: 13")
    with pytest.raises(UserError) as error:
        match(read_sweep(write(text)))
    assert str(error.value).endswith(
        "the searches must have equal budgets, but plain has 3 runs, 36 steps, 4,608 tokens, "
        "and decayed 3 runs, 39 steps, 4,992 tokens"
    )
