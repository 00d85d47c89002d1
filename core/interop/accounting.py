"""Every tensor of both sides is accounted for before a byte is moved."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from core.contracts.checkpoint_format import CheckpointFormat, Piece
from core.contracts.errors import UserError
from core.interop.tensors import CODES, SCALE, Kind

_ANY = torch.float32  # a format that no sum of rows depends on


def wanted(pieces: Iterable[Piece], theirs: Collection[str]) -> list[Piece]:
    """The pieces without those optional ones that the files do not hold."""
    return [piece for piece in pieces if not piece.optional or piece.theirs in theirs]


def check_theirs(pieces: Sequence[Piece], theirs: Mapping[str, Kind], made: CheckpointFormat, folder: Path) -> None:
    """Hold the files against what their configuration asks for.

    Raises:
        UserError: the first tensor that is unexpected, missing or of another shape, by name.
    """
    expected = {piece.theirs: piece for piece in pieces}
    for name in theirs:
        codes = theirs.get(name.removesuffix(SCALE))
        is_scale = name.endswith(SCALE) and codes is not None and codes.dtype == CODES
        if name not in expected and not is_scale and not made.ignores(name):
            raise UserError(f"{folder}: tensor {name} is unexpected: config.json describes no such part")
    for name, piece in expected.items():
        if name not in theirs:
            raise UserError(f"{folder}: tensor {name} is missing, and config.json asks for it")
        if theirs[name].shape != piece.shape:
            found, asked = list(theirs[name].shape), list(piece.shape)
            raise UserError(f"{folder}: tensor {name} has the shape {found}, and config.json asks for {asked}")


def check_ours(pieces: Sequence[Piece], ours: Mapping[str, tuple[int, ...]], who: str) -> None:
    """Every row of our model belongs to exactly one piece, copies apart.

    Raises:
        UserError: the format leaves a tensor out, names one that the model has not, or fills a row twice.
    """
    spans: dict[str, list[tuple[int, int, str]]] = {}
    seen: set[str] = set()
    for piece in pieces:
        if piece.theirs in seen:
            raise UserError(f"{who}: tensor {piece.theirs} stands there twice")
        seen.add(piece.theirs)
        if piece.ours is None:
            continue
        rows = Kind(_ANY, piece.shape).rows
        if piece.ours not in ours or Kind(_ANY, ours[piece.ours]).width != piece.shape[-1]:
            raise UserError(f"{who}: tensor {piece.theirs} has no place of its width: {piece.ours}")
        if not piece.copy:
            spans.setdefault(piece.ours, []).append((piece.first, piece.first + rows, piece.theirs))
    for name, shape in ours.items():
        at = 0
        for begin, end, theirs in sorted(spans.get(name, [])):
            if begin != at:
                raise UserError(
                    f"{who}: rows {min(at, begin)} to {max(at, begin)} of {name}, before {theirs}, do not add up"
                )
            at = end
        if at != Kind(_ANY, shape).rows:
            raise UserError(
                f"{who}: has no place for tensor {name} of this model (rows {at} to {Kind(_ANY, shape).rows})"
            )


def owners(pieces: Iterable[Piece]) -> dict[tuple[str, int], Piece]:
    """Who fills the rows of ours, by name and first row."""
    return {(piece.ours, piece.first): piece for piece in pieces if piece.ours is not None and not piece.copy}
