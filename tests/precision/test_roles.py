"""Roles: which are low, how a recipe says so, and what a run writes down of what really ran."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab

from core.contracts.errors import ConfigError, UserError
from core.contracts.precision import HIGH, NEVER_LOW, ROLES, KernelLog, roles_matching
from core.numerics.linear import GroupedLinear, Linear
from core.testing import bench

from .layers import precision

FP8 = "precision={name: fp8_emulated}"


def test_what_stays_high_is_the_papers_list_and_the_multi_token_projection() -> None:
    """Report, section 3.3.1; attention's own products belong to no layer."""
    assert set(HIGH) == {"embedding", "head", "router", "norm"} | {"mtp.projection"}
    made = precision()
    low = {role for role in ROLES if made.compute_dtype(role) == torch.float8_e4m3fn}
    assert low == set(ROLES) - set(HIGH)
    assert {made.param_dtype(role) for role in ROLES} == {torch.float32}


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["head"], {"head"}),
        (["ffn.*", "head"], {"ffn.gate_up", "ffn.down", "head"}),
        (["*.down"], {"ffn.down", "experts.down", "shared_experts.down"}),
        (["*experts.gate_up"], {"experts.gate_up", "shared_experts.gate_up"}),
        (["*"], set(ROLES)),
        ([], set()),
    ],
)
def test_patterns_name_roles(patterns: list[str], named: set[str]) -> None:
    assert roles_matching(patterns) == named


@pytest.mark.parametrize("pattern", ["experts", "Head", "ffn.up", "attention*output.", "ffn"])
def test_a_pattern_that_names_nothing_is_wrong(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        roles_matching(["head", pattern])
    assert caught.value.key == "1"


@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_every_role_is_in_the_format_that_the_recipe_gives_it(stream: str) -> None:
    made = precision(high=["attention.*"], stream=stream)
    high = {role for role in ROLES if role.startswith("attention.")} | set(NEVER_LOW)
    wide = {"fp32": torch.float32, "bf16": torch.bfloat16}[stream]
    for role in ROLES:
        expected = wide if role in high else torch.float8_e4m3fn
        if role in ("router", "norm"):
            expected = torch.float32
        assert made.compute_dtype(role) == expected, role
        layers = (made.linear(8, 4, role, std=0.1), made.grouped_linear(2, 8, 4, role, std=0.1))
        assert [type(layer) in (Linear, GroupedLinear) for layer in layers] == [role in high] * 2
        y = layers[0](torch.randn(3, 8, dtype=wide))
        assert y.dtype == (torch.float32 if role in ("router", "norm") else wide)


def test_gradients_have_the_format_that_is_asked_for() -> None:
    made = precision(gradients="e5m2")
    assert made.gradient_dtype("ffn.down") == torch.float8_e5m2
    assert made.gradient_dtype("head") == made.compute_dtype("head") == torch.float32
    assert precision().gradient_dtype("ffn.down") == torch.float8_e4m3fn


def test_an_unknown_role_is_refused_with_the_nearest(lab: Lab) -> None:
    result = lab.command(
        "describe", lab.file, "precision={name: fp8_emulated, high: [head, experts.donw]}"
    )
    assert result.code == 2
    assert (
        "precision.high.1 = 'experts.donw': is not a role; did you mean experts.down"
        in result.sentence
    )


def test_a_low_output_that_is_the_embedding_is_refused(lab: Lab) -> None:
    with pytest.raises(
        UserError, match=r"precision\.high = .*must name head, because model\.tied_embedding"
    ):
        lab.recipe("model.tied_embedding=true", "precision={name: fp8_emulated, high: []}")
    lab.recipe("model.tied_embedding=true", FP8)


def test_describe_reports_format_and_path_of_every_role(lab: Lab) -> None:
    result = lab.command(
        "describe", lab.file, "precision={name: fp8_emulated, high: [head, ffn.*]}", "--json"
    )
    roles = json.loads(result.out)["precision"]
    low = {"kept": "float32", "computed": "float8_e4m3fn", "path": "emulated e4m3 1x128 / 128x128"}
    assert roles["experts.down"] == low
    assert roles["mtp.projection"] == low
    assert roles["attention.output"] == {**low, "path": low["path"] + ", saved in e5m6"}
    for role in ("router", "head", "ffn.down"):
        assert roles[role] == {"kept": "float32", "computed": "float32", "path": "float32 product"}
    assert "emulated e4m3 1x128 / 128x128" in lab.command("describe", lab.file, FP8).out


def test_a_run_writes_down_what_ran(lab: Lab, finished: Path, tmp_path: Path) -> None:
    """Every role of the model, as `describe` announced it; embedding and norms take no product."""
    summary = lab.fit(tmp_path / "run", FP8, "budget.steps=1")
    announced = json.loads(lab.command("describe", lab.file, FP8, "--json").out)["precision"]
    ran = summary["precision_paths"]
    assert ran == {
        role: announced[role]["path"] for role in announced if role not in ("embedding", "norm")
    }
    assert set(json.loads((finished / "summary.json").read_text())["precision_paths"].values()) == {
        "float32 product"
    }


def test_what_did_not_run_is_not_written_down() -> None:
    made = precision()
    layer = made.linear(8, 4, "ffn.down", std=0.1)
    assert made.kernels_used.table() == {}
    layer(torch.randn(3, 8))
    assert made.kernels_used.table() == {"ffn.down": "emulated e4m3 1x128 / 128x128"}


def test_several_paths_are_reported_in_the_order_in_which_they_ran() -> None:
    paths = KernelLog()
    for way in ("kernel", "loop", "kernel"):
        paths.note("head", way)
    assert paths.table() == {"head": "kernel | loop"}


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"scaling": "tensor"}, "emulated e4m3 tensor / tensor"),
        (
            {"scaling": "delayed", "gradients": "e5m2"},
            "emulated e4m3 delayed tensor / tensor, e5m2 gradients",
        ),
        ({"scaling": "mxfp8"}, "emulated e4m3 1x32 / 1x32, ue8m0 scales"),
        ({"weight_gradient": "te"}, "emulated e4m3 1x128 / 128x128, input saved as it is"),
        ({"accumulator_bits": 14}, "emulated e4m3 1x128 / 128x128, 14-bit sums every 128"),
    ],
)
def test_the_path_reports_the_options(keys: dict[str, Any], path: str) -> None:
    assert precision(**keys).path("ffn.down") == path


def test_a_layer_for_no_role_is_a_mistake_of_its_plugin() -> None:
    """Recipes could not name it."""
    build = bench.build_context(bench.KitPrecision(torch.float32))
    for make in (
        lambda: build.linear(8, 4, "attention.out"),
        lambda: build.grouped_linear(2, 8, 4, "attention.out"),
    ):
        with pytest.raises(AssertionError, match=r"unknown role 'attention\.out'"):
            make()
