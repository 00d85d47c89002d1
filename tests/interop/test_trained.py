"""A run that was trained here, as a Hugging Face folder and back."""

import json
from pathlib import Path

import pytest
import torch
from lab import Lab

import core
from core.checkpoints.listing import checkpoints_in

from .checkpoints import read

PAIR = "model.blocks.moe.ffn.router.group_score=2"


@pytest.fixture(scope="module")
def run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, with a bias that has moved."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    lab.fit(folder, PAIR, "budget.steps=4", "checkpoint.every_steps=2")
    return folder


def convert(lab: Lab, *arguments: str | Path) -> str:
    result = lab.command("convert", *arguments)
    assert result.code == 0, result.err
    return result.err


def test_fp32_keeps_every_bit_there_and_back(lab: Lab, run: Path, tmp_path: Path) -> None:
    convert(lab, "to-hf", run, tmp_path / "out", "--dtype", "fp32")
    convert(lab, "from-hf", tmp_path / "out", tmp_path / "again")
    before, after = core.load(run).state_dict(), core.load(tmp_path / "again").state_dict()
    assert list(before) == list(after)
    assert float(before["blocks.1.ffn.balance.0.bias"].abs().max()) > 0
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(core.load(run).logits(tokens), core.load(tmp_path / "again").logits(tokens))


def test_bf16_is_the_default_and_is_said(lab: Lab, run: Path, tmp_path: Path) -> None:
    result = convert(lab, "to-hf", run, tmp_path / "out")
    assert "written in bf16" in result
    assert "--dtype fp32" in result
    state, found = core.load(run).state_dict(), read(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith("_bias") else torch.bfloat16), name
    assert torch.equal(found["lm_head.weight"], state["output.weight"].bfloat16())


def test_one_checkpoint_file_is_written_as_well_as_a_run(
    lab: Lab, run: Path, tmp_path: Path
) -> None:
    first = checkpoints_in(run)[0]
    convert(lab, "to-hf", first, tmp_path / "out", "--dtype", "fp32")
    found = read(tmp_path / "out")["model.norm.weight"]
    assert torch.equal(found, core.load(first).state_dict()["norm.weight"])
    assert not torch.equal(found, core.load(run).state_dict()["norm.weight"])


def test_modules_have_copies_as_released_and_the_index_names_every_tensor(
    lab: Lab, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.interop.writing.planned.__defaults__", (40_000,))
    convert(lab, "to-hf", run, tmp_path / "out", "--dtype", "fp32")
    found, files = read(tmp_path / "out"), sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in found.values()
    )
    assert torch.equal(
        found["model.layers.2.embed_tokens.weight"], found["model.embed_tokens.weight"]
    )
    assert torch.equal(found["model.layers.2.shared_head.head.weight"], found["lm_head.weight"])


def test_markers_and_tokenizer_go_along(lab: Lab, run: Path, tmp_path: Path) -> None:
    convert(lab, "to-hf", run, tmp_path / "out")
    configs = {
        name: json.loads((tmp_path / f"out/{name}.json").read_text())
        for name in ("config", "generation_config")
    }
    assert (configs["config"]["bos_token_id"], configs["config"]["eos_token_id"]) == (0, 0)
    assert [configs["generation_config"][f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [
        0,
        0,
        0,
    ]
    tokens = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert [tokens[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["<|endoftext|>"] * 3
    theirs, ours = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "out", run)
    )
    assert theirs.pop("post_processor")["single"][0] == {
        "SpecialToken": {"id": "<|endoftext|>", "type_id": 0}
    }
    assert ours.pop("post_processor") is None
    assert theirs == ours


def test_a_converted_run_writes_text_and_starts_another(
    lab: Lab, run: Path, tmp_path: Path
) -> None:
    """Its recipe is one that `fit` takes, and its weights are where that run begins."""
    convert(lab, "to-hf", run, tmp_path / "out", "--dtype", "fp32")
    convert(lab, "from-hf", tmp_path / "out", tmp_path / "again")
    texts = [
        lab.command("generate", r, "--prompt", "ab", "--tokens", "8")
        for r in (run, tmp_path / "again")
    ]
    assert texts[0].code == texts[1].code == 0, texts[1].err
    assert texts[0].out == texts[1].out
    start = f"initial_weights={tmp_path / 'again'}"
    corpus = [
        f"data.corpus={{name: files, paths: ['{lab.texts}/*.txt']}}",
        "budget.steps=1",
        "optimizer.lr=0.0",
    ]
    overrides = [
        *corpus,
        "data.sequence_length=16",
        "optimizer.weight_decay=0.0",
        "trainer.enable_progress_bar=false",
    ]
    result = lab.command(
        "fit", tmp_path / "again/recipe.yaml", start, *overrides, "--out", tmp_path / "tuned"
    )
    assert result.code == 0, result.err
    assert "another tokenizer" not in result.err
    before, after = core.load(run).state_dict(), core.load(tmp_path / "tuned").state_dict()
    for name, tensor in before.items():
        assert name.endswith(".bias") or torch.equal(after[name], tensor), name
    fewer = f"data.corpus={{name: files, paths: ['{lab.texts}/doc-[12]*.txt']}}"
    anew = (fewer, "data.tokenizer.file=null")
    result = lab.command(
        "fit", tmp_path / "again/recipe.yaml", start, *overrides, *anew, "--out", tmp_path / "other"
    )
    assert result.code == 0, result.err
    assert "is another tokenizer than this run's" in result.err
    assert "its tokenizer files and chat template are not kept" in result.err


def test_the_main_model_goes_alone_where_it_is_asked_for(
    lab: Lab, run: Path, tmp_path: Path
) -> None:
    """A V2 model with a multi-token head can be written only without it: the architecture has none."""
    convert(lab, "to-hf", run, tmp_path / "out", "--main-only", "--dtype", "fp32")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0
    found = read(tmp_path / "out")
    assert not any(name.startswith("model.layers.2.") for name in found)
    assert sum(t.numel() for t in found.values()) == sum(
        t.numel()
        for name, t in core.load(run).state_dict().items()
        if not name.startswith("heads.")
    )
    router = "model.blocks.moe.ffn.router={name: deepseek_v2, top_k: 2, groups: 4, group_limit: 2}"
    lab.fit(
        tmp_path / "v2", router, "model.blocks.moe.ffn.balance=[{name: expert}]", "budget.steps=1"
    )
    result = lab.command("convert", "to-hf", tmp_path / "v2", tmp_path / "no_export")
    assert result.code == 2
    assert "DeepSeek-V2 has no multi-token module" in result.sentence
    assert "--main-only" in result.sentence
    convert(lab, "to-hf", tmp_path / "v2", tmp_path / "v2-out", "--main-only")
    config = json.loads((tmp_path / "v2-out/config.json").read_text())
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
    assert (config["topk_method"], config["n_group"], config["topk_group"]) == (
        "group_limited_greedy",
        4,
        2,
    )
