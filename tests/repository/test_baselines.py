"""The baselines are matched as their headers say, and DeepSeekMoE's published table follows from its recipes."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import core
from core.analysis.budget import plan_of
from core.analysis.compare_recipes import table, unequal
from core.contracts.schedule import value_at
from core.describe import document_of
from core.recipe.compose import Recipe

from .documents import ROOT, blocks

REFERENCE = "deepseek_v3"
COARSE = ("gshard", "gshard_dropless", "switch", "hash")
FINE = ("deepseek_moe", "deepseek_v2")
DENSE = ("dense", "dense_active")
ATTENTIONS = ("mha", "gqa", "mqa")
EVERY = (REFERENCE, *FINE, *COARSE, *DENSE, *ATTENTIONS)
ROUTED = (*FINE, *COARSE, *DENSE)
"""Baselines that change the feed-forward layer."""

WITHIN = 0.02
SAME_WORK = [
    *(
        (name, REFERENCE)
        for name in ("gshard", "gshard_dropless", *FINE, "dense_active", *ATTENTIONS)
    ),
    *(("switch", "hash"), ("switch", "dense"), ("hash", "dense")),
]
"""Pairs that are meant to do the same work for a token."""

ROUTING = {
    "deepseek_v3": (4, None, False, True, False),
    "deepseek_v2": (4, 1.0, True, False, True),
    "deepseek_moe": (4, None, False, True, False),
    "gshard": (2, 1.0, True, False, False),
    "gshard_dropless": (2, None, False, True, False),
    "switch": (1, 1.25, True, True, True),
    "hash": (1, None, False, True, False),
    **dict.fromkeys(DENSE, (0, None, False, True, False)),
    **dict.fromkeys(ATTENTIONS, (4, None, False, True, False)),
}
"""top_k, capacity factor, drops, causal, depends on the batch."""


@cache
def recipe(name: str) -> Recipe:
    """A shipped recipe."""
    return core.compose(name)


@cache
def described(name: str, *overrides: str) -> dict[str, Any]:
    """The document that `describe --json` prints."""
    return document_of(core.compose(name, overrides) if overrides else recipe(name))


def baseline(name: str) -> dict[str, Any]:
    """The description of one of `recipes/baselines`."""
    return described(f"baselines/{name}")


def resolved(name: str) -> dict[str, Any]:
    """A baseline with every default, without the sizes of its smoke run."""
    return {
        key: value for key, value in recipe(f"baselines/{name}").to_dict().items() if key != "smoke"
    }


def header(file: Path) -> str:
    """The comment at the top, as one line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return " ".join(line.strip("# ") for line in lines if line.startswith("#"))


def test_these_are_all_baselines() -> None:
    assert (
        {file.stem for file in (ROOT / "recipes/baselines").glob("*.yaml")}
        == set(EVERY)
        == set(ROUTING)
    )


def test_the_reference_is_the_recipe_that_people_know() -> None:
    known = recipe("dsv3_small").to_dict()
    assert resolved(REFERENCE) == {key: value for key, value in known.items() if key != "smoke"}


@pytest.mark.parametrize("name", ROUTED)
def test_a_routing_baseline_changes_the_feed_forward_layer_and_nothing_else(name: str) -> None:
    mine, reference = resolved(name), resolved(REFERENCE)
    (first, last), (reference_first, reference_last) = (
        r["model"].pop("blocks").values() for r in (mine, reference)
    )
    assert mine == reference
    assert first == reference_first
    assert last.pop("ffn") != reference_last.pop("ffn")
    assert last == reference_last


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_baseline_changes_the_attention_and_nothing_else(name: str) -> None:
    mine, reference = resolved(name), resolved(REFERENCE)
    for block in mine["model"]["blocks"].values():
        assert block["attention"]["name"] == name
        block["attention"] = None
    assert mine == reference


def test_nothing_that_should_be_held_equal_differs() -> None:
    for names, expected in (
        ((REFERENCE, *ROUTED), []),
        ((REFERENCE, "mqa"), ["attention: mla; mqa in mqa"]),
    ):
        recipes = [recipe(f"baselines/{name}") for name in names]
        assert unequal(recipes, [baseline(name) for name in names]) == expected


@pytest.mark.parametrize("name", [*FINE, *COARSE, *ATTENTIONS])
def test_every_baseline_with_experts_has_as_many_parameters_in_them(name: str) -> None:
    assert baseline(name)["params_experts"] == pytest.approx(
        baseline(REFERENCE)["params_experts"], rel=WITHIN
    )
    assert baseline(name)["params_total"] == pytest.approx(
        baseline(REFERENCE)["params_total"], rel=WITHIN
    )


@pytest.mark.parametrize(("one", "other"), SAME_WORK)
def test_matched_baselines_do_the_same_work_for_a_token(one: str, other: str) -> None:
    for key in ("params_active", "flops_per_token", "flops_per_token_main"):
        assert baseline(one)[key] == pytest.approx(baseline(other)[key], rel=WITHIN), key


def test_one_coarse_expert_is_half_the_work_of_two() -> None:
    """Experts have the same width in all coarse baselines, and a dense layer has that of one expert."""
    experts = [recipe(f"baselines/{name}").model.blocks["coarse"].ffn.config for name in COARSE]
    assert {
        (config.experts, config.expert_hidden, config.shared_experts) for config in experts
    } == {(7, 232, 0)}
    two, one = (baseline(name)["params_active"] for name in ("gshard", "switch"))
    assert two - one == 3 * 3 * 192 * 232
    assert (
        one - 3 * 7 * 192 == baseline("hash")["params_active"] == baseline("dense")["params_active"]
    )  # its router


@pytest.mark.parametrize("name", EVERY)
def test_what_the_routing_of_a_baseline_promises(name: str) -> None:
    keys = ("top_k", "capacity_factor", "drops", "causal", "batch_dependent")
    assert tuple(baseline(name)[key] for key in keys) == ROUTING[name]


@pytest.mark.parametrize("name", EVERY)
def test_the_sizes_in_a_baselines_header_are_its_own(name: str) -> None:
    text, mine, reference = (
        header(ROOT / f"recipes/baselines/{name}.yaml"),
        baseline(name),
        baseline(REFERENCE),
    )
    claims = {
        "params_total": ("million parameters", 1e6),
        "params_experts": ("million in experts", 1e6),
        "params_active": ("million active", 1e6),
        "flops_per_token": ("MFLOPs per token", 1e6),
        "kv_bytes_per_token": ("bytes of cache per token", 1),
    }
    for key, (words, unit) in claims.items():
        claim = re.search(rf"([\d,.]*\d) {words}(?: \(([+-][\d.]+)%\))?", text)
        assert claim is not None or (key == "params_experts" and mine[key] == 0), f"no {words}"
        if claim is None:
            continue
        number, difference = claim[1].replace(",", ""), claim[2]
        assert f"{mine[key] / unit:.{len(number.partition('.')[2])}f}" == number, words
        if difference is not None:
            assert f"{100 * (mine[key] / reference[key] - 1):+.1f}" == difference, words


def test_the_printed_table_is_the_computed_one() -> None:
    block = next(
        block for block in blocks(ROOT / "docs/baselines.md", "text") if "--compare" in block.text
    )
    command, _, printed = block.text.partition("\n\n")
    names = re.findall(r"baselines/\w+", command)
    assert {name.removeprefix("baselines/") for name in names} == set(EVERY)
    assert printed.splitlines() == table(
        [recipe(name) for name in names], [described(name) for name in names]
    )


def test_the_printed_2b_table_is_the_computed_one() -> None:
    text = (ROOT / "docs/baselines.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    printed = {cells[0].strip("`"): cells[1:] for cells in rows}
    for name, published in PUBLISHED.items():
        document = described(f"deepseekmoe_2b/{name}")
        numbers = (document["params_total"] / 1e9, document["params_active"] / 1e9)
        flops = 2048 * document["flops_per_token_full"] / 1e12
        own = [*(f"{number:.3f}" for number in numbers), f"{flops:.3f}"]
        assert printed[name][:3] == [
            f"{mine} ({paper})" for mine, paper in zip(own, published, strict=True)
        ], name


PUBLISHED = {
    "dense": ("0.2", "0.2", "2.9"),
    "hash": ("2.0", "0.2", "2.9"),
    "switch": ("2.0", "0.2", "2.9"),
    "gshard": ("2.0", "0.3", "4.3"),
    "deepseekmoe": ("2.0", "0.3", "4.3"),
}
"""DeepSeekMoE (arXiv 2401.06066), table 1: billions of parameters in total and active, TFLOPs per 2K tokens."""


def teraflops(document: dict[str, Any]) -> str:
    """TFLOPs per 2K tokens with the whole square of attention, as that paper counts and prints them."""
    return f"{2048 * document['flops_per_token_full'] / 1e12:.1f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_columns_of_deepseekmoes_table_1(name: str) -> None:
    """Total counts embedding and output. Active leaves out the embedding; with it the same digits would be printed."""
    document = described(f"deepseekmoe_2b/{name}")
    total, active = document["params_total"] / 1e9, document["params_active"] / 1e9
    assert (f"{total:.1f}", f"{active:.1f}", teraflops(document)) == PUBLISHED[name]
    assert f"{active + 8192 * 1280 / 1e9:.1f}" == PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_formula_behind_its_flops(name: str) -> None:
    """6 N + 12 L d s, N = L 4 d^2 + active FFNs of 8 d^2 + V d; the rest is routers, norms and 3,416 for 3,413.3."""
    layers, dim, length, vocabulary = 9, 1280, 2048, 8192
    active_ffns = 2 if PUBLISHED[name][1] == "0.3" else 1
    weights = layers * (4 * dim**2 + active_ffns * 8 * dim**2) + vocabulary * dim
    by_formula = 6 * weights + 12 * layers * dim * length
    assert described(f"deepseekmoe_2b/{name}")["flops_per_token_full"] == pytest.approx(
        by_formula, rel=0.003
    )


def test_its_larger_gshard_and_dense_models() -> None:
    """GShard x 1.5 (2.83 billion in experts, 0.35 of them active, 5.8 TFLOPs) and Dense x 16 (24.6 TFLOPs)."""
    wider = described(
        "deepseekmoe_2b/gshard", "model.blocks.moe.ffn.expert_hidden=5120"
    )  # 12 d^2 = 3 d x 4 d
    assert f"{wider['params_experts'] / 1e9:.2f}" == "2.83"
    assert f"{wider['params_experts'] * 2 / 16 / 1e9:.2f}" == "0.35"
    assert teraflops(wider) == "5.8"
    assert (
        teraflops(described("deepseekmoe_2b/dense", f"model.blocks.dense.ffn.hidden={16 * 3416}"))
        == "24.6"
    )


def test_its_models_with_experts_have_sixteen_standard_ffns_in_them() -> None:
    counts = {
        described(f"deepseekmoe_2b/{name}")["params_experts"]
        for name in PUBLISHED
        if name != "dense"
    }
    assert counts == {16 * 9 * 3 * 1280 * 3416}
    standard = 8 * 1280**2
    assert abs(3 * 1280 * 3416 - standard) < 0.001 * standard


def test_its_schedule_batch_and_weights() -> None:
    common = recipe("deepseekmoe_2b/dense")
    plan, rate = plan_of(common), common.optimizer.config.lr
    assert (plan.steps, plan.tokens) == (25_000, 25_000 * 2048 * 2048)
    expected = {
        1: 1.08e-3 / 2000,
        2000: 1.08e-3,
        20_000: 1.08e-3,
        20_001: 0.316 * 1.08e-3,
        25_000: 0.316**2 * 1.08e-3,
    }
    for step, value in expected.items():
        assert value_at(rate, plan.progress(step - 1)) == pytest.approx(value, rel=1e-9)
    optimizer = common.optimizer.config
    assert (optimizer.betas, optimizer.weight_decay, common.gradient_clip) == (
        [0.9, 0.95],
        0.1,
        1.0,
    )
    assert common.model.init.std == 0.006
    recipes = [recipe(f"deepseekmoe_2b/{name}") for name in PUBLISHED]
    assert unequal(recipes, [described(f"deepseekmoe_2b/{name}") for name in PUBLISHED]) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_in_a_2b_header_are_its_own_and_the_papers(name: str) -> None:
    text, document = (
        header(ROOT / f"recipes/deepseekmoe_2b/{name}.yaml"),
        described(f"deepseekmoe_2b/{name}"),
    )
    own = re.search(
        r"Expect: ([\d.]+) billion parameters,.*? ([\d.]+) billion active, ([\d.]+) TFLOPs", text
    )
    assert own is not None
    flops = 2048 * document["flops_per_token_full"]
    values = (document["params_total"] / 1e9, document["params_active"] / 1e9)
    assert own.groups() == (*(f"{value:.2f}" for value in values), f"{flops / 1e12:.3f}")
    paper = re.search(
        r"prints ([\d.]+) billion in total(?:, ([\d.]+) billion| and) active, ([\d.]+) TFLOPs", text
    )
    assert paper is not None
    assert (paper[1], paper[2] or paper[1], paper[3]) == PUBLISHED[name]
