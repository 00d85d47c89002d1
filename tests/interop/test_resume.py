"""A conversion that is stopped leaves no target, and goes on where it was; a second one does not get in its way."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lab import CommandResult, Lab, fill, forked, run_command_here, small_disk
from torch import Tensor

from core.interop import transfer
from core.interop.from_hf import from_hf
from core.interop.shards import Shards
from core.storage.lock import hold

from .checkpoints import V3, read, same_bits, tensors_of, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", V3, tensors_of(V3), 2)


def stopped_after(
    reads: int, stop: Callable[[], object], *arguments: str | Path, every: int = 1
) -> CommandResult:
    """A conversion that is stopped before so many reads of rows, with a journal entry for every so many bytes."""

    def work() -> None:
        count, plain = 0, Shards.read_rows

        def counted(self: Shards, name: str, begin: int, end: int) -> Tensor:
            nonlocal count
            count += 1
            if count > reads:
                stop()
            return plain(self, name, begin, end)

        transfer.EVERY = every
        Shards.read_rows = counted  # type: ignore[method-assign]
        run_command_here("convert", *arguments)

    return forked(work)


def reads_of(*arguments: str | Path) -> tuple[int, CommandResult]:
    """How often a conversion reads rows."""
    report, wrote = os.pipe()

    def work() -> None:
        count, plain = 0, Shards.read_rows

        def counted(self: Shards, name: str, begin: int, end: int) -> Tensor:
            nonlocal count
            count += 1
            return plain(self, name, begin, end)

        Shards.read_rows = counted  # type: ignore[method-assign]
        try:
            run_command_here("convert", *arguments)
        finally:
            os.write(wrote, str(count).encode())

    result = forked(work)
    os.close(wrote)
    with os.fdopen(report) as stream:
        return int(stream.read()), result


def interrupted() -> None:
    raise KeyboardInterrupt


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("stop", "code"), [(interrupted, 130), (killed, 137)])
@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_a_second_run_goes_on(
    lab: Lab, source: Path, tmp_path: Path, command: str, stop: Callable[[], object], code: int
) -> None:
    expected = tmp_path / "whole"
    if command == "to-hf":
        lab.command("convert", "from-hf", source, tmp_path / "run")
        source = tmp_path / "run"
    total, result = reads_of(command, source, expected)
    assert result.code == 0
    first = stopped_after(30, stop, command, source, tmp_path / "out")
    assert first.code == code
    assert ("the same command continues" in first.err) == (code == 130)
    assert not (tmp_path / "out").exists()
    again, result = reads_of(command, source, tmp_path / "out")
    assert result.code == 0, result.err
    assert "continuing " in result.err
    assert again == total - 30
    weights = "weights" if command == "from-hf" else "."
    same_bits(read(tmp_path / "out" / weights), read(expected / weights))
    names = [
        sorted(str(f.relative_to(place)) for f in place.rglob("*"))
        for place in (expected, tmp_path / "out")
    ]
    assert names[0] == names[1]
    assert not list(tmp_path.glob(".*"))


def test_what_was_not_yet_in_the_journal_is_done_again(
    lab: Lab, source: Path, tmp_path: Path
) -> None:
    total, _ = reads_of("from-hf", source, tmp_path / "whole")
    stopped_after(30, killed, "from-hf", source, tmp_path / "out", every=10**9)
    again, result = reads_of("from-hf", source, tmp_path / "out")
    assert (again, result.code) == (total, 0)
    same_bits(read(tmp_path / "out/weights"), read(tmp_path / "whole/weights"))


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is synced before the rename, and the folder that names the target after it."""
    synced: set[int] = set()
    before: list[set[int]] = []
    sync, rename = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def renamed(here: Path, there: Path) -> None:
        rename(here, there)
        if Path(there) == tmp_path / "out":
            before.append(set(synced))
            synced.clear()

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    from_hf(source, tmp_path / "out", say=lambda _: None)
    whole = {path.stat().st_ino for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert len(whole) > 6
    assert len(before) == 1
    assert whole <= before[0]
    assert tmp_path.stat().st_ino in synced


@pytest.mark.parametrize("what", ["the source", "the wish"])
def test_what_was_begun_otherwise_is_begun_anew(
    lab: Lab, source: Path, tmp_path: Path, what: str
) -> None:
    stopped_after(30, killed, "from-hf", source, tmp_path / "out")
    wish: list[str] = ["--dtype", "bf16"] if what == "the wish" else []
    if what == "the source":
        tensors = {name: -tensor for name, tensor in read(source).items()}
        write(tmp_path / "other", V3, tensors, 2)
        for file in (tmp_path / "other").iterdir():
            os.replace(file, source / file.name)
    total, _ = reads_of("from-hf", source, tmp_path / "whole", *wish)
    again, result = reads_of("from-hf", source, tmp_path / "out", *wish)
    assert (again, result.code) == (total, 0)
    assert "continuing " not in result.err
    same_bits(read(tmp_path / "out/weights"), read(tmp_path / "whole/weights"))


def test_two_conversions_to_one_folder_are_refused(lab: Lab, source: Path, tmp_path: Path) -> None:
    with hold(tmp_path / ".out.lock"):
        result = lab.command("convert", "from-hf", source, tmp_path / "out")
    assert result.code == 2
    assert result.sentence == f"{tmp_path}/out: process {os.getpid()} is converting to it"
    assert list(tmp_path.iterdir()) == [source]


def test_a_conversion_that_ends_meanwhile_is_not_overwritten(
    lab: Lab, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target appears between the first look at it and the lock."""
    checked = transfer.check_target
    monkeypatch.setattr("core.interop.from_hf.check_target", lambda *_: None)

    def appears(target: Path, how: str) -> None:
        (target / "weights").mkdir(parents=True, exist_ok=True)
        checked(target, how)

    monkeypatch.setattr(transfer, "check_target", appears)
    result = lab.command("convert", "from-hf", source, tmp_path / "out")
    assert result.code == 2
    assert "is not empty, and nothing is overwritten" in result.sentence
    assert {file.name for file in tmp_path.iterdir()} == {source.name, "out"}


def test_a_folder_of_somebody_else_is_left_alone(lab: Lab, source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/diary.txt").write_text("mine")
    result = lab.command("convert", "from-hf", source, tmp_path / "out")
    assert result.code == 2
    assert "is in the way" in result.sentence
    assert (tmp_path / ".out.partial/diary.txt").read_text() == "mine"


def test_a_disk_that_fills_up_on_the_way_costs_nothing_that_is_done(
    lab: Lab, source: Path, tmp_path: Path
) -> None:
    """The files have their places by then; what may still be lacking is a journal entry or a small file."""
    with small_disk(tmp_path / "disk", kilobytes=1000) as disk:
        result = stopped_after(30, lambda: fill(disk), "from-hf", source, disk / "out")
        assert result.code == 2
        assert "free some space and give the same command again" in result.sentence
        assert not (disk / "out").exists()
        (disk / "filler").unlink()
        again, result = reads_of("from-hf", source, disk / "out")
        assert result.code == 0, result.err
        total, _ = reads_of("from-hf", source, tmp_path / "whole")
        assert again <= total - 30
        same_bits(read(disk / "out/weights"), read(tmp_path / "whole/weights"))


def test_numbers_that_blocks_cannot_hold_leave_nothing(lab: Lab, tmp_path: Path) -> None:
    theirs = tensors_of(V3)
    theirs["model.layers.1.mlp.experts.2.up_proj.weight"][3, 3] = torch.inf
    source = write(tmp_path / "infinite", V3, theirs)
    lab.command("convert", "from-hf", source, tmp_path / "run", "--allow-non-finite")
    for allow in ([], ["--allow-non-finite"]):
        result = lab.command(
            "convert", "to-hf", tmp_path / "run", tmp_path / "out", "--fp8", *allow
        )
        assert result.code == 2
        found = "blocks.1.ffn.routed.gate_up.weight holds a number that is not finite"
        assert found in result.sentence
        assert "FP8 blocks cannot hold" in result.sentence
    assert sorted(f.name for f in tmp_path.iterdir()) == ["infinite", "run"]
