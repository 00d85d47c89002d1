"""Records of files with many documents: lines or lists of JSON, rows of Parquet and Arrow; and the text in a record."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from plugins.text_files.locate import Source
from plugins.text_files.streams import UnreadableError, lines, reading, whole

ROWS = 1024
"""Rows that are read at once."""

LARGEST_ID = 1 << 31

SEPARATOR = "\n\n"
"""What stands between the texts of several keys."""


class BadRecordError(Exception):
    """A record without a text; the message is the end of a sentence about it."""


@dataclass(frozen=True)
class FileRecord:
    """One record of a file.

    Args:
        number: its line, item or row, from 1.
        place: `line 3`, for error messages.
        value: what it holds.
        error: why it cannot be read; empty if it can.
    """

    number: int
    place: str
    value: Any = None
    error: str = ""


def records(source: Source, keys: Sequence[str]) -> Iterator[FileRecord]:
    """Yields the records of a file of JSON, Parquet or Arrow.

    Args:
        source: the file.
        keys: the keys whose values are needed.

    Raises:
        UnreadableError: the file cannot be read any further.
    """
    if source.kind == ".parquet":
        yield from _rows(source, keys, _parquet_batches(source, keys))
    elif source.kind == ".arrow":
        yield from _rows(source, keys, _arrow_batches(source))
    elif source.kind == ".json" and not _holds_lines(source):
        yield from _items(source)
    else:
        for number, line in enumerate(lines(source), start=1):
            if line.strip():
                yield _parsed(number, line)


def _parsed(number: int, line: bytes) -> FileRecord:
    place = f"line {number}"
    try:
        return FileRecord(number, place, json.loads(line.decode("utf-8")))
    except RecursionError:
        return FileRecord(number, place, error="is nested too deep")
    except ValueError as cause:
        return FileRecord(number, place, error=f"is not JSON: {cause}")


def _holds_lines(source: Source) -> bool:
    """Whether a .json file holds a value on each of several lines, as many programs write it."""
    written = (line for line in lines(source) if line.strip())
    first = next(written, None)
    if first is None or _parsed(1, first).error:
        return False
    return next(written, None) is not None


def _items(source: Source) -> Iterator[FileRecord]:
    """Yields the items of a JSON file that holds a list, or the one object that it holds."""
    try:
        value = json.loads(whole(source).decode("utf-8"))
    except RecursionError as cause:
        raise UnreadableError(source, "is nested too deep") from cause
    except ValueError as cause:
        raise UnreadableError(source, f"is not JSON: {cause}") from cause
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, start=1):
        yield FileRecord(number, f"item {number}", item)


@contextmanager
def _reading_rows(source: Source) -> Iterator[None]:
    """A context in which an error of pyarrow is one sentence about the file."""
    import pyarrow

    try:
        with reading(source):
            yield
    except pyarrow.ArrowException as cause:
        first = str(cause).splitlines()[0]
        raise UnreadableError(source, f"cannot be read: {first}") from cause


def _parquet_batches(source: Source, keys: Sequence[str]) -> Iterator[Any]:
    """Yields the batches of a Parquet file, of which only the columns of the keys are read."""
    from pyarrow import parquet

    with _reading_rows(source), parquet.ParquetFile(source.path) as file:
        names = set(file.schema_arrow.names)
        columns = []
        for key in keys:
            column = key if key in names else key.partition(".")[0]
            if column not in names:
                raise _no_column(source, column, names)
            columns.append(column)
        yield from file.iter_batches(batch_size=ROWS, columns=columns)


def _arrow_batches(source: Source) -> Iterator[Any]:
    """Yields the batches of an Arrow file, in the format for files or in that for streams, as `datasets` writes it."""
    import pyarrow

    with _reading_rows(source), pyarrow.memory_map(str(source.path)) as file:
        try:
            table = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)
            return
        for index in range(table.num_record_batches):
            yield table.get_batch(index)


def _rows(source: Source, keys: Sequence[str], batches: Iterator[Any]) -> Iterator[FileRecord]:
    number = 0
    for batch in batches:
        names = set(batch.schema.names)
        columns = {}
        for key in keys:
            column = key if key in names else key.partition(".")[0]
            if column not in names:
                raise _no_column(source, column, names)
            columns[column] = batch.column(batch.schema.get_field_index(column))
        for start in range(0, batch.num_rows, ROWS):
            values = {
                name: column.slice(start, ROWS).to_pylist() for name, column in columns.items()
            }
            for row in zip(*values.values(), strict=True):
                number += 1
                yield FileRecord(number, f"row {number}", dict(zip(values, row, strict=True)))


def _no_column(source: Source, column: str, names: set[str]) -> UnreadableError:
    known = ", ".join(sorted(names)) or "none"
    return UnreadableError(
        source, f"has no column {column!r} (data.corpus.text_key); its columns: {known}"
    )


def content_of(value: Any, keys: Sequence[str]) -> str | list[int]:
    """The text of a record, or its token ids.

    Args:
        value: a string, or an object with the keys.
        keys: key paths with dots; the texts of several are joined by an empty line, and null is left out.

    Raises:
        BadRecordError: there is neither text nor a list of ids under a key.
    """
    if isinstance(value, str):
        return value
    if len(keys) == 1:
        return _checked(value_at(value, keys[0]), value, keys[0])
    texts = []
    for key in keys:
        found = value_at(value, key)
        if found is None and _has(value, key):
            continue
        text = _checked(found, value, key)
        if not isinstance(text, str):
            raise BadRecordError(
                f"has token ids under {key!r}, and ids of several keys cannot be joined "
                "(data.corpus.text_key)"
            )
        texts.append(text)
    if not texts:
        shown = ", ".join(keys)
        raise BadRecordError(f"has no text under any of the keys {shown} (data.corpus.text_key)")
    return SEPARATOR.join(text for text in texts if text)


def _checked(found: Any, record: Any, key: str) -> str | list[int]:
    if isinstance(found, str):
        return found
    if isinstance(found, list) and found and all(type(item) is int for item in found):
        if not 0 <= min(found) <= max(found) < LARGEST_ID:
            raise BadRecordError(f"has ids under {key!r} that are none: from 0 to {LARGEST_ID - 1}")
        return found
    raise BadRecordError(
        f"has no text under the key {key!r} (data.corpus.text_key){_keys_of(record)}"
    )


def _keys_of(record: Any) -> str:
    """The end of a sentence about a missing key: which keys there are."""
    if not isinstance(record, dict) or not record:
        return ""
    known = ", ".join(str(key) for key in list(record)[:12])
    return f"; its keys: {known}"


def value_at(value: Any, key: str) -> Any:
    """The value under a key, or under a path of keys with dots; None where there is none."""
    return next(_paths(value, key), None)


def _has(value: Any, key: str) -> bool:
    return any(True for _ in _paths(value, key))


def _paths(value: Any, key: str) -> Iterator[Any]:
    """Yields the values that a key with dots may mean: a key that itself holds dots comes first."""
    if not isinstance(value, dict):
        return
    if key in value:
        yield value[key]
    for index, sign in enumerate(key):
        if sign == "." and key[:index] in value:
            yield from _paths(value[key[:index]], key[index + 1 :])
