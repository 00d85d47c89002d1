"""Checksums of a folder's files: what changed is named, what was never listed is read as it is."""

import subprocess
import warnings
from pathlib import Path

import pytest
from helpers import flip_bit

from core.contracts.errors import UserError
from core.storage.digests import (
    DigestWarning,
    check_digests,
    set_digest,
    warn_if_edited,
    write_digests,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them in a folder, with their checksums."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/one").write_bytes(bytes(range(256)))
    (tmp_path / "two words").write_text("two")
    write_digests(tmp_path, ["weights/one", "two words"])
    return tmp_path


def test_every_flipped_bit_of_a_file_is_noticed(folder: Path) -> None:
    check_digests(folder, "weights")
    file = folder / "weights/one"
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        file.write_bytes(flip_bit(whole, bit))
        with pytest.raises(UserError, match=f"{file}: has changed since it was written"):
            check_digests(folder, "weights")
        check_digests(folder, "two words")


def test_a_missing_file_has_changed(folder: Path) -> None:
    (folder / "weights/one").unlink()
    with pytest.raises(UserError, match="weights/one: has changed"):
        check_digests(folder, "weights")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "weights/one: is not listed in"),
        ("{second}\n", "weights/one: is not listed in"),
        ("{first}\n{second}", "SHA256SUMS: is damaged: its last line is not whole"),
        ("{first}X\n{second}\n", "weights/oneX: has changed"),
    ],
)
def test_a_damaged_list_does_not_switch_the_check_off(
    folder: Path, text: str, sentence: str
) -> None:
    """It is empty, lacks a line or its end, or a name in it has changed."""
    first, second = (folder / "SHA256SUMS").read_text().splitlines()
    (folder / "SHA256SUMS").write_text(text.format(first=first, second=second))
    with pytest.raises(UserError, match=sentence):
        check_digests(folder, "weights")


def test_an_edited_file_is_a_warning(folder: Path) -> None:
    set_digest(folder, "recipe.yaml", b"seed: 1")
    (folder / "recipe.yaml").write_text("seed: 1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_edited(folder / "recipe.yaml")
    check_digests(folder, "weights")
    (folder / "recipe.yaml").write_text("seed: 2")
    with pytest.warns(DigestWarning, match="has been edited since it was written"):
        warn_if_edited(folder / "recipe.yaml")


def test_a_folder_from_before_is_one_warning(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    with pytest.warns(DigestWarning, match="SHA256SUMS is missing"):
        check_digests(folder, "weights")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "weights/../../outside", ""])
def test_a_list_that_leads_out_of_its_folder_is_damaged(folder: Path, name: str) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="SHA256SUMS: is damaged"):
        check_digests(folder, "weights")


def test_sha256sum_reads_the_list(folder: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
