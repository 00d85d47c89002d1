"""`describe` and `catalog`: what they promise, and one JSON document."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import MOE, Lab

from core.assemble import build
from core.extension.loader import installed_registry

SIZES = ["params_total", "params_mtp", "params_active", "flops_per_token", "flops_per_token_main", "kv_bytes_per_token"]


@pytest.fixture(scope="module")
def small(lab: Lab) -> dict[str, Any]:
    """What `describe --json` says of the small recipe."""
    said = lab.door("describe", lab.file, "--json")
    assert said.code == 0, said.err
    return dict(json.loads(said.out))


def test_describe_has_every_promised_key(small: dict[str, Any]) -> None:
    promised = {*SIZES, "flops_convention", "memory_bytes", "layers", "plugins", "precision", "loss_coefficients"}
    assert promised <= small.keys()
    assert small["runnable_here"] is True
    assert (small["steps"], small["tokens"]) == (12, 12 * 2 * 4 * 16)


def test_sizes_are_those_of_the_model(lab: Lab, small: dict[str, Any]) -> None:
    model = build(lab.recipe())
    everything = sum(p.numel() for p in model.parameters())
    of_mtp = sum(p.numel() for p in model.heads["mtp"].parameters())
    assert small["params_total"] == everything - of_mtp + 8  # one layer's selection bias counts as the papers count it
    assert small["params_mtp"] == of_mtp + 8
    unused = 6 * (3 * 32 * 16)  # a token uses 2 of 8 experts of width 16
    norms_and_rest = small["params_active"] + unused + 300 * 32 + 8
    assert norms_and_rest == small["params_total"]
    assert small["kv_bytes_per_token"] == 2 * 2 * (16 + 4)  # bytes x layers x (latent + rotated key)


def test_flops_are_six_per_active_parameter_and_the_causal_half_of_attention(small: dict[str, Any]) -> None:
    scores_and_sums = 2 * 2 * (8 + 4 + 8) * 16 / 2  # 2 FLOPs x heads x (key + value width) x half of the sequence
    assert small["flops_per_token_main"] == 6 * small["params_active"] + 3 * 2 * scores_and_sums
    of_mtp = small["params_mtp"] - 8 - 6 * (3 * 32 * 16) + 300 * 32  # its own active weights, and the output once more
    assert small["flops_per_token"] == small["flops_per_token_main"] + 6 * of_mtp + 3 * scores_and_sums


def test_P13_every_loss_term_is_told_with_its_coefficient(small: dict[str, Any]) -> None:
    assert small["loss_coefficients"] == {
        "next_token": {"first": 1.0, "last": 1.0},
        "mtp": {"first": 0.3, "last": 0.3},
        **{f"{path} sequence": {"first": 0.01, "last": 0.01} for path in MOE},
    }


def test_the_precision_of_every_role_is_told(lab: Lab) -> None:
    said = lab.door("describe", lab.file, "precision.name=bf16", "--json")
    roles = json.loads(said.out)["precision"]
    assert roles["router"] == {"kept": "float32", "computed": "float32"}
    assert roles["experts.down"] == {"kept": "float32", "computed": "bfloat16"}
    assert {"embedding", "head", "mtp.projection"} <= roles.keys()


def test_plugins_come_with_their_owners(small: dict[str, Any]) -> None:
    named = {(row["slot"], row["name"]) for row in small["plugins"]}
    assert {("attention", "mla"), ("router", "deepseek_v3"), ("balancer", "bias"), ("loss_head", "mtp")} <= named
    assert all(row["distribution"] and row["version"] and row["module"] for row in small["plugins"])


def test_compare_is_one_document_for_all(lab: Lab, small: dict[str, Any]) -> None:
    said = lab.door("describe", lab.file, "--json", "--compare", lab.file, "dsv3_small")
    assert said.code == 0, said.err
    documents = json.loads(said.out)
    assert [document["params_total"] for document in documents[:2]] == [small["params_total"]] * 2
    assert documents[2]["recipe"].endswith("dsv3_small.yaml")


def test_the_tables_are_for_people(lab: Lab) -> None:
    for arguments in ([], ["--compare", "dsv3_small"]):
        said = lab.door("describe", lab.file, *arguments)
        assert said.code == 0, said.err
        assert "params_total" in said.out
        assert "6 x active parameters" in said.out
        assert said.err == ""


@pytest.mark.parametrize("door", ["describe", "fit"])
def test_a_dry_look_writes_nothing(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str) -> None:
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--dry-run", "--json", "--out", tmp_path / "run"] if door == "fit" else ["--json"]
    said = lab.door(door, lab.file, *arguments)
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps"] == 12
    assert list(tmp_path.iterdir()) == []


def test_what_an_override_drops_is_told_on_stderr(lab: Lab) -> None:
    gqa = "model.attention.name=mha"
    said = lab.door("fit", lab.file, gqa, "--dry-run", "--json")
    assert said.code == 0, said.err
    dropped = [line.split()[1].rstrip(":") for line in said.err.splitlines() if line.startswith("dropped ")]
    assert {"model.attention.q_rank", "model.attention.kv_rank"} <= set(dropped)
    assert json.loads(said.out)["dropped_keys"] == dropped


def test_the_catalog_lists_every_built_in_component(lab: Lab) -> None:
    said = lab.door("catalog", "--json")
    assert said.code == 0, said.err
    listed = json.loads(said.out)
    assert all(
        {"slot", "name", "distribution", "version", "module", "status", "schema"} <= row.keys() for row in listed
    )
    assert {(row["slot"], row["name"]) for row in listed} >= set(installed_registry().entries)
    assert [row for row in listed if row["distribution"] == "moeloom" and row["status"] != "ok"] == []
    bias = next(row for row in listed if (row["slot"], row["name"]) == ("balancer", "bias"))
    assert bias["schema"]["rate"]["default"] == 0.001
    assert bias["schema"]["rate"]["required"] is False
    router = next(row for row in listed if (row["slot"], row["name"]) == ("router", "deepseek_v3"))
    assert router["schema"]["top_k"] == {**router["schema"]["top_k"], "required": True, "default": None, "type": "int"}


def test_the_catalog_shows_one_component(lab: Lab) -> None:
    for command in (["show", "router", "deepseek_v3", "--json"], ["--json", "show", "router", "deepseek_v3"]):
        said = lab.door("catalog", *command)
        assert said.code == 0, said.err
        shown = json.loads(said.out)
        assert {"doc", "paper", "capabilities", "example", "contract", "contract_doc", "schema"} <= shown.keys()
        assert "selects_with_bias" in shown["capabilities"]
        assert shown["example"]["name"] == "deepseek_v3"
    said = lab.door("catalog", "show", "router", "deepseek_v3")
    assert "top_k: int  [required]" in said.out
    assert "deepseek_v3" in lab.door("catalog").out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "ruoter", "deepseek_v3"], "there is no slot 'ruoter'; did you mean router?"),
        (["show", "router", "deepseek_v4"], "did you mean deepseek_v3"),
    ],
)
def test_the_catalog_names_what_is_near(lab: Lab, arguments: list[str], sentence: str) -> None:
    said = lab.door("catalog", *arguments)
    assert said.code == 2
    assert sentence in said.sentence


def test_a_reader_that_closes_early_is_no_error(lab: Lab, tmp_path: Path) -> None:
    """`python -m core.catalog | head -1`"""
    import os

    from lab import forked, through

    def work() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        through("catalog", "--json")

    said = forked(work)
    assert said.code == 141
    assert said.err == ""
