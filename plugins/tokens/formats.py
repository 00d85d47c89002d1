"""Token files of other programs, mapped from disk: .bin of nanoGPT, llm.c and Megatron-LM, and .npy."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.contracts.errors import UserError

LLMC_MAGIC = 20240520
"""The first of the 256 int32 that a token file of llm.c begins with; the third is the number of its tokens."""

LLMC_HEADER = 256 * 4
"""Bytes of that header; uint16 ids follow."""

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
"""The beginning of an .idx file of Megatron-LM (`megatron/core/datasets/indexed_dataset.py`)."""

MEGATRON_HEADER = struct.Struct("<QBQQ")
"""Version, code of the ids' format, number of sequences, number of documents plus 1."""

MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}

SEARCHED = 1 << 24
"""Ids that are searched for the end marker at once."""

Ids = NDArray[Any]


def documents_in(path: Path, dtype: str | None, end: int | None) -> Iterator[Ids]:
    """Yields the ids of each document in a file, mapped from disk.

    Args:
        path: a .bin or .npy file.
        dtype: the format of raw ids; None: uint16.
        end: the id that ends a document; None: a file without an index is one document.

    Raises:
        UserError: the file is damaged, or of another format.
    """
    index = path.with_suffix(".idx")
    if path.suffix.lower() == ".npy":
        yield from _of_array(path, end)
    elif index.is_file():
        yield from _of_megatron(path, index)
    else:
        yield from _split(_raw(path, dtype), end)


def _split(ids: Ids, end: int | None) -> Iterator[Ids]:
    """Yields the documents of a stream, each with its end marker; what follows the last one is a document too."""
    begin = 0
    if end is not None:
        for piece in range(0, len(ids), SEARCHED):
            for place in np.flatnonzero(ids[piece : piece + SEARCHED] == end):
                after = piece + int(place) + 1
                yield ids[begin:after]
                begin = after
    if begin < len(ids):
        yield ids[begin:]


def _raw(path: Path, dtype: str | None) -> Ids:
    """The ids of a .bin file without an index: nanoGPT's, or llm.c's with a header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
    if len(head) == 12:
        magic, version, count = struct.unpack("<3i", head)
        if magic == LLMC_MAGIC and version == 1 and size == LLMC_HEADER + 2 * count:
            return np.memmap(path, "<u2", mode="r", offset=LLMC_HEADER, shape=(count,))
    kind = np.dtype(dtype or "uint16").newbyteorder("<")
    if not size:
        raise UserError(f"{path} is empty")
    if size % kind.itemsize:
        raise UserError(
            f"{path} has {size} bytes, which are no whole number of {kind.name} ids "
            "(data.corpus.dtype)"
        )
    return np.memmap(path, kind, mode="r")


def _of_array(path: Path, end: int | None) -> Iterator[Ids]:
    """Yields the documents of a .npy file: those of a stream, or the rows of a table."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as cause:
        raise UserError(f"{path} cannot be read as an array: {cause}") from cause
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.ndim} dimensions of {array.dtype}"
        raise UserError(f"{path} holds {found}, and must hold one or two dimensions of integers")
    if array.ndim == 1:
        yield from _split(array, end)
    else:
        yield from array


def _of_megatron(path: Path, index: Path) -> Iterator[Ids]:
    """Yields the documents of a .bin file that an .idx file describes."""
    content = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.empty(0, "u1")
    begin = len(MEGATRON_MAGIC) + MEGATRON_HEADER.size
    if bytes(content[: len(MEGATRON_MAGIC)]) != MEGATRON_MAGIC or len(content) < begin:
        raise UserError(f"{index} is no index of Megatron-LM; remove it if {path.name} is raw ids")
    version, code, sequences, documents = MEGATRON_HEADER.unpack(
        bytes(content[len(MEGATRON_MAGIC) : begin])
    )
    if version != 1 or code not in MEGATRON_DTYPES:
        raise UserError(f"{index} has version {version} and format {code}, which are not known")
    needed = begin + 12 * sequences + 8 * documents
    if len(content) < needed:
        raise UserError(f"{index} is cut: it has {len(content)} bytes and needs {needed}")
    kind = np.dtype(MEGATRON_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, begin).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, begin + 4 * sequences)
    bounds = np.frombuffer(content, "<i8", documents, begin + 12 * sequences)
    size = path.stat().st_size
    ends = pointers + lengths * kind.itemsize
    is_whole = size % kind.itemsize == 0 and (pointers % kind.itemsize == 0).all()
    is_inside = (pointers >= 0).all() and (lengths >= 0).all() and (ends <= size).all()
    is_ordered = (
        (np.diff(bounds) >= 0).all() and (bounds >= 0).all() and (bounds <= sequences).all()
    )
    if not (is_whole and is_inside and is_ordered):
        raise UserError(f"{index} does not describe {path.name}: it names ids outside of it")
    ids = np.memmap(path, kind, mode="r") if size else np.empty(0, kind)
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = []
        for number in range(first, last):
            start = int(pointers[number]) // kind.itemsize
            parts.append(ids[start : start + int(lengths[number])])
        document = parts[0] if len(parts) == 1 else np.concatenate([ids[:0], *parts])
        if len(document):
            yield document
