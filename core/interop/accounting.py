"""Checks, before any byte is written, that every tensor of the checkpoint and of our model is accounted for."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from core.contracts.checkpoint_format import CheckpointFormat, TensorMapping
from core.contracts.errors import UserError
from core.interop.tensors import CODES, SCALE, TensorSpec

_ANY = torch.float32  # the number of rows does not depend on the format


def wanted(mappings: Iterable[TensorMapping], theirs: Collection[str]) -> list[TensorMapping]:
    """Returns the mappings without the optional ones whose tensors are not in the files."""
    return [mapping for mapping in mappings if not mapping.optional or mapping.theirs in theirs]


def check_theirs(
    mappings: Sequence[TensorMapping],
    theirs: Mapping[str, TensorSpec],
    checkpoint_format: CheckpointFormat,
    folder: Path,
) -> None:
    """Checks that the files hold the tensors that their configuration needs.

    Raises:
        UserError: the first tensor that is unexpected, missing or of another shape, by name.
    """
    expected = {mapping.theirs: mapping for mapping in mappings}
    for name in theirs:
        codes = theirs.get(name.removesuffix(SCALE))
        is_scale = name.endswith(SCALE) and codes is not None and codes.dtype == CODES
        if name not in expected and not is_scale and not checkpoint_format.ignores(name):
            raise UserError(
                f"{folder}: tensor {name} is unexpected: config.json describes no such part"
            )
    for name, mapping in expected.items():
        if name not in theirs:
            raise UserError(f"{folder}: tensor {name} is missing, and config.json needs it")
        if theirs[name].shape != mapping.shape:
            found = list(theirs[name].shape)
            needed = list(mapping.shape)
            raise UserError(
                f"{folder}: tensor {name} has the shape {found}, and config.json needs {needed}"
            )


def check_ours(
    mappings: Sequence[TensorMapping], ours: Mapping[str, tuple[int, ...]], who: str
) -> None:
    """Checks that every row of our model is filled by exactly one mapping that is not a copy.

    Args:
        mappings: all mappings of a checkpoint.
        ours: the shapes of our model's tensors, by name.
        who: the format, as error messages name it.

    Raises:
        UserError: the format leaves a tensor out, names one that the model has not, or fills a row twice.
    """
    spans: dict[str, list[tuple[int, int, str]]] = {}
    seen: set[str] = set()
    for mapping in mappings:
        if mapping.theirs in seen:
            raise UserError(f"{who}: tensor {mapping.theirs} is listed twice")
        seen.add(mapping.theirs)
        if mapping.ours is None:
            continue
        spec = TensorSpec(_ANY, mapping.shape)
        if mapping.ours not in ours or TensorSpec(_ANY, ours[mapping.ours]).width != spec.width:
            raise UserError(
                f"{who}: tensor {mapping.theirs} is mapped to {mapping.ours}, "
                f"and the model has no such tensor of width {spec.width}"
            )
        if not mapping.copy:
            end = mapping.first + spec.rows
            spans.setdefault(mapping.ours, []).append((mapping.first, end, mapping.theirs))
    for name, shape in ours.items():
        _check_rows(name, TensorSpec(_ANY, shape).rows, sorted(spans.get(name, [])), who)


def _check_rows(name: str, rows: int, spans: Sequence[tuple[int, int, str]], who: str) -> None:
    """Raises `UserError` unless spans (first row, row after the last, tensor) fill all rows of tensor `name`."""
    filled = 0
    for begin, end, theirs in spans:
        if begin != filled:
            low = min(filled, begin)
            high = max(filled, begin)
            how = "twice" if begin < filled else "by no tensor"
            raise UserError(
                f"{who}: rows {low} to {high} of {name}, before {theirs}, are filled {how}"
            )
        filled = end
    if filled != rows:
        raise UserError(
            f"{who}: no mapping fills rows {filled} to {rows} of tensor {name} of this model"
        )


def owners(mappings: Iterable[TensorMapping]) -> dict[tuple[str, int], TensorMapping]:
    """Returns the mapping that fills rows of our tensors, by tensor name and first row."""
    found = {}
    for mapping in mappings:
        if mapping.ours is not None and not mapping.copy:
            found[mapping.ours, mapping.first] = mapping
    return found
