"""Where each expert's rows begin and end, as the host knows it: the device is waited for once for a tensor of ends.

The layers of one expert network are called with the same tensor, and so are their backward passes.
"""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Spans = list[tuple[int, int]]

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def spans(rows: int, ends_E: Tensor | None) -> Spans:
    """Where each expert's rows begin and end; all of them without experts."""
    if ends_E is None:
        return [(0, rows)]
    if ends_E.is_inference():  # keeps no count of its versions
        return _read(ends_E)
    found: Spans
    version, found = _known.get(ends_E, (-1, []))
    if version != ends_E._version:
        found = _read(ends_E)
        _known[ends_E] = (ends_E._version, found)
    return found


def _read(ends_E: Tensor) -> Spans:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
