"""The two corpus plugins: what they read, and their error messages."""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.contracts.errors import ConfigError, UserError
from plugins.package_text.corpus import PackageText
from plugins.text_files.chat import Chat
from plugins.text_files.corpus import TextFiles


def package_text(package: str) -> PackageText:
    return PackageText(PackageText.Config(package=package))


def text_files(*paths: Path | str, text_key: str = "text") -> TextFiles:
    return TextFiles(TextFiles.Config(paths=[str(path) for path in paths], text_key=text_key))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an installed distribution `proser`, which lists its files."""
    notes = tmp_path / "proser-1.dist-info"
    for path in (
        "proser/texts/a.txt",
        "proser/b.txt",
        "proser/code.py",
        "proser-1.dist-info/top_level.txt",
        "loose.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"text of {path}")
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: proser\nVersion: 1\n")
    listed = [
        "proser/texts/a.txt",
        "proser/b.txt",
        "proser/code.py",
        "proser-1.dist-info/top_level.txt",
        "loose.txt",
    ]
    (notes / "RECORD").write_text(
        "".join(f"{path},,\n" for path in [*listed, "../../share/proser/c.txt"])
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_package_text_reads_only_the_files_inside_the_package_and_does_not_import_it(
    site: Path,
) -> None:
    documents = {document.name: document for document in package_text("proser").documents()}
    assert set(documents) == {"proser/texts/a.txt", "proser/b.txt"}
    assert documents["proser/b.txt"].data == b"text of proser/b.txt"
    assert documents["proser/b.txt"].source == str(site / "proser/b.txt")
    assert "proser" not in sys.modules


def test_package_text_of_a_package_that_is_not_installed() -> None:
    with pytest.raises(UserError) as error:
        list(package_text("no-such-prose").documents())
    assert (
        str(error.value)
        == "package 'no-such-prose' is not installed: run `pip install no-such-prose`"
    )


def test_package_text_of_a_package_without_texts() -> None:
    with pytest.raises(UserError) as error:
        list(package_text("pluggy").documents())
    assert str(error.value) == "package 'pluggy' ships no .txt files inside its import package"


def test_package_text_of_a_file_that_has_gone(site: Path) -> None:
    (site / "proser/b.txt").unlink()
    with pytest.raises(
        UserError, match=r"b\.txt of package 'proser' cannot be read: No such file or directory"
    ):
        list(package_text("proser").documents())


def test_package_text_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="must be the name of an installed distribution"):
        PackageText.Config(package=" ").check(None)


def test_files_are_documents_and_so_are_jsonl_lines(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.txt").write_bytes(b"two\r\n")
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "c.jsonl").write_text('{"text": "three \\u00e9"}\n\n{"text": "four", "more": 1}\n')
    documents = {
        document.name: document.data
        for document in text_files(tmp_path / "**/*.*", tmp_path / "a*").documents()
    }
    assert documents == {
        "a.txt": b"one",
        "deep/b.txt": b"two\r\n",
        "c.jsonl:000000001": "three é".encode(),
        "c.jsonl:000000003": b"four",
    }


def test_files_keep_their_names_when_their_folder_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.txt").write_bytes(b"one")
    before = [document.name for document in text_files(tmp_path / "here/*.txt").documents()]
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert (
        [document.name for document in text_files("there/*.txt").documents()] == before == ["a.txt"]
    )


def test_a_glob_that_matches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError) as error:
        list(text_files("*.txt").documents())
    assert str(error.value) == f"the glob '*.txt' (data.corpus.paths) matches no file in {tmp_path}"


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(
        UserError,
        match=r"a\.csv is matched by .*, but only \.txt, \.md, .* and \.arrow can be read",
    ):
        list(text_files(tmp_path / "*").documents())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": ', "is not JSON: Expecting value"),
        (b'{"text": "\xff"}', "is not JSON: 'utf-8' codec can't decode byte 0xff in position 10"),
        (b'{"body": "x"}', "has no text under the key 'text' (data.corpus.text_key)"),
        (b'{"text": 3}', "has no text under the key 'text' (data.corpus.text_key)"),
        (b'["text"]', "has no text under the key 'text' (data.corpus.text_key)"),
        (b'{"text": "\\ud83d"}', "holds half a surrogate pair"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        list(text_files(path).documents())
    assert str(error.value).startswith(f"{path}, line 2 {expected}")


def test_files_take_the_text_from_the_key_that_was_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    assert [
        document.data for document in text_files(tmp_path / "a.jsonl", text_key="body").documents()
    ] == [b"x"]


def test_files_need_a_glob() -> None:
    with pytest.raises(ConfigError, match="must hold at least one glob"):
        TextFiles.Config(paths=[]).check(None)


@pytest.mark.parametrize("corpus", [PackageText, TextFiles])
def test_examples_fit_their_schema(corpus: type[PackageText] | type[TextFiles]) -> None:
    section = {key: value for key, value in corpus.example.items() if key != "name"}
    corpus.Config(**section).check(None)


@pytest.mark.parametrize(
    ("plugin", "name", "corpus"),
    [
        ("package_text", "package_text", PackageText),
        ("text_files", "files", TextFiles),
        ("text_files", "chat", Chat),
    ],
)
def test_each_plugin_registers_its_corpus_by_its_name(plugin: str, name: str, corpus: type) -> None:
    offered = {}
    registry = SimpleNamespace(corpus=offered.__setitem__)
    import_module(f"plugins.{plugin}").register(registry)
    module, _, attribute = offered.pop(name).partition(":")
    assert getattr(import_module(module), attribute) is corpus
    assert set(offered) <= {"files", "chat"}
