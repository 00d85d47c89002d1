"""Whole files, plain names, and links that lead out of a folder."""

from pathlib import Path

import pytest

from core.contracts.errors import UserError
from core.storage.files import check_links, is_plain_name, write_text


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "folder/file", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "folder/file").is_symlink()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0b", None, 3])
def test_a_name_that_leads_elsewhere_is_not_plain(name: object) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("place", ["link", ".link", "deep/er/link"])
@pytest.mark.parametrize("target", ["../mine", "/etc/passwd", "../missing", ".."])
def test_a_link_out_of_a_folder_is_named(tmp_path: Path, place: str, target: str) -> None:
    folder = tmp_path / "folder"
    link = folder / place
    link.parent.mkdir(parents=True)
    (folder / "inside").touch()
    (folder / "good").symlink_to(folder / "inside")
    check_links(folder)
    up = "../" * (len(link.relative_to(folder).parts) - 1)
    link.symlink_to(target if target.startswith("/") else up + target)
    with pytest.raises(UserError, match=f"{link}: is a symbolic link that leads out of {folder}"):
        check_links(folder)
