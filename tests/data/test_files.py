"""The corpus `files`: every format gives the same documents, and what cannot be read is one sentence."""

import codecs
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.contracts.errors import ConfigError, UserError
from core.data.prepare import prepare
from plugins.text_files import corpus as corpus_module
from plugins.text_files.corpus import TextFiles

TEXTS = ["one é", "two\r\n", "three 😀\n\nlines"]
ROWS = [{"text": text, "id": index} for index, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def files(*paths: Path | str, **settings: Any) -> TextFiles:
    config = TextFiles.Config(paths=[str(path) for path in paths], **settings)
    config.check(None)
    return TextFiles(config)


def texts(*paths: Path | str, **settings: Any) -> list[str]:
    return [document.data.decode() for document in files(*paths, **settings).documents()]


def error_of(*paths: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        texts(*paths, **settings)
    return str(error.value)


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)


def write_arrow(path: Path, *, stream: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_zst(path: Path, data: bytes) -> None:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as `cat a.zst b.zst` makes
    frames = [zstandard.compress(part) for part in (data[:half], data[half:])]
    path.write_bytes(b"".join(frames))


FORMATS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.JSONL": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n") + b"\r\n  \r\n"),
    "lines.json": lambda path: path.write_bytes(LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "strings.json": lambda path: path.write_text(json.dumps(TEXTS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.json.GZ": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.zst": lambda path: write_zst(path, LINES),
    "rows.parquet": write_parquet,
    "file.arrow": lambda path: write_arrow(path, stream=False),
    "stream.arrow": lambda path: write_arrow(path, stream=True),
    "marked.jsonl": lambda path: path.write_bytes(codecs.BOM_UTF8 + LINES),
    "wide.jsonl": lambda path: path.write_bytes(LINES.decode().encode("utf-16")),
    "wide.json": lambda path: path.write_bytes(json.dumps(ROWS, indent=1).encode("utf-32")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    assert texts(tmp_path / name) == TEXTS
    assert texts(tmp_path) == TEXTS
    names = [document.name for document in files(tmp_path).documents()]
    assert names == [f"{name}:{number:09d}" for number in (1, 2, 3)]


@pytest.mark.parametrize("ending", [".txt", ".md", ".TXT", ".txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_text_is_one_document_without_its_mark(
    tmp_path: Path, ending: str, encoding: str
) -> None:
    text = "né\r\nlast line without an end"
    data = text.encode(encoding)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert texts(path) == [text]


def test_a_folder_stands_for_the_readable_files_below_it(tmp_path: Path) -> None:
    for name in ("[web] crawl/b.txt", "[web] crawl/deep/a.TXT", ".git/c.txt", ".d.txt", "e.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = files(tmp_path)
    assert [document.name for document in corpus.documents()] == ["b.txt", "deep/a.TXT"]
    assert corpus.notes() == ["files of other kinds in the corpus's folders are not read: 1 .csv"]
    assert texts(tmp_path / "[web] crawl/*") == ["[web] crawl/b.txt"]


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("x")
    assert "holds no file that can be read: .txt, .md, .json, .jsonl" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["a [1].txt", "b?.jsonl"])
def test_a_file_whose_name_looks_like_a_glob_stands_for_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('"text"')
    (tmp_path / "a 1.jsonl").write_text('"other"')
    assert len(texts(tmp_path / name)) == 1


NESTED = {"a": {"b": "inner", "c.d": "dotted"}, "a.b": "outer", "none": None, "title": "T"}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.c.d", "dotted"),
        ("a.b", "outer"),
        (["title", "a.b"], "T\n\nouter"),
        (["none", "title"], "T"),
    ],
)
def test_keys_lead_into_objects_and_are_joined(tmp_path: Path, key: Any, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(NESTED))
    assert texts(tmp_path / "a.jsonl", text_key=key) == [expected]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_keys_lead_into_columns_of_structures(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"data": {"text": "x", "n": 1}, "title": "T"}])
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    assert texts(path, text_key="data.text") == ["x"]
    assert texts(path, text_key=["title", "data.text"]) == ["T\n\nx"]
    sentence = f"{path} has no column 'body' (data.corpus.text_key); its columns: data, title"
    assert error_of(path, text_key="body").startswith(sentence)


def test_a_key_that_is_missing_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [], "id": 1}\n')
    assert error_of(path).startswith(
        f"{path}, line 1 has no text under the key 'text' (data.corpus.text_key); its keys: messages, id"
    )


BAD = b'{"text": "the ca'


def test_a_cut_line_is_an_error_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + BAD)
    message = error_of(path)
    assert message.startswith(f"{path}, line 4 is not JSON: Unterminated string")
    assert message.endswith("data.corpus.on_error: skip leaves such records out and counts them")
    corpus = files(path, on_error="skip")
    for _ in range(2):
        assert [document.data.decode() for document in corpus.documents()] == TEXTS
        assert corpus.notes() == ["1 record without readable text left out of the corpus"]
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: left out: {path}, line 4 is not JSON")


def test_only_the_first_bad_records_are_shown_and_too_many_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + (BAD + b"\n") * 30)
    corpus = files(path, on_error="skip", skip_limit=30)
    assert len(list(corpus.documents())) == 3
    assert corpus.notes() == ["30 records without readable text left out of the corpus"]
    assert len(capsys.readouterr().err.splitlines()) == corpus_module.SHOWN
    message = error_of(path, on_error="skip", skip_limit=29)
    assert message.endswith("; more records are bad than data.corpus.skip_limit = 29 allows")


def test_a_text_that_is_not_utf8_is_left_out_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"n\xe9")
    (tmp_path / "b.txt").write_bytes(b"good")
    corpus = files(tmp_path, on_error="skip")
    assert [document.name for document in corpus.documents()] == ["b.txt"]
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 1"):
        prepare(files(tmp_path), 300)


def cut(data: bytes) -> bytes:
    return data[: len(data) - len(data) // 3]


@pytest.mark.parametrize(
    "name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "file.arrow", "stream.arrow"]
)
@pytest.mark.parametrize("damage", [cut, lambda data: b"no such format"])
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    path.write_bytes(damage(path.read_bytes()))
    message = error_of(path)
    assert re.match(rf"{re.escape(str(path))} cannot be (read|decompressed): .", message)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_file_that_is_cut_is_never_read_as_if_it_were_whole(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1])
    assert "cannot be decompressed" in error_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "library"),
    [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.txt.zst", "zstandard")],
)
def test_a_missing_library_is_named_with_the_extra(
    tmp_path: Path, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    monkeypatch.setattr("plugins.text_files.locate.find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        files(tmp_path / name).check_source()
    assert str(error.value) == (
        f"{tmp_path / name} needs the package {library}, which is not installed: "
        "pip install 'moeloom[data]'"
    )


def test_documents_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("c.jsonl", "c.jsonl-a.txt", "c/d.txt", "c.txt", "C.md", "b/z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    names = [document.name for document in files(tmp_path).documents()]
    assert names == sorted(names)


def test_lists_of_ids_are_a_corpus_of_tokens(tmp_path: Path) -> None:
    rows = [{"text": [index, 0, 299]} for index in range(12)]
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = prepare(files(path), 300)
    assert data.tokenizer is None
    assert data.train.tokens[:6].tolist() == [0, 0, 299, 1, 0, 299]
    assert data.validation.tokens.tolist() == [10, 0, 299]
    assert (data.train.documents, data.validation.documents) == (11, 1)
    with pytest.raises(UserError, match="holds the id 299, which is not in a vocabulary of 299"):
        prepare(files(path), 299)


def test_text_among_ids_and_ids_among_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [1]}\n{"text": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 holds text, and the first record"):
        prepare(files(tmp_path), 300)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": [1]}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 holds token ids, and the first"):
        prepare(files(tmp_path), 300)


@pytest.mark.parametrize("ids", [[-1], [2**31], [2**70]])
def test_ids_that_no_vocabulary_holds_are_bad_records(tmp_path: Path, ids: list[int]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ids}))
    assert "has ids under 'text' that are none: from 0 to 2147483647" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"paths": []}, "paths"),
        ({"paths": ["a", " "]}, "paths"),
        ({"text_key": []}, "text_key"),
        ({"text_key": ""}, "text_key"),
        ({"text_key": 3}, "text_key"),
        ({"text_key": None}, "text_key"),
        ({"text_key": ["a", 1]}, "text_key"),
        ({"text_key": ["a", "a"]}, "text_key"),
        ({"skip_limit": 0}, "skip_limit"),
    ],
)
def test_wrong_settings_name_their_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        TextFiles.Config(**{"paths": ["a"], **settings}).check(None)
    assert error.value.key == key
