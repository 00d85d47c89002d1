"""Bytes of text files: decompressed, without a byte-order mark, and in UTF-8."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from core.contracts.errors import UserError
from plugins.text_files.locate import Source

PIECE = 1 << 20
"""Bytes that are read at once."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte-order marks, each with its encoding."""


class UnreadableError(UserError):
    """A file that cannot be read to its end; what came before is whole.

    Args:
        source: the file.
        why: the end of the sentence.
    """

    def __init__(self, source: Source, why: str) -> None:
        super().__init__(f"{source.path} {why}")


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """A context in which an error of the system or of a decompressor is one sentence about the file."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError, _DamagedError) as cause:
        raise UnreadableError(source, f"cannot be decompressed: {cause}") from cause
    except OSError as cause:
        raise UnreadableError(source, f"cannot be read: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        why = f"is not {cause.encoding.upper()}, which its byte-order mark says: {cause.reason}"
        raise UnreadableError(source, why) from cause


def whole(source: Source) -> bytes:
    """The text of a file in UTF-8, as it would be after its byte-order mark; line ends stay as they are."""
    with reading(source), opened(source) as stream:
        data = stream.read()
        mark, encoding = _mark_of(data[:4])
        data = data[len(mark) :]
        if encoding != "utf-8":
            data = data.decode(encoding).encode()
        return data


def lines(source: Source) -> Iterator[bytes]:
    """Yields the lines of a file in UTF-8, as `whole` has them."""
    with reading(source), opened(source) as stream:
        mark, encoding = _mark_of(stream.peek(4)[:4])
        stream.read(len(mark))
        if encoding == "utf-8":
            yield from stream
            return
        with io.TextIOWrapper(stream, encoding=encoding, newline="\n") as text:
            for line in text:
                yield line.encode()


def _mark_of(begin: bytes) -> tuple[bytes, str]:
    """The byte-order mark that a file begins with, and the encoding; UTF-8 without one."""
    for mark, encoding in MARKS:
        if begin.startswith(mark):
            return mark, encoding
    return b"", "utf-8"


@contextmanager
def opened(source: Source) -> Iterator[io.BufferedReader]:
    """Opens a file and decompresses it as it is read."""
    with source.path.open("rb") as file:
        if source.compression == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield io.BufferedReader(cast("io.RawIOBase", unpacked), PIECE)
        elif source.compression == ".zst":
            yield io.BufferedReader(_ZstdStream(file), PIECE)
        else:
            yield file


class _DamagedError(Exception):
    """A compressed file that is damaged or cut."""


class _ZstdStream(io.RawIOBase):
    """The text of a zstd file of one or several frames; unlike the library's own reader, an error where it is cut."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._pieces = _unpacked(file)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _unpacked(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the decompressed pieces of a zstd file."""
    import zstandard

    library = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` needs
    frame = library.decompressobj()
    is_inside = False
    try:
        while data := file.read(PIECE):
            while data:
                yield frame.decompress(data)
                is_inside = not frame.eof
                data = frame.unused_data
                if frame.eof:
                    frame = library.decompressobj()
    except zstandard.ZstdError as cause:
        raise _DamagedError(cause) from cause
    if is_inside:
        raise _DamagedError("the file ends within a frame")
