"""FP8 block-quantised checkpoints: read as code x scale, and written again bit by bit on request."""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab

import core

from .hf_fp8 import dequantise, dequantised, quantisation, quantised
from .hf_models import (
    BASE,
    LAYERS,
    V2_BASE,
    Case,
    change_config,
    in_dtype,
    meaning,
    mtp_tensors,
    random_model,
    random_tokens,
    read_tensors,
    save,
    shared_copies,
    transformers_or_skip,
    write_tensors,
)
from .parity import FP32, assert_same_bits, assert_same_model

TOKENS = random_tokens(2, 20, seed=5)
RAGGED = {
    "hidden_size": 160,
    "intermediate_size": 296,
    "moe_intermediate_size": 132,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
"""Sizes over 128 that are no multiple of it: whole blocks are followed by ragged ones."""

STRADDLING = {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
}
"""The rotated rows of the fifth head, 124 to 139, lie in two blocks: whoever reorders them takes their scales along."""

SQUARE = (128, 128)
RELEASED = replace(BASE.but(style="released", dtype=torch.bfloat16), config=RAGGED)
CASES = [
    (RELEASED, SQUARE, 1),
    (
        replace(
            RELEASED.but(dtype=torch.float32, q_rank=None, interleave=False),
            config=RAGGED | STRADDLING,
        ),
        SQUARE,
        0,
    ),
    (replace(V2_BASE.but(style="released"), config=RAGGED), SQUARE, 0),
]


@dataclass(frozen=True)
class Quantised:
    """A checkpoint in FP8, its case, and the size of its blocks."""

    case: Case
    folder: Path
    block: tuple[int, int]

    @property
    def format(self) -> str:
        """The number format of what is not quantised, as the command calls it."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.case.point["dtype"]]


def write(case: Case, block: tuple[int, int], depths: int, root: Path) -> Quantised:
    """A checkpoint whose matrices are quantised, in three files, with multi-token layers on request."""
    folder = save(case, in_dtype(random_model(case), case.point["dtype"]), root / "checkpoint")
    tensors = read_tensors(folder)
    if depths:
        tensors |= mtp_tensors(case, depths, root / "scratch")
        tensors |= shared_copies(tensors, depths)
    codes = quantised(tensors, block)
    for name in [
        name for name in codes if name.endswith("_scale_inv")
    ]:  # far apart, so that mixing them up shows
        codes[name] = (
            codes[name]
            * torch.arange(1, codes[name].numel() + 1).view_as(codes[name])
            / codes[name].numel()
        )
    write_tensors(folder, codes, files=3)
    change_config(folder, quantization_config=quantisation(block), num_nextn_predict_layers=depths)
    return Quantised(case, folder, block)


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


@pytest.fixture(
    scope="module", params=CASES, ids=lambda p: f"{p[0].family}-{p[0].point['dtype']}-mtp{p[2]}"
)
def source(
    request: pytest.FixtureRequest, hf: Any, tmp_path_factory: pytest.TempPathFactory
) -> Quantised:
    return write(*request.param, tmp_path_factory.mktemp("fp8"))


def convert(lab: Lab, *arguments: str | Path) -> None:
    result = lab.command("convert", *arguments)
    assert result.code == 0, result.err


def test_the_checkpoint_has_ragged_blocks_of_different_scales(source: Quantised) -> None:
    tensors = read_tensors(source.folder)
    codes = {name: t for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert any(".experts.3." in name for name in codes)
    assert any("kv_b_proj" in name for name in codes)
    grids = {name: tensors[f"{name}_scale_inv"] for name in codes}
    assert {name: tuple(grid.shape) for name, grid in grids.items()} == {
        name: (ceil(t.shape[0] / 128), ceil(t.shape[1] / 128)) for name, t in codes.items()
    }
    assert {(2, 2), (3, 2), (2, 3)} <= {tuple(grid.shape) for grid in grids.values()}
    assert all(float(grid.max() / grid.min()) > 2 for grid in grids.values() if grid.numel() > 3)


def test_codes_times_scales_are_what_is_read(source: Quantised, lab: Lab, tmp_path: Path) -> None:
    """Given back in a plain format the checkpoint holds code x scale, in fp32 exactly, in bf16 rounded once."""
    run, back = tmp_path / "run", tmp_path / "back"
    convert(lab, "from-hf", source.folder, run)
    convert(lab, "to-hf", run, back, "--dtype", source.format)
    expected = dequantised(read_tensors(source.folder), source.block, source.case.point["dtype"])
    assert_same_bits(read_tensors(back), expected)
    config = {**meaning(source.folder)}
    del config["quantization_config"]
    assert meaning(back) == config


def test_logits_are_those_of_the_dequantised_weights(
    hf: Any, source: Quantised, lab: Lab, tmp_path: Path
) -> None:
    """Read in fp32, whatever the other weights come in: code x scale is one fp32 number."""
    convert(lab, "from-hf", source.folder, tmp_path / "run", "--dtype", "fp32")
    model = random_model(source.case).float()
    weights = {
        name: tensor.float()
        for name, tensor in dequantised(
            read_tensors(source.folder), source.block, torch.float32
        ).items()
        if f"layers.{LAYERS}." not in name
    }
    write_tensors(
        plain := save(source.case.but(dtype=torch.float32), model, tmp_path / "plain"), weights
    )
    loaded = type(model).from_pretrained(plain, dtype=torch.float32)
    assert_same_model(core.load(tmp_path / "run"), loaded, TOKENS, FP32)


def test_codes_and_scales_that_are_kept_come_back_bit_by_bit(
    source: Quantised, lab: Lab, tmp_path: Path
) -> None:
    convert(lab, "from-hf", source.folder, tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "back", "--keep-fp8")
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(source.folder))
    assert meaning(tmp_path / "back") == meaning(source.folder)


def test_a_plain_checkpoint_is_quantised_on_request(hf: Any, lab: Lab, tmp_path: Path) -> None:
    """The matrices that the release has in FP8, by the loops' codes and scales; read again they are code x scale."""
    case = replace(BASE.but(dtype=torch.bfloat16), config=RAGGED)
    folder = save(case, in_dtype(random_model(case), torch.bfloat16), tmp_path / "checkpoint")
    tensors = {**read_tensors(folder), **mtp_tensors(case, 1, tmp_path / "scratch")}
    write_tensors(folder, tensors := {**tensors, **shared_copies(tensors, 1)})
    convert(lab, "from-hf", folder, tmp_path / "run")
    convert(lab, "to-hf", tmp_path / "run", tmp_path / "fp8", "--fp8")
    expected = quantised(tensors, SQUARE)
    assert_same_bits(read_tensors(tmp_path / "fp8"), expected)
    assert meaning(tmp_path / "fp8") == {
        **meaning(folder),
        "quantization_config": quantisation(SQUARE),
    }
    convert(lab, "from-hf", tmp_path / "fp8", tmp_path / "again")
    convert(lab, "to-hf", tmp_path / "again", tmp_path / "back", "--dtype", "bf16")
    assert_same_bits(read_tensors(tmp_path / "back"), dequantised(expected, SQUARE, torch.bfloat16))


def test_blocks_of_another_size_are_refused(hf: Any, lab: Lab, tmp_path: Path) -> None:
    oblong = write(replace(BASE, config=RAGGED), (32, 48), 0, tmp_path)
    result = lab.command("convert", "from-hf", oblong.folder, tmp_path / "run")
    assert result.code == 2
    assert "weight_block_size" in result.sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["missing", "too small"])
def test_codes_without_their_scales_are_refused_by_name(
    hf: Any, lab: Lab, tmp_path: Path, what: str
) -> None:
    source = write(replace(BASE, config=RAGGED), SQUARE, 0, tmp_path)
    tensors, name = read_tensors(source.folder), "model.layers.1.mlp.experts.2.up_proj.weight"
    scales = tensors.pop(f"{name}_scale_inv")
    if what == "too small":
        tensors[f"{name}_scale_inv"] = scales[:1]
    write_tensors(source.folder, tensors)
    result = lab.command("convert", "from-hf", source.folder, tmp_path / "run")
    assert result.code == 2
    assert name in result.sentence
    assert not (tmp_path / "run").exists()


def test_the_blocks_of_the_loops_are_128_by_128() -> None:
    """A value at (129, 5) of a 130 x 200 matrix has the scale of row 1, column 0 of the grid."""
    codes = torch.zeros(130, 200).to(torch.float8_e4m3fn)
    codes[129, 5], codes[127, 128] = 3.0, 5.0
    values = dequantise(codes, torch.tensor([[2.0, 7.0], [11.0, 13.0]]), SQUARE)
    assert (float(values[129, 5]), float(values[127, 128]), float(values.abs().sum())) == (
        33.0,
        35.0,
        68.0,
    )
