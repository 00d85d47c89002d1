"""Names and links in somebody else's files lead nowhere outside of the folders that a conversion works in."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import flip_bit

from core.contracts.errors import UserError
from core.interop.from_hf import from_hf
from core.interop.to_hf import ExportOptions, to_hf
from core.storage.digests import DigestWarning, write_digests
from core.training.resume import newest_checkpoint

from .checkpoints import V3, read, same_bits, tensors_of, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", V3, tensors_of(V3))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    from_hf(write(folder / "source", V3, tensors_of(V3)), folder / "run", say=lambda _: None)
    return folder / "run"


@pytest.fixture
def run(converted: Path, tmp_path: Path) -> Path:
    """A converted run that a test may change."""
    return Path(shutil.copytree(converted, tmp_path / "run"))


def export(run: Path, target: Path, *, trust: bool = False) -> list[str]:
    """Converts a run back; returns the notes."""
    notes: list[str] = []
    to_hf(run, newest_checkpoint(run), target, ExportOptions(), trust=trust, say=notes.append)
    return notes


def change_layout(run: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Changes `hf/layout.json`, and the checksums as an attacker would."""
    file = run / "hf/layout.json"
    layout = json.loads(file.read_text())
    change(layout)
    file.write_text(json.dumps(layout))
    listed = [*(run / "hf").iterdir(), *(run / "weights").iterdir()]
    write_digests(run, [str(one.relative_to(run)) for one in listed])


@pytest.mark.parametrize(
    "name",
    [
        "../../mine.safetensors",
        "{}/mine.safetensors",
        "a/../../../mine.safetensors",
        "mine.sh",
        "..",
    ],
)
def test_a_layout_names_files_of_the_target_only(run: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    name = name.format(tmp_path)

    def rename(layout: dict[str, object]) -> None:
        files = layout["files"]
        assert isinstance(files, dict)
        layout["files"] = {name: next(iter(files.values()))}

    change_layout(run, rename)
    with pytest.raises(UserError) as found:
        export(run, tmp_path / "deep/er/out")
    where = f"{run}/hf/layout.json: files: {name!r}"
    assert str(found.value).startswith(f"{where}: must be the name of a .safetensors file")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("plain", "load", "plain = 'load': must be one of float64, "),
        ("formats", {"x": "hub"}, "formats: x = 'hub': must be one of "),
        ("files", None, "files is missing or damaged"),
        ("files", {"model.safetensors": [3]}, "files: model.safetensors: must list the names"),
        ("format", 3, "format is missing or damaged"),
        ("format", "nobody's", "nobody's"),
    ],
)
def test_every_value_of_a_layout_is_checked(
    run: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    change_layout(run, lambda layout: layout.update({key: value}))
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "out")


def test_a_link_out_of_a_checkpoint_is_left_out_with_a_note(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("secret")
    (source / "README.md").write_text("read me")
    (source / "LICENSE").symlink_to("README.md")
    (source / "extra.json").symlink_to(tmp_path / "secret.json")
    notes: list[str] = []
    from_hf(source, tmp_path / "run", say=notes.append)
    left_out = f"note: {source}/extra.json is left out: it is a symbolic link that leads out"
    assert any(note.startswith(left_out) for note in notes)
    copied = {file.name for file in (tmp_path / "run/hf").iterdir()}
    assert copied == {"config.json", "layout.json", "README.md", "LICENSE"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_in_place_of_a_file_that_is_needed_is_an_error(
    source: Path, tmp_path: Path, name: str
) -> None:
    (source / "tokenizer.json").write_text("{}")
    os.replace(source / name, tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError) as found:
        from_hf(source, tmp_path / "run")
    assert str(found.value).startswith(f"{source}/{name}: is a symbolic link that leads out of its")
    assert not (tmp_path / "run").exists()


def test_files_whose_names_are_not_plain_are_left_out_with_a_note(
    source: Path, tmp_path: Path
) -> None:
    names = ["two\nlines.md", "para\u2028graph.md", "back\\slash.md", os.fsdecode(b"latin-\xe9.md")]
    for name in names:
        (source / name).write_text("text")
    notes: list[str] = []
    from_hf(source, tmp_path / "run", say=notes.append)
    assert len([note for note in notes if "cannot be printed or is not UTF-8" in note]) == 4
    assert {file.name for file in (tmp_path / "run/hf").iterdir()} == {"config.json", "layout.json"}
    export(tmp_path / "run", tmp_path / "out")


def as_downloaded(source: Path, cache: Path) -> Path:
    """The folder as Hugging Face's library leaves it in its cache: links to files named by their hashes."""
    snapshot = cache / "models--a--b/snapshots/0123"
    blobs = cache / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        os.replace(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_cache_of_hugging_face_is_converted(source: Path, tmp_path: Path) -> None:
    tensors = read(source)
    snapshot = as_downloaded(source, tmp_path / "cache")
    from_hf(snapshot, tmp_path / "run", say=lambda _: None)
    export(tmp_path / "run", tmp_path / "out")
    same_bits(read(tmp_path / "out"), tensors)


def test_a_cache_whose_blobs_are_elsewhere_is_not(source: Path, tmp_path: Path) -> None:
    snapshot = as_downloaded(source, tmp_path / "cache")
    blobs = snapshot.parent.parent / "blobs"
    os.replace(blobs, tmp_path / "private")
    blobs.symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="is a symbolic link that leads out of its folder"):
        from_hf(snapshot, tmp_path / "run")


def test_a_link_in_a_converted_run_is_not_copied_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("secret")
    (run / "hf/extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"leads out of .*; --trust allows it"):
        export(run, tmp_path / "out")
    (note,) = export(run, tmp_path / "out", trust=True)
    assert "symbolic link that leads out" in note
    assert not (tmp_path / "out/extra.json").exists()


def test_a_changed_byte_of_a_converted_run_is_one_sentence(run: Path, tmp_path: Path) -> None:
    for name in ("weights/model.safetensors", "hf/config.json"):
        file = run / name
        whole = file.read_bytes()
        file.write_bytes(flip_bit(whole, 4 * len(whole)))
        with pytest.raises(UserError, match=f"{file}: has changed since it was written"):
            export(run, tmp_path / "out")
        file.write_bytes(whole)
    (run / "SHA256SUMS").unlink()
    with pytest.warns(DigestWarning, match="SHA256SUMS is missing"):
        export(run, tmp_path / "out")
