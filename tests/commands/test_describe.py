"""`describe` and `catalog`: what they promise, and one JSON document."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import MOE, Lab

from core.assemble import build
from core.extension.loader import installed_registry
from core.recipe.shipped import shipped_recipes

SIZES = ["params_total", "params_experts", "params_mtp", "params_active", "kv_bytes_per_token"]
FLOPS = ["flops_per_token", "flops_per_token_main", "flops_per_token_full", "flops_convention"]
ROUTING = ["top_k", "capacity_factor", "drops", "causal", "batch_dependent", "notices"]
ROUTER, NO_LOSS = "model.blocks.moe.ffn.router", "model.blocks.moe.ffn.balance=[]"
CHOICE = (f"{ROUTER}={{name: expert_choice, top_k: 2, group: batch}}", NO_LOSS)
"""Experts that choose tokens: neither causal nor apart from the other sequences."""


@pytest.fixture(scope="module")
def small(lab: Lab) -> dict[str, Any]:
    """What `describe --json` says of the small recipe."""
    result = lab.command("describe", lab.file, "--json")
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def test_describe_has_every_promised_key(small: dict[str, Any]) -> None:
    promised = {
        *SIZES,
        *FLOPS,
        *ROUTING,
        "memory_bytes",
        "layers",
        "plugins",
        "precision",
        "loss_coefficients",
    }
    assert promised <= small.keys()
    assert small["runnable_here"] is True
    assert (small["steps"], small["tokens"]) == (12, 12 * 2 * 4 * 16)


def test_sizes_are_those_of_the_model(lab: Lab, small: dict[str, Any]) -> None:
    model = build(lab.recipe())
    everything = sum(p.numel() for p in model.parameters())
    of_mtp = sum(p.numel() for p in model.heads["mtp"].parameters())
    assert (
        small["params_total"] == everything - of_mtp + 8
    )  # one layer's selection bias counts as the papers count it
    assert small["params_mtp"] == of_mtp + 8
    unused = 6 * (3 * 32 * 16)  # a token uses 2 of 8 experts of width 16
    norms_and_rest = small["params_active"] + unused + 300 * 32 + 8
    assert norms_and_rest == small["params_total"]
    assert (
        small["params_experts"] == (8 + 1) * 3 * 32 * 16
    )  # without those of the multi-token module
    assert small["kv_bytes_per_token"] == 2 * 2 * (
        16 + 4
    )  # bytes x layers x (latent + rotated key)


def test_flops_are_six_per_active_parameter_and_the_causal_half_of_attention(
    small: dict[str, Any],
) -> None:
    scores_and_sums = (
        2 * 2 * (8 + 4 + 8) * 16 / 2
    )  # 2 FLOPs x heads x (key + value width) x half of the sequence
    assert small["flops_per_token_main"] == 6 * small["params_active"] + 3 * 2 * scores_and_sums
    of_mtp = (
        small["params_mtp"] - 8 - 6 * (3 * 32 * 16) + 300 * 32
    )  # its own active weights, and the output once more
    assert (
        small["flops_per_token"] == small["flops_per_token_main"] + 6 * of_mtp + 3 * scores_and_sums
    )
    assert (
        small["flops_per_token_full"] == small["flops_per_token"] + 3 * 3 * scores_and_sums
    )  # three blocks in all


def test_a_table_of_integers_is_no_parameter(lab: Lab, small: dict[str, Any]) -> None:
    result = lab.command("describe", lab.file, f"{ROUTER}={{name: hash}}", NO_LOSS, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    centroids, biases = 8 * 32, 8
    for key in ("params_total", "params_mtp"):  # a layer with experts in each
        assert small[key] - document[key] == centroids + biases
    assert document["params_experts"] == small["params_experts"]


def test_what_the_routing_promises_is_reported(lab: Lab, small: dict[str, Any]) -> None:
    assert [small[key] for key in ROUTING] == [2, None, False, True, False, []]
    switch = (f"{ROUTER}={{name: switch, capacity_factor: 1.5, group: batch}}", NO_LOSS)
    documents = [
        json.loads(lab.command("describe", lab.file, *o, "--json").out) for o in (switch, CHOICE)
    ]
    *promised, notices = [documents[0][key] for key in ROUTING]
    assert promised == [1, 1.5, True, True, True]
    assert "drops assignments beyond an expert's capacity" in notices[0]
    *_, causal, batch_dependent, notices = [documents[1][key] for key in ROUTING]
    assert (causal, batch_dependent, len(notices)) == (False, True, 1)


def test_a_notice_is_printed(lab: Lab) -> None:
    alone = lab.command("describe", lab.file, *CHOICE).out
    (notice,) = json.loads(lab.command("describe", lab.file, *CHOICE, "--json").out)["notices"]
    assert f"note: {notice}" in alone
    beside = lab.command("describe", lab.file, *CHOICE, "--compare", "dsv3_1b").out
    assert f"note on small, dsv3_1b: {notice}" in " ".join(beside.split())


def test_P13_every_loss_term_is_reported_with_its_coefficient(small: dict[str, Any]) -> None:
    assert small["loss_coefficients"] == {
        "next_token": {"first": 1.0, "last": 1.0},
        "mtp": {"first": 0.3, "last": 0.3},
        **{f"{path} sequence": {"first": 0.01, "last": 0.01} for path in MOE},
    }


def test_the_precision_of_every_role_is_reported(lab: Lab) -> None:
    result = lab.command("describe", lab.file, "precision.name=bf16", "--json")
    roles = json.loads(result.out)["precision"]
    assert roles["router"] == {"kept": "float32", "computed": "float32", "path": "float32 product"}
    assert roles["experts.down"] == {
        "kept": "float32",
        "computed": "bfloat16",
        "path": "bfloat16 product",
    }
    assert {"embedding", "head", "mtp.projection"} <= roles.keys()


def test_plugins_come_with_their_owners(small: dict[str, Any]) -> None:
    named = {(row["slot"], row["name"]) for row in small["plugins"]}
    assert {
        ("attention", "mla"),
        ("router", "deepseek_v3"),
        ("balancer", "bias"),
        ("loss_head", "mtp"),
    } <= named
    assert all(row["distribution"] and row["version"] and row["module"] for row in small["plugins"])


def test_compare_is_one_document_for_all(lab: Lab, small: dict[str, Any]) -> None:
    result = lab.command("describe", lab.file, "--json", "--compare", lab.file, "dsv3_small")
    assert result.code == 0, result.err
    documents = json.loads(result.out)
    assert [document["params_total"] for document in documents[:2]] == [small["params_total"]] * 2
    assert documents[2]["recipe"].endswith("dsv3_small.yaml")


def test_recipes_to_compare_and_their_overrides_come_in_any_order(lab: Lab, tmp_path: Path) -> None:
    odd = tmp_path / "lr=1.yaml"  # a recipe whose name looks like an override
    odd.write_text(lab.file.read_text(encoding="utf-8"), encoding="utf-8")
    dim = "model.dim=64"
    forms: list[tuple[str | Path, ...]] = [
        (lab.file, dim, "--compare", odd),
        (lab.file, "--compare", odd, dim),
        ("--compare", lab.file, odd, dim),
        (dim, "--compare", lab.file, odd),
        ("--compare", lab.file, dim, odd),
    ]
    results = [lab.command("describe", "--json", *form) for form in forms]
    assert [result.code for result in results] == [0] * len(forms), [
        result.err for result in results
    ]
    documents = json.loads(results[0].out)
    assert [document["recipe"] for document in documents] == [str(lab.file), str(odd)]
    assert {document["params_total"] for document in documents} == {documents[0]["params_total"]}
    assert documents[0]["layers"][0]["parameters"] == 300 * 64
    assert all(json.loads(result.out) == documents for result in results)


def test_one_recipe_to_compare_is_a_list_of_one(lab: Lab) -> None:
    (document,) = json.loads(lab.command("describe", "--compare", lab.file, "--json").out)
    assert document["recipe"] == str(lab.file)


@pytest.mark.parametrize("arguments", [(), ("--json",), ("--compare", "model.dim=64")])
def test_a_recipe_must_be_named(lab: Lab, arguments: tuple[str, ...]) -> None:
    result = lab.command("describe", *arguments)
    assert result.code == 2
    assert result.sentence.startswith("RECIPE is missing")


def test_compare_sets_every_recipe_in_a_row_of_100_columns(lab: Lab) -> None:
    names = [name for name in shipped_recipes() if name.startswith("baselines/")]
    result = lab.command("describe", "--compare", "dsv3_small", *names)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split()[1:] for line in lines[3 : 3 + 1 + len(names)]}
    assert list(rows) == ["dsv3_small", *(name.removeprefix("baselines/") for name in names)]
    assert " ".join(rows["dsv3_small"]) == "5.105M 2.820M 2.328M 22.89M 512 4 none no yes no"
    assert (
        " ".join(rows["gshard"]) == "5.086M 2.806M -0.5 2.295M -1.4 22.63M -1.1 512 2 1 yes no no"
    )
    assert rows["dense"][1:3] == ["0", "-"]


def test_compare_says_what_is_not_held_equal(lab: Lab, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    model = "model: {dim: 64, attention: {name: mha, heads: 4}}"
    changed = [model, "data: {sequence_length: 8}", "budget: {steps: 24}", "optimizer: {lr: 0.001}"]
    other.write_text("\n".join([f"extends: {lab.file}", *changed]), encoding="utf-8")
    result = lab.command("describe", "--compare", lab.file, other)
    assert result.code == 0, result.err
    differences = [
        line.removeprefix("not equal: ")
        for line in result.out.splitlines()
        if line.startswith("not equal: ")
    ]
    assert differences == [
        "width: 32; 64 in other",
        "attention: mla; mha in other",
        "sequence length: 16; 8 in other",
        "steps: 12; 24 in other",
        "optimizer and its schedule: another in other",
    ]
    assert "not equal" not in lab.command("describe", "--compare", lab.file, lab.file).out


def test_the_tables_are_for_people(lab: Lab) -> None:
    for arguments in ([], ["--compare", "dsv3_small"]):
        result = lab.command("describe", lab.file, *arguments)
        assert result.code == 0, result.err
        assert "params_total" in result.out
        assert "6 x active parameters" in result.out
        assert result.err == ""


@pytest.mark.parametrize("command", ["describe", "fit"])
def test_a_dry_look_writes_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    arguments = (
        ["--dry-run", "--json", "--out", tmp_path / "run"] if command == "fit" else ["--json"]
    )
    result = lab.command(command, lab.file, *arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out)["steps"] == 12
    assert list(tmp_path.iterdir()) == []


def test_what_an_override_drops_is_reported_on_stderr(lab: Lab) -> None:
    gqa = "model.attention.name=mha"
    result = lab.command("fit", lab.file, gqa, "--dry-run", "--json")
    assert result.code == 0, result.err
    dropped = [
        line.split()[1].rstrip(":")
        for line in result.err.splitlines()
        if line.startswith("dropped ")
    ]
    assert {"model.attention.q_rank", "model.attention.kv_rank"} <= set(dropped)
    assert json.loads(result.out)["dropped_keys"] == dropped


def test_the_catalog_lists_every_built_in_component(lab: Lab) -> None:
    result = lab.command("catalog", "--json")
    assert result.code == 0, result.err
    listed = json.loads(result.out)
    assert all(
        {"slot", "name", "distribution", "version", "module", "status", "schema"} <= row.keys()
        for row in listed
    )
    assert {(row["slot"], row["name"]) for row in listed} >= set(installed_registry().entries)
    assert [
        row for row in listed if row["distribution"] == "moeloom" and row["status"] != "ok"
    ] == []
    bias = next(row for row in listed if (row["slot"], row["name"]) == ("balancer", "bias"))
    assert bias["schema"]["rate"]["default"] == 0.001
    assert bias["schema"]["rate"]["required"] is False
    router = next(row for row in listed if (row["slot"], row["name"]) == ("router", "deepseek_v3"))
    assert router["schema"]["top_k"] == {
        **router["schema"]["top_k"],
        "required": True,
        "default": None,
        "type": "int",
    }


def test_the_catalog_shows_one_component(lab: Lab) -> None:
    for command in (
        ["show", "router", "deepseek_v3", "--json"],
        ["--json", "show", "router", "deepseek_v3"],
    ):
        result = lab.command("catalog", *command)
        assert result.code == 0, result.err
        shown = json.loads(result.out)
        assert {
            "doc",
            "paper",
            "capabilities",
            "example",
            "contract",
            "contract_doc",
            "schema",
        } <= shown.keys()
        assert "selects_with_bias" in shown["capabilities"]
        assert shown["example"]["name"] == "deepseek_v3"
    result = lab.command("catalog", "show", "router", "deepseek_v3")
    assert "top_k: int  [required]" in result.out
    assert "deepseek_v3" in lab.command("catalog").out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "ruoter", "deepseek_v3"], "there is no slot 'ruoter'; did you mean router?"),
        (["show", "router", "deepseek_v4"], "did you mean deepseek_v3"),
    ],
)
def test_the_catalog_names_what_is_near(lab: Lab, arguments: list[str], sentence: str) -> None:
    result = lab.command("catalog", *arguments)
    assert result.code == 2
    assert sentence in result.sentence


def test_a_reader_that_closes_early_is_no_error(lab: Lab, tmp_path: Path) -> None:
    """`python -m core.catalog | head -1`"""
    import os

    from lab import forked, run_command_here

    def work() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        run_command_here("catalog", "--json")

    result = forked(work)
    assert result.code == 141
    assert result.err == ""
