"""A resolved recipe, dumped and read again, is the same recipe; and every shipped one composes and builds (P23)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiers import first_by_default

from core.analysis.budget import plan_of
from core.assemble import build
from core.recipe.compose import Recipe, compose
from core.recipe.shipped import find_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file for file in (ROOT / "recipes").rglob("*.yaml") if "sweeps" not in file.parts)
BY_DEFAULT = ("dsv3_small", "dsv3_671b", "gshard", "deepseek_v2")
IN_ORDER = sorted(FILES, key=lambda file: file.stem not in BY_DEFAULT)
EVERY = pytest.mark.parametrize(
    "file",
    first_by_default(IN_ORDER, keep=len(BY_DEFAULT)),
    ids=lambda file: str(file.relative_to(ROOT / "recipes")),
)

Write = Callable[..., Path]

SCHEDULES = [
    "optimizer.lr={start: 0, unit: tokens, segments: [{until: 1e3, shape: linear, to: 1e-3}, {until: 2e3, to: 0}]}",
    "batch.accumulate={start: 1, unit: steps, segments: [{until: 5, shape: linear, to: 4}]}",
    "model.blocks.moe.ffn.balance.0.rate={start: 1e-3, segments: [{until: 0.9}, {until: 1, to: 0}]}",
    "model.blocks.moe.ffn.balance.1.alpha={start: 1}",
    "model.heads.mtp={name: mtp, weight: {start: 0.3, segments: [{until: 0.5}, {until: 1, to: 0.1}]}}",
]
RICH = [
    *SCHEDULES,
    "model.rope={yarn: {factor: 40, mscale: null}, max_length: 8192}",
    "model.blocks.dense.attention={name: mla, heads: 2, kv_rank: 8, nope_dim: 8, rope_dim: 4, value_dim: 8}",
    "trainer={profiler: simple, log_every_n_steps: 3}",
    "gradient_clip=null",
    "compile=true",
    "recompute.blocks=[moe]",
    "initial_weights='12'",
    "loggers.0.name=csv",
    "strategy={name: ddp, ranks: 2}",
    "budget={steps: null, tokens: 1e9}",
    "smoke.seed=4",
]


def again(recipe: Recipe, write: Write) -> Recipe:
    return compose(
        write(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), "again.yaml")
    )


def plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    if type(value) is list:
        return all(plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


@EVERY
def test_every_shipped_recipe_composes_builds_and_comes_back(file: Path, write: Write) -> None:
    recipe = compose(file)
    assert recipe.dropped == ()
    model = build(recipe, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert plan_of(recipe, model).steps >= 1
    assert again(recipe, write).to_dict() == recipe.to_dict()


@EVERY
def test_every_shipped_recipe_has_a_smoke_form_that_composes(file: Path, write: Write) -> None:
    recipe = compose(file, smoke=True)
    assert again(recipe, write).to_dict() == recipe.to_dict()


@EVERY
def test_every_shipped_recipe_is_known_by_its_name(file: Path) -> None:
    name = str(file.relative_to(ROOT / "recipes").with_suffix(""))
    assert shipped_recipes()[name] == file
    assert find_recipe(name) == find_recipe(f"recipes/{name}.yaml").resolve() == file


@pytest.mark.parametrize(
    "overrides", [[], *([s] for s in SCHEDULES), RICH], ids=lambda o: f"{len(o)}-{''.join(o)[:20]}"
)
def test_a_recipe_with_every_kind_of_value_comes_back(
    overrides: list[str], base: Path, write: Write
) -> None:
    if overrides is RICH:
        base.write_text(base.read_text().replace("loggers: []\n", ""))
        overrides = [o for o in overrides if "budget" not in o and "unit: steps" not in o]
    recipe = compose(base, overrides)
    second = again(recipe, write)
    assert second.to_dict() == recipe.to_dict()
    assert second.dropped == ()
    assert [(s.slot, s.name, s.config) for s in second.sections()] == [
        (s.slot, s.name, s.config) for s in recipe.sections()
    ]


def test_a_recipe_with_plugins_comes_back(base: Path, write: Write, fake_plugin: str) -> None:
    router = "model.blocks.moe.ffn.router.name=plain"
    recipe = compose(base, [f"plugins=[{fake_plugin}]", router, "model.blocks.moe.ffn.balance=[]"])
    assert len(recipe.dropped) == 3
    second = again(recipe, write)
    assert second.to_dict() == recipe.to_dict()
    assert second.dropped == (), "what was dropped is not written"


def test_P23_a_resolved_recipe_is_plain_containers_all_the_way_down(base: Path) -> None:
    assert plain(compose(base, SCHEDULES).to_dict())
    assert list(compose(base).to_dict())[:3] == ["seed", "plugins", "model"], (
        "in the schema's order, readable"
    )


def test_sections_are_every_component_with_its_children_in_order(base: Path) -> None:
    found = [(section.slot, section.name) for section in compose(base).sections()]
    assert found == [
        ("attention", "mha"),
        ("ffn", "swiglu"),
        ("ffn", "moe"),
        ("router", "deepseek_v3"),
        ("balancer", "bias"),
        ("balancer", "sequence"),
        ("dispatcher", "local"),
        ("residual", "add"),
        ("loss_head", "next_token"),
        ("precision", "fp32"),
        ("corpus", "files"),
        ("optimizer", "adamw"),
        ("strategy", "single"),
    ]
