"""The begin and end of each expert's rows on the host, which waits for the device once for each tensor of ends.

The layers of one expert network are called with the same tensor, and so are their backward passes.
"""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Spans = list[tuple[int, int]]

_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def spans(rows: int, ends_E: Tensor | None) -> Spans:
    """The begin and end of each expert's rows; without experts, of all rows."""
    if ends_E is None:
        return [(0, rows)]
    if ends_E.is_inference():  # such tensors have no version counter
        return _read(ends_E)
    found: Spans
    version, found = _cache.get(ends_E, (-1, []))
    if version != ends_E._version:
        found = _read(ends_E)
        _cache[ends_E] = (ends_E._version, found)
    return found


def _read(ends_E: Tensor) -> Spans:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
