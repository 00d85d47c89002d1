"""The tokens that begin and end a text."""

import json
from dataclasses import dataclass

from core.contracts.errors import UserError
from core.data.tokenizer import END
from core.training.folder import RunFolder


@dataclass(frozen=True)
class Markers:
    """Token ids.

    Args:
        begin: stands before every text.
        end: ends what the model writes.
    """

    begin: int = END
    end: int = END


def markers_of(folder: RunFolder) -> Markers:
    """One marker does both in runs of ours; a converted run wrote down what its source says.

    Raises:
        UserError: a converted run whose source says neither.
    """
    if not folder.provenance.exists():
        return Markers()
    converted = json.loads(folder.provenance.read_text(encoding="utf-8")).get("converted")
    if converted is None:
        return Markers()
    begin, end = converted["begin"], converted["end"]
    if begin is None and end is None:
        raise UserError(f"{folder.provenance}: converted.begin and converted.end are null: no marker begins a text")
    return Markers(end if begin is None else begin, begin if end is None else end)
