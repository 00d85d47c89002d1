"""A checkpoint to a run and back, by the commands: every number at its place, every bit on the way back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab import Lab
from tiers import first_by_default

import core
from core.contracts.errors import UserError
from core.run.loading import load_weights

from .checkpoints import FP8, V2, V3, in_blocks, out_of_blocks, read, same_bits, tensors_of, write

YARN = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
SOURCES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "v3": (V3, {}, 1),
    "v3 in three files": (V3, {}, 3),
    "v3 bf16": ({**V3, "torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}, 2),
    "v3 fp64": ({**V3, "torch_dtype": "float64"}, {"dtype": torch.float64}, 1),
    "v3 packed": (V3, {"packed": True}, 1),
    "v3 in halves": (
        {**V3, "rope_interleave": False, "num_nextn_predict_layers": 1},
        {"depths": 1},
        1,
    ),
    "v3 two depths": ({**V3, "num_nextn_predict_layers": 2}, {"depths": 2}, 2),
    "v3 tied": (
        {**V3, "tie_word_embeddings": True, "num_nextn_predict_layers": 1},
        {"depths": 1},
        1,
    ),
    "v3 yarn": ({**V3, "rope_scaling": YARN}, {}, 1),
    "v3 all dense": ({**V3, "first_k_dense_replace": 5}, {}, 1),
    "v3 straight queries": (
        {**V3, "q_lora_rank": None, "n_group": 1, "first_k_dense_replace": 0},
        {},
        1,
    ),
    "v2": (V2, {}, 1),
    "v2 greedy": ({**V2, "topk_method": "greedy", "q_lora_rank": None}, {"packed": True}, 1),
}


def convert(lab: Lab, *arguments: str | Path) -> str:
    result = lab.command("convert", *arguments)
    assert result.code == 0, result.err
    return result.err


@pytest.mark.parametrize("name", first_by_default(SOURCES, keep=2))
def test_what_goes_in_comes_out(lab: Lab, tmp_path: Path, name: str) -> None:
    """Names, formats, bits, files and the meaning of config.json."""
    config, layout, files = SOURCES[name]
    source = write(tmp_path / "source", config, tensors_of(config, **layout), files)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(lab, "from-hf", source, tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "back")
    same_bits(read(tmp_path / "back"), read(source))
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    assert {f.name for f in (tmp_path / "back").iterdir()} == {f.name for f in source.iterdir()}


def test_every_number_stands_where_the_model_reads_it(lab: Lab, tmp_path: Path) -> None:
    """Maps tensors by name, and by row where ours are stacked: the slow form of the README's table."""
    config = {**V3, "num_nextn_predict_layers": 1}
    theirs = tensors_of(config, depths=1)
    convert(lab, "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run")
    ours = core.load(tmp_path / "run").state_dict()
    used: set[str] = set()

    def check(name: str, *parts: str) -> None:
        used.add(name)
        assert torch.equal(ours[name], torch.cat([theirs[part] for part in parts])), name

    def check_swiglu(name: str, prefix: str) -> None:
        check(f"{name}.gate_up.weight", f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        check(f"{name}.down.weight", f"{prefix}.down_proj.weight")

    check("embedding.weight", "model.embed_tokens.weight")
    check("norm.weight", "model.norm.weight")
    check("output.weight", "lm_head.weight")
    mtp, last = "heads.mtp.depths.0", "model.layers.3"
    check(f"{mtp}.embedding_norm.weight", f"{last}.enorm.weight")
    check(f"{mtp}.hidden_norm.weight", f"{last}.hnorm.weight")
    check(f"{mtp}.projection.weight", f"{last}.eh_proj.weight")
    check(f"{mtp}.norm.weight", f"{last}.shared_head.norm.weight")
    for layer, block in enumerate(["blocks.0", "blocks.1", "blocks.2", f"{mtp}.block"]):
        prefix = f"model.layers.{layer}"
        check(f"{block}.attention_norm.weight", f"{prefix}.input_layernorm.weight")
        check(f"{block}.ffn_norm.weight", f"{prefix}.post_attention_layernorm.weight")
        for mine, yours in (
            ("q_down", "q_a_proj"),
            ("q_norm", "q_a_layernorm"),
            ("q_up", "q_b_proj"),
            ("kv_down", "kv_a_proj_with_mqa"),
            ("kv_norm", "kv_a_layernorm"),
            ("kv_up", "kv_b_proj"),
            ("output", "o_proj"),
        ):
            check(f"{block}.attention.{mine}.weight", f"{prefix}.self_attn.{yours}.weight")
        if layer == 0:
            check_swiglu(f"{block}.ffn", f"{prefix}.mlp")
            continue
        check(f"{block}.ffn.router.centroids.weight", f"{prefix}.mlp.gate.weight")
        check(f"{block}.ffn.balance.0.bias", f"{prefix}.mlp.gate.e_score_correction_bias")
        check_swiglu(f"{block}.ffn.shared", f"{prefix}.mlp.shared_experts")
        used |= {f"{block}.ffn.routed.{name}.weight" for name in ("gate_up", "down")}
        for expert in range(4):
            each = f"{prefix}.mlp.experts.{expert}"
            both = torch.cat([theirs[f"{each}.gate_proj.weight"], theirs[f"{each}.up_proj.weight"]])
            assert torch.equal(ours[f"{block}.ffn.routed.gate_up.weight"][expert], both)
            assert torch.equal(
                ours[f"{block}.ffn.routed.down.weight"][expert], theirs[f"{each}.down_proj.weight"]
            )
    assert used == set(ours)


def test_halves_become_pairs_in_the_last_rows_of_every_head(lab: Lab, tmp_path: Path) -> None:
    config = {**V3, "rope_interleave": False}
    theirs = tensors_of(config)
    convert(lab, "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run")
    ours = core.load(tmp_path / "run").state_dict()
    down, up = ours["blocks.0.attention.kv_down.weight"], ours["blocks.0.attention.q_up.weight"]
    their_down = theirs["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    their_up = theirs["model.layers.0.self_attn.q_b_proj.weight"]
    assert torch.equal(down[:16], their_down[:16])
    assert torch.equal(down[16:], their_down[16:][[0, 3, 1, 4, 2, 5]])
    for head in range(2):
        mine, yours = up[16 * head : 16 * head + 16], their_up[16 * head : 16 * head + 16]
        assert torch.equal(mine[:10], yours[:10])
        assert torch.equal(mine[10:], yours[10:][[0, 3, 1, 4, 2, 5]])


def test_a_bias_in_a_narrow_format_is_held_in_fp32(lab: Lab, tmp_path: Path) -> None:
    """The bias is restored in its own format; in new files it is fp32 whatever the weights are."""
    theirs = tensors_of(V3, dtype=torch.bfloat16)
    theirs = {name: tensor.to(torch.bfloat16) for name, tensor in theirs.items()}
    convert(lab, "from-hf", write(tmp_path / "source", V3, theirs), tmp_path / "run")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert read(tmp_path / "run/weights")["blocks.1.ffn.balance.0.bias"].dtype == torch.float32
    assert (
        core.load(tmp_path / "run").state_dict()["blocks.1.ffn.balance.0.bias"].dtype
        == torch.float32
    )
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "back")
    assert read(tmp_path / "back")[name].dtype == torch.bfloat16
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "half", "--dtype", "fp16")
    half = read(tmp_path / "half")
    assert {t.dtype for n, t in half.items() if n != name and not n.endswith("_bias")} == {
        torch.float16
    }
    assert half[name].dtype == torch.float32


def test_the_recipe_of_a_converted_run_says_what_it_is(lab: Lab, tmp_path: Path) -> None:
    convert(
        lab,
        "from-hf",
        write(tmp_path / "source", V2, tensors_of(V2, dtype=torch.bfloat16)),
        tmp_path / "run",
    )
    result = lab.command("describe", tmp_path / "run/recipe.yaml", "--json")
    described = json.loads(result.out)
    assert described["params_total"] == sum(t.numel() for t in read(tmp_path / "source").values())
    assert described["kv_bytes_per_token"] == 2 * 3 * (16 + 6)
    written = json.loads((tmp_path / "run/provenance.json").read_text())["converted"]
    assert (written["begin"], written["end"], written["format"]) == (3, 5, "deepseek_v2")
    assert core.compose(tmp_path / "run/recipe.yaml").to_dict()["precision"] == {"name": "bf16"}


def test_what_transformers_says_of_a_head_that_is_not_there_is_said_in_one_line(
    lab: Lab, tmp_path: Path
) -> None:
    config = {**V3, "num_nextn_predict_layers": 1}
    stderr = convert(
        lab, "from-hf", write(tmp_path / "source", config, tensors_of(config)), tmp_path / "run"
    )
    assert len([line for line in stderr.splitlines() if "no multi-token head is made" in line]) == 1
    assert list(core.compose(tmp_path / "run/recipe.yaml").model.heads) == ["next_token"]


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_differs_is_refused(lab: Lab, tmp_path: Path, copy: str) -> None:
    config = {**V3, "num_nextn_predict_layers": 1}
    theirs = tensors_of(config, depths=1)
    theirs[f"model.layers.3.{copy}.weight"][299, 23] += 1e-3
    result = lab.command(
        "convert", "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run"
    )
    assert result.code == 2
    assert f"tensor model.layers.3.{copy}.weight must be a copy of" in result.sentence
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_copies_may_be_left_out_and_stay_left_out(lab: Lab, tmp_path: Path) -> None:
    config = {**V3, "num_nextn_predict_layers": 1}
    theirs = tensors_of(config, depths=1)
    del (
        theirs["model.layers.3.embed_tokens.weight"],
        theirs["model.layers.3.shared_head.head.weight"],
    )
    convert(lab, "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "back")
    same_bits(read(tmp_path / "back"), theirs)


def test_tables_of_frequencies_are_passed_over(lab: Lab, tmp_path: Path) -> None:
    theirs = tensors_of(V3)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    convert(lab, "from-hf", write(tmp_path / "source", V3, theirs | table), tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "back")
    same_bits(read(tmp_path / "back"), theirs)


WIDE = {
    **V3,
    "hidden_size": 160,
    "intermediate_size": 300,
    "moe_intermediate_size": 140,
    "kv_lora_rank": 130,
}


@pytest.mark.parametrize("interleaved", first_by_default([True, False]))
def test_fp8_blocks_are_read_kept_and_left(lab: Lab, tmp_path: Path, interleaved: bool) -> None:
    """Ragged blocks, stacked matrices of 140 rows, and rows in another order than the blocks'."""
    config = {
        **WIDE,
        "rope_interleave": interleaved,
        "torch_dtype": "bfloat16",
        "quantization_config": FP8,
    }
    theirs = in_blocks(tensors_of(config, dtype=torch.bfloat16))
    convert(lab, "from-hf", write(tmp_path / "source", config, theirs, 2), tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "kept", "--keep-fp8")
    same_bits(read(tmp_path / "kept"), theirs)
    assert json.loads((tmp_path / "kept/config.json").read_text()) == config
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "plain")
    same_bits(read(tmp_path / "plain"), out_of_blocks(theirs, torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    model = core.build(core.compose(tmp_path / "run/recipe.yaml", ["precision.name=fp32"]))
    load_weights(model, tmp_path / "run/weights/model.safetensors.index.json")
    wide = out_of_blocks(theirs, torch.float32)
    gate, up = (wide[f"model.layers.1.mlp.experts.3.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(
        model.state_dict()["blocks.1.ffn.routed.gate_up.weight"][3], torch.cat([gate, up])
    )


def test_fp8_blocks_beside_fp32_are_computed_and_written_in_fp32(lab: Lab, tmp_path: Path) -> None:
    config = {**WIDE, "quantization_config": FP8}
    theirs = in_blocks(tensors_of(config))
    convert(lab, "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run")
    assert core.compose(tmp_path / "run/recipe.yaml").precision.name == "fp32"
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "plain")
    same_bits(read(tmp_path / "plain"), out_of_blocks(theirs, torch.float32))


def test_fp8_blocks_are_made_on_request(lab: Lab, tmp_path: Path) -> None:
    """The codes and scales of a loop over blocks; routers, norms, embeddings and projections between modules stay."""
    config = {**WIDE, "num_nextn_predict_layers": 1}
    theirs = tensors_of(config, depths=1)
    theirs["model.layers.0.mlp.up_proj.weight"][128:, :128] = 0
    convert(lab, "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "fp8", "--fp8")
    found, expected = read(tmp_path / "fp8"), in_blocks(theirs)
    zero = "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert (
        float(found[zero][1:, 0].min()) > 0
    )  # a scale of 0 would make 0/0 of whoever divides by it
    found[zero][1:, 0] = expected[zero][1:, 0] = 1
    same_codes = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[same_codes][128:, :128].float(), torch.zeros(172, 128))
    found[same_codes] = expected[same_codes]
    same_bits(found, expected)
    assert json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"] == FP8


def test_fp8_that_is_not_there_cannot_be_kept(lab: Lab, tmp_path: Path) -> None:
    convert(lab, "from-hf", write(tmp_path / "source", V3, tensors_of(V3)), tmp_path / "run")
    result = lab.command("convert", "to-hf", tmp_path / "run", tmp_path / "back", "--keep-fp8")
    assert (result.code, (tmp_path / "back").exists()) == (2, False)
    assert "--keep-fp8" in result.sentence


def spoil_length(folder: Path) -> None:
    with (folder / "weights/model.safetensors").open("r+b") as file:
        file.truncate((folder / "weights/model.safetensors").stat().st_size - 1)


def spoil_recipe(key: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["model"][key] = value
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_length, "model.safetensors: is truncated: 1 bytes"),
        (spoil_recipe("tied_embedding", True), "tensor output.weight is not of this model"),
        (
            spoil_recipe("dim", 32),
            r"tensor embedding.weight is \(300, 24\), the model's \(300, 32\)",
        ),
    ],
)
def test_a_converted_run_that_was_spoilt_is_reported_by_tensor(
    lab: Lab, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    convert(lab, "from-hf", write(tmp_path / "source", V3, tensors_of(V3)), tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        core.load(tmp_path / "run")


def test_a_tensor_that_looks_like_a_scale_is_unexpected(lab: Lab, tmp_path: Path) -> None:
    theirs = tensors_of(V3) | {"lm_head.weight_scale": torch.ones(300)}
    result = lab.command(
        "convert", "from-hf", write(tmp_path / "source", V3, theirs), tmp_path / "run"
    )
    assert result.code == 2
    assert "tensor lm_head.weight_scale is unexpected" in result.sentence


def test_tensors_that_go_in_many_chunks_arrive_whole(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows by the dozen, blocks of 128 rows one by one; everything as with one chunk each."""
    config = {**WIDE, "num_nextn_predict_layers": 1}
    source = write(tmp_path / "source", config, tensors_of(config, depths=1))
    convert(lab, "from-hf", source, tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "fp8", "--fp8")
    monkeypatch.setattr("core.interop.tensors.CHUNK", 10_000)
    convert(lab, "from-hf", source, tmp_path / "run again")
    same_bits(read(tmp_path / "run again/weights"), read(tmp_path / "run/weights"))
    convert(lab, "to-hf", tmp_path / "run again", tmp_path / "back")
    same_bits(read(tmp_path / "back"), read(source))
    convert(lab, "to-hf", tmp_path / "run again", tmp_path / "fp8 again", "--fp8")
    same_bits(read(tmp_path / "fp8 again"), read(tmp_path / "fp8"))
    convert(lab, "from-hf", tmp_path / "fp8", tmp_path / "coded")
    one, two = (
        core.load(tmp_path / "coded").state_dict(),
        out_of_blocks(read(tmp_path / "fp8"), torch.float32),
    )
    assert torch.equal(
        one["blocks.0.attention.output.weight"], two["model.layers.0.self_attn.o_proj.weight"]
    )
    assert torch.equal(
        one["blocks.2.ffn.shared.down.weight"],
        two["model.layers.2.mlp.shared_experts.down_proj.weight"],
    )
    changed = tensors_of(config, depths=1)
    changed["model.layers.3.embed_tokens.weight"][297] += 1
    result = lab.command(
        "convert", "from-hf", write(tmp_path / "other", config, changed), tmp_path / "never"
    )
    assert result.code == 2


def test_a_converted_run_that_is_written_anew_keeps_its_markers_formats_and_files(
    lab: Lab, tmp_path: Path
) -> None:
    """The modules of multi-token prediction are left out, so only the layout of the files is ours."""
    config = {**V3, "num_nextn_predict_layers": 1, "rope_interleave": False}
    source = write(tmp_path / "source", config, tensors_of(config, depths=1, dtype=torch.bfloat16))
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    convert(lab, "from-hf", source, tmp_path / "run")
    stderr = convert(lab, "to-hf", tmp_path / "run", tmp_path / "main", "--main-only")
    assert "bf16" not in stderr
    written = json.loads((tmp_path / "main/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["torch_dtype"]) == (
        3,
        [5, 7],
        "bfloat16",
    )
    assert (written["rope_interleave"], written["num_nextn_predict_layers"]) == (True, 0)
    assert (tmp_path / "main/tokenizer_config.json").read_text() == '{"bos_token": "<s>"}'
    found, before = read(tmp_path / "main"), read(source)
    assert set(found) == {name for name in before if not name.startswith("model.layers.3.")}
    assert {t.dtype for n, t in found.items() if not n.endswith("_bias")} == {torch.bfloat16}
    convert(lab, "from-hf", tmp_path / "main", tmp_path / "again")
    one, two = core.load(tmp_path / "run").state_dict(), core.load(tmp_path / "again").state_dict()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_the_recipe_of_a_converted_run_starts_from_its_weights_and_asks_for_a_corpus(
    lab: Lab, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    run = tmp_path / "run"
    convert(lab, "from-hf", source, run)
    out = tmp_path / "new"
    done = lab.command("fit", run / "recipe.yaml", "--out", out)
    how = "give the text to train on, such as data.corpus='{name: files, paths: [texts]}'"
    assert done.code == 2
    assert done.sentence == f"{run}/recipe.yaml: data.corpus = null: {how}"
    assert not out.exists()
    moved = tmp_path / "moved"
    run.rename(moved)
    recipe = core.compose(moved / "recipe.yaml")
    assert recipe.selection is not None
    assert (recipe.selection.path, recipe.data.corpus) == (str(moved), None)
    corpus = f"data.corpus={{name: files, paths: ['{lab.texts}/*.txt']}}"
    settings = (corpus, "budget.steps=1", "optimizer.lr=0", "data.sequence_length=16")
    done = lab.command("fit", moved / "recipe.yaml", *settings, "--out", out)
    assert done.code == 0, done.err
    before, after = core.load(moved).state_dict(), core.load(out).state_dict()
    for name, tensor in before.items():
        assert name.endswith(".bias") or torch.equal(after[name], tensor), name
    done = lab.command("fit", moved / "recipe.yaml", corpus, "--from", moved)
    assert "start a run from its weights with initial_weights" in done.sentence
