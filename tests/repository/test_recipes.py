"""The shipped recipes have the published numbers, and those that their headers state."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiers import first_by_default

import core
from core.analysis.budget import plan_of
from core.contracts.schedule import Progress, value_at
from core.contracts.schema import Section
from core.describe import document_of
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan
from core.recipe.shipped import shipped_recipes
from core.run.training import fit
from core.training.run_folder import RunFolder

from .documents import ROOT

if TYPE_CHECKING:
    from lab import Lab

RECIPES = sorted(
    file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name != "sweeps"
)
QUICK = ("dsv3_small", "switch")
EVERY = pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
SEQUENCE = 4096


@cache
def published() -> Recipe:
    """The recipe of DeepSeek-V3."""
    return core.compose("dsv3_671b")


@cache
def plan() -> TrainingPlan:
    """The plan of steps of DeepSeek-V3."""
    return plan_of(published())


@cache
def described(name: str) -> dict[str, Any]:
    """The document that `describe --json` prints."""
    document = document_of(core.compose(name))
    json.dumps(document, allow_nan=False)
    return document


def at(tokens: float) -> Progress:
    """The position after the given tokens of the published run."""
    return Progress(
        step=1, tokens=int(tokens), total_steps=plan().steps, total_tokens=plan().tokens
    )


def test_A4_the_sizes_of_deepseek_v3() -> None:
    document = described("dsv3_671b")
    assert document["params_total"] == 671_026_419_200
    assert document["params_mtp"] == 11_610_068_224
    assert document["params_active"] == 36_625_603_584
    assert document["kv_bytes_per_token"] == 70_272


def test_A17_the_flops_of_deepseek_v3() -> None:
    flops = described("dsv3_671b")["flops_per_token_main"]
    assert flops == 6 * 36_625_603_584 + 3 * 61 * 128 * (192 + 128) * SEQUENCE
    assert flops / 1e9 == pytest.approx(250, abs=0.5)  # arXiv 2505.09343, table 2: 250 GFLOPs


def test_P13_the_coefficients_of_deepseek_v3_are_in_force() -> None:
    found = described("dsv3_671b")["loss_coefficients"]
    assert found["next_token"] == {"first": 1.0, "last": 1.0}
    assert found["mtp"] == {"first": 0.3, "last": 0.1}
    layers = [f"blocks.{index} sequence" for index in range(3, 61)] + [
        "heads.mtp.depths.0.block sequence"
    ]
    assert {name: found[name] for name in layers} == {
        name: {"first": 1e-4, "last": 1e-4} for name in layers
    }
    assert len(found) == 2 + len(layers)


def test_the_batch_grows_from_3072_to_15360_sequences_over_469_billion_tokens() -> None:
    sizes = [
        plan().window(step).count * published().batch.sequences for step in range(plan().steps)
    ]
    assert (sizes[0], sizes[-1]) == (3072, 15360)
    assert sizes == sorted(sizes)
    last = max(step for step, size in enumerate(sizes) if size < 15360)
    assert plan().progress(last).tokens == pytest.approx(
        469e9 * 7 / 8, rel=1e-3
    )  # the nearest whole number from there
    assert plan().tokens - 14.8e12 < 15360 * SEQUENCE
    assert published().data.sequence_length == SEQUENCE


def test_the_learning_rate_of_deepseek_v3() -> None:
    rate = published().optimizer.config.lr
    assert plan().progress(1999).tokens == 2000 * 3072 * SEQUENCE
    assert value_at(rate, plan().progress(0)) == pytest.approx(2.2e-4 / 2000)
    assert value_at(rate, plan().progress(1999)) == 2.2e-4
    assert value_at(rate, plan().progress(2000)) == 2.2e-4
    expected = {
        10e12: 2.2e-4,
        12.15e12: (2.2e-4 + 2.2e-5) / 2,
        14.3e12: 2.2e-5,
        14.633e12: 2.2e-5,
        14.7e12: 7.3e-6,
    }
    for tokens, value in expected.items():
        assert value_at(rate, at(tokens)) == pytest.approx(value, rel=1e-12)
    assert published().optimizer.config.betas == [0.9, 0.95]
    assert published().optimizer.config.weight_decay == 0.1
    assert published().gradient_clip == 1.0


def test_gamma_is_0_for_the_last_500_billion_tokens_and_lambda_a_tenth_after_10_trillion() -> None:
    bias, sequence = published().model.blocks["moe"].ffn.config.balance
    gamma, lambda_ = bias.config.rate, published().model.heads["mtp"].config.weight
    assert [value_at(gamma, at(tokens)) for tokens in (1, 14.3e12, 14.31e12, 14.8e12)] == [
        0.001,
        0.001,
        0,
        0,
    ]
    assert [value_at(lambda_, at(tokens)) for tokens in (1, 10e12, 10.1e12, 14.8e12)] == [
        0.3,
        0.3,
        0.1,
        0.1,
    ]
    assert sequence.config.alpha == 0.0001


def parts(recipe: Recipe) -> list[tuple[str, str]]:
    """Slots and names of all components that a smoke run must not change."""
    sections = recipe.sections()
    return [
        (section.slot, section.name)
        for section in sections
        if section.slot not in ("corpus", "precision")
    ]


def balancers(recipe: Recipe) -> list[Section]:
    """The balancers of the blocks with experts."""
    found: list[Section] = recipe.model.blocks["moe"].ffn.config.balance
    return found


@EVERY
def test_every_recipe_is_shipped_and_its_header_says_how_to_run_it(file: Path) -> None:
    name = str(file.relative_to(ROOT / "recipes").with_suffix(""))
    assert shipped_recipes()[name] == file
    header = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    ]
    assert any("python -m core." in line for line in header), f"{file}: no command in the header"


PAPERS = ["dsv2_lite", "dsv2", "dsv3_1b", "dsv3_16b", "dsv3_671b"]
"""Recipes of published models."""


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("params_total", "parameters"),
        ("params_active", "active"),
        ("params_mtp", "in the multi-token module"),
        ("kv_bytes_per_token", "bytes of cache"),
        ("flops_per_token", "GFLOPs per token"),
    ],
)
def test_what_a_header_claims_is_the_recipes(name: str, key: str, words: str) -> None:
    text = " ".join(
        line.strip("# ") for line in (ROOT / f"recipes/{name}.yaml").read_text().splitlines()
    )
    claim = re.search(rf"([\d.,]*\d)( million| billion|) {words}", text)
    if claim is None:
        assert key == "params_mtp", f"no {words} in the header"
        assert described(name)[key] == 0
        return
    number = claim[1].replace(",", "")
    unit = {" million": 1e6, " billion": 1e9}.get(claim[2], 1e9 if key == "flops_per_token" else 1)
    document = described(name)
    actual = document[
        "flops_per_token_main" if (name, key) == ("dsv3_671b", "flops_per_token") else key
    ]
    assert f"{actual / unit:.{len(number.partition('.')[2])}f}" == number


@pytest.mark.parametrize(
    "file",
    first_by_default(sorted(RECIPES, key=lambda file: file.stem not in QUICK), keep=2),
    ids=lambda file: file.stem,
)
def test_every_recipe_trains_two_steps_in_small(file: Path, lab: "Lab", tmp_path: Path) -> None:
    corpus = f"data.corpus={{name: files, paths: ['{lab.texts}/*.txt']}}"
    overrides = [
        corpus,
        "data.tokenizer.vocab=300",
        "data.sequence_length=64",
        "trainer.enable_progress_bar=false",
    ]
    recipe = core.compose(file, overrides, smoke=True)
    summary = fit(recipe, RunFolder(tmp_path / "run"), say=lambda _: None)
    assert (summary["steps"], summary["skipped_steps"]) == (2, 0)
    assert math.isfinite(summary["val_bits_per_byte"])


@pytest.mark.parametrize("name", PAPERS)
def test_smoke_shrinks_the_widths_and_keeps_every_part_and_schedule(name: str) -> None:
    whole, small = core.compose(name), core.compose(name, smoke=True)
    assert parts(small) == parts(whole)
    assert small.optimizer.config == whole.optimizer.config
    assert {name: head.config for name, head in small.model.heads.items()} == {
        name: head.config for name, head in whole.model.heads.items()
    }
    for mine, theirs in zip(balancers(small), balancers(whole), strict=True):
        assert mine.config == theirs.config
    assert (plan_of(small).steps, small.precision.name, small.data.corpus.name) == (
        2,
        "fp32",
        "package_text",
    )
    assert plan_of(small).tokens < 5000
