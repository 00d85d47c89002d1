"""Packs documents into streams of tokens on disk; memory stays bounded, and a killed program goes on where it was.

Documents are encoded in groups of some megabytes. Of a large text each group's tokens are kept in the folder of the
cache entry that is being made, so a second start encodes the remaining groups alone. Groups depend on the documents,
never on the number of processes, and the stream is all of them in order.
"""

import hashlib
import io
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.contracts.corpus import Document
from core.data.encoding import Encoding
from core.data.encoding_progress import EncodingProgress
from core.data.store import write_header
from core.data.tokenizer import Tokenizer
from core.data.unfinished import SUFFIX, keep_bytes, kept_bytes

GROUP = 32 << 20
"""Bytes of text from which a group of documents is full."""


@dataclass
class Group:
    """The tokens of some documents.

    Args:
        lengths: tokens of each document, its marker included.
        ids: the bytes of their ids.
        file: where they are kept instead; None: in memory.
    """

    lengths: "array[int]"
    ids: bytes
    file: Path | None = None

    def write(self, stream: IO[bytes]) -> None:
        """Writes the ids."""
        stream.write(self.ids if self.file is None else _read(self.file).ids)


@dataclass
class PackedStream:
    """One side's documents as tokens, with their markers.

    Args:
        dtype: the format of the ids.
        groups: the tokens in order.
        sources: the number of each document's source.
    """

    dtype: "np.dtype[Any]"
    groups: list[Group] = field(default_factory=list)
    sources_of: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, group: Group, source: int) -> None:
        """Adds the tokens of documents of one source."""
        self.groups.append(group)
        self.sources_of.extend([source] * len(group.lengths))

    def write(self, stream: IO[bytes]) -> None:
        """Writes the tokens as a `.npy` file."""
        write_header(stream, self.dtype, int(self._ends()[-1]))
        for group in self.groups:
            group.write(stream)

    def starts(self) -> NDArray[np.int64]:
        """The position of each document's marker."""
        return self._ends()[:-1]

    def sources(self) -> NDArray[np.int64]:
        """The number of each document's source."""
        return np.array(self.sources_of, np.int64)

    def _ends(self) -> NDArray[np.int64]:
        lengths = [np.array(group.lengths, np.int64) for group in self.groups]
        return np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()


class GroupPacker:
    """Encodes groups of documents, but for those whose tokens a folder already has.

    Args:
        encoding: encodes documents.
        dtype: the format of the ids.
        progress: counts what is done.
        folder: keeps each group's tokens; None: they stay in memory.
        tokenizer: makes the ids; its markers stand before documents, and after them where there are two.
    """

    def __init__(
        self,
        encoding: Encoding,
        dtype: "np.dtype[Any]",
        progress: EncodingProgress,
        *,
        tokenizer: Tokenizer,
        folder: Path | None = None,
    ) -> None:
        self._encoding = encoding
        self._dtype = dtype
        self._begin = np.array([tokenizer.begin], dtype).tobytes()
        ending = tokenizer.ending
        self._ending = b"" if ending is None else np.array([ending], dtype).tobytes()
        self._progress = progress
        self._folder = folder
        identity = json.dumps(tokenizer.identity()).encode()
        self._identity = hashlib.sha256(identity).hexdigest()

    def pack(self, documents: Iterable[Document]) -> Iterator[Group]:
        """Yields the tokens of documents, a group at a time."""
        for group in _groups(documents):
            yield self._stored(group) if self._folder else self._encode(group)

    def _stored(self, documents: list[Document]) -> Group:
        """A group's tokens in a file, which may be there already."""
        assert self._folder is not None
        digest = hashlib.sha256(f"{self._identity} {self._dtype.name}".encode())
        for document in documents:
            digest.update(len(document.data).to_bytes(8, "little"))
            digest.update(document.data)
        file = self._folder / f"{digest.hexdigest()}{SUFFIX}"
        found = _kept(file)
        if found is None:
            made = self._encode(documents)
            _write(file, made)
            return Group(made.lengths, b"", file)
        self._progress.skip(sum(len(document.data) for document in documents))
        return Group(found.lengths, b"", file)

    def _encode(self, documents: list[Document]) -> Group:
        lengths = array("q")
        parts: list[bytes] = []
        around = len(self._begin + self._ending) // self._dtype.itemsize
        for piece, ids in self._encoding.encode(documents):
            if piece.begins:
                if lengths:
                    parts.append(self._ending)
                lengths.append(around)
                parts.append(self._begin)
            lengths[-1] += len(ids) // self._dtype.itemsize
            parts.append(ids)
            self._progress.add(len(piece.text))
        return Group(lengths, b"".join([*parts, self._ending]))


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields documents until they are large enough together."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.data)
        if size >= GROUP:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _kept(file: Path) -> Group | None:
    """A group that this user has recorded; None where there is none, or it was changed since."""
    content = kept_bytes(file)
    return None if content is None else _parse(content)


def _write(file: Path, group: Group) -> None:
    lengths = np.array(group.lengths, np.int64).tobytes()
    keep_bytes(file, len(group.lengths).to_bytes(8, "little") + lengths + group.ids)


def _read(file: Path) -> Group:
    return _parse(file.read_bytes())


def _parse(content: bytes) -> Group:
    stream = io.BytesIO(content)
    count = int.from_bytes(stream.read(8), "little")
    lengths = array("q")
    lengths.frombytes(stream.read(count * lengths.itemsize))
    return Group(lengths, stream.read())
