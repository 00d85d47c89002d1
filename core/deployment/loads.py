"""Recorded loads of experts, from a run, a file, or a model that reads a text; what cannot be a load is an error."""

import io
import json
import tokenize
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.contracts.errors import UserError
from core.model.trace import Trace
from core.storage.documents import read_bytes

UNREADABLE = (
    ValueError,
    EOFError,
    OSError,
    TypeError,
    SyntaxError,
    MemoryError,
    RecursionError,
    UnicodeError,
    zipfile.BadZipFile,
    tokenize.TokenError,
)
"""What numpy raises for a file that is no array: its header is parsed as Python's."""

LARGEST_LOAD = 1e15
"""More tokens than anybody counts; sums of such loads are still exact enough and finite."""

Loads = NDArray[np.float64]
"""Loads of one layer: a row for each step or sequence, a column for each expert."""


@dataclass(frozen=True)
class RecordedLoads:
    """The loads of all layers with experts over some time.

    S entries in time, E experts of a layer.

    Args:
        name: where they are from, for a reader.
        unit: what an entry is: `step`, `sequence` or `row`.
        at: the number of each entry.
        layers: the loads S x E of each layer, by the path of its block.
        groups: groups of experts of which a token reaches some only; 1 if that is not known.
        changes: whether the model changed from entry to entry, as in training: only the newest then count for a plan.
    """

    name: str
    unit: str
    at: list[int]
    layers: dict[str, Loads]
    groups: int = 1
    changes: bool = False
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError(f"{self.name}: there is no layer with experts")
        for path, load_SE in self.layers.items():
            _check(f"{self.name}: the load of {path}", load_SE, len(self.at))
        if not any(load_SE.any() for load_SE in self.layers.values()):
            raise UserError(f"{self.name}: every load is 0, so there is nothing to balance")

    @classmethod
    def of_traces(cls, traces: Iterable[Trace], name: str = "trace") -> "RecordedLoads":
        """Counts the loads of every sequence that was traced, in order; padding does not count.

        Raises:
            UserError: no layer has experts.
        """
        rows: dict[str, list[Loads]] = {}
        sequences = 0
        for trace in traces:
            batch = len(trace.context.tokens_BL)
            sequences += batch
            for path, block in trace.blocks.items():
                if block.routing is None:
                    continue
                valid_BL = block.context.valid().cpu()
                token_A = block.routing.token_A.cpu()
                expert_A = block.routing.expert_A.cpu()[valid_BL.flatten()[token_A]]
                token_A = token_A[valid_BL.flatten()[token_A]]
                key_A = (token_A // valid_BL.shape[1]) * block.experts + expert_A
                counted = np.bincount(key_A.numpy(), minlength=batch * block.experts)
                load_BE = counted.reshape(batch, block.experts).astype(np.float64)
                rows.setdefault(path, []).append(load_BE)
        layers = {path: np.concatenate(parts) for path, parts in rows.items()}
        return cls(name, "sequence", list(range(sequences)), layers)

    def between(self, first: int, last: int) -> dict[str, list[float]]:
        """The load of each layer's experts, added up from entry `first` to before entry `last`."""
        return {
            path: load_SE[first:last].sum(axis=0).tolist() for path, load_SE in self.layers.items()
        }

    def stretches(self, most: int) -> list[tuple[int, int]]:
        """Divides the entries into at most so many stretches of neighbours: where each begins, and where it ends."""
        parts = np.array_split(np.arange(len(self.at)), min(most, len(self.at)))
        return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _check(what: str, load_SE: Loads, entries: int) -> None:
    """Raises `UserError` for what cannot be loads."""
    if load_SE.ndim != 2 or not load_SE.shape[1]:
        raise UserError(
            f"{what} has shape {list(load_SE.shape)}: must be [entries, experts], with one expert or more"
        )
    if len(load_SE) != entries:
        raise UserError(f"{what} has {len(load_SE)} entries: must be {entries}, as the others have")
    if not entries:
        raise UserError(f"{what} has no entry")
    bad = ~((load_SE >= 0) & (load_SE <= LARGEST_LOAD))
    if bad.any():
        entry, expert = np.argwhere(bad)[0]
        value = load_SE[entry, expert]
        raise UserError(
            f"{what} is {value} for expert {expert} in entry {entry}: must be a number from 0 to {LARGEST_LOAD:g}"
        )


def read_loads(file: Path) -> RecordedLoads:
    """Reads loads from a file.

    Args:
        file: `loads.safetensors` of a run, the document of `core.inspect --json`, or an array of layers x experts or
            entries x layers x experts in a .npy file.

    Raises:
        UserError: it cannot be read, or what it holds cannot be loads.
    """
    readers = {".safetensors": _of_tensors, ".json": _of_document, ".npy": _of_array}
    if file.suffix not in readers:
        raise UserError(
            f"{file}: must be a run folder, or loads in a .safetensors, .json or .npy file"
        )
    return readers[file.suffix](file)


def _of_tensors(file: Path) -> RecordedLoads:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(read_bytes(file))
    except (SafetensorError, ValueError, KeyError) as cause:
        raise UserError(f"{file}: is no safetensors file ({cause})") from cause
    named = {
        name.removeprefix("load."): tensor.astype(np.float64)
        for name, tensor in tensors.items()
        if name.startswith("load.")
    }
    if not named:
        raise UserError(f"{file}: holds no tensor load.PATH, as the loads of a run do")
    steps = tensors.get("steps")
    if steps is None or steps.ndim != 1 or steps.dtype.kind not in "iu":
        raise UserError(f"{file}: steps must be a list of whole numbers, one for each entry")
    layers = {name: named[name] for name in sorted(named, key=_natural)}
    return RecordedLoads(str(file), "step", steps.tolist(), layers, changes=True)


def _of_document(file: Path) -> RecordedLoads:
    try:
        document: Any = json.loads(read_bytes(file))
        layers = {}
        for layer in document["layers"]:
            load_E = [expert["load"] for expert in layer["experts"]]
            layers[str(layer["path"])] = np.array([load_E], dtype=np.float64)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as cause:
        raise UserError(
            f"{file}: is not the document of core.inspect --json, with load of layers[].experts[]"
        ) from cause
    return RecordedLoads(str(file), "row", [0], layers)


def _of_array(file: Path) -> RecordedLoads:
    content = read_bytes(file)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except UNREADABLE as cause:
        raise UserError(f"{file}: is no array that numpy can read") from cause
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise UserError(f"{file}: must hold an array of numbers")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise UserError(
            f"{file}: has shape {list(array.shape)}: must be [layers, experts] or [entries, layers, experts]"
        )
    layers = {
        f"layer {index}": array[:, index].astype(np.float64) for index in range(array.shape[1])
    }
    return RecordedLoads(str(file), "row", list(range(len(array))), layers)


def _natural(name: str) -> list[tuple[int, str]]:
    """The key of an order in which blocks.2 comes before blocks.10."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in name.split(".")]
