"""Finds the tokens that begin and end a text."""

import json
from dataclasses import dataclass

from core.contracts.errors import UserError
from core.data.tokenizer import END
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
    """Returns the markers of a run: those of its source for a converted run, otherwise one marker for both.

    Raises:
        UserError: the source of a converted run has neither.
    """
    if not folder.provenance.exists():
        return Markers()
    converted = json.loads(folder.provenance.read_text(encoding="utf-8")).get("converted")
    if converted is None:
        return Markers()
    begin = converted["begin"]
    end = converted["end"]
    if begin is None and end is None:
        raise UserError(
            f"{folder.provenance}: converted.begin and converted.end are null: no marker begins a text"
        )
    if begin is None:
        begin = end
    if end is None:
        end = begin
    return Markers(begin, end)
