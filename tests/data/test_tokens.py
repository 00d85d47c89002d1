"""The corpus `tokens`: files of other programs, written here byte by byte as those programs write them."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.contracts.errors import ConfigError, UserError
from core.data.prepare import prepare
from plugins.tokens.corpus import Tokens

IDS = [5, 6, 9, 7, 9, 8]


def tokens(*paths: Path | str, **settings: Any) -> Tokens:
    config = Tokens.Config(paths=[str(path) for path in paths], **settings)
    config.check(None)
    return Tokens(config)


def documents(*paths: Path | str, **settings: Any) -> list[list[int]]:
    corpus = tokens(*paths, **settings)
    return [list(map(int, block.tokens)) for block in corpus.blocks("train")]


def error_of(*paths: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        documents(*paths, **settings)
    return str(error.value)


def write_megatron(stem: Path, sequences: list[list[int]], bounds: list[int]) -> None:
    """Writes a .bin and an .idx file as `IndexedDatasetBuilder` does, with ids of int32 (code 4)."""
    with stem.with_suffix(".bin").open("wb") as file:
        for ids in sequences:
            file.write(struct.pack(f"<{len(ids)}i", *ids))
    pointers = [0]
    for ids in sequences:
        pointers.append(pointers[-1] + 4 * len(ids))
    with stem.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 4))
        file.write(struct.pack("<QQ", len(sequences), len(bounds)))
        file.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        file.write(struct.pack(f"<{len(sequences)}q", *pointers[:-1]))
        file.write(struct.pack(f"<{len(bounds)}q", *bounds))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", "uint8"])
def test_raw_ids_are_read_in_their_format(tmp_path: Path, dtype: str) -> None:
    np.array(IDS, dtype).tofile(tmp_path / "a.bin")
    assert documents(tmp_path / "a.bin", dtype=dtype) == [IDS]
    assert documents(tmp_path, dtype=dtype, end=9) == [[5, 6, 9], [7, 9], [8]]


def test_raw_ids_are_uint16_by_default(tmp_path: Path) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / "a.bin")
    assert documents(tmp_path / "*.bin") == [IDS]


def test_a_header_of_llmc_is_no_text(tmp_path: Path) -> None:
    header = struct.pack("<256i", 20240520, 1, len(IDS), *[0] * 253)
    (tmp_path / "a.bin").write_bytes(header + np.array(IDS, "<u2").tobytes())
    assert documents(tmp_path / "a.bin", end=9) == [[5, 6, 9], [7, 9], [8]]


def test_documents_of_megatron_are_those_of_its_index(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[1, 2], [3], [], [4, 5, 6]], [0, 2, 3, 4])
    assert documents(tmp_path / "a.bin") == [[1, 2, 3], [4, 5, 6]]
    assert documents(tmp_path / "*") == documents(tmp_path)


@pytest.mark.parametrize("end", [None, 9])
def test_arrays_are_streams_or_rows(tmp_path: Path, end: int | None) -> None:
    np.save(tmp_path / "a.npy", np.array(IDS, np.int64))
    np.save(tmp_path / "b.npy", np.array(IDS, np.uint16).reshape(2, 3))
    split = [IDS] if end is None else [[5, 6, 9], [7, 9], [8]]
    assert documents(tmp_path, end=end) == [*split, [5, 6, 9], [7, 9, 8]]


def test_ids_are_written_as_they_are(tmp_path: Path) -> None:
    np.array([*range(9, -1, -1)] * 12, "<u2").tofile(tmp_path / "a.bin")
    data = prepare(tokens(tmp_path / "a.bin", end=0), 10)
    assert data.train.tokens.tolist() == [*range(9, -1, -1)] * 11
    assert data.validation.tokens.tolist() == [*range(9, -1, -1)]
    assert data.train.starts.tolist() == list(range(0, 110, 10))
    assert data.tokenizer is None


def test_long_files_are_searched_and_packed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 50, 1000).astype("<u2")
    ids.tofile(tmp_path / "a.bin")
    corpus = tokens(tmp_path / "a.bin", end=7)
    whole = [block.tokens.tolist() for block in corpus.blocks("train")]  # type: ignore[attr-defined]
    before = prepare(corpus, 50)
    monkeypatch.setattr("plugins.tokens.formats.SEARCHED", 10)
    monkeypatch.setattr("core.data.token_blocks.PIECE", 7)
    assert [block.tokens.tolist() for block in corpus.blocks("train")] == whole  # type: ignore[attr-defined]
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "other"))
    after = prepare(corpus, 50)
    assert after.fingerprint == before.fingerprint
    assert np.array_equal(after.train.tokens, before.train.tokens)


def test_an_id_outside_of_the_vocabulary_is_named(tmp_path: Path) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"the id 9, which is not in a vocabulary of 9"):
        prepare(tokens(tmp_path / "a.bin"), 9)


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"123")
    assert error_of(path) == (
        f"{path} has 3 bytes, which are no whole number of uint16 ids (data.corpus.dtype)"
    )
    path.write_bytes(b"")
    assert error_of(path) == f"{path} is empty"
    write_megatron(tmp_path / "m", [[1, 2], [3]], [0, 1, 2])
    index = (tmp_path / "m.idx").read_bytes()
    (tmp_path / "m.idx").write_bytes(index[:-3])
    assert "m.idx is cut: it has" in error_of(tmp_path / "m.bin")
    (tmp_path / "m.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(b"1234")
    assert "m.idx does not describe m.bin" in error_of(tmp_path / "m.bin")
    (tmp_path / "m.idx").write_bytes(b"other")
    assert "m.idx is no index of Megatron-LM" in error_of(tmp_path / "m.bin")
    np.save(tmp_path / "f.npy", np.ones(3))
    assert "holds 1 dimensions of float64" in error_of(tmp_path / "f.npy")
    (tmp_path / "p.npy").write_bytes(b"nothing")
    assert "p.npy cannot be read as an array" in error_of(tmp_path / "p.npy")


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert "names no .bin or .npy file" in error_of(tmp_path)
    assert "names no .bin or .npy file" in error_of(tmp_path / "*.npy")
    assert "but only .bin and .npy hold token ids" in error_of(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"paths": []}, "paths"), ({"end": -1}, "end"), ({"paths": [" "]}, "paths")],
)
def test_wrong_settings_name_their_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        Tokens.Config(**{"paths": ["a"], **settings}).check(None)
    assert error.value.key == key
