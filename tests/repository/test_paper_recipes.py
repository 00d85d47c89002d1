"""The recipes of papers: shapes against a count written by hand from the released configurations, schedules against
the sections that print them. DeepSeek-V3's own schedules are in test_recipes.py."""

import re
from functools import cache
from typing import Any

import pytest

import core
from core.analysis.budget import plan_of
from core.contracts.schedule import Progress, value_at
from core.describe import document_of
from core.recipe.compose import Recipe

from .documents import ROOT
from .released import Released

V2, LF = "arXiv 2405.04434", "arXiv 2408.15664"
SEQUENCE = 4096


LITE = Released(102_400, 2048, 27, 1, 16, None, 512, 128, 64, 128, 10_944, 1408, 64, 2, 6, False)
FULL = Released(102_400, 5120, 60, 1, 128, 1536, 512, 128, 64, 128, 12_288, 1536, 160, 2, 6, False)
V3 = Released(129_280, 7168, 61, 3, 128, 1536, 512, 128, 64, 128, 18_432, 2048, 256, 1, 8, True)
SHAPES = {"dsv2_lite": LITE, "dsv2": FULL, "dsv3_671b": V3}


@cache
def recipe(name: str) -> Recipe:
    """A recipe as it is shipped."""
    return core.compose(name)


@cache
def described(name: str) -> dict[str, Any]:
    """The document that `describe --json` prints."""
    return document_of(recipe(name))


def rates(name: str, positions: list[float]) -> list[float]:
    """The learning rates after the given numbers of tokens."""
    lr = recipe(name).optimizer.config.lr
    return [
        value_at(lr, Progress(step=1, tokens=int(at), total_steps=1, total_tokens=1))
        for at in positions
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_a_released_models_shape_is_its_configurations(name: str) -> None:
    document, config = described(name), SHAPES[name]
    assert document["params_total"] == config.total
    assert document["params_active"] == config.active
    kept = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert document["kv_bytes_per_token"] == 2 * kept


def test_the_released_counts() -> None:
    """Printed: 15.7B, 236B, 671B in total, 2.4B, 21B, 37B active (these with the embedding, or rounded)."""
    assert [config.total for config in (LITE, FULL, V3)] == [
        15_706_484_224,
        235_741_434_880,
        671_026_419_200,
    ]
    assert [round(c.active / 1e9, 1) for c in (LITE, FULL, V3)] == [2.5, 20.9, 36.6]
    assert V3.attention == 187_107_328


def test_the_flops_that_are_printed() -> None:
    """arXiv 2505.09343, table 2: 155 and 250 GFLOPs a token of 4,096."""
    assert round(described("dsv2")["flops_per_token_main"] / 1e9) == 155
    assert described("dsv3_671b")["flops_per_token_main"] / 1e9 == pytest.approx(250, abs=0.5)


def test_V3s_parts_on_V2_lites_sizes() -> None:
    mine, lite = described("dsv3_16b"), described("dsv2_lite")
    assert mine["params_total"] == lite["params_total"] + 26 * 64  # the selection biases
    assert mine["params_active"] == lite["params_active"]
    depth = (
        LITE.attention
        + 2 * 2048
        + LITE.mlp(1408) * 66
        + 64 * 2048
        + 64
        + 2 * 2048 * 2048
        + 3 * 2048
    )
    assert mine["params_mtp"] == depth
    router = recipe("dsv3_16b").model.blocks["moe"].ffn.config.router
    assert (router.name, router.config.affinity, router.config.normalise) == (
        "deepseek_v3",
        "sigmoid",
        True,
    )


def test_V3s_schedules_turn_at_the_same_fractions_of_the_16b_run() -> None:
    small, plan = recipe("dsv3_16b"), plan_of(recipe("dsv3_16b"))
    bias, sequence = small.model.blocks["moe"].ffn.config.balance
    gamma, lambda_ = bias.config.rate, small.model.heads["mtp"].config.weight

    def at(fraction: float) -> Progress:
        return Progress(
            step=1,
            tokens=round(fraction * plan.tokens),
            total_steps=plan.steps,
            total_tokens=plan.tokens,
        )

    turn, fall = 10 / 14.8, 14.3 / 14.8
    assert [value_at(lambda_, at(turn + by)) for by in (-0.001, 0.001)] == [0.3, 0.1]
    assert [value_at(gamma, at(fall + by)) for by in (-0.001, 0.001)] == [0.001, 0.0]
    assert sequence.config.alpha == 1e-4
    assert rates("dsv3_16b", [1e12, 5e12, 5.5e12]) == rates("dsv2_lite", [1e12, 5e12, 5.5e12])


@pytest.mark.parametrize(
    ("name", "peak", "first", "turns", "end"),
    [
        ("dsv2_lite", 4.2e-4, 4608, (0.8, 0.9), 5.7e12),  # appendix B.1
        ("dsv2", 2.4e-4, 2304, (0.6, 0.9), 8.1e12),  # section 3.1.2
    ],
)
def test_V2s_learning_rate_falls_in_two_steps(
    name: str, peak: float, first: int, turns: tuple[float, float], end: float
) -> None:
    plan, lr = plan_of(recipe(name)), recipe(name).optimizer.config.lr
    assert plan.progress(1999).tokens == 2000 * first * SEQUENCE
    assert value_at(lr, plan.progress(0)) == pytest.approx(peak / 2000)
    assert [value_at(lr, plan.progress(step)) for step in (1999, 2000)] == [peak, peak]
    one, two = (turn * end for turn in turns)
    expected = [peak, 0.316 * peak, 0.316 * peak, 0.316**2 * peak, 0.316**2 * peak]
    assert rates(name, [one - 1e9, one + 1e9, two - 1e9, two + 1e9, end]) == pytest.approx(
        expected, rel=1e-12
    )
    assert 0 <= plan.tokens - end < 9216 * SEQUENCE


def test_V2s_batch_grows_from_2304_to_9216_sequences_over_225_billion_tokens() -> None:
    plan = plan_of(recipe("dsv2"))
    sizes = [
        plan.window(step).count * recipe("dsv2").batch.sequences
        for step in range(0, plan.steps, 100)
    ]
    assert (sizes[0], sizes[-1]) == (2304, 9216)
    assert sizes == sorted(sizes)
    last = max(step for step in range(plan.steps) if plan.window(step).count < 4)
    assert plan.progress(last).tokens == pytest.approx(
        225e9 * 5 / 6, rel=1e-3
    )  # the nearest whole number from there
    lite = recipe("dsv2_lite").batch
    assert lite.sequences * lite.accumulate == 4608


def test_V2s_losses_and_dropping() -> None:
    layer, lite = (recipe(name).model.blocks["moe"].ffn.config for name in ("dsv2", "dsv2_lite"))
    assert [(loss.name, loss.config.alpha) for loss in layer.balance] == [
        ("expert", 0.003),
        ("device", 0.05),
        ("communication", 0.02),
    ]
    assert (layer.token_dropping.devices, layer.token_dropping.capacity_factor) == (8, 1.0)
    assert layer.token_dropping.keep_sequences == 0.1
    assert (
        layer.router.config.groups,
        layer.router.config.group_limit,
        layer.router.config.scale,
    ) == (8, 3, 16.0)
    assert [(loss.name, loss.config.alpha) for loss in lite.balance] == [("expert", 0.001)]
    assert (lite.token_dropping, lite.router.config.groups, lite.router.config.scale) == (
        None,
        1,
        1.0,
    )


def test_the_1b_is_the_loss_free_papers() -> None:
    """Appendices A and B; the count by hand."""
    small, plan = recipe("dsv3_1b"), plan_of(recipe("dsv3_1b"))
    d, expert = (
        1024,
        round(8 / 3 * 1024 * 3 / 16),
    )  # granularity: a standard FFN of 8 d / 3 is 16/3 experts wide
    assert expert == 512
    norms, attention = 2 * d, 4 * d * d
    sparse = 3 * d * expert * (64 + 2) + 64 * d + 64
    total = 2 * 32_064 * d + d + 10 * (norms + attention) + 3 * d * 2736 + 9 * sparse
    assert described("dsv3_1b")["params_total"] == total
    layer = small.model.blocks["moe"].ffn.config
    assert (
        layer.router.config.affinity,
        layer.router.config.normalise,
        layer.router.config.top_k,
    ) == (
        "sigmoid",
        False,
        6,
    )
    assert [(b.name, b.config.rate, b.config.form, b.config.update) for b in layer.balance] == [
        ("bias", 0.001, "additive", "sign")
    ]
    assert list(small.model.heads) == ["next_token"]
    assert (small.batch.sequences * small.batch.accumulate, plan.steps) == (1152, 40_000)
    assert plan.tokens == 1152 * 2048 * 40_000
    lr = small.optimizer.config.lr
    at = {
        1: 1e-6,
        1000: 1e-3,
        20_500: 5.5e-4,
        40_000: 1e-4,
    }  # a cosine is half-way at half its length
    found = {step: value_at(lr, plan.progress(step - 1)) for step in at}
    assert found == pytest.approx(at, rel=1e-12)


def test_the_1b_fits_one_gpu_with_80_gb() -> None:
    memory = described("dsv3_1b")["memory_bytes"]
    assert sum(memory[key] for key in ("weights", "gradients", "optimizer")) / 1e9 == pytest.approx(
        16.8, abs=0.05
    )


@pytest.mark.parametrize("name", ["dsv2_lite", "dsv2", "dsv3_1b", "dsv3_16b", "dsv3_671b"])
def test_the_papers_optimizer_and_initial_weights(name: str) -> None:
    mine = recipe(name)
    assert mine.model.init.std == 0.006
    assert (mine.model.init.output_std, mine.model.init.embedding_std) == (None, None)
    assert (mine.optimizer.config.betas, mine.optimizer.config.weight_decay) == ([0.9, 0.95], 0.1)
    assert mine.gradient_clip == 1.0
    assert (
        mine.data.sequence_length
        == mine.model.rope.max_length
        == (2048 if name == "dsv3_1b" else SEQUENCE)
    )


@pytest.mark.parametrize("name", ["dsv2_lite", "dsv2", "dsv3_1b", "dsv3_16b", "dsv3_671b"])
def test_every_number_of_a_papers_recipe_cites_its_source(name: str) -> None:
    """The citation is on the same line, on the line above, or on the line that opens the block."""
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    keys = set(re.findall(r"\[(\w+)\]", text.partition("seed:")[0]))
    body = text[text.index("model:") : text.index("smoke:")].splitlines()
    source = re.compile(rf"#.*\b({'|'.join(keys)}|config_671B)\b")
    ours = ("checkpoint:", "validation:", "corpus:")  # keys that papers say nothing about
    bare = [
        line
        for at, line in enumerate(body)
        if _sets_a_number(line, ours) and not _cited(body, at, source)
    ]
    assert bare == []


def _sets_a_number(line: str, ours: tuple[str, ...]) -> bool:
    plain = re.sub(r"name: \w+", "", line.partition("#")[0])
    return bool(re.search(r"[:,\[] *-?\d", plain)) and not plain.strip().startswith(ours)


def _cited(body: list[str], at: int, source: re.Pattern[str]) -> bool:
    """Whether a line cites a source itself, in the comment above it, or in a line that opens a block around it."""
    if source.search(body[at]) or (
        at and body[at - 1].strip().startswith("#") and source.search(body[at - 1])
    ):
        return True
    depth = _depth(body[at])
    for line in reversed(body[:at]):
        if _depth(line) < depth and line.strip():
            depth = _depth(line)
            if source.search(line):
                return True
    return False


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))
