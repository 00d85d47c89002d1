"""Whole runs with sharded checkpoints: killed, continued on another layout, exported, and without any checkpoint."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same, assert_same_run, checkpoint_names, forked, last_checkpoint, rows
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from safetensors.torch import load_file
from tiers import first_by_default

from core.checkpoints import shard_storage, sharded_saving
from core.checkpoints.index import INDEX, ShardIndex, is_sharded, read_index
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.checkpoints.shards import ShardReader
from core.contracts.errors import Interrupted, RunFailed, UserError
from core.run.loading import load
from core.training import callbacks

FP64 = "precision.name=fp64"
STRATEGIES = {
    "fsdp 2": (2, "strategy={name: fsdp, ranks: 2}"),
    "experts 2": (2, "strategy={name: expert_parallel, expert_ranks: 2}"),
    "experts 4": (4, "strategy={name: expert_parallel, expert_ranks: 4}"),
    "data 2 x experts 2": (4, "strategy={name: expert_parallel, expert_ranks: 2, ranks: 4}"),
}
EXPORTED = "model.blocks.moe.ffn.router.group_score=2"
"""The router of DeepSeek-V3, which can be exported."""

ALL = ("checkpoint.keep=9", "checkpoint.every_steps=5")


def train(lab: Lab, run: Path, layout: str, *overrides: str, **options: Any) -> Path:
    """Trains the small recipe in fp64 on a layout, or on one process."""
    if layout == "one":
        lab.fit(run, FP64, *ALL, *overrides, resume=options.get("resume", False))
        return run
    ranks, strategy = STRATEGIES[layout]
    fit_on_ranks(lab, run, FP64, *ALL, strategy, *overrides, ranks=ranks, **options)
    return run


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A whole run on a layout."""
    known: dict[str, Path] = {}

    def trained(layout: str) -> Path:
        if layout not in known:
            known[layout] = train(lab, tmp_path_factory.mktemp("whole") / "run", layout)
        return known[layout]

    return trained


def test_a_strategy_that_leaves_weights_whole_saves_one_file(lab: Lab) -> None:
    sentence = "checkpoint.sharded = true: must be false or null under strategy single"
    with pytest.raises(UserError, match=sentence):
        lab.recipe("checkpoint.sharded=true")
    with pytest.raises(UserError, match=r"checkpoint\.asynchronous = true: must be false unless"):
        lab.recipe("checkpoint.asynchronous=true")
    strategy = STRATEGIES["fsdp 2"][1]
    assert lab.recipe(strategy).shards_checkpoints
    assert not lab.recipe(strategy, "checkpoint.sharded=false").shards_checkpoints


def test_a_run_without_checkpoints_saves_none_and_has_its_results(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = lab.fit(run, "checkpoint.every_steps=null", "budget.steps=3")
    assert summary["steps"] == 3
    assert checkpoint_names(run) == []
    assert len(rows(run)) == 4
    assert (run / "sample.txt").read_text()


def test_a_signal_ends_a_run_without_checkpoints_and_says_that_nothing_is_saved(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def stopped() -> None:
        before = callbacks.StepLog.on_train_batch_end

        def signalled(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
            before(self, trainer, module, *rest)
            if module.windows_done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        callbacks.StepLog.on_train_batch_end = signalled  # type: ignore[method-assign]
        try:
            lab.fit(run, "checkpoint.every_steps=null")
        except Interrupted as error:
            print(error)
            raise SystemExit(128 + error.signum) from None

    found = forked(stopped)
    assert found.code == 128 + signal.SIGTERM, found.err
    assert found.out.strip() == (
        "stopped by SIGTERM after step 2, and nothing is saved, as checkpoint.every_steps is null; "
        f"{run} has its log"
    )
    assert checkpoint_names(run) == []
    assert lab.fit(run, "checkpoint.every_steps=null", resume=True)["steps"] == 12
    assert [row["step"] for row in rows(run) if "lr" in row] == [str(n) for n in range(1, 13)]


@pytest.mark.parametrize(
    "layout", first_by_default(["fsdp 2", *sorted(STRATEGIES.keys() - {"fsdp 2"})])
)
def test_a_run_continues_at_its_layout_to_the_same_bits(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    run = cut_after(whole(layout), 5, tmp_path / "run")
    train(lab, run, layout, resume=True)
    one, two = last_checkpoint(run), last_checkpoint(whole(layout))
    for key in ("state_dict", "optimizer_states", "loops"):
        assert_same(one[key], two[key])
    assert_same(rows(run), rows(whole(layout)))
    assert (run / "sample.txt").read_text() == (whole(layout) / "sample.txt").read_text()


@pytest.mark.full
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("experts 2", "one"),
        ("experts 2", "experts 4"),
        ("experts 4", "experts 2"),
        ("data 2 x experts 2", "one"),
        ("data 2 x experts 2", "fsdp 2"),
        ("fsdp 2", "one"),
        ("fsdp 2", "data 2 x experts 2"),
        ("one", "data 2 x experts 2"),
    ],
)
def test_a_run_continues_on_another_layout(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path, first: str, then: str
) -> None:
    run = cut_after(whole(first), 5, tmp_path / "run")
    train(lab, run, then, resume=True)
    assert_same_end(whole("one"), run)


def die(*_: Any, **__: Any) -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def half(file: Path, content: bytes) -> None:
    """Writes half of a file, and ends the process."""
    file.write_bytes(content[: len(content) // 2])
    die()


def at(step: int, replace: Callable[[], None]) -> Callable[[int], None]:
    """Breaks the save after a step."""

    def prepared(rank: int) -> None:
        save = callbacks.save_step

        def breaking(trainer: Any, module: Any, folder: Path) -> None:
            if module.windows_done == step:
                replace()
            save(trainer, module, folder)

        callbacks.save_step = breaking

    return prepared


def on_rank(chosen: int, prepare: Callable[[int], None]) -> Callable[[int], None]:
    """Breaks one rank alone."""
    return lambda rank: prepare(rank) if rank == chosen else None


def set_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replaces an attribute."""
    return lambda: setattr(owner, name, value)


def dies_before_removing(path: Path) -> None:
    """Ends the process when the oldest checkpoint has lost its index and nothing else."""
    (path / INDEX).unlink()
    die()


def dies_after_saving(step: int) -> None:
    """Ends the process when a checkpoint is saved or, if it is saved while training goes on, staged."""
    save = sharded_saving.ShardedCheckpointIO.save_checkpoint

    def dying(self: Any, content: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(self, content, path, storage_options)
        if Path(path).name == f"step-{step:08d}.ckpt":
            die()

    sharded_saving.ShardedCheckpointIO.save_checkpoint = dying  # type: ignore[method-assign]


KILLED: dict[str, Callable[[int], None]] = {
    "rank 0 before it writes a shard": on_rank(
        0, at(10, set_attribute(shard_storage, "_write", die))
    ),
    "rank 1 before it writes a shard": on_rank(
        1, at(10, set_attribute(shard_storage, "_write", die))
    ),
    "rank 1 when a shard is half written": on_rank(
        1, at(10, set_attribute(shard_storage, "_write", half))
    ),
    "rank 0 before the index": on_rank(0, at(10, set_attribute(ShardIndex, "write", die))),
    "rank 0 after the index": on_rank(
        0, at(10, set_attribute(shard_storage, "files_left_over", die))
    ),
    "rank 0 when the oldest checkpoint is half removed": on_rank(
        0, at(12, set_attribute(callbacks, "remove_checkpoint", dies_before_removing))
    ),
    "rank 1 after the checkpoint": on_rank(1, lambda rank: dies_after_saving(10)),
}


WHILE_TRAINING = ("rank 1 when a shard is half written", "rank 0 before the index")
"""Moments at which a rank is also killed in an asynchronous save."""


@pytest.mark.full
@pytest.mark.parametrize(
    ("moment", "asynchronous"),
    [*((moment, False) for moment in sorted(KILLED)), *((m, True) for m in WHILE_TRAINING)],
)
def test_a_run_with_a_killed_rank_resumes_to_the_same_bits(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path, moment: str, asynchronous: bool
) -> None:
    run = tmp_path / "run"
    keep = ("checkpoint.keep=1", f"checkpoint.asynchronous={str(asynchronous).lower()}")
    with pytest.raises(AssertionError, match="exit codes"):
        train(lab, run, "experts 2", *keep, before=KILLED[moment])
    assert not (run / "summary.json").exists()
    for checkpoint in checkpoints_in(run):
        assert is_sharded(checkpoint)
        ShardReader(checkpoint).check()
    train(lab, run, "experts 2", "checkpoint.keep=9", resume=True)
    one, two = last_checkpoint(run), last_checkpoint(whole("experts 2"))
    for key in ("state_dict", "optimizer_states", "loops"):
        assert_same(one[key], two[key])
    assert_same(rows(run), rows(whole("experts 2")))
    for checkpoint in (run / "checkpoints").iterdir():
        listed = {INDEX, *read_index(checkpoint).files}
        assert {file.name for file in checkpoint.iterdir()} == listed


@pytest.mark.full
def test_an_asynchronous_run_saves_the_same_bits(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = train(lab, tmp_path / "run", "experts 2", "checkpoint.asynchronous=true")
    assert checkpoint_names(run) == checkpoint_names(whole("experts 2"))
    for checkpoint in checkpoints_in(run):
        twin = whole("experts 2") / "checkpoints" / checkpoint.name
        one, two = ShardReader(checkpoint), ShardReader(twin)
        assert one.index.tensors.keys() == two.index.tensors.keys()
        for name in one.index.tensors:
            assert torch.equal(one.tensor(name), two.tensor(name)), (checkpoint.name, name)
    assert_same_run(run, whole("experts 2"))


def slow_writing(seconds: float) -> None:
    """Makes every file take some time."""
    write = shard_storage._write

    def slow(file: Path, content: bytes) -> None:
        time.sleep(seconds)
        write(file, content)

    shard_storage._write = slow


@pytest.mark.full
def test_a_run_that_fails_waits_for_the_checkpoint_that_is_being_written(
    lab: Lab, tmp_path: Path
) -> None:
    def fails(rank: int) -> None:
        slow_writing(1.0)
        before = callbacks.StepLog.on_train_batch_end

        def failing(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
            before(self, trainer, module, *rest)
            if module.windows_done == 6:
                raise RunFailed("no further")

        callbacks.StepLog.on_train_batch_end = failing  # type: ignore[method-assign]

    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="no further"):
        train(lab, run, "fsdp 2", "checkpoint.asynchronous=true", before=fails)
    assert [path.name for path in checkpoints_in(run)] == ["step-00000005.ckpt"]
    ShardReader(run / "checkpoints" / "step-00000005.ckpt").check()


@pytest.mark.full
def test_no_step_is_saved_twice_while_training_goes_on(lab: Lab, tmp_path: Path) -> None:
    written = tmp_path / "written"

    def counted(rank: int) -> None:
        slow_writing(0.3)
        write = ShardIndex.write

        def noted(self: ShardIndex, folder: Path) -> None:
            with written.open("a") as log:
                log.write(folder.name + "\n")
            write(self, folder)

        ShardIndex.write = noted  # type: ignore[method-assign]

    train(lab, tmp_path / "run", "fsdp 2", "checkpoint.asynchronous=true", before=counted)
    steps = [line for line in written.read_text().split() if line.startswith("step")]
    assert steps == [f"step-{step:08d}.ckpt" for step in (5, 10, 12)]


@pytest.mark.full
def test_a_signal_waits_for_the_checkpoint_that_is_being_written(lab: Lab, tmp_path: Path) -> None:
    def signalled(rank: int) -> None:
        slow_writing(0.3)
        before = callbacks.StepLog.on_train_batch_end

        def sending(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
            before(self, trainer, module, *rest)
            if module.windows_done == 6 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        callbacks.StepLog.on_train_batch_end = sending  # type: ignore[method-assign]

    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="stopped by SIGTERM after step 6, which is saved"):
        train(lab, run, "experts 2", "checkpoint.asynchronous=true", before=signalled)
    names = [path.name for path in checkpoints_in(run)]
    assert names == ["step-00000005.ckpt", "step-00000006.ckpt"]


@pytest.mark.full
def test_one_damaged_checkpoint_does_not_stop_a_run_that_continues_from_another(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole("experts 2"), run)
    (run / "summary.json").unlink()
    shard = sorted((run / "checkpoints" / "step-00000005.ckpt").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    train(lab, run, "experts 2", resume=True)
    newest = sorted((run / "checkpoints" / "step-00000012.ckpt").glob("*.safetensors"))[0]
    newest.write_bytes(newest.read_bytes()[:100])
    (run / "summary.json").unlink()
    sentence = r"not a whole checkpoint: .* has 100 bytes.*others here: best\.ckpt, step-00000005"
    with pytest.raises(AssertionError, match=sentence):
        train(lab, run, "experts 2", resume=True)


@pytest.mark.full
def test_a_best_checkpoint_of_one_file_gives_way_to_a_sharded_one(lab: Lab, tmp_path: Path) -> None:
    """The first rank is slow, so that others would be first to make the folder."""

    def slow(rank: int) -> None:
        write = callbacks.LoadLog.write

        def late(self: Any) -> None:
            time.sleep(0.2)
            write(self)

        callbacks.LoadLog.write = late  # type: ignore[method-assign]

    run = train(
        lab, tmp_path / "run", "fsdp 2", "checkpoint.sharded=false", "validation.every_steps=2"
    )
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    (cut / "summary.json").unlink()
    for step in (10, 12):
        (cut / "checkpoints" / f"step-{step:08d}.ckpt").unlink()
    train(lab, cut, "fsdp 2", "validation.every_steps=2", resume=True, before=slow)
    assert is_sharded(cut / "checkpoints" / "best.ckpt")
    assert_same(
        read_checkpoint(cut / "checkpoints" / "best.ckpt")["state_dict"],
        read_checkpoint(run / "checkpoints" / "best.ckpt")["state_dict"],
    )


@pytest.mark.full
def test_a_sharded_run_can_be_used_like_any_other(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is loaded, generates, is evaluated, exported, and gives other runs their initial weights."""
    sharded = train(lab, tmp_path / "sharded", "data 2 x experts 2", EXPORTED)
    alone = train(lab, tmp_path / "alone", "one", EXPORTED)
    state = load(alone).state_dict()
    for name, value in load(sharded).state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-9)
    for name, arguments in {
        "generate": ("--prompt", "ab", "--tokens", "8", "--temperature", "0"),
        "evaluate": ("--json",),
    }.items():
        one = lab.command(name, sharded, *arguments)
        two = lab.command(name, alone, *arguments)
        assert one.code == two.code == 0, one.err
        assert rounded(one.out) == rounded(two.out)
    # an export must read a few rows at a time, and never a whole tensor
    monkeypatch.setattr(ShardReader, "tensor", lambda *_: pytest.fail("a whole tensor was read"))
    for run, out in ((sharded, tmp_path / "one"), (alone, tmp_path / "two")):
        done = lab.command("convert", "to-hf", run, out, "--dtype", "fp64")
        assert done.code == 0, done.err
    for file in (tmp_path / "two").glob("*.safetensors"):
        expected = load_file(file)
        for name, value in load_file(tmp_path / "one" / file.name).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    monkeypatch.undo()
    start = ("budget.steps=3", EXPORTED)
    named = [
        train(lab, tmp_path / f"from-{n}", layout, *start, f"initial_weights={run}")
        for n, (layout, run) in enumerate(
            [("one", alone), ("one", sharded), ("experts 2", sharded), ("fsdp 2", alone)]
        )
    ]
    for run in named[1:]:
        assert_same_end(named[0], run)


def rounded(printed: str) -> str:
    """Printed text with numbers of at most six digits."""
    return re.sub(r"\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.6g}", printed)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["experts 2", "one"])
def test_a_damaged_or_diverged_checkpoint_is_as_user_error_on_every_rank(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    run = cut_after(whole("experts 2"), 10, tmp_path / "run")
    shutil.copytree(run, tmp_path / "copy")
    index = read_index(run / "checkpoints" / "step-00000010.ckpt")
    name = next(n for n in index.tensors if n.endswith("blocks.1.ffn.routed.down.weight"))
    file = run / "checkpoints" / "step-00000010.ckpt" / index.tensors[name].shards[1].file
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises((AssertionError, UserError), match="has changed since it was written"):
        train(lab, run, layout, resume=True)
    write_nan(tmp_path / "copy" / "checkpoints" / "step-00000010.ckpt", name)
    with pytest.raises((AssertionError, UserError), match="cannot be continued from here"):
        train(lab, tmp_path / "copy", layout, resume=True)


def write_nan(folder: Path, name: str) -> None:
    """Puts a NaN into the second part of a tensor of a checkpoint, whose checksums then fit again."""
    from safetensors.torch import save

    from core.checkpoints.index import FileRecord

    index = read_index(folder)
    file = folder / index.tensors[name].shards[1].file
    tensors = load_file(file)
    tensors[name].view(-1)[0] = float("nan")
    content = save(tensors)
    file.write_bytes(content)
    files = {**index.files, file.name: FileRecord.of(content)}
    ShardIndex(index.rest, files, index.tensors).write(folder)


@pytest.mark.full
def test_checkpoints_of_one_file_are_still_written_on_request(
    lab: Lab, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = train(lab, tmp_path / "run", "experts 2", "checkpoint.sharded=false")
    assert all(file.is_file() for file in (run / "checkpoints").iterdir())
    assert_same(
        last_checkpoint(run)["state_dict"], last_checkpoint(whole("experts 2"))["state_dict"]
    )
    back = cut_after(run, 5, tmp_path / "back")
    train(lab, back, "experts 2", resume=True)
    assert is_sharded(checkpoints_in(back)[-1])
    assert_same_end(run, back)
