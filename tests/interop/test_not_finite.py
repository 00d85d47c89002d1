"""A number that is not finite stops a conversion with its tensor and place, unless a flag lets it through."""

import json
import math
from pathlib import Path

import pytest
import torch
from lab import CommandResult, Lab
from tiers import first_by_default

import core
from core.contracts.errors import NotFiniteError
from core.interop.finite import FiniteTensors
from core.interop.tensors import InMemoryTensors

from .checkpoints import FP8, V3, in_blocks, read, same_bits, tensors_of, write

EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
MTP = {**V3, "num_nextn_predict_layers": 1}
NAN_CODE = 0x7F


def refused(lab: Lab, *arguments: str | Path) -> str:
    """Converts, expects one error message and no target, and returns the message."""
    result: CommandResult = lab.command("convert", *arguments)
    assert result.code == 2, result.err
    target = Path(arguments[2])
    assert not target.exists()
    assert not list(target.parent.glob(".*.partial"))
    return result.sentence


def notes(result: CommandResult) -> list[str]:
    """The notes about numbers that are not finite."""
    assert result.code == 0, result.err
    return [line for line in result.err.splitlines() if "finite" in line or "too large" in line]


def test_from_hf_names_the_tensor_and_the_flag_lets_it_through(lab: Lab, tmp_path: Path) -> None:
    tensors = tensors_of(V3)
    tensors[EXPERT][3, 5] = math.nan
    tensors["model.norm.weight"][4] = math.inf
    source = write(tmp_path / "source", V3, tensors)
    sentence = refused(lab, "from-hf", source, tmp_path / "run")
    assert f"{EXPERT} holds a number that is not finite (nan at [3, 5])" in sentence
    assert sentence.startswith(f"{source}: tensor ")
    assert sentence.endswith("; --allow-non-finite converts it all the same")
    result = lab.command("convert", "from-hf", source, tmp_path / "run", "--allow-non-finite")
    assert len(notes(result)) == 1
    with pytest.raises(NotFiniteError, match=r"holds a number that is not finite"):
        core.load(tmp_path / "run")
    sentence = refused(lab, "to-hf", tmp_path / "run", tmp_path / "back")
    assert "holds a number that is not finite" in sentence
    result = lab.command(
        "convert", "to-hf", tmp_path / "run", tmp_path / "back", "--allow-non-finite"
    )
    assert len(notes(result)) == 1
    same_bits(read(tmp_path / "back"), tensors)


def test_a_stopped_conversion_that_allowed_them_is_not_continued_without(tmp_path: Path) -> None:
    """The journal of the one would hide numbers from the other."""
    from core.interop.from_hf import from_hf

    tensors = tensors_of(V3)
    tensors[EXPERT][0, 0] = math.nan
    source = write(tmp_path / "source", V3, tensors)

    def stop(sentence: str) -> None:
        if "not finite" in sentence:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_hf(source, tmp_path / "run", allow_non_finite=True, say=stop)
    sentences: list[str] = []
    with pytest.raises(NotFiniteError, match=rf"tensor {EXPERT} holds a number that is not finite"):
        from_hf(source, tmp_path / "run", say=sentences.append)
    assert not [sentence for sentence in sentences if "continuing" in sentence]


def test_a_number_that_a_narrower_format_cannot_hold_is_too_large(lab: Lab, tmp_path: Path) -> None:
    tensors = tensors_of(V3)
    tensors[EXPERT][1, 2] = 1e5
    source = write(tmp_path / "source", V3, tensors)
    sentence = refused(lab, "from-hf", source, tmp_path / "run", "--dtype", "fp16")
    assert f"tensor {EXPERT} holds 100000.0 at [1, 2], which is too large for fp16" in sentence
    assert lab.command("convert", "from-hf", source, tmp_path / "run").code == 0
    sentence = refused(lab, "to-hf", tmp_path / "run", tmp_path / "back", "--dtype", "fp16")
    assert "ffn.routed.down.weight holds 100000.0 at [2, 1, 2], which is too large" in sentence


def test_copies_with_a_nan_are_not_finite_and_with_the_flag_the_same(
    lab: Lab, tmp_path: Path
) -> None:
    tensors = tensors_of(MTP, depths=1)
    for name in ("model.embed_tokens.weight", "model.layers.3.embed_tokens.weight"):
        tensors[name][7, 1] = math.nan
        tensors[name][7, 2] = 0.0
    tensors["model.layers.3.embed_tokens.weight"][7, 2] = -0.0
    source = write(tmp_path / "source", MTP, tensors)
    sentence = refused(lab, "from-hf", source, tmp_path / "run")
    assert "embed_tokens.weight holds a number that is not finite (nan at [7, 1])" in sentence
    result = lab.command("convert", "from-hf", source, tmp_path / "run", "--allow-non-finite")
    assert len(notes(result)) == 1
    tensors["model.layers.3.embed_tokens.weight"][7, 3] += 1
    source = write(tmp_path / "other", MTP, tensors)
    sentence = refused(lab, "from-hf", source, tmp_path / "run-2", "--allow-non-finite")
    assert "must be a copy of" in sentence


@pytest.mark.parametrize("negative", first_by_default([False, True]))
def test_fp8_codes_and_scales_are_checked(lab: Lab, tmp_path: Path, negative: bool) -> None:
    config = {**V3, "quantization_config": FP8}
    tensors = in_blocks(tensors_of(V3))
    tensors[EXPERT].view(torch.uint8)[2, 3] = NAN_CODE | (0x80 if negative else 0)
    source = write(tmp_path / "source", config, tensors)
    for options in ((), ("--dtype", "bf16")):
        sentence = refused(lab, "from-hf", source, tmp_path / "run", *options)
        assert f"{EXPERT} holds a number that is not finite (nan at [2, 3])" in sentence
    tensors = in_blocks(tensors_of(V3))
    tensors[f"{EXPERT}_scale_inv"][0, 0] = math.inf
    source = write(tmp_path / "scales", config, tensors)
    sentence = refused(lab, "from-hf", source, tmp_path / "run")
    assert f"tensor {EXPERT} has an FP8 scale that is not finite (inf)" in sentence


def test_fp8_blocks_cannot_hold_them_even_with_the_flag(lab: Lab, tmp_path: Path) -> None:
    tensors = tensors_of(V3)
    tensors[EXPERT][2, 3] = math.nan
    source, run = write(tmp_path / "source", V3, tensors), tmp_path / "run"
    assert lab.command("convert", "from-hf", source, run, "--allow-non-finite").code == 0
    sentence = refused(lab, "to-hf", run, tmp_path / "out", "--fp8")
    assert "routed.down.weight holds a number that is not finite (nan at [2, 2, 3])" in sentence
    sentence = refused(lab, "to-hf", run, tmp_path / "out", "--fp8", "--allow-non-finite")
    assert "which FP8 blocks cannot hold; leave out --fp8" in sentence


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('"rope_theta": NaN', "rope_theta = nan"),
        ('"rope_scaling": {"type": "yarn", "factor": -Infinity}', "rope_scaling.factor = -inf"),
        ('"unknown": [1, 1e999]', "unknown.1 = inf"),
    ],
)
def test_a_configuration_with_such_a_number_is_no_json(
    lab: Lab, tmp_path: Path, text: str, where: str
) -> None:
    source = write(tmp_path / "source", V3, tensors_of(V3))
    config = json.dumps({k: v for k, v in V3.items() if k not in text})
    (source / "config.json").write_text(f"{config[:-1]}, {text}}}")
    sentence = refused(lab, "from-hf", source, tmp_path / "run")
    assert sentence == f"{source}/config.json: {where}: must be a finite number"


def test_the_place_is_that_in_the_whole_tensor() -> None:
    """Rows are counted over all dimensions but the last, and may be read from the middle."""
    tensor = torch.zeros(3, 4, 5, dtype=torch.float64)
    tensor[2, 1, 4] = 1e300
    tensors = {"a": tensor, "b": torch.tensor(math.inf)}
    reader = FiniteTensors(InMemoryTensors(tensors), "here")
    assert torch.equal(reader.values("a", 0, 12, torch.float64), tensor.view(12, 5))
    assert reader.values("a", 0, 9, torch.float32).shape == (9, 5)
    sentence = r"^here: tensor a holds 1e\+300 at \[2, 1, 4\], which is too large for fp32$"
    with pytest.raises(NotFiniteError, match=sentence):
        reader.values("a", 7, 12, torch.float32)
    with pytest.raises(NotFiniteError, match=r"tensor b .* \(inf at \[\]\)"):
        reader.values("b", 0, 1, torch.float32)
