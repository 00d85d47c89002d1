"""Reading documents that may hold anything, and paths that may be no files."""

import os
from pathlib import Path

import pytest

from core.storage.documents import DocumentError, read_bytes, read_object, read_text, read_yaml
from core.storage.files import is_plain_name, leads_out_of


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty, and must hold a JSON object"),
        ("[1]", "must hold a JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "is nested more than 100 levels deep"),
        ('{"a":' + "[" * 101 + "]" * 101 + "}", "is nested more than 100 levels deep"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_what_is_no_object_is_a_sentence(text: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DocumentError, match=f"^{file}: {why}"):
        read_object(file)


def test_an_object_of_the_largest_depth_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a":' + "[" * 99 + "]" * 99 + "}")
    assert "a" in read_object(file)


def test_what_is_no_regular_file_is_a_sentence_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(bytes(20))
    expected = {
        "pipe": "is a pipe, not a file",
        "endless": "is a device, not a file",
        "loop": "cannot be read: Too many levels of symbolic links",
        ".": "is a folder, not a file",
        "none": "there is no such file",
        "large": "has 20 bytes; at most 10 are read",
        "n" * 300: "cannot be read: File name too long",
    }
    for name, why in expected.items():
        with pytest.raises(DocumentError) as caught:
            read_bytes(tmp_path / name, 10)
        assert caught.value.why == why
    assert not leads_out_of(tmp_path / "loop", tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(DocumentError, match="not UTF-8 text"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: " + "[" * 300 + "]" * 300, "is nested more than 100 levels deep"),
        ('a: "\\ud800"', "holds half a surrogate pair"),
        ("just text", "must be a section of keys: one, two"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "holds more than 1000000 values, aliases filled in",
        ),
    ],
)
def test_yaml_that_cannot_be_worked_through(text: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(DocumentError, match=f"^{file}: {why}"):
        read_yaml(file, ["one", "two"])


@pytest.mark.parametrize("name", ["n" * 256, "\udc80", "a/b", "..", "", "a\0", 3])
def test_what_no_file_can_be_called(name: object) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("n" * 255)
