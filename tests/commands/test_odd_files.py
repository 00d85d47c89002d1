"""Odd corpora, recipes and disks: each works, or is one sentence."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import SMALL, Lab, write_texts

from core.command import system_error
from core.contracts.errors import UserError
from core.data.documents import fingerprint
from core.data.held_out import read_split
from core.recipe.compose import compose
from core.run.environment import check_environment
from plugins.text_files.corpus import TextFiles


def files_of(*patterns: str) -> list[str]:
    """The names of the documents that some globs match."""
    corpus = TextFiles(TextFiles.Config(paths=list(patterns)))
    return sorted(Path(document.source).name for document in corpus.documents())


def test_folders_with_brackets_and_upper_case_endings_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "[web] crawl"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.TXT").write_text("b")
    assert files_of(f"{folder}/*.txt") == ["a.txt"]
    assert files_of(f"{folder}/*.txt", f"{folder}/*.TXT") == ["a.txt", "b.TXT"]
    assert files_of(f"{tmp_path}/[[]web] crawl/*.txt") == ["a.txt"]


def test_a_name_that_is_no_text_has_a_fingerprint(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("a")
    corpus = TextFiles(TextFiles.Config(paths=[f"{tmp_path}/*.txt"]))
    assert len(fingerprint(read_split(corpus).documents)) == 64


def test_one_document_trains_without_validation_and_says_so(lab: Lab, tmp_path: Path) -> None:
    write_texts(tmp_path / "one", count=1, words=400)
    paths = f"data.corpus.paths=['{tmp_path}/one/*.txt']"
    run = tmp_path / "run"
    result = lab.command("fit", lab.file, paths, "budget.steps=1", "--out", run)
    assert result.code == 0, result.err
    assert "no document is held out for validation" in result.err
    assert "val_dataloader" not in result.err
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert any("held out" in notice for notice in summary["notices"])


@pytest.mark.parametrize("name", ["/etc/passwd", "/etc/hosts"])
def test_extends_repeats_nothing_of_another_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {name}\n")
    with pytest.raises(UserError) as caught:
        compose(file)
    assert str(caught.value).startswith(f"{file}: extends = {name!r}: must be a recipe file")


def test_a_topology_that_leaves_one_expert_names_the_groups(lab: Lab) -> None:
    router = "model.blocks.moe.ffn.router"
    with pytest.raises(UserError) as caught:
        lab.recipe(f"{router}.groups=8", f"{router}.group_limit=1")
    sentence = str(caught.value)
    assert f"{router}.group_limit = 1: leaves 1 expert to choose from" in sentence
    assert "between" not in sentence


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.dim=1000000000000", "model.dim = 1000000000000: must be at most 2147483647"),
        ("model.blocks.moe.count=1000000", "model.blocks: holds 1000001 blocks"),
        ("model.dim=2000000000", "its sizes are too large"),
        ("model.blocks.dense.ffn.hidden=1000000000000", "must be at most 2147483647"),
        ("model.blocks.dense.ffn.hidden=2000000000", "its weights need "),
        ("model.heads.mtp.depth=1000000", "must be at most 1000"),
        ("data.tokenizer.vocab=256", "must be at least 257, as the corpus is text"),
        ("batch.accumulate=10000000", "must be at most 1000000"),
        ("budget.steps=100000000000000000000", "must be at most 9007199254740992"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    override: str, why: str, lab: Lab
) -> None:
    with pytest.raises(UserError) as caught:
        check_environment(lab.recipe(override))
    assert why in str(caught.value)


def test_errors_of_the_machine_are_sentences_and_others_are_not() -> None:
    assert "Read-only" in str(system_error(OSError(30, "Read-only file system", "/a")))
    assert "memory" in str(system_error(MemoryError()))
    assert system_error(FileNotFoundError(2, "No such file", "/a")) is None
    assert system_error(OSError("no path")) is None
    assert system_error(RuntimeError("a mistake of the program")) is None


@pytest.mark.full
def test_a_read_only_disk(lab: Lab, finished: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("nothing can be mounted here: not root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree(finished, disk / "run")
        (disk / "run" / "summary.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for option, name in (("--resume", "run"), ("--out", "new")):
            result = lab.command("fit", lab.file, option, disk / name)
            assert result.code == 2, result.err
            assert "Read-only file system" in result.sentence
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_recipe_of_the_fuzzer_is_the_small_one() -> None:
    assert "every_steps: 6" in SMALL
    assert "steps: 12" in SMALL
