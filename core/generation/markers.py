"""Finds the tokens that begin and end a text."""

from dataclasses import dataclass
from typing import Any

from core.contracts.errors import UserError
from core.data.tokenizer import END
from core.storage.documents import read_object
from core.training.run_folder import RunFolder


@dataclass(frozen=True)
class Markers:
    """Ids of special tokens.

    Args:
        begin: precedes every text.
        end: ends a text that the model writes.
    """

    begin: int = END
    end: int = END


def markers_of(folder: RunFolder) -> Markers:
    """Returns the markers of a run: of its source, of its tokenizer's file, or one for both.

    Raises:
        UserError: the source of a converted run has neither.
    """
    if not folder.provenance.exists():
        return Markers()
    found = read_object(folder.provenance)
    section = "converted" if "converted" in found else "markers"
    source = found.get(section)
    if source is None:
        return Markers(*(folder.file_markers() or ()))
    if not isinstance(source, dict):
        raise UserError(f"{folder.provenance}: {section}: must be a section of keys")
    begin = _id_in(source, section, "begin", folder)
    end = _id_in(source, section, "end", folder)
    known = [marker for marker in (begin, end) if marker is not None]
    if not known:
        raise UserError(
            f"{folder.provenance}: converted.begin and converted.end are null: no marker begins a text"
        )
    return Markers(known[0], known[-1])


def _id_in(values: dict[str, Any], section: str, key: str, folder: RunFolder) -> int | None:
    """The id under a key of a section in a run's provenance.

    Raises:
        UserError: it is not the number of a token.
    """
    value = values.get(key)
    if value is not None and (type(value) is not int or value < 0):
        allowed = "must be a token's number, or null"
        raise UserError(f"{folder.provenance}: {section}.{key} = {value!r}: {allowed}")
    return value
