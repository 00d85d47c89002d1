"""Large texts: encoded by chunks and by processes as the library encodes them, and gone on with after a kill."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCorpus

from core.contracts.corpus import Document
from core.contracts.errors import RunFailed
from core.data import encoding, packing
from core.data import prepare as prepare_module
from core.data import tokenizer as tokenizer_module
from core.data.cache_listing import entries_in
from core.data.encoder import Encoder, chunks_of
from core.data.encoding import Encoding
from core.data.encoding_progress import EncodingProgress
from core.data.prepare import prepare
from core.data.tokenizer import Tokenizer, sample_every, train

VOCAB = 300
IDS = np.dtype(np.uint16)
ALPHABET = [
    *("a", "B", "z", "é", "ß", "ﬁ", "漢", "字", "ा", "\u0301", "😀", "1", "23", "4567", "½", "²"),
    *(" ", " ", " ", "  ", "\n", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2003"),
    *("\u3000", "\u200b", "\u2028", "\u180e", "\ufeff", "\x00", "\u200d", "_", "-", ".", "…", "“"),
    *("!", "?", "'", '"', "'s", "'re", "'LL", "'\u017f", "<|endoftext|>"),
]
"""Letters, digits, signs and all kinds of space, and what the pattern of the cut names."""


MOSTLY_SPACE = ["a", "1", "!", " ", " ", " ", "\n", "\n", "\r", "\t", "\xa0"]
"""Where rules about white space follow each other."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """It joins white space too, so a cut inside of it would show."""
    draw = random.Random(1)
    return train(["".join(draw.choices(one, k=9000)) for one in (ALPHABET, MOSTLY_SPACE)], 600)


def random_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    texts = []
    for index in range(count):
        letters = MOSTLY_SPACE if index % 2 else ALPHABET
        texts.append("".join(draw.choices(letters, k=draw.randint(0, 30))))
    return texts


def by_library(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    return [np.array(ids, IDS).tobytes() for ids in tokenizer.encode_batch(texts)]


def test_chunks_have_the_ids_of_the_library(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands at the ends of a chunk, and after chunks were forgotten too."""
    monkeypatch.setattr("core.data.encoder.MOST_KEPT", 50)
    texts = random_texts(10_000)
    assert all("".join(chunks_of(text)) == text for text in texts)
    assert tokenizer.cuts_at_spaces
    encoder = Encoder(tokenizer, IDS)
    for begin in range(0, len(texts), 100):
        some = texts[begin : begin + 100]
        assert encoder.encode(some) == by_library(tokenizer, some)


def test_another_cut_is_left_to_the_library(tokenizer: Tokenizer) -> None:
    content = tokenizer.to_json().replace("{1,3}", "{1,2}")
    other = Tokenizer.parse(content)
    assert not other.cuts_at_spaces
    texts = random_texts(200)
    assert Encoder(other, IDS).encode(texts) == by_library(other, texts)


def documents(count: int) -> list[Document]:
    texts = random_texts(count, seed=3)
    return [Document(f"{i:04d}", f"x{text}".encode(), "x") for i, text in enumerate(texts)]


def test_processes_give_the_same_ids_in_the_same_order(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "AT_ONCE", 7)
    found = []
    for processes in (0, 2):
        with Encoding(tokenizer, IDS, processes) as coder:
            found.append(list(coder.encode(documents(300))))
    assert found[0] == found[1]
    assert len(found[0]) == 300


def test_a_process_that_dies_is_one_sentence(tokenizer: Tokenizer) -> None:
    with Encoding(tokenizer, IDS, 1) as coder:
        coder._processes[0]._running.kill()
        with pytest.raises(
            RunFailed, match="a process that encodes the text ended with exit code -9"
        ):
            list(coder.encode(documents(3)))


def test_processes_end_with_the_program_that_started_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, numpy as np\n"
        "from core.data.encoding import Encoding\n"
        "from core.data.tokenizer import train\n"
        "coder = Encoding(train(['ab ab'], 257), np.dtype(np.uint16), 2)\n"
        "print(*(p._running.pid for p in coder._processes), flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, env=env) as running:
        assert running.stdout is not None
        pids = [int(pid) for pid in running.stdout.readline().split()]
        running.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# ---- going on after a kill


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every text a large one, of groups of about four documents."""
    monkeypatch.setattr(prepare_module, "IN_MEMORY", 10)
    monkeypatch.setattr(packing, "GROUP", 4000)


def seal_of(folder: Path) -> bytes:
    (entry,) = entries_in(folder)
    return (entry.path / "seal.json").read_bytes()


def interrupted(corpus_of: MakeCorpus, texts: dict[str, bytes], groups: int) -> None:
    """A process that prepares a corpus, and is killed when it has encoded so many groups."""
    pid = os.fork()
    if pid == 0:
        done = 0
        write = packing._write

        def counted(file: Path, group: packing.Group) -> None:
            nonlocal done
            write(file, group)
            done += 1
            if done == groups:
                os.kill(os.getpid(), signal.SIGKILL)

        packing._write = counted
        prepare(corpus_of(texts), VOCAB)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def encoded_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of documents of the groups that are encoded from now on."""
    found: list[int] = []
    encode = packing.GroupPacker._encode

    def counted(self: packing.GroupPacker, group: list[Document]) -> packing.Group:
        found.append(len(group))
        return encode(self, group)

    monkeypatch.setattr(packing.GroupPacker, "_encode", counted)
    return found


@pytest.mark.usefixtures("large")
def test_a_killed_preparation_goes_on_where_it_was(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = encoded_groups(monkeypatch)
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "whole"))
    prepare(corpus_of(texts), VOCAB)
    groups = len(encoded)
    assert groups > 5
    monkeypatch.setenv("MOELOOM_CACHE", str(cache))
    interrupted(corpus_of, texts, groups=3)
    (entry,) = entries_in(cache)
    assert entry.train_tokens is None
    encoded.clear()

    def no_training(*_: object, **__: object) -> Tokenizer:
        raise AssertionError("the tokenizer is trained twice")

    monkeypatch.setattr(prepare_module, "train", no_training)
    prepare(corpus_of(texts), VOCAB)
    assert len(encoded) == groups - 3
    assert seal_of(cache) == seal_of(tmp_path / "whole")
    assert not list(entry.path.glob("*.unfinished"))
    encoded.clear()
    prepare(corpus_of(texts), VOCAB)
    assert encoded == []


@pytest.mark.usefixtures("large")
def test_groups_of_equally_long_documents_differ_by_their_text(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortest = min(map(len, texts.values()))
    equal = {name: data[:shortest] for name, data in texts.items()}
    kept = prepare(corpus_of(equal), VOCAB).train.tokens.tolist()
    monkeypatch.setattr(prepare_module, "IN_MEMORY", 1 << 30)
    monkeypatch.setenv("MOELOOM_CACHE", str(cache / "other"))
    assert prepare(corpus_of(equal), VOCAB).train.tokens.tolist() == kept


@pytest.mark.usefixtures("large")
def test_groups_that_somebody_else_has_written_are_not_used(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(corpus_of, texts, groups=3)
    (entry,) = entries_in(cache)
    one, two, three = sorted(entry.path.glob("[0-9a-f]*.unfinished"))
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    two.write_bytes(three.read_bytes())
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "whole"))
    encoded = encoded_groups(monkeypatch)
    prepare(corpus_of(texts), VOCAB)
    groups = len(encoded)
    encoded.clear()
    monkeypatch.setenv("MOELOOM_CACHE", str(cache))
    prepare(corpus_of(texts), VOCAB)
    assert len(encoded) == groups - 1
    assert seal_of(cache) == seal_of(tmp_path / "whole")


def test_a_tokenizer_is_trained_on_every_nth_document_of_a_large_text(
    corpus_of: MakeCorpus, texts: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(data) for name, data in texts.items() if name != "doc-10")
    monkeypatch.setattr(tokenizer_module, "SAMPLE", size // 3 + 1)
    assert [sample_every(n) for n in (1, size // 3 + 1, size // 3 + 2, size)] == [1, 1, 2, 3]
    made = prepare(corpus_of(texts), VOCAB).tokenizer
    trained = [data.decode() for name, data in texts.items() if name != "doc-10"][::3]
    assert made is not None
    assert made.to_json() == train(trained, VOCAB).to_json()


# ---- what is said meanwhile


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with EncodingProgress(100_000_000, terminal) as progress:
        progress.add(40_000_000)
    shown = terminal.getvalue()
    assert "encoding the text" in shown
    assert "40.0/100.0 MB" in shown or "40.0 MB" in shown
    log = io.StringIO()
    with EncodingProgress(100_000_000, log) as progress:
        progress._next = 0
        progress.skip(20_000_000)
        progress.add(40_000_000)
    assert log.getvalue().startswith("encoding the text: 20 of 100 MB")
    assert log.getvalue().count("\n") == 1
