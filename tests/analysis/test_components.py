"""The table by component: it adds up for every shipped recipe, and is DeepSeek-V3's by hand."""

import pytest

import core
from core.describe import document_of
from core.recipe.shipped import shipped_recipes

SMALL = [
    name for name in shipped_recipes() if not name.startswith(("dsv2", "dsv3_16b", "dsv3_671b"))
]


@pytest.mark.parametrize("name", [*SMALL, "dsv2_lite", "dsv3_16b"])
def test_the_rows_add_up_and_nothing_is_left_over(name: str) -> None:
    document = document_of(core.compose(name))
    rows = document["components"]
    main = [row for row in rows if not row["component"].startswith("heads.")]
    heads = [row for row in rows if row["component"].startswith("heads.")]
    assert sum(row["parameters"] for row in main) == document["params_total"]
    assert sum(row["parameters"] for row in heads) == document["params_mtp"]
    assert sum(row["active"] for row in main) == document["params_active"]
    assert sum(row["flops_per_token"] for row in main) == pytest.approx(
        document["flops_per_token_main"], rel=1e-12
    )
    assert sum(row["flops_per_token"] for row in rows) == pytest.approx(
        document["flops_per_token"], rel=1e-12
    )
    assert "other" not in {row["component"] for row in rows}


def test_deepseek_v3_by_component() -> None:
    rows = {row["component"]: row for row in document_of(core.compose("dsv3_671b"))["components"]}
    expert, attention = 3 * 7168 * 2048, 187_107_328
    parameters = {
        "embedding": 129_280 * 7168,
        "attention": 61 * attention,
        "dense feed-forward": 3 * 3 * 7168 * 18_432,
        "routed experts": 58 * 256 * expert,
        "shared experts": 58 * expert,
        "routers": 58 * 256 * 7168,
        "norms": (2 * 61 + 1) * 7168,
        "selection biases": 58 * 256,
        "output": 129_280 * 7168,
        "heads.mtp": 11_610_068_224,
    }
    assert {name: row["parameters"] for name, row in rows.items()} == parameters
    active = {"embedding": 0, "selection biases": 0, "routed experts": 58 * 8 * expert}
    active["heads.mtp"] = 11_610_068_224 - 248 * expert - 256 + 129_280 * 7168
    assert {name: row["active"] for name, row in rows.items()} == parameters | active


def test_what_costs_and_products_disagree_in_is_reported(lab: object) -> None:
    """A tied output is active and owns nothing; a hash router owns no centroids."""
    rows = document_of(core.compose("baselines/hash", ["model.tied_embedding=true"]))["components"]
    found = {row["component"]: row for row in rows}
    assert (found["output"]["parameters"], found["output"]["active"]) == (
        0,
        found["embedding"]["parameters"],
    )
    assert not {"routers", "other"} & found.keys()
