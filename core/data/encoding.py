"""Encodes documents in order, on several processes where there is much text; the ids do not depend on how many.

A process is `python -m core.data.encode_process`: it reads texts from its input and writes their ids to its output. So
it needs no part of the program that starts it, and ends when that program ends.
"""

import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from core.contracts.corpus import Document
from core.contracts.errors import RunFailed
from core.data.documents import text_of
from core.data.encoder import Encoder
from core.data.tokenizer import Tokenizer

AT_ONCE = 64
"""Documents that are encoded together at most."""

CHARACTERS_AT_ONCE = 2_000_000
"""Characters that are encoded together, so that their encodings fit in memory."""

WORTH_PROCESSES = 64 << 20
"""Bytes of text from which other processes are started."""

WAITING = 3
"""Batches for each process that are read before they are needed."""

_ROOT = Path(__file__).resolve().parents[2]
_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True)
class TextPart:
    """A document's text, or a part of it.

    Args:
        text: the characters.
        begins: whether a document begins with it.
    """

    text: str
    begins: bool


class Encoding(AbstractContextManager["Encoding"]):
    """Encodes pieces of documents in order.

    Args:
        tokenizer: the tokenizer.
        dtype: the format of the ids.
        processes: how many others encode; 0: this one does.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: "np.dtype[Any]", processes: int = 0) -> None:
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, dtype)
        self._processes = [_Process(tokenizer, dtype) for _ in range(processes)]
        self._threads = ThreadPoolExecutor(max(1, processes))

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()
        self._threads.shutdown()

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[TextPart, bytes]]:
        """Yields every piece of some documents with its ids, as the bytes of an array."""
        batches = _batches(_pieces(self._tokenizer, documents))
        if not self._processes:
            for batch in batches:
                yield from zip(batch, self._encoder.encode(_texts(batch)), strict=True)
            return
        idle = deque(self._processes)
        waiting: deque[tuple[list[TextPart], Future[list[bytes]]]] = deque()

        def work(texts: list[str]) -> list[bytes]:
            process = idle.popleft()  # there are as many threads as processes
            try:
                return process.encode(texts)
            finally:
                idle.append(process)

        for batch in batches:
            waiting.append((batch, self._threads.submit(work, _texts(batch))))
            if len(waiting) > WAITING * len(self._processes):
                yield from _done(*waiting.popleft())
        while waiting:
            yield from _done(*waiting.popleft())


def _done(batch: list[TextPart], future: Future[list[bytes]]) -> Iterator[tuple[TextPart, bytes]]:
    return zip(batch, future.result(), strict=True)


def _texts(batch: list[TextPart]) -> list[str]:
    return [piece.text for piece in batch]


def processes_for(size: int) -> int:
    """How many processes are worth starting for so many bytes of text: one for each core, or none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores if cores and cores > 1 and size >= WORTH_PROCESSES else 0


def _pieces(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[TextPart]:
    """Yields the texts of documents, long ones in pieces."""
    for document in documents:
        for index, text in enumerate(tokenizer.cut(text_of(document), CHARACTERS_AT_ONCE)):
            yield TextPart(text, index == 0)


def _batches(pieces: Iterable[TextPart]) -> Iterator[list[TextPart]]:
    """Yields a few pieces at a time."""
    batch: list[TextPart] = []
    size = 0
    for piece in pieces:
        if batch and (len(batch) == AT_ONCE or size + len(piece.text) > CHARACTERS_AT_ONCE):
            yield batch
            batch = []
            size = 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


class _Process:
    """A process that encodes what it is given."""

    def __init__(self, tokenizer: Tokenizer, dtype: "np.dtype[Any]") -> None:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._running = subprocess.Popen(
            [sys.executable, "-m", "core.data.encode_process", dtype.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the program that started it, which ends it
        )
        assert self._running.stdin is not None
        assert self._running.stdout is not None
        self._input = self._running.stdin
        self._output = self._running.stdout
        write_frames(self._input, [tokenizer.to_json().encode()])

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of some texts.

        Raises:
            RunFailed: the process has ended.
        """
        try:
            write_frames(self._input, [text.encode() for text in texts])
            return read_frames(self._output)
        except (EOFError, BrokenPipeError) as cause:
            code = self._running.wait()
            raise RunFailed(
                f"a process that encodes the text ended with exit code {code}"
            ) from cause

    def end(self) -> None:
        """Ends the process."""
        self._running.kill()
        self._running.wait()
        for stream in (self._input, self._output):
            with suppress(BrokenPipeError):  # what could not be written to it
                stream.close()


def write_frames(stream: IO[bytes], frames: list[bytes]) -> None:
    """Writes some bytes strings: their number, the length of each, and their contents."""
    lengths = [_NUMBER.pack(len(frame)) for frame in frames]
    stream.write(b"".join([_NUMBER.pack(len(frames)), *lengths, *frames]))
    stream.flush()


def read_frames(stream: IO[bytes]) -> list[bytes]:
    """Reads what `write_frames` wrote.

    Raises:
        EOFError: the stream has ended.
    """
    (count,) = _NUMBER.unpack(_exactly(stream, _NUMBER.size))
    lengths = [_NUMBER.unpack(_exactly(stream, _NUMBER.size))[0] for _ in range(count)]
    return [_exactly(stream, length) for length in lengths]


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
