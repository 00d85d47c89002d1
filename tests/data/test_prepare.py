"""The token stores, and a cache that survives damaged files."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from conftest import MakeCorpus

import core.data.prepare
from core.contracts.errors import UserError
from core.data import cache as cache_files
from core.data.packing import Group, PackedStream
from core.data.prepare import Prepared, prepare
from core.data.store import open_store, width_of
from core.storage import records

VOCAB = 300


def same(one: Prepared, two: Prepared) -> bool:
    return (
        one.fingerprint == two.fingerprint
        and one.tokenizer.to_json() == two.tokenizer.to_json()
        and all(
            np.array_equal(a.tokens, b.tokens)
            and np.array_equal(a.starts, b.starts)
            and a.bytes == b.bytes
            for a, b in ((one.train, two.train), (one.validation, two.validation))
        )
    )


def test_each_document_is_a_marker_and_its_tokens(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = prepare(corpus_of(texts), VOCAB)
    assert data.tokenizer.size == VOCAB
    assert (data.train.documents, data.validation.documents) == (24, 1)
    held_out = texts.pop("doc-10")
    for store, expected in ((data.train, list(texts.values())), (data.validation, [held_out])):
        ends = [*store.starts[1:], len(store)]
        pieces = [
            store.tokens[start:end].tolist() for start, end in zip(store.starts, ends, strict=True)
        ]
        assert all(piece[0] == 0 and 0 not in piece[1:] for piece in pieces)
        assert [data.tokenizer.decode(piece[1:]).encode() for piece in pieces] == expected
        assert store.bytes == sum(map(len, expected))


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(300, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_are_as_narrow_as_the_vocabulary_allows(vocab: int, dtype: type) -> None:
    assert width_of(vocab) == dtype
    packed = PackedStream(np.dtype(dtype))
    for ids in ([0, vocab - 1, 5], [0, 7]):
        packed.add(Group(array("q", [len(ids)]), np.array(ids, dtype).tobytes()), source=0)
    file = io.BytesIO()
    packed.write(file)
    file.seek(0)
    tokens = np.load(file, allow_pickle=False)
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, vocab - 1, 5, 0, 7]
    assert packed.starts().tolist() == [0, 3]


def test_few_documents_leave_nothing_to_validate(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = prepare(corpus_of(dict(list(texts.items())[:10])), VOCAB)
    assert (len(data.validation), data.validation.documents, data.validation.bytes) == (0, 0, 0)
    assert data.train.documents == 10


def test_the_tokenizer_never_sees_the_validation_text(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    one = prepare(corpus_of(texts), VOCAB)
    two = prepare(corpus_of(texts | {"doc-10": b"zyxw " * 500}), VOCAB)
    assert one.fingerprint != two.fingerprint
    assert one.tokenizer.to_json() == two.tokenizer.to_json()


def test_the_second_start_reads_the_cache(
    corpus_of: MakeCorpus, texts: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(corpus_of(texts), VOCAB)
    monkeypatch.setattr(core.data.prepare, "train", None)
    backwards = dict(reversed(texts.items()))
    assert same(prepare(corpus_of(backwards), VOCAB), first)


def test_another_vocabulary_or_text_is_another_entry(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    prints = {
        prepare(corpus_of(texts), VOCAB).fingerprint,
        prepare(corpus_of(texts), VOCAB + 1).fingerprint,
        prepare(corpus_of(texts | {"doc-24": b"other"}), VOCAB).fingerprint,
    }
    assert len(prints) == 3


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


FILES = [
    "tokenizer.json",
    *(f"{side}.{what}.npy" for side in ("train", "validation") for what in ("tokens", "starts")),
]


@pytest.mark.parametrize("damage", [truncated, flipped, None])
@pytest.mark.parametrize("name", [*FILES, "seal.json"])
def test_a_damaged_entry_is_built_again(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path, name: str, damage: object
) -> None:
    first = prepare(corpus_of(texts), VOCAB)
    path = cache / first.fingerprint / name
    whole = path.read_bytes()
    path.unlink()
    if callable(damage):
        path.write_bytes(damage(whole))
    assert same(prepare(corpus_of(texts), VOCAB), first)
    assert path.read_bytes() == whole
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([*FILES, "seal.json"])


@pytest.mark.parametrize("seal", ["{}", "[]", "3", "", '{"tokenizer.json": 1}'])
def test_a_seal_that_lists_nothing_seals_nothing(tmp_path: Path, seal: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "seal.json").write_text(seal)
    assert not cache_files.intact(tmp_path)


def test_two_processes_at_once(tmp_path: Path, texts: dict[str, bytes]) -> None:
    for name, data in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    program = (
        "import sys; from core.data.prepare import prepare; from plugins.text_files.corpus import TextFiles\n"
        "data = prepare(TextFiles(TextFiles.Config(paths=[sys.argv[1]])), 800)\n"
        "print(data.fingerprint, data.train.tokens.sum(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "*.txt")]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    answers = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]
    assert answers[0][2] == "False", "everything up to the token store works without torch"
    assert cache_files.intact(tmp_path / "cache" / answers[0][0])


def test_a_writer_that_fails_leaves_neither_seal_nor_scraps(tmp_path: Path) -> None:
    def full(stream: IO[bytes]) -> None:
        stream.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError) as error:
        cache_files.write_entry(
            tmp_path / "entry", {"whole": lambda stream: stream.write(b"all"), "cut": full}
        )
    assert str(error.value) == (
        f"the cache {tmp_path / 'entry'} cannot be written (No space left on device): "
        "free some space, or set MOELOOM_CACHE to another folder"
    )
    assert [file.name for file in (tmp_path / "entry").iterdir()] == ["whole"]
    assert not cache_files.intact(tmp_path / "entry")


def test_a_cache_that_cannot_be_written(
    corpus_of: MakeCorpus, texts: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        prepare(corpus_of(texts), VOCAB)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("MOELOOM_CACHE", "~/mine")
    assert cache_files.cache_folder() == Path("/home/me/mine")
    monkeypatch.delenv("MOELOOM_CACHE")
    assert cache_files.cache_folder() == Path("/caches/moeloom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_files.cache_folder() == Path("/home/me/.cache/moeloom")


def test_a_seal_is_plain_json(corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path) -> None:
    data = prepare(corpus_of(texts), VOCAB)
    assert sorted(json.loads((cache / data.fingerprint / "seal.json").read_text())) == sorted(FILES)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder without records."""
    monkeypatch.setenv("MOELOOM_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def replace_tokens(entry: Path) -> bytes:
    """Replaces the training tokens of an entry and seals it anew, as anybody can who may write it."""
    file = entry / "train.tokens.npy"
    before = file.read_bytes()
    tokens = np.load(file)
    file.unlink()  # the old file may be mapped
    np.save(file, tokens[::-1])
    seal = json.loads((entry / "seal.json").read_text())
    seal[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (entry / "seal.json").write_text(json.dumps(seal, indent=2))
    assert cache_files.intact(entry)
    return before


def test_tokens_replaced_together_with_their_seal_are_not_read(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    cache: Path,
    state: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = prepare(corpus_of(texts), VOCAB)
    entry = cache / first.fingerprint
    before = replace_tokens(entry)
    assert same(prepare(corpus_of(texts), VOCAB), first)
    assert (entry / "train.tokens.npy").read_bytes() == before
    (note,) = capsys.readouterr().err.splitlines()
    assert note == (
        f"note: the cache {entry} held other data than this run's, under a seal of their own; "
        "it is written again"
    )


def test_an_entry_of_another_corpus_is_not_read_either(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path, state: Path
) -> None:
    """Its seal is recorded, for its own name."""
    first = prepare(corpus_of(texts), VOCAB)
    other = prepare(corpus_of(texts | {"doc-24": b"other"}), VOCAB)
    shutil.rmtree(cache / first.fingerprint)
    shutil.copytree(cache / other.fingerprint, cache / first.fingerprint)
    assert same(prepare(corpus_of(texts), VOCAB), first)


def test_a_shared_entry_is_verified_once_and_not_written(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = prepare(corpus_of(texts), VOCAB)
    (state / "data.txt").unlink()  # somebody else has made the entry
    monkeypatch.setattr(cache_files, "write_entry", None)
    assert same(prepare(corpus_of(texts), VOCAB), first)
    monkeypatch.setattr(core.data.prepare, "train", None)
    assert same(prepare(corpus_of(texts), VOCAB), first)
    assert capsys.readouterr().err == ""


def test_without_a_state_folder_every_start_verifies(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOELOOM_STATE", str(tmp_path / "file"))
    first = prepare(corpus_of(texts), VOCAB)
    replace_tokens(cache / first.fingerprint)
    assert same(prepare(corpus_of(texts), VOCAB), first)
    assert not records.contains("data", "")


class Marks:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["train.tokens.npy", "train.starts.npy"])
def test_a_pickle_in_the_place_of_an_array_is_not_loaded(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path, tmp_path: Path, name: str
) -> None:
    entry = cache / prepare(corpus_of(texts), VOCAB).fingerprint
    evil = np.array([Marks(tmp_path / "it-ran")], dtype=object)
    for write in (
        lambda file: np.save(file, evil, allow_pickle=True),
        lambda file: pickle.dump(evil, file),
    ):
        (entry / name).unlink()
        with (entry / name).open("xb") as file:
            write(file)
        with pytest.raises(UserError, match="must hold a one-dimensional array of integers"):
            open_store(entry / "train.tokens.npy", entry / "train.starts.npy", 1)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["../../../../dev/zero", "/dev/zero", "pipe"])
def test_the_names_of_a_seal_lead_nowhere(tmp_path: Path, name: str) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    os.mkfifo(entry / "pipe")
    (entry / "seal.json").write_text(json.dumps({name: "0" * 64}))
    assert not cache_files.intact(entry)
    (entry / "seal.json").unlink()
    os.mkfifo(entry / "seal.json")
    assert not cache_files.intact(entry)


def test_an_entry_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "entry").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a symbolic link, through which nothing is written"):
        cache_files.ensure(tmp_path / "entry", dict)
    assert list((tmp_path / "mine").iterdir()) == []


def test_without_a_home_folder_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELOOM_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(UserError, match="MOELOOM_CACHE must name a folder"):
        cache_files.cache_folder()


def test_a_record_after_a_cut_one_is_kept(state: Path) -> None:
    records.add("data", "one")
    with (state / "data.txt").open("a") as file:
        file.write("cut")
    records.add("data", "two")
    assert records.contains("data", "one")
    assert records.contains("data", "two")


@pytest.mark.parametrize("content", [np.array([{}], dtype=object), np.ones((2, 2)), None])
def test_a_sealed_file_that_holds_no_tokens_is_a_sentence(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path, content: Any
) -> None:
    """A pickle could run code, so it is not read even under a seal of this user."""
    entry = cache / prepare(corpus_of(texts), VOCAB).fingerprint
    files: dict[str, Any] = {}
    for name in FILES:
        whole = (entry / name).read_bytes()
        files[name] = lambda stream, whole=whole: stream.write(whole)
    files["train.tokens.npy"] = lambda stream: (
        stream.write(b"") if content is None else np.save(stream, content, allow_pickle=True)
    )
    cache_files.write_entry(entry, files)
    with pytest.raises(
        UserError,
        match=r"train.tokens.npy: is damaged: must hold a one-dimensional array of integers",
    ):
        prepare(corpus_of(texts), VOCAB)
