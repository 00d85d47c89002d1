"""Sharded checkpoints: every layout is read into every other one, and whatever breaks a save leaves whole ones."""

import io
import json
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import flip_bit
from lab import assert_same
from torch import Tensor
from two_ranks import on_two_ranks

from core.checkpoints import shard_storage
from core.checkpoints.distributed import load_shards, save_shards
from core.checkpoints.index import INDEX, ShardIndex, files_left_over, is_sharded, read_index
from core.checkpoints.listing import checkpoints_in, remove_checkpoint, remove_partial_checkpoints
from core.checkpoints.reading import read_checkpoint, read_metadata
from core.checkpoints.saving import AtomicCheckpointIO
from core.checkpoints.sharded_saving import ShardedCheckpointIO
from core.checkpoints.shards import ShardReader
from core.checkpoints.tensor_shard import TensorShard
from core.contracts.errors import UserError
from core.interop.shard_rows import ShardRows
from core.storage.documents import DocumentError
from core.testing.forked_ranks import on_ranks
from core.training.weight_shards import WeightShard

SHAPES = {
    "state_dict.model.matrix": (7, 6),
    "state_dict.model.stack": (4, 6, 5),
    "state_dict.model.vector": (5,),
    "state_dict.model.bias": (3,),
    "state_dict.model.scalar": (),
    "optimizer_states.0.state.0.exp_avg": (7, 6),
    "optimizer_states.0.state.1.exp_avg": (4, 6, 5),
}
FORMATS = {"state_dict.model.stack": torch.bfloat16, "state_dict.model.bias": torch.int64}
REST = {
    "moeloom": {"windows_done": 3},
    "state_dict": {"extra": 1},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": []}],
}

Layout = Callable[[str, tuple[int, ...], int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]]
"""The boxes of a tensor of some shape, as offsets and shapes, that a rank of several holds."""


def whole_tensors() -> dict[str, Tensor]:
    """A number of its own at every place of every tensor."""
    tensors = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        numbers = torch.arange(math.prod(shape), dtype=torch.float32) + 100 * index
        tensors[name] = numbers.reshape(shape).to(FORMATS.get(name, torch.float32))
    return tensors


def share(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """The begin and the length of a rank's share, as `torch.chunk` divides; the last ranks may have none."""
    size = -(-length // ranks)
    begin = min(size * rank, length)
    return begin, min(size, length - begin)


def box_of(
    name: str, rank: int, ranks: int, axes: dict[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The box of a tensor that a rank holds, if the tensor is divided along an axis; all of it if it is not."""
    shape = list(SHAPES[name])
    offsets = [0] * len(shape)
    if name in axes:
        axis = axes[name]
        offsets[axis], shape[axis] = share(shape[axis], rank, ranks)
    return tuple(offsets), tuple(shape)


def parts_of(rank: int, ranks: int, axes: dict[str, int], *, empty: bool) -> dict[str, TensorShard]:
    """The parts of a rank, with their numbers or with others in their places."""
    parts = {}
    for name, tensor in whole_tensors().items():
        offsets, shape = box_of(name, rank, ranks, axes)
        own = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))].clone()
        if empty:
            own = torch.full_like(own, 99)
        parts[name] = TensorShard(own, offsets, tuple(tensor.shape))
    return parts


def save_on_ranks(folder: Path, ranks: int, axes: dict[str, int], work: Path) -> None:
    """Saves the tensors from ranks that hold parts of them."""
    work.mkdir()

    def save(rank: int) -> None:
        parts = parts_of(rank, ranks, axes, empty=False)
        save_shards(parts, REST, folder, dist.group.WORLD, asynchronous=False)  # type: ignore[arg-type]

    on_ranks(save, work, world=ranks)


def load_on_ranks(folder: Path, ranks: int, axes: dict[str, int], work: Path) -> None:
    """Loads them on ranks that hold other parts, and compares each number."""
    work.mkdir()

    def load(rank: int) -> None:
        parts = parts_of(rank, ranks, axes, empty=True)
        load_shards(parts, ShardReader(folder))
        expected = parts_of(rank, ranks, axes, empty=False)
        for name, part in parts.items():
            assert torch.equal(part.tensor, expected[name].tensor), name

    on_ranks(load, work, world=ranks)


def drawn_axes(draw: random.Random) -> dict[str, int]:
    """An axis for some of the tensors that have one."""
    axes = {}
    for name, shape in SHAPES.items():
        if shape and draw.random() < 0.7:
            axes[name] = draw.randrange(len(shape))
    return axes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, which divide matrices by rows and the stack by matrices."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints" / "step-00000003.ckpt"
    axes = {name: 0 for name, shape in SHAPES.items() if len(shape) > 1}
    save_on_ranks(folder, 2, axes, folder.parents[1] / "work")
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage."""
    folder = tmp_path / "checkpoints" / saved.name
    shutil.copytree(saved, folder)
    return folder


def test_every_number_is_written_once_in_files_of_one_kind(saved: Path) -> None:
    index = read_index(saved)
    assert {name: tensor.shape for name, tensor in index.tensors.items()} == SHAPES
    for name, tensor in index.tensors.items():
        places = torch.zeros(tensor.shape, dtype=torch.int64)
        for part in tensor.shards:
            ends = zip(part.offsets, part.shape, strict=True)
            places[tuple(slice(o, o + n) for o, n in ends)] += 1
        assert bool((places == 1).all()), name
    kinds: dict[str, set[str]] = {}
    for name, tensor in index.tensors.items():
        for part in tensor.shards:
            kinds.setdefault(part.file, set()).add(name.partition(".")[0])
    assert all(len(names) == 1 for names in kinds.values())
    assert sorted(path.name for path in saved.iterdir()) == sorted([INDEX, *index.files])


def test_one_process_reads_all_of_it(saved: Path) -> None:
    content = read_checkpoint(saved)
    whole = whole_tensors()
    for name in SHAPES:
        if name.startswith("state_dict."):
            assert torch.equal(content["state_dict"][name[11:]], whole[name])
            assert content["state_dict"][name[11:]].dtype == whole[name].dtype
    assert content["state_dict"]["extra"] == 1
    moments = content["optimizer_states"][0]["state"]
    assert torch.equal(moments[1]["exp_avg"], whole["optimizer_states.0.state.1.exp_avg"])
    assert moments[0]["step"] == 3.0


def test_an_outline_has_shapes_and_formats_and_reads_no_number(copied: Path) -> None:
    for file in copied.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    content = read_metadata(copied)
    stack = content["state_dict"]["model.stack"]
    assert stack.is_meta
    assert tuple(stack.shape) == (4, 6, 5)
    assert stack.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_every_layout_is_read_into_every_other_one(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    for case, (before, after) in enumerate([(2, 3), (3, 1), (4, 2), (1, 4)]):
        folder = tmp_path / str(case) / "step-00000003.ckpt"
        folder.parent.mkdir()
        save_on_ranks(folder, before, drawn_axes(draw), folder.parent / "save")
        load_on_ranks(folder, after, drawn_axes(draw), folder.parent / "load")


def test_rows_are_read_without_the_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardRows(saved)
    monkeypatch.setattr(ShardReader, "tensor", lambda *_: pytest.fail("a whole tensor was read"))
    for name, spec in reader.specs.items():
        whole = whole_tensors()[f"state_dict.model.{name}"].reshape(spec.rows, spec.width)
        for begin in range(spec.rows + 1):
            for end in range(begin, spec.rows + 1):
                assert torch.equal(reader.read_rows(name, begin, end), whole[begin:end]), name


def damages(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields ways to damage a sharded checkpoint, by name."""
    index = folder / INDEX
    text = index.read_text()
    document = json.loads(text)
    shard = sorted(folder.glob("*.safetensors"))[0]
    rest = next(folder.glob("*.pt"))
    yield "no index", index.unlink
    yield "an empty index", lambda: index.write_text("")
    yield "half an index", lambda: index.write_text(text[: len(text) // 2])
    yield "another format", lambda: index.write_text(json.dumps({**document, "format": "x"}))
    for key in ("rest", "files", "tensors", "sha256"):
        for value in (None, 3, [], {}, "x"):
            changed = json.dumps({**document, key: value})
            yield f"{key} = {value!r}", lambda changed=changed: index.write_text(changed)
    yield "a pipe for an index", lambda: (index.unlink(), os.mkfifo(index))
    yield "no shard", shard.unlink
    yield "an empty shard", lambda: shard.write_bytes(b"")
    yield "half a shard", lambda: shard.write_bytes(shard.read_bytes()[:100])
    yield "zeros", lambda: shard.write_bytes(bytes(shard.stat().st_size))
    yield "a pipe for a shard", lambda: (shard.unlink(), os.mkfifo(shard))
    yield "a folder for a shard", lambda: (shard.unlink(), shard.mkdir())
    yield "no rest", rest.unlink
    yield "zeros for the rest", lambda: rest.write_bytes(bytes(rest.stat().st_size))
    yield (
        "another checkpoint's index",
        lambda: index.write_text(text.replace(shard.name, shard.name.replace("rank", "tank"))),
    )


def test_every_damage_is_as_user_error_that_names_the_checkpoint(
    saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "checkpoints" / "step-00000002.ckpt"
    shutil.copytree(saved, other)
    target = tmp_path / "checkpoints" / saved.name
    shutil.copytree(saved, target)
    names = [name for name, _ in damages(target)]
    for name in names:
        shutil.rmtree(target)
        shutil.copytree(saved, target)
        dict(damages(target))[name]()
        with pytest.raises(UserError) as error:
            read_checkpoint(target)
        assert str(error.value).startswith(str(target)), name
        assert "\n" not in str(error.value), name
        assert "step-00000002.ckpt" in str(error.value), name


def signed(document: dict[str, Any]) -> str:
    """An index with a checksum that fits it."""
    from core.checkpoints.index import _digest_of

    return json.dumps({**document, "sha256": _digest_of(document)})


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", INDEX]
)
def test_names_that_lead_out_of_the_folder_are_refused(copied: Path, name: str) -> None:
    document = json.loads((copied / INDEX).read_text())
    document["files"][0][0] = name
    (copied / INDEX).write_text(signed(document))
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda parts: parts.pop(), "do not make up the whole"),
        (lambda parts: parts.append(parts[0]), "do not make up the whole"),
        (lambda parts: parts[1].__setitem__(1, [0, 0]), "do not make up the whole"),
        (lambda parts: parts[1].__setitem__(1, [9, 0]), "do not make up the whole"),
        (lambda parts: parts[1].__setitem__(1, [-1, 0]), "whole numbers"),
        (lambda parts: parts[1].__setitem__(2, [2, 6]), "do not make up the whole"),
        (lambda parts: parts[0].__setitem__(0, 99), "damaged"),
        (lambda parts: parts[0].__setitem__(0, -1), "must be the number of a file"),
        # rows 0 to 3 and 2 to 4: as many numbers as there are, at different places
        (lambda parts: parts[1].__setitem__(1, [2, 0]), "do not make up the whole"),
    ],
)
def test_parts_that_do_not_make_up_a_tensor_are_refused(
    copied: Path, change: Callable[[list[Any]], object], why: str
) -> None:
    document = json.loads((copied / INDEX).read_text())
    change(document["tensors"]["state_dict.model.matrix"]["shards"])
    (copied / INDEX).write_text(signed(document))
    with pytest.raises(UserError, match=why):
        read_checkpoint(copied)


@pytest.mark.parametrize("shape", [[2**62], [2**40, 2**40], [10**4, 10**6]])
def test_sizes_that_no_file_can_hold_are_refused(copied: Path, shape: list[int]) -> None:
    document = json.loads((copied / INDEX).read_text())
    offsets = [0] * len(shape)
    huge = {"dtype": "float32", "shape": shape, "shards": [[0, offsets, shape]]}
    document["tensors"]["state_dict.model.matrix"] = huge
    (copied / INDEX).write_text(signed(document))
    for read in (read_checkpoint, read_metadata):
        with pytest.raises(UserError, match="of tensors"):
            read(copied)


def test_another_rest_is_refused(copied: Path) -> None:
    rest = next(copied.glob("rest-*.pt"))
    size = rest.stat().st_size
    content = torch.load(rest, weights_only=True)
    content["moeloom"]["windows_done"] = 4
    changed = io.BytesIO()
    torch.save(content, changed)
    rest.write_bytes(changed.getvalue())
    assert rest.stat().st_size == size
    for read in (read_checkpoint, read_metadata):
        with pytest.raises(UserError, match=r"rest-\w+\.pt: has changed since it was written"):
            read(copied)


def test_no_flipped_bit_changes_what_is_read(saved: Path, copied: Path) -> None:
    draw = random.Random(1)
    before = read_checkpoint(saved)
    for file in sorted(saved.iterdir()):
        for _ in range(12):
            content = file.read_bytes()
            bit = draw.randrange(8 * len(content))
            (copied / file.name).write_bytes(flip_bit(content, bit))
            try:
                found = read_checkpoint(copied)
            except UserError:
                continue
            assert_same(found, before)
        shutil.copy(file, copied / file.name)


def broken_save(folder: Path, work: Path, breaks: Callable[[int], None]) -> None:
    """Saves other numbers into a checkpoint on two ranks, which do not come to the end of it."""
    work.mkdir()

    def save(rank: int) -> None:
        breaks(rank)
        axes = {"state_dict.model.matrix": 1}
        parts = parts_of(rank, 2, axes, empty=True)
        save_shards(parts, REST, folder, dist.group.WORLD, asynchronous=False)  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match="exit codes"):
        on_ranks(save, work, world=2)


def die(*_: Any) -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def half(file: Path, content: bytes) -> None:
    """Writes half of a file, and ends the process."""
    file.write_bytes(content[: len(content) // 2])
    die()


def no_space(file: Path, content: bytes) -> None:
    """Raises the error of a disk without space."""
    raise OSError(28, "No space left on device")


BREAKS: dict[str, Callable[[int], None]] = {
    "a rank dies before it writes": lambda rank: rank == 1 and set_write(die),
    "a rank dies in the middle of a file": lambda rank: rank == 1 and set_write(half),
    "the first rank dies before the index": lambda rank: rank == 0 and set_index(die),
    "a rank has no space": lambda rank: rank == 1 and set_write(no_space),
}


def set_write(function: Callable[..., None]) -> None:
    """Replaces what writes a file."""
    shard_storage._write = function  # type: ignore[assignment]


def set_index(function: Callable[..., None]) -> None:
    """Replaces what writes the index."""
    ShardIndex.write = function  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("how", sorted(BREAKS))
def test_whatever_breaks_a_save_the_checkpoint_that_was_there_stays_whole(
    copied: Path, tmp_path: Path, how: str
) -> None:
    broken_save(copied, tmp_path / "work", BREAKS[how])
    whole = whole_tensors()["state_dict.model.matrix"]
    assert torch.equal(read_checkpoint(copied)["state_dict"]["model.matrix"], whole)
    remove_partial_checkpoints(copied.parent)
    assert not list(files_left_over(copied))
    assert torch.equal(read_checkpoint(copied)["state_dict"]["model.matrix"], whole)


def test_a_save_that_broke_off_is_no_checkpoint_and_is_swept_away(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)
    begun = tmp_path / "checkpoints" / "step-00000004.ckpt"
    broken_save(begun, tmp_path / "work", BREAKS["the first rank dies before the index"])
    assert begun.is_dir()
    assert [path.name for path in checkpoints_in(tmp_path)] == [saved.name]
    with pytest.raises(UserError, match=r"index\.json, which is written last, is missing"):
        read_checkpoint(begun)
    remove_partial_checkpoints(tmp_path / "checkpoints")
    assert not begun.exists()


OF_OTHERS = ("notes.txt", "model.safetensors", "weights.pt", "x.tmp")


def test_removing_and_sweeping_delete_no_file_of_others(copied: Path) -> None:
    export = copied.parent / "export.ckpt"
    broken = copied.parent / "step-00000009.ckpt"
    for folder in (copied, export, broken):
        folder.mkdir(exist_ok=True)
        for name in OF_OTHERS:
            (folder / name).write_text("mine")
    before = read_checkpoint(copied)
    remove_partial_checkpoints(copied.parent)
    assert_same(read_checkpoint(copied), before)
    for folder in (copied, export, broken):
        assert {path.name for path in folder.iterdir()} >= set(OF_OTHERS)
    remove_checkpoint(copied)
    assert {path.name for path in copied.iterdir()} == set(OF_OTHERS)
    assert not is_sharded(copied)


def test_a_damaged_checkpoint_does_not_stop_the_sweep(copied: Path) -> None:
    other = copied.parent / "best.ckpt"
    shutil.copytree(copied, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    (copied / "rank-00000-0123abcd-000.safetensors").write_text("left by a save")
    names = {path.name for path in other.iterdir()}
    remove_partial_checkpoints(copied.parent)
    assert {path.name for path in other.iterdir()} == names
    assert not list(files_left_over(copied))


def test_a_link_in_the_place_of_a_checkpoint_is_replaced_and_what_it_names_stays(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "rank-00000-0123abcd-000.safetensors").write_text("precious")
    folder = tmp_path / "best.ckpt"
    folder.symlink_to(mine)
    save_on_ranks(folder, 2, {}, tmp_path / "work")
    assert not folder.is_symlink()
    assert [path.name for path in mine.iterdir()] == ["rank-00000-0123abcd-000.safetensors"]
    load_on_ranks(folder, 1, {}, tmp_path / "load")


def test_a_checkpoint_of_another_kind_is_replaced_when_the_new_one_is_whole(
    copied: Path, tmp_path: Path
) -> None:
    best = copied.parent / "best.ckpt"
    torch.save(read_checkpoint(copied), best)
    before = read_checkpoint(best)
    broken_save(best, tmp_path / "broken", BREAKS["the first rank dies before the index"])
    remove_partial_checkpoints(best.parent)
    assert best.is_file()
    assert_same(read_checkpoint(best), before)
    save_on_ranks(best, 2, {}, tmp_path / "work")
    assert is_sharded(best)
    AtomicCheckpointIO().save_checkpoint(before, best)
    assert best.is_file()
    assert_same(read_checkpoint(best), before)
    assert sorted(path.name for path in best.parent.iterdir()) == [best.name, copied.name]


def test_ranks_leave_nothing_of_a_save_that_failed_on_one(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000004.ckpt"
    broken_save(folder, tmp_path / "work", BREAKS["a rank has no space"])
    assert list(folder.iterdir()) == []


def test_what_a_failed_save_deletes_is_not_in_the_index(copied: Path) -> None:
    """The first rank may have failed after it had replaced the index."""
    before = read_checkpoint(copied)
    left = copied / "rank-00000-0123abcd-000.safetensors"
    left.write_text("of the failed save")
    writer = shard_storage.ShardWriter(copied, b"")
    writer.written = [*copied.iterdir()]
    writer.discard()
    assert not left.exists()
    assert_same(read_checkpoint(copied), before)


def test_a_state_of_another_shape_than_its_weight_is_one_sentence() -> None:
    shard = WeightShard(torch.zeros(4, 3))
    with pytest.raises(UserError, match=r"has the shape \[4\], and its weight \[4, 3\]"):
        shard.place(torch.zeros(4))


def test_an_asynchronous_save_has_the_numbers_of_its_moment(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003.ckpt"
    (tmp_path / "work").mkdir()
    axes = {"state_dict.model.matrix": 0}

    def save(rank: int) -> bool:
        may_write = threading.Event()
        write = shard_storage._write

        def waiting(file: Path, content: bytes) -> None:
            assert may_write.wait(30)
            write(file, content)

        set_write(waiting)
        parts = parts_of(rank, 2, axes, empty=False)
        group = dist.new_group(backend="gloo")
        pending = save_shards(parts, REST, folder, group, asynchronous=True)
        for part in parts.values():
            part.tensor.add_(1)  # training goes on
        dist.barrier()  # and so do its exchanges
        was_open = not is_sharded(folder)
        may_write.set()
        assert pending is not None
        pending.result()
        return was_open

    assert on_two_ranks(save, tmp_path / "work") == [True, True]
    load_on_ranks(folder, 3, {"state_dict.model.stack": 1}, tmp_path / "load")


def test_a_failed_asynchronous_save_is_as_user_error_on_every_rank_at_the_next_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "work").mkdir()
    folder = tmp_path / "run" / "checkpoints" / "step-00000003.ckpt"

    def save(rank: int) -> str:
        files = ShardedCheckpointIO(asynchronous=True)
        if rank == 1:
            set_write(no_space)
        parts = parts_of(rank, 2, {}, empty=False)
        state = {name[11:]: part for name, part in parts.items() if name.startswith("state_dict.")}
        files.save_checkpoint({**REST, "state_dict": state}, folder)
        try:
            files.wait()
        except UserError as error:
            return str(error)
        return ""

    one, two = on_two_ranks(save, tmp_path / "work")
    assert one == two
    assert one.startswith(f"{folder}: this checkpoint cannot be written (rank 1: No space left")
    assert one.endswith(f"--resume {tmp_path / 'run'}")
    assert not is_sharded(folder)


def test_a_file_that_is_missing_or_changed_is_found_before_a_number_is_taken(copied: Path) -> None:
    file = sorted(copied.glob("*.safetensors"))[0]
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="has changed since it was written"):
        ShardReader(copied).check()
    file.unlink()
    with pytest.raises(DocumentError, match="there is no such file"):
        read_index(copied)


def test_boxes_of_parts_agree_with_slices(saved: Path) -> None:
    reader = ShardReader(saved)
    stack = whole_tensors()["state_dict.model.stack"]
    draw = random.Random(2)
    for _ in range(50):
        offsets: list[int] = []
        lengths: list[int] = []
        for size in stack.shape:
            begin = draw.randrange(size)
            offsets.append(begin)
            lengths.append(draw.randint(1, size - begin))
        expected = stack[slices(offsets, lengths)]
        assert torch.equal(reader.read_slice("state_dict.model.stack", offsets, lengths), expected)


def slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    """The slices of a box."""
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
