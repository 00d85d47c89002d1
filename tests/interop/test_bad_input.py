"""What is wrong with a folder is one sentence with its name, and leaves everything as it was."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, fill, small_disk
from safetensors.torch import save_file
from tiers import first_by_default
from tokenizers import Tokenizer, models

from .checkpoints import FP8, V3, in_blocks, tensors_of, write

FILE, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"


def change_config(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **keys}
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def change_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return changed


def change_header(key: str, value: Any) -> Callable[[Path], None]:
    """Replace a value in the entry of the last tensor."""

    def change(folder: Path) -> None:
        data = (folder / FILE).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header[sorted(header)[-1]][key] = value
        text = json.dumps(header).encode()
        (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def cut(folder: Path) -> None:
    with (folder / FILE).open("r+b") as file:
        file.truncate((folder / FILE).stat().st_size - 10)


def cut_in_the_header(folder: Path) -> None:
    with (folder / FILE).open("r+b") as file:
        file.truncate(40)


def lengthen(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.write(b"more")


def shift(folder: Path) -> None:
    """Gives the second tensor the place of the first."""
    data = (folder / FILE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = sorted(
        (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    same = [n for n in names if header[n]["shape"] == header[names[-1]]["shape"]]
    header[same[-1]]["data_offsets"] = header[same[0]]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    (folder / FILE).write_bytes(data[:8] + text + data[8 + length :])


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")


def name_missing_file(weights: dict[str, str]) -> None:
    weights["lm_head.weight"] = "model-00009-of-00003.safetensors"


def forget_file(weights: dict[str, str]) -> None:
    for name in [name for name, file in weights.items() if file == FILE]:
        del weights[name]


def climb(weights: dict[str, str]) -> None:
    weights["lm_head.weight"] = "../model.safetensors"


BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("holds no config.json",)),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{,"),
        ("config.json", "cannot be read as JSON"),
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ("config.json", "must hold a JSON object"),
    ),
    "another architecture": (
        change_config(architectures=["LlamaForCausalLM"]),
        ("LlamaForCausalLM is not supported", "DeepseekV2ForCausalLM, DeepseekV32ForCausalLM"),
    ),
    "another model_type": (
        change_config(architectures=..., model_type="llama"),
        ("llama is not supported",),
    ),
    "a key is missing": (
        change_config(hidden_size=...),
        ("config.json: hidden_size: this key is missing",),
    ),
    "a key is null": (
        change_config(kv_lora_rank=None),
        ("config.json: kv_lora_rank = None", "whole number"),
    ),
    "truncated": (cut, (FILE, "is truncated: 10 bytes")),
    "truncated header": (cut_in_the_header, (FILE, "is truncated, or no safetensors file")),
    "too long": (lengthen, (FILE, "4 bytes after its last tensor")),
    "tensors overlap": (shift, (FILE, "does not begin where the one before it ends")),
    "no JSON": (
        lambda f: (f / FILE).write_bytes(struct.pack("<Q", 4) + b"{{{{"),
        (FILE, "cannot be read as JSON"),
    ),
    "an index that names a missing file": (
        change_index(name_missing_file),
        (INDEX, "model-00009", "does not exist"),
    ),
    "a file that the index lacks": (
        change_index(forget_file),
        (INDEX, f"{FILE} is not in this index"),
    ),
    "a tensor that the index lacks": (
        change_index(lambda w: w.pop("model.norm.weight")),
        ("tensor model.norm.weight of", "is not in this index"),
    ),
    "a tensor that its file lacks": (
        change_index(lambda w: w.update({"model.no.weight": FILE})),
        (f"tensor model.no.weight should be in {FILE}",),
    ),
    "an index that leaves the folder": (change_index(climb), (INDEX, "beside it")),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), (INDEX, "weight_map")),
    "files without an index": (
        lambda f: (f / INDEX).unlink(),
        ("3 safetensors files and no", INDEX),
    ),
    "pickled weights": (pickled, ("pytorch_model.bin", "only safetensors are read")),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("*.safetensors*")],
        ("no weights here",),
    ),
    "more layers than weights": (
        change_config(num_hidden_layers=4),
        ("tensor model.layers.3.", "is missing"),
    ),
    "fewer layers than weights": (
        change_config(num_hidden_layers=2),
        ("config.json: num_hidden_layers = 2: the files hold layers that are not counted (2)",),
    ),
    "another width": (
        change_config(hidden_size=32),
        ("tensor model.embed_tokens.weight has the shape [300, 24]", "needs [300, 32]"),
    ),
    "another number of experts": (
        change_config(n_routed_experts=8),
        ("mlp.gate.weight has the shape [4, 24]",),
    ),
    "another vocabulary": (change_config(vocab_size=301), ("shape [300, 24]", "[301, 24]")),
    "tied, with an output of its own": (
        change_config(tie_word_embeddings=True),
        ("tensor lm_head.weight must be a copy of model.embed_tokens.weight, and differs",),
    ),
    "blocks of another size": (
        change_config(quantization_config={**FP8, "weight_block_size": [64, 64]}),
        ("quantization_config", "weight_block_size"),
    ),
    "another quantisation": (
        change_config(quantization_config={"quant_method": "gptq"}),
        ("quant_method",),
    ),
    "generation's configuration is no JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ("source/generation_config.json: cannot be read as JSON",),
    ),
    "config is nested": (
        lambda f: (f / "config.json").write_text('{"a":' + "[" * 90_000),
        ("config.json: is nested more than 100 levels deep",),
    ),
    "config is nested, and whole": (
        lambda f: (f / "config.json").write_text('{"a":' + "[" * 500 + "]" * 500 + "}"),
        ("config.json: is nested more than 100 levels deep",),
    ),
    "index is nested": (
        lambda f: (f / INDEX).write_text("[" * 90_000),
        (f"{INDEX}: is nested more than 100 levels deep",),
    ),
    "header is nested": (
        lambda f: (f / FILE).write_bytes(struct.pack("<Q", 90_000) + b"[" * 90_000),
        (f"{FILE}: no safetensors file: its header: is nested more than 100 levels deep",),
    ),
    "a format that is a list": (
        change_header("dtype", ["F32"]),
        ("entry in the header is damaged",),
    ),
    "a shape of truth values": (
        change_header("shape", [True]),
        ("entry in the header is damaged",),
    ),
    "a file's name of 300 characters": (
        change_index(lambda w: w.update({"lm_head.weight": "n" * 300 + ".safetensors"})),
        (INDEX, "beside it"),
    ),
    "a file's name with half a surrogate pair": (
        change_index(lambda w: w.update({"lm_head.weight": "\udc80.safetensors"})),
        (INDEX, "beside it"),
    ),
    "a pipe in the place of the config": (
        lambda f: (f / "config.json").unlink() or os.mkfifo(f / "config.json"),
        ("holds no config.json",),
    ),
    "a pipe in the place of the index": (
        lambda f: (f / INDEX).unlink() or os.mkfifo(f / INDEX),
        (f"{INDEX}: is a pipe, not a file",),
    ),
    "a width of 10^12": (
        change_config(hidden_size=10**12),
        ("config.json: hidden_size = 1000000000000: must be at most 100000000",),
    ),
    "a million layers": (
        change_config(num_hidden_layers=10**6),
        ("config.json: num_hidden_layers = 1000000: must be at most 10000",),
    ),
    "more layers than tensors": (
        change_config(num_hidden_layers=9_999),
        ("config.json: num_hidden_layers = 9999: is more than there can be",),
    ),
    "more experts than tensors": (
        change_config(n_routed_experts=90_000),
        ("config.json: n_routed_experts = 90000: is more than there can be",),
    ),
    "a million heads": (
        change_config(num_attention_heads=10**6, num_key_value_heads=10**6),
        ("num_attention_heads = 1000000: gives 16000000 rows",),
    ),
    "groups that leave one expert": (
        change_config(n_group=4, topk_group=1, num_experts_per_tok=2),
        ("n_group = 4: must leave at least 2 experts in a group",),
    ),
    "a marker that is no number": (
        change_config(eos_token_id=["</s>"]),
        ("source/config.json: eos_token_id = ['</s>']: must be a token's number",),
    ),
}


@pytest.fixture(scope="module")
def tensors() -> Mapping[str, torch.Tensor]:
    return tensors_of(V3)


@pytest.mark.parametrize("what", first_by_default(BAD, keep=16))
def test_it_is_one_sentence_and_nothing_is_left(
    lab: Lab, tmp_path: Path, tensors: Mapping[str, torch.Tensor], what: str
) -> None:
    spoil, words = BAD[what]
    source = write(tmp_path / "source", V3, tensors, 3)
    spoil(source)
    result = lab.command("convert", "from-hf", source, tmp_path / "run")
    assert result.code == 2, result.err
    for word in words:
        assert word in result.sentence
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    first_by_default(
        [
            (301, "has a token 300, and the model knows 300, from 0"),
            (0, "cannot be read as a tokenizer"),
            (300, None),
        ],
        several=True,
    ),
)
def test_a_tokenizer_that_fails_later_is_reported_at_once(
    lab: Lab,
    tmp_path: Path,
    tensors: Mapping[str, torch.Tensor],
    vocabulary: int,
    words: str | None,
) -> None:
    """A tokenizer that is unusable is no error: the weights can be used without it."""
    source = write(tmp_path / "source", V3, tensors)
    engine = Tokenizer(models.BPE({f"t{i}": i for i in range(vocabulary)}, []))
    (source / "tokenizer.json").write_text(engine.to_str() if vocabulary else "{}")
    result = lab.command("convert", "from-hf", source, tmp_path / "run")
    assert result.code == 0, result.err
    notes = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


def test_a_folder_that_is_not_there_is_reported(lab: Lab, tmp_path: Path) -> None:
    result = lab.command("convert", "from-hf", tmp_path / "nowhere", tmp_path / "run")
    assert (result.code, result.sentence) == (2, f"{tmp_path / 'nowhere'}: there is no such folder")
    result = lab.command("convert", "to-hf", tmp_path / "nowhere", tmp_path / "out")
    assert result.code == 2
    assert "no checkpoint here" in result.sentence


@pytest.mark.parametrize(("tensor", "change"), [("down_proj", "codes"), ("o_proj", "grid")])
def test_codes_and_scales_need_each_other(
    lab: Lab, tmp_path: Path, tensor: str, change: str
) -> None:
    config = {**V3, "quantization_config": FP8}
    theirs = in_blocks(tensors_of(config))
    name = next(n for n in theirs if n.endswith(f"{tensor}.weight"))
    if change == "codes":
        theirs[name] = theirs[name].float()
    else:
        theirs[f"{name}_scale_inv"] = torch.ones(2, 1)
    result = lab.command(
        "convert", "from-hf", write(tmp_path / "source", config, theirs), tmp_path / "run"
    )
    assert result.code == 2
    assert f"{name}_scale_inv" in result.sentence
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
@pytest.mark.parametrize("what", first_by_default(["a run", "a file", "something", "a link"]))
def test_nothing_is_overwritten(lab: Lab, tmp_path: Path, command: str, what: str) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    target = tmp_path / "target"
    if command == "to-hf":
        assert lab.command("convert", "from-hf", source, tmp_path / "run").code == 0
        source = tmp_path / "run"
    if what == "a run":
        target.mkdir()
        (target / "recipe.yaml").write_text("seed: 0")
    elif what == "a file":
        target.write_text("mine")
    elif what == "a link":
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    result = lab.command("convert", command, source, target)
    assert result.code == 2
    assert "nothing is overwritten" in result.sentence
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_may_be_the_target(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert (
        lab.command(
            "convert", "from-hf", write(tmp_path / "source", V3, tensors_of(V3)), tmp_path / "run"
        ).code
        == 0
    )


def test_a_disk_that_is_too_small_says_so_before_anything_is_moved(
    lab: Lab, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        result = lab.command("convert", "from-hf", source, disk / "run")
        assert result.code == 2
        assert "no space is left on the disk" in result.sentence
        assert "are needed" in result.sentence
        assert list(disk.iterdir()) == []
        fill(disk)
        result = lab.command("convert", "from-hf", source, disk / "run")
        assert "no space is left on the disk" in result.sentence
        assert [f.name for f in disk.iterdir()] == ["filler"]


def test_a_folder_that_cannot_be_written_is_reported(lab: Lab, tmp_path: Path) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    (tmp_path / "file").write_text("")
    result = lab.command("convert", "from-hf", source, tmp_path / "file" / "run")
    assert result.code == 2
    assert result.sentence.startswith(f"{tmp_path / 'file' / 'run'}: cannot be written: ")


@pytest.mark.parametrize("command", first_by_default(["fit", "evaluate", "generate"]))
def test_other_commands_say_what_a_converted_run_lacks(
    lab: Lab, tmp_path: Path, command: str
) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    assert lab.command("convert", "from-hf", source, tmp_path / "run").code == 0
    arguments: dict[str, list[str | Path]] = {
        "evaluate": [tmp_path / "run", lab.texts.parent],
        "generate": [tmp_path / "run", "--prompt", "a"],
        "fit": [tmp_path / "run/recipe.yaml", "--resume", tmp_path / "run"],
    }
    result = lab.command(command, *arguments[command][: 1 if command == "evaluate" else None])
    assert result.code == 2, result.err
    words = {
        "evaluate": "score it with --tasks",
        "generate": "tokenizer.json cannot be read",
        "fit": "initial_weights",
    }
    assert words[command] in result.sentence
    assert os.listdir(tmp_path / "run") != []


@pytest.mark.parametrize("given", [..., 0])
def test_a_multi_token_layer_that_is_not_counted_is_named(
    lab: Lab, tmp_path: Path, given: Any
) -> None:
    config = {key: value for key, value in V3.items() if key != "num_nextn_predict_layers"}
    if given is not ...:
        config["num_nextn_predict_layers"] = given
    source = write(tmp_path / "source", config, tensors_of(V3, depths=1))
    result = lab.command("convert", "from-hf", source, tmp_path / "run")
    assert result.code == 2
    assert "num_nextn_predict_layers" in result.sentence
    assert (
        "layers that are not counted (3), modules of multi-token prediction: give 1"
        in result.sentence
    )


def test_an_adapter_beside_an_index_costs_a_note(
    lab: Lab, tmp_path: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    source = write(tmp_path / "source", V3, tensors, 3)
    save_file({"base.lora_A.weight": torch.ones(2, 2)}, source / "adapter_model.safetensors")
    result = lab.command("convert", "from-hf", source, tmp_path / "run")
    assert result.code == 0, result.err
    assert "adapter_model.safetensors is left out: an adapter" in result.err


def test_a_small_vocabulary_and_a_name_that_is_no_text_convert(lab: Lab, tmp_path: Path) -> None:
    config = {**V3, "vocab_size": 99}
    source = write(tmp_path / "source", config, tensors_of(config))
    Path(os.fsdecode(os.fsencode(source) + b"/\xff.txt")).write_text("odd")
    result = lab.command("convert", "from-hf", source, tmp_path / "run")
    assert result.code == 0, result.err
    assert "is left out: its name cannot be printed or is not UTF-8" in result.err


def test_a_layout_without_files_is_named(
    lab: Lab, tmp_path: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    source = write(tmp_path / "source", V3, tensors)
    run = tmp_path / "run"
    assert lab.command("convert", "from-hf", source, run).code == 0
    layout = run / "hf" / "layout.json"
    content = json.loads(layout.read_text())
    del content["files"]
    layout.write_text(json.dumps(content))
    (run / "SHA256SUMS").unlink()
    result = lab.command("convert", "to-hf", run, tmp_path / "out")
    assert result.code == 2
    assert "layout.json: files is missing or damaged" in result.sentence


def test_names_that_are_too_long_are_one_sentence(lab: Lab, tmp_path: Path) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    name = tmp_path / ("n" * 300)
    for arguments in (
        ("convert", "from-hf", source, name),
        ("fit", lab.file, "--out", name),
        ("fit", lab.file, "--resume", name),
        ("generate", name, "--prompt", "a"),
        ("report", name),
        ("describe", name),
    ):
        result = lab.command(*arguments)
        assert result.code == 2, result.err
        assert "too long" in result.sentence
