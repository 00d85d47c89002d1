"""Reading and writing safetensors, compared with the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.interop import tensors as readers
from core.interop.blocks import ReadBlocks, WriteBlocks
from core.interop.shards import FORMATS, Shards, read_header, shards_of
from core.interop.tensors import (
    BLOCK,
    SCALE,
    InMemoryTensors,
    TensorSpec,
    chunks,
    dequantised,
    quantised,
)
from core.interop.writing import ShardWriter, planned


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=draw, dtype=torch.float64) * 50
    return (values > 0) if dtype == torch.bool else values.to(dtype)


ALL = {name: random(dtype, 3, 4, 5) for name, dtype in FORMATS.items()} | {
    "vector": random(torch.bfloat16, 7),
    "scalar": random(torch.float32),
    "empty": torch.empty(0, 6),
    "narrow": torch.empty(6, 0),
}


def test_every_format_and_shape_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    save_file(ALL, tmp_path / "model.safetensors")
    shards = shards_of(tmp_path)
    assert set(shards.specs) == set(ALL)
    for name, tensor in ALL.items():
        spec = shards.specs[name]
        assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape))
        rows = shards.read_rows(name, 0, spec.rows)
        assert rows.view(torch.uint8).equal(
            tensor.reshape(spec.rows, spec.width).view(torch.uint8)
        ), name
    assert shards.read_rows("F16", 5, 7).equal(ALL["F16"].view(12, 5)[5:7])


def test_the_library_reads_what_is_written_in_any_order_and_in_parts(tmp_path: Path) -> None:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in ALL.items()}
    plan = planned(specs, limit=400)
    assert len(plan.files) > 2
    writer = ShardWriter(tmp_path, plan)
    writer.create()
    for name, tensor in reversed(ALL.items()):
        rows = tensor.reshape(specs[name].rows, specs[name].width)
        for row in reversed(range(len(rows))):
            writer.write(name, row, rows[row : row + 1])
    writer.sync()
    found = {
        name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert sorted(found) == sorted(ALL)
    for name, tensor in ALL.items():
        assert found[name].shape == tensor.shape
        assert (
            found[name].view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.ndim else True
        )
    assert set(shards_of(tmp_path).specs) == set(ALL)


def test_every_tensor_begins_where_its_format_is_aligned(tmp_path: Path) -> None:
    specs = {
        "a": TensorSpec(torch.uint8, (3,)),
        "b": TensorSpec(torch.float64, (1,)),
        "c": TensorSpec(torch.bfloat16, (1,)),
    }
    writer = ShardWriter(tmp_path, planned(specs))
    writer.create()
    for spec, begin in read_header(tmp_path / "model.safetensors").values():
        assert begin % spec.dtype.itemsize == 0


def test_files_hold_what_fits_and_a_tensor_is_never_split() -> None:
    specs = {
        name: TensorSpec(torch.uint8, (size,))
        for name, size in zip("abcde", (40, 60, 1, 500, 99), strict=True)
    }
    plan = planned(specs, limit=100)
    assert [list(names) for names in plan.files.values()] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(plan.files)[1] == "model-00002-of-00004.safetensors"
    assert plan.bytes == 700
    assert not planned({"a": specs["a"]}, limit=100).index


def test_files_stay_open_by_the_dozen_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.interop.shards.OPEN_FILES", 2)
    for number in range(5):
        save_file({f"t{number}": torch.full((2,), number)}, tmp_path / f"{number}.safetensors")
    shards = Shards(sorted(tmp_path.iterdir()))
    for number in (0, 1, 2, 3, 4, 0, 2):
        assert shards.read_rows(f"t{number}", 0, 1).tolist() == [[number, number]]
        assert len(shards._open) <= 2


def test_chunks_cover_all_rows_once_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK", 1000)
    spec = TensorSpec(torch.float32, (70, 10))
    assert list(chunks(spec, 3, 70)) == [(3, 28), (28, 53), (53, 70)]
    assert [high - low for low, high in chunks(spec, 0, 70, step=16)] == [16, 16, 16, 16, 6]
    assert list(chunks(TensorSpec(torch.float32, (5, 10**6)), 0, 5)) == [
        (i, i + 1) for i in range(5)
    ]
    assert list(chunks(TensorSpec(torch.float32, (0, 4)), 0, 0)) == []


def slow_quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """One element after the other."""
    codes, scales = torch.empty_like(x), torch.empty(x.shape[0], -(-x.shape[1] // BLOCK))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            top, left = i // BLOCK * BLOCK, j // BLOCK * BLOCK
            largest = x[top : top + BLOCK, left : left + BLOCK].abs().max()
            scale = largest / 448 if largest else torch.tensor(1.0)
            codes[i, j] = (x[i, j] / scale).clamp(-448, 448)
            scales[i, j // BLOCK] = scale
    return codes.to(torch.float8_e4m3fn), scales


def test_blocks_are_quantised_as_one_by_one() -> None:
    x = random(torch.float32, 130, 140) * torch.logspace(-3, 3, 140)
    x[128:, :128] = 0
    codes, scales = quantised(x)
    expected, by_row = slow_quantised(x)
    kept = scales[:128], by_row[:128]
    assert codes.view(torch.uint8).equal(expected.view(torch.uint8))
    assert torch.equal(*kept)
    assert torch.equal(dequantised(codes, scales, torch.float32)[128:, :128], torch.zeros(2, 128))
    error = (dequantised(codes, scales, torch.float32) - x).abs()
    assert bool(
        (error <= x.abs() / 16 + scales.repeat_interleave(BLOCK, 1)[:, :140] * 2**-10).all()
    )


@pytest.mark.parametrize(("begin", "end"), [(0, 300), (1, 2), (127, 129), (130, 300), (256, 257)])
def test_a_grid_is_seen_by_row_and_written_back(tmp_path: Path, begin: int, end: int) -> None:
    """Any rows of the view are the grid's, each row those of its block; writing keeps the first row of each block."""
    codes, grid = (
        random(torch.float32, 300, 200).to(torch.float8_e4m3fn),
        random(torch.float32, 3, 2).abs(),
    )
    save_file({"x.weight": codes, "x.weight_scale_inv": grid}, tmp_path / "model.safetensors")
    view = ReadBlocks(shards_of(tmp_path))
    assert view.specs["x.weight" + SCALE] == TensorSpec(torch.float32, (300, 2))
    rows = view.read_rows("x.weight" + SCALE, begin, end)
    assert torch.equal(rows, torch.stack([grid[row // 128] for row in range(begin, end)]))
    values = torch.stack(
        [
            codes[row].float() * grid[row // 128].repeat_interleave(128)[:200]
            for row in range(begin, end)
        ]
    )
    assert torch.equal(view.values("x.weight", begin, end, torch.float32), values)
    (tmp_path / "out").mkdir()
    writer = ShardWriter(
        tmp_path / "out", planned({"x.weight_scale_inv": TensorSpec(torch.float32, (3, 2))})
    )
    writer.create()
    WriteBlocks(writer).write("x.weight" + SCALE, begin, rows)
    writer.sync()
    found = load_file(tmp_path / "out/model.safetensors")["x.weight_scale_inv"]
    first_rows = [begin <= 128 * i < end for i in range(3)]
    assert torch.equal(found, grid * torch.tensor(first_rows)[:, None])


def test_codes_are_numbers_in_fp64_too() -> None:
    codes, scales = quantised(random(torch.float32, 4, 130))
    held = InMemoryTensors({"x": codes, "x" + SCALE: scales})
    wide = held.values("x", 1, 3, torch.float64)
    assert torch.equal(
        wide, codes[1:3].double() * scales[1:3].double().repeat_interleave(128, 1)[:, :130]
    )
