"""Checkpoint files: plain content, written whole, read without unpickling, and error messages about bad ones."""

import ast
import errno
import os
import pickle
import random
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flip_bit
from lab import (
    ROOT,
    Lab,
    assert_same,
    assert_same_run,
    forked,
    last_checkpoint,
    run_command_here,
    small_disk,
)
from tiers import first_by_default
from torch import Tensor

from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.checkpoints.saving import AtomicCheckpointIO
from core.contracts.errors import UserError
from core.training import callbacks

SCALARS = (Tensor, int, float, str, bool, type(None))
UNPICKLERS = ("pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle")
CONTAINERS = (dict, OrderedDict, list, tuple)


def kinds(value: Any) -> Iterator[type]:
    """The types of all values in nested containers."""
    yield type(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield type(key)
            yield from kinds(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from kinds(item)


def test_P23_a_checkpoint_holds_tensors_and_plain_containers_only(finished: Path) -> None:
    for file in (finished / "checkpoints").iterdir():
        content = torch.load(file, weights_only=True)
        assert set(kinds(content)) <= {*SCALARS, *CONTAINERS}, file.name


def test_P23_nothing_in_the_code_unpickles_what_it_was_given() -> None:
    """Every `torch.load` passes `weights_only=True`, and no code uses pickle or a library built on it."""
    found = []
    for file in [*ROOT.glob("core/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        if file.name == "forked_ranks.py":  # reads what its own child processes have computed
            continue
        source = file.read_text(encoding="utf-8")
        if not any(word in source for word in (*UNPICKLERS, "load", "allow_pickle")):
            continue
        for node in ast.walk(ast.parse(source)):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                found += [where for name in names if name.partition(".")[0] in UNPICKLERS]
            elif isinstance(node, ast.Call):
                settings = {
                    k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
                }
                if (
                    ast.unparse(node.func) == "torch.load"
                    and settings.get("weights_only") is not True
                ):
                    found.append(where)
                if settings.get("allow_pickle") or settings.get("weights_only", True) is None:
                    found.append(where)
    assert not found


def test_P23_a_checkpoint_that_carries_code_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trap),)

    file = tmp_path / "step-00000001.ckpt"
    torch.save({"moeloom": Trap(), "state_dict": {}}, file)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        read_checkpoint(file)
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="not a whole checkpoint"):
        read_checkpoint(file)
    assert not trap.exists()


DAMAGE = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: whole[:1],
    "cut in the header": lambda whole: whole[:100],
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"Shall I compare thee to a summer's day?",
    "the end of another file": lambda whole: whole[1000:],
    "a broken pickle": lambda whole: b"\x80\x02}q\x00X\x05\x00\x00\x00",
}


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run, whose newest checkpoint a test may damage."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    return run


@pytest.mark.parametrize("how", first_by_default(DAMAGE, keep=4))
def test_a_damaged_checkpoint_is_one_sentence_that_names_it_and_the_others(
    lab: Lab, damaged: Path, finished: Path, how: str
) -> None:
    file = checkpoints_in(damaged)[-1]
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    with pytest.raises(UserError) as caught:
        lab.fit(damaged, resume=True)
    assert str(caught.value).startswith(f"{file}: not a whole checkpoint")
    assert str(caught.value).endswith("others here: best.ckpt, step-00000010.ckpt")
    for name in ("best.ckpt", "step-00000010.ckpt"):
        assert (damaged / "checkpoints" / name).read_bytes() == (
            finished / "checkpoints" / name
        ).read_bytes()


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, {"weight": torch.zeros(2)}, torch.zeros(2), [1, 2]]
)
def test_a_file_of_another_program_is_reported_apart(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "other.ckpt"
    torch.save(content, file)
    with pytest.raises(UserError, match=f"{file}: a file of another program"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    "command", [("fit", "--resume"), ("evaluate",), ("generate", "--prompt", "a")]
)
def test_every_command_leaves_a_damaged_run_with_2_and_a_sentence(
    lab: Lab, damaged: Path, command: tuple[str, ...]
) -> None:
    file = checkpoints_in(damaged)[-1]
    file.write_bytes(file.read_bytes()[:1000])
    result = lab.command(
        command[0], *([lab.file] if command[0] == "fit" else []), *command[1:], damaged
    )
    assert result.code == 2
    assert result.sentence.startswith(f"{file}: not a whole checkpoint")
    assert result.out == ""


def test_without_the_damaged_file_the_run_goes_on_from_the_one_before(
    lab: Lab, damaged: Path, finished: Path
) -> None:
    checkpoints_in(damaged)[-1].unlink()
    lab.fit(damaged, resume=True)
    assert_same_run(damaged, finished)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "checkpoints" / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, file)
    old = file.read_bytes()

    def full(content: Any, stream: Any) -> None:
        stream.write(b"the first half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=f"{file}: this checkpoint cannot be written .No space left on device"
    ):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, file)
    assert [found.name for found in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == old


def test_half_a_checkpoint_left_by_a_kill_is_swept_away(lab: Lab, damaged: Path) -> None:
    checkpoints_in(damaged)[-1].unlink()
    half = damaged / "checkpoints" / ".step-00000011.ckpt.tmp"
    half.write_bytes(b"half")
    lab.fit(damaged, resume=True)
    assert not half.exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2,200 kB, which holds two checkpoints of the small run and their logs."""
    with small_disk(tmp_path / "disk", kilobytes=2200) as folder:
        yield folder


@pytest.mark.full
@pytest.mark.parametrize(
    "suddenly", [False, True], ids=["no space for a checkpoint", "no space for anything"]
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    lab: Lab, finished: Path, disk: Path, suddenly: bool
) -> None:
    run = disk / "run"

    def fill(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        if module.windows_done == 8:
            with (disk / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(1 << 20)) == 1 << 20:
                    pass

    def work() -> None:
        if suddenly:
            callbacks.KeepLatest.on_train_batch_start = fill
        run_command_here("fit", lab.file, "--out", run)

    result = forked(work)
    assert result.code == 2, result.err
    assert "free some space and continue with --resume" in result.sentence
    assert [file.name for file in checkpoints_in(run)] == ["step-00000005.ckpt"]
    assert last_checkpoint(run)["moeloom"]["windows_done"] == 5
    assert not [file for file in run.rglob("*.tmp") if "ckpt" in file.name]
    (disk / "filler").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    lab.fit(run, resume=True)
    assert_same_run(run, finished)


def test_no_flipped_bit_of_a_checkpoint_changes_what_is_read(
    finished: Path, tmp_path: Path
) -> None:
    """A flip is noticed, or it is in the padding between records and the content is the same."""
    whole = checkpoints_in(finished)[-1].read_bytes()
    content = read_checkpoint(checkpoints_in(finished)[-1])
    file = tmp_path / "step-00000012.ckpt"
    draw = random.Random(0)
    noticed = 0
    for _ in range(60):
        file.write_bytes(flip_bit(whole, draw.randrange(8 * len(whole))))
        try:
            found = read_checkpoint(file)
        except UserError:
            noticed += 1
        else:
            assert_same(found, content)
    assert noticed > 40


def test_a_flipped_bit_of_a_weight_is_one_sentence_for_every_command(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    file = checkpoints_in(run)[-1]
    state = read_checkpoint(file)["state_dict"]
    weight = state["model.embedding.weight"].numpy().tobytes()
    whole = file.read_bytes()
    file.write_bytes(flip_bit(whole, 8 * whole.index(weight) + 5))
    others = "others here: best.ckpt, step-00000010.ckpt"
    commands: list[list[str | Path]] = [
        ["fit", lab.file, "--resume", run],
        ["evaluate", run],
        ["generate", run, "--prompt", "a"],
        ["convert", "to-hf", run, tmp_path / "hf"],
    ]
    for name, *arguments in commands:
        result = lab.command(str(name), *arguments)
        assert result.code == 2, name
        assert result.sentence.startswith(f"{file}: has changed since it was written: ")
        assert result.sentence.endswith(others)
    assert not (tmp_path / "hf").exists()
