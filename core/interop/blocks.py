"""FP8 blocks: theirs have one scale for 128 x 128 elements, ours one for each row and 128 columns.

These two views show a grid of block scales (`X.weight_scale_inv`) as scales by row (`X.weight_scale`), to read and to
write, so that whoever moves rows need not know of blocks.
"""

import math

from torch import Tensor

from core.contracts.errors import UserError
from core.interop.shards import Shards
from core.interop.tensors import BLOCK, CODES, SCALE, Kind, Tensors, scale_kind
from core.interop.writing import Writer

INVERSE = "_scale_inv"
"""Ends the name of a grid; the scale multiplies codes, whatever the name says."""


def grid_kind(kind: Kind) -> Kind:
    """The grid of block scales of a matrix."""
    return Kind(scale_kind(kind).dtype, tuple(math.ceil(n / BLOCK) for n in kind.shape))


class ReadBlocks(Tensors):
    """Shards whose grids are seen as scales by row.

    Args:
        shards: what the files hold.

    Raises:
        UserError: codes without a grid, a grid without codes, or one of another shape.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        grids = {name: name.removesuffix(INVERSE) for name in shards.kinds if name.endswith(INVERSE)}
        kinds = {name: kind for name, kind in shards.kinds.items() if name not in grids}
        for grid, name in grids.items():
            if name not in kinds or kinds[name].dtype != CODES:
                raise UserError(f"{shards.files[grid]}: tensor {grid} scales no FP8 tensor {name}")
            if len(kinds[name].shape) != 2 or shards.kinds[grid] != grid_kind(kinds[name]):
                wanted = list(grid_kind(kinds[name]).shape)
                got = f"{shards.kinds[grid].dtype} {list(shards.kinds[grid].shape)}".removeprefix("torch.")
                raise UserError(f"{shards.files[grid]}: tensor {grid} is {got}, and must be float32 {wanted}")
        for name, kind in list(kinds.items()):
            if kind.dtype == CODES:
                if name + INVERSE not in grids:
                    raise UserError(f"{shards.files[name]}: FP8 tensor {name} has no {name}{INVERSE}")
                kinds[name + SCALE] = scale_kind(kind)
        self.kinds = kinds
        self.codes = {name for name, kind in kinds.items() if kind.dtype == CODES}

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows of a tensor; of scales, each row those of its block."""
        if name in self.shards.kinds:
            return self.shards.rows(name, begin, end)
        low = begin // BLOCK
        grid = self.shards.rows(name.removesuffix(SCALE) + INVERSE, low, math.ceil(end / BLOCK))
        return grid.repeat_interleave(BLOCK, dim=0)[begin - low * BLOCK : end - low * BLOCK]


class WriteBlocks:
    """A writer that takes scales by row and keeps the first row of every block.

    Args:
        writer: plans the grids.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Put rows in their place."""
        if name in self.writer.kinds:
            self.writer.write(name, first, rows)
            return
        kept = rows[-first % BLOCK :: BLOCK]
        self.writer.write(name.removesuffix(SCALE) + INVERSE, math.ceil(first / BLOCK), kept)

    def sync(self) -> None:
        """Force what was written to the disk."""
        self.writer.sync()
