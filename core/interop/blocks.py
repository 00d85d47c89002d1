"""FP8 blocks: other programs keep one scale for 128 x 128 elements, this one a scale for each row and 128 columns.

A grid of block scales (`X.weight_scale_inv`) is read and written through these two views as scales by row
(`X.weight_scale`), so that the operations on tensors need not know of blocks.
"""

import math

from torch import Tensor

from core.contracts.errors import UserError
from core.interop.shards import Shards
from core.interop.tensors import BLOCK, CODES, SCALE, TensorReader, TensorSpec, scale_spec
from core.interop.writing import ShardWriter

INVERSE = "_scale_inv"
"""Suffix of the name of a grid; in spite of this name the codes are multiplied by the scale."""


def grid_spec(spec: TensorSpec) -> TensorSpec:
    """The specification of a matrix's grid of block scales."""
    return TensorSpec(scale_spec(spec).dtype, tuple(math.ceil(n / BLOCK) for n in spec.shape))


class ReadBlocks(TensorReader):
    """Shards whose grids of block scales are read as scales by row.

    Args:
        shards: the tensors of the files.

    Raises:
        UserError: codes without a grid, a grid without codes, or a grid of another shape.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        grids = {
            name: name.removesuffix(INVERSE) for name in shards.specs if name.endswith(INVERSE)
        }
        specs = {name: spec for name, spec in shards.specs.items() if name not in grids}
        for grid, name in grids.items():
            if name not in specs or specs[name].dtype != CODES:
                raise UserError(
                    f"{shards.files[grid]}: tensor {grid} has no FP8 tensor {name} to scale"
                )
            if len(specs[name].shape) != 2 or shards.specs[grid] != grid_spec(specs[name]):
                expected = list(grid_spec(specs[name]).shape)
                found = shards.specs[grid]
                dtype = str(found.dtype).removeprefix("torch.")
                raise UserError(
                    f"{shards.files[grid]}: tensor {grid} is {dtype} {list(found.shape)}, "
                    f"and must be float32 {expected}"
                )
        for name, spec in list(specs.items()):
            if spec.dtype == CODES:
                if name + INVERSE not in grids:
                    raise UserError(
                        f"{shards.files[name]}: FP8 tensor {name} has no {name}{INVERSE}"
                    )
                specs[name + SCALE] = scale_spec(spec)
        self.specs = specs
        self.codes = {name for name, spec in specs.items() if spec.dtype == CODES}

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Returns rows of a tensor; each row of scales holds those of its block."""
        if name in self.shards.specs:
            return self.shards.read_rows(name, begin, end)
        low = begin // BLOCK
        grid = self.shards.read_rows(
            name.removesuffix(SCALE) + INVERSE, low, math.ceil(end / BLOCK)
        )
        return grid.repeat_interleave(BLOCK, dim=0)[begin - low * BLOCK : end - low * BLOCK]


class WriteBlocks:
    """A writer that takes scales by row and writes those of the first row of every block.

    Args:
        writer: its plan holds the grids.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Writes rows of a tensor, the first of them at row `first`."""
        if name in self.writer.specs:
            self.writer.write(name, first, rows)
            return
        kept = rows[-first % BLOCK :: BLOCK]
        self.writer.write(name.removesuffix(SCALE) + INVERSE, math.ceil(first / BLOCK), kept)

    def sync(self) -> None:
        """Flushes what was written to the disk."""
        self.writer.sync()
