"""`core.cache` lists and removes what was prepared, and nothing else in the folder."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from lab import Lab

from core.data.cache import array_writer, write_entry

ONE = "a" * 64
TWO = "ab" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two entries, and things that are none."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOELOOM_CACHE", str(folder))
    for name, tokens in ((ONE, 5), (TWO, 700)):
        write_entry(folder / name, {"train.tokens.npy": array_writer(np.zeros(tokens, np.uint16))})
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / ("c" * 64)).symlink_to(folder / "notes")
    past = time.time() - 40 * 86400
    for file in (folder / ONE).iterdir():
        os.utime(file, (past, past))
    return folder


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if len(path.name) == 64 and not path.is_symlink()}


def test_entries_are_listed_with_their_tokens(lab: Lab, cache: Path) -> None:
    done = lab.command("cache", "--json")
    document = json.loads(done.out)
    assert document["folder"] == str(cache)
    assert [(e["name"], e["train_tokens"]) for e in document["entries"]] == [(TWO, 700), (ONE, 5)]
    assert document["entries"][1]["days"] == pytest.approx(40, abs=0.1)
    assert "prepared data: 2 entries" in lab.command("cache").out


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["aaa"], {TWO}),
        ([TWO], {ONE}),
        (["--older-than", "30"], {TWO}),
        (["--older-than", "50"], {ONE, TWO}),
        (["--all"], set()),
    ],
)
def test_only_the_entries_that_are_named_are_removed(
    lab: Lab, cache: Path, arguments: list[str], left: set[str]
) -> None:
    done = lab.command("cache", "remove", *arguments)
    assert done.code == 0, done.err
    assert names(cache) == left
    assert (cache / "notes" / "mine.txt").read_text() == "mine"
    assert (cache / ("c" * 64)).is_symlink()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "remove: give one of NAME, --all, --older-than DAYS"),
        (["--all", "aaa"], "remove: give one of NAME, --all, --older-than DAYS"),
        (["a"], "'a': 2 entries begin with it"),
        (["f"], "'f': no entry begins with it"),
        (["--older-than", "-1"], "--older-than = -1.0: must be a number of days, at least 0"),
        (["--older-than", "nan"], "--older-than = nan: must be a number of days, at least 0"),
    ],
)
def test_what_names_no_entry_removes_nothing(
    lab: Lab, cache: Path, arguments: list[str], sentence: str
) -> None:
    done = lab.command("cache", "remove", *arguments)
    assert done.code == 2
    assert done.sentence.startswith(sentence)
    assert names(cache) == {ONE, TWO}


def test_without_a_cache_there_is_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "none"))
    assert lab.command("cache").out.startswith("prepared data: 0 entries")
    assert not (tmp_path / "none").exists()
