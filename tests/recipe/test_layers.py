"""Merged layers: `extends`, the file, `smoke`, the command line; and which keys a changed `name` drops."""

from collections.abc import Callable
from pathlib import Path

import pytest

from core.contracts.errors import UserError
from core.contracts.schedule import Schedule
from core.contracts.schema import Section
from core.recipe.compose import Recipe, compose

Write = Callable[..., Path]
MessageOf = Callable[..., str]

FFN = "model.blocks.moe.ffn"
ROUTER = f"{FFN}.router"


def moe(recipe: Recipe) -> Section:
    section: Section = recipe.model.blocks["moe"].ffn
    return section


def router(recipe: Recipe) -> Section:
    section: Section = moe(recipe).config.router
    return section


# --- extends -------------------------------------------------------------------------------------------------------


def test_extends_merges_deeply_and_keeps_what_it_does_not_name(base: Path, write: Write) -> None:
    file = write(
        "extends: base.yaml\nmodel: {dim: 64, blocks: {moe: {ffn: {router: {scale: 1.0}}}}}\n"
    )
    recipe, before = compose(file), compose(base)
    assert recipe.model.dim == 64
    assert (
        router(recipe).config.scale,
        router(recipe).config.top_k,
        router(recipe).config.groups,
    ) == (1.0, 2, 4)
    changed = before.to_dict()
    changed["model"]["dim"] = 64
    changed["model"]["blocks"]["moe"]["ffn"]["router"]["scale"] = 1.0
    assert recipe.to_dict() == changed
    assert (recipe.name, recipe.source) == ("mine", str(file))


def test_extends_keeps_the_order_of_blocks_and_adds_after_them(base: Path, write: Write) -> None:
    blocks = "{last: {count: 1, ffn: {name: swiglu, hidden: 8}}, dense: {count: 3}}"
    last = f"extends: base.yaml\nmodel: {{blocks: {blocks}}}\n"
    composed = compose(write(last)).model.blocks
    assert {name: block.count for name, block in composed.items()} == {
        "dense": 3,
        "moe": 2,
        "last": 1,
    }
    assert list(composed) == ["dense", "moe", "last"]


def test_extends_replaces_a_list_whole(base: Path, write: Write) -> None:
    file = write(
        "extends: base.yaml\nmodel: {blocks: {moe: {ffn: {balance: [{name: sequence}]}}}}\n"
    )
    (only,) = moe(compose(file)).config.balance
    assert (only.name, only.config.alpha) == ("sequence", 0.0001), (
        "the default, not an item of the base"
    )
    empty = write("extends: base.yaml\nmodel: {blocks: {moe: {ffn: {balance: []}}}}\n")
    assert moe(compose(empty)).config.balance == []


def test_extends_finds_a_file_beside_it_or_a_shipped_name(
    base: Path, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    assert compose(write("extends: ../base.yaml\n", "inner/mine.yaml")).model.dim == 32
    shipped = compose(write("extends: dsv3_small\nseed: 7\nloggers: []\n"))
    assert (shipped.seed, shipped.model.dim) == (7, compose("dsv3_small", ["loggers=[]"]).model.dim)


def test_extends_may_replace_a_section_by_a_value_and_a_value_by_a_section(
    base: Path, write: Write, message_of: MessageOf
) -> None:
    wrong = write("extends: base.yaml\nbatch: [1]\n")
    assert (
        message_of(wrong)
        == f"{wrong}: batch = [1]: must be a section of keys: sequences, accumulate"
    )
    right = write("extends: base.yaml\noptimizer: {lr: {start: 0.5}}\n")
    assert compose(right).optimizer.config.lr == Schedule(start=0.5)


def test_a_null_in_a_mapping_of_sections_takes_one_away(base: Path, write: Write) -> None:
    assert list(compose(base, ["model.blocks.dense=null"]).model.blocks) == ["moe"]
    assert list(compose("dsv3_small", ["model.heads.mtp=null", "loggers=[]"]).model.heads) == [
        "next_token"
    ]
    assert list(
        compose(write("extends: base.yaml\nmodel: {blocks: {moe: null}}\n")).model.blocks
    ) == ["dense"]


# --- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("budget.steps=1e6", 1_000_000),
        ("budget.steps=1_000", 1000),
        ("budget={steps: null, tokens: 14.8e12}", 14_800_000_000_000),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.betas=[0, 0.5]", [0.0, 0.5]),
        ("gradient_clip=null", None),
        ("gradient_clip=", None),
        ("gradient_clip = 2 ", 2.0),
        ("compile=true", True),
        ("initial_weights=runs/a=b", "runs/a=b"),
        ("initial_weights=17", "17"),
        ("batch.accumulate=4", 4),
        ("model.norm_eps=0.5", 0.5),
        ("trainer={profiler: simple}", "simple"),
        ("model.rope.yarn.factor=40", 40.0),
        ("model.norm_eps=${optimizer.lr}", 0.001),
        (f"{FFN}.balance.1.alpha=0.5", 0.5),
        ("loggers.0.name=csv", "csv"),
        ("strategy.accelerator=cpu", "cpu"),
    ],
)
def test_an_override_sets_one_key(override: str, value: object, base: Path) -> None:
    base.write_text(base.read_text().replace("loggers: []\n", ""))
    found = compose(
        base, [override, "budget.steps=null"] if "14.8e12" in override else [override]
    ).to_dict()
    before = compose(base).to_dict()
    path = override.partition("=")[0].strip()
    path = {"budget": "budget.tokens", "trainer": "trainer.profiler"}.get(path, path)
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
        before = before[int(part)] if isinstance(before, list) else (before or {}).get(part)
    assert found == value
    assert type(found) is type(value) or path == "batch.accumulate"
    assert before != value or path == "loggers.0.name"


def test_an_override_of_a_mapping_is_laid_over_it(base: Path) -> None:
    recipe = compose(base, [f"{ROUTER}={{top_k: 4, scale: 1}}"])
    config = router(recipe).config
    assert (config.top_k, config.scale, config.groups, config.group_limit) == (4, 1.0, 4, 2)


def test_an_override_of_a_list_item_leaves_the_others(base: Path) -> None:
    recipe = compose(base, [f"{FFN}.balance.0.rate=0.5", f"{FFN}.balance.1={{alpha: 3}}"])
    assert [s.name for s in moe(recipe).config.balance] == ["bias", "sequence"]
    assert (
        moe(recipe).config.balance[0].config.rate,
        moe(recipe).config.balance[1].config.alpha,
    ) == (0.5, 3.0)


def test_the_last_of_two_overrides_wins(base: Path) -> None:
    assert compose(base, ["seed=2", "seed=3"]).seed == 3


def test_an_override_reaches_into_defaults_that_no_file_gives(base: Path) -> None:
    base.write_text(base.read_text().replace("loggers: []\n", ""))
    recipe = compose(base, ["loggers.1.name=csv", "model.heads.mtp={name: mtp, weight: 0.1}"])
    assert [section.name for section in recipe.loggers] == ["csv", "csv"]
    assert list(recipe.model.heads) == ["next_token", "mtp"], "the default head stays"
    assert compose(base, [f"{FFN}.dispatcher={{}}"]).to_dict() == compose(base).to_dict()


def test_interpolations_follow_the_last_layer(base: Path, write: Write) -> None:
    file = write("extends: base.yaml\nmodel: {rope: {max_length: '${data.sequence_length}'}}\n")
    assert compose(file).model.rope.max_length == 64
    assert compose(file, ["data.sequence_length=128"]).model.rope.max_length == 128


def test_yaml_anchors_and_merge_keys_are_read(base: Path) -> None:
    text = base.read_text().replace("dense: {count: 1,", "dense: &d {count: 1,")
    base.write_text(text.replace("    moe:\n", "    more: {<<: *d, count: 3}\n    moe:\n"))
    blocks = compose(base).model.blocks
    assert (blocks["more"].count, blocks["more"].ffn.config.hidden) == (3, 48)


def test_keys_may_be_unicode_or_numbers(base: Path) -> None:
    text = base.read_text()
    base.write_text(text.replace("dense:", "schön:").replace("    moe:", "    2:"))
    recipe = compose(base, ["model.blocks.schön.count=2", "model.blocks.2.count=1"])
    assert {name: block.count for name, block in recipe.model.blocks.items()} == {
        "schön": 2,
        "2": 1,
    }


# --- smoke ---------------------------------------------------------------------------------------------------------


def test_the_smoke_section_is_laid_over_only_where_asked_for_and_overrides_win_over_it(
    base: Path,
) -> None:
    plain, smoke = compose(base), compose(base, smoke=True)
    assert (plain.budget.steps, plain.model.dim) == (10, 32)
    assert (smoke.budget.steps, smoke.model.dim) == (2, 16)
    both = compose(base, ["budget.steps=5"], smoke=True)
    assert (both.budget.steps, both.model.dim) == (5, 16)


def test_the_smoke_section_of_a_base_is_inherited(base: Path, write: Write) -> None:
    file = write("extends: base.yaml\nsmoke: {budget: {steps: 3}}\n")
    recipe = compose(file, smoke=True)
    assert (recipe.budget.steps, recipe.model.dim) == (3, 16)


# --- where a key was set -------------------------------------------------------------------------------------------


def test_a_mistake_is_reported_with_the_layer_that_made_it(
    base: Path, write: Write, message_of: MessageOf
) -> None:
    file = write("extends: base.yaml\nseed: 2\n")
    assert message_of(base, "seed=x").startswith("command line (seed=x): seed = 'x'")
    base.write_text(base.read_text().replace("vocab: 300", "vocab: 0"))
    assert message_of(file).startswith(f"{base}: data.tokenizer.vocab = 0: ")
    file.write_text("extends: base.yaml\ndata: {tokenizer: {vocab: -1}}\n")
    assert message_of(file).startswith(f"{file}: data.tokenizer.vocab = -1: ")
    assert message_of(file, "data.tokenizer={vocab: -2}").startswith(
        "command line (data.tokenizer={vocab: -2}): data.tokenizer.vocab = -2: "
    )
    file.write_text(
        "extends: base.yaml\ndata: {tokenizer: {vocab: 400}}\nsmoke: {data: {tokenizer: {vocab: -3}}}\n"
    )
    assert compose(file).data.tokenizer.vocab == 400
    assert message_of(file, smoke=True).startswith(f"{file} (smoke): data.tokenizer.vocab = -3: ")


def test_a_key_that_nobody_set_is_reported_with_the_section_around_it(
    base: Path, write: Write, message_of: MessageOf
) -> None:
    file = write("extends: base.yaml\nmodel: {rope: {max_length: 9000, yarn: {factor: 2}}}\n")
    assert (
        message_of(file)
        == f"{file}: model.rope.max_length = 9000: must be at most 8192, as far as yarn reaches"
    )
    # the router's keys are the base's, but the new name is what needs a key that they lack
    assert message_of(base, "model.attention.name=mla").startswith(
        "command line (model.attention.name=mla): model.attention."
    )


def test_the_items_of_a_replaced_list_are_reported_with_the_file_that_replaced_them(
    base: Path, write: Write, message_of: MessageOf
) -> None:
    file = write(
        "extends: base.yaml\nmodel: {blocks: {moe: {ffn: {balance: [{name: bias, rate: -1}]}}}}\n"
    )
    assert message_of(file) == f"{file}: {FFN}.balance.0.rate = -1: must be at least 0"
    base.write_text(base.read_text().replace("rate: 0.001", "rate: -2"))
    assert message_of(base) == f"{base}: {FFN}.balance.0.rate = -2: must be at least 0"


# --- a changed name (P41) ------------------------------------------------------------------------------------------

DROPPED = tuple(f"{ROUTER}.{key}" for key in ("groups", "group_limit", "scale"))


def test_P41_a_name_changed_by_an_override_keeps_what_the_new_schema_has_and_lists_the_rest(
    base: Path, fake_plugin: str
) -> None:
    recipe = compose(
        base, [f"plugins=[{fake_plugin}]", f"{ROUTER}.name=plain", f"{FFN}.balance=[]"]
    )
    assert (
        router(recipe).name,
        router(recipe).config.top_k,
        router(recipe).config.temperature,
    ) == ("plain", 2, 1.0)
    assert recipe.dropped == DROPPED
    assert compose(base).dropped == ()


def test_P41_a_name_changed_by_extends(base: Path, write: Write, fake_plugin: str) -> None:
    file = write(
        f"extends: base.yaml\nplugins: [{fake_plugin}]\n"
        "model: {blocks: {moe: {ffn: {router: {name: plain, temperature: 0.5}, balance: []}}}}\n"
    )
    recipe = compose(file)
    assert (router(recipe).config.top_k, router(recipe).config.temperature) == (2, 0.5)
    assert recipe.dropped == DROPPED


def test_P41_a_name_changed_by_the_smoke_section(
    base: Path, write: Write, fake_plugin: str
) -> None:
    file = write(
        f"extends: base.yaml\nplugins: [{fake_plugin}]\n"
        "smoke: {model: {blocks: {moe: {ffn: {router: {name: plain}, balance: []}}}}}\n"
    )
    assert compose(file).dropped == ()
    assert compose(file, smoke=True).dropped == DROPPED


def test_P41_a_name_changed_in_a_list_item(base: Path) -> None:
    recipe = compose(base, [f"{FFN}.balance.0.name=z_loss"])
    assert [(s.name, s.config.alpha) for s in moe(recipe).config.balance] == [
        ("z_loss", 0.001),
        ("sequence", 0.0002),
    ]
    assert recipe.dropped == (f"{FFN}.balance.0.rate",)


def test_P41_a_changed_composite_drops_its_children_whole(base: Path, fake_plugin: str) -> None:
    recipe = compose(base, [f"plugins=[{fake_plugin}]", f"{FFN}.name=wide", f"{FFN}.branches=3"])
    assert (moe(recipe).name, moe(recipe).config.hidden, moe(recipe).config.branches) == (
        "wide",
        64,
        3,
    )
    assert recipe.dropped == tuple(
        f"{FFN}.{key}" for key in ("experts", "expert_hidden", "router", "balance")
    )


def test_P41_the_shared_keys_of_two_attentions_are_kept(base: Path) -> None:
    recipe = compose(base, ["model.attention.name=gqa", "model.attention.kv_heads=2"])
    assert (recipe.model.attention.config.heads, recipe.model.attention.config.kv_heads) == (4, 2)
    assert recipe.dropped == ()


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{ROUTER}={{name: plain, groups: 2}}"],
        [f"{ROUTER}.name=plain", f"{ROUTER}.groups=2"],
        [f"{ROUTER}.groups=2", f"{ROUTER}.name=plain"],
    ],
    ids=["together", "after", "before"],
)
def test_P41_a_key_given_beside_the_new_name_must_be_known(
    overrides: list[str], base: Path, message_of: MessageOf, fake_plugin: str
) -> None:
    by = next(override for override in overrides if "groups" in override)
    assert message_of(base, f"plugins=[{fake_plugin}]", *overrides) == (
        f"command line ({by}): {ROUTER}.groups: unknown key; known: name, temperature, top_k"
    )


def test_P41_a_key_given_beside_the_new_name_in_a_file_must_be_known(
    base: Path, write: Write, message_of: MessageOf, fake_plugin: str
) -> None:
    file = write(
        f"extends: base.yaml\nplugins: [{fake_plugin}]\n"
        "model: {blocks: {moe: {ffn: {router: {name: plain, groups: 2}, balance: []}}}}\n"
    )
    assert (
        message_of(file) == f"{file}: {ROUTER}.groups: unknown key; known: name, temperature, top_k"
    )


def test_P41_a_name_changed_and_changed_back_is_the_old_section(
    base: Path, write: Write, fake_plugin: str
) -> None:
    file = write(
        f"extends: base.yaml\nplugins: [{fake_plugin}]\n"
        "model: {blocks: {moe: {ffn: {router: {name: plain}}}}}\n"
    )
    back = compose(file, [f"{ROUTER}.name=deepseek_v3"])
    assert (router(back).config.groups, router(back).config.scale, back.dropped) == (4, 2.5, ())


def test_P41_the_keys_of_a_default_component_go_with_its_name(base: Path) -> None:
    base.write_text(f"{base.read_text()}strategy: {{accelerator: cpu}}\n")
    assert compose(base).strategy.config.accelerator == "cpu"
    swapped = compose(base, ["strategy.name=ddp", "strategy.ranks=2"])
    assert (swapped.strategy.config.ranks, swapped.strategy.config.accelerator) == (2, "cpu")


def test_a_distribution_may_be_named_with_a_component(base: Path, fake_plugin: str) -> None:
    recipe = compose(base, ["model.attention.name=moeloom/mha", f"plugins=[{fake_plugin}]"])
    assert recipe.model.attention.name == "moeloom/mha"
    assert recipe.model.attention.provenance.distribution == "moeloom"


@pytest.mark.parametrize("budget", ["steps=7", "tokens=7000", "flops=1e12"])
def test_a_budget_on_the_command_line_takes_the_place_of_the_files(base: Path, budget: str) -> None:
    found = compose(base, [f"budget.{budget}"]).budget
    given = {key for key in ("steps", "tokens", "flops") if getattr(found, key) is not None}
    assert given == {budget.partition("=")[0]}


def test_two_budgets_on_the_command_line_are_still_one_too_many(base: Path) -> None:
    with pytest.raises(UserError, match="exactly one of steps, tokens, flops"):
        compose(base, ["budget.steps=7", "budget.tokens=70"])
