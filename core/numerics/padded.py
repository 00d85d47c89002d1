"""Rows sorted by group, each group's padded with zeros to whole tiles: the shape that FP8 kernels need.

A group without rows gets one tile of zeros, so that no kernel gets an empty operand. Zeros change no product:
rows of the output are cut away again, and to a weight's gradient they add nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PaddedGroups:
    """The place of every row among the padded ones.

    Args:
        rows: number of rows before padding.
        owned: number of those that belong to a group; rows after the last end do not.
        sizes: number of rows of each group, padded.
        places_A: the place of each owned row among the padded ones, int64.
    """

    rows: int
    owned: int
    sizes: list[int]
    places_A: Tensor

    @classmethod
    def of(cls, ends_E: Tensor, rows: int, tile: int) -> "PaddedGroups":
        """The places for groups that end at `ends_E`, padded to multiples of `tile` rows; waits for the device."""
        ends = ends_E.tolist()
        counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        sizes = [max(-(-count // tile), 1) * tile for count in counts]
        begins = torch.tensor([0, *sizes[:-1]]).cumsum(0) - torch.tensor([0, *ends[:-1]])
        shift_A = begins.repeat_interleave(torch.tensor(counts))
        places_A = (torch.arange(ends[-1]) + shift_A).to(ends_E.device)
        return cls(rows, ends[-1], sizes, places_A)

    def pad(self, x_AI: Tensor) -> Tensor:
        """The padded rows, [sum of sizes, I]."""
        zeros_PI = x_AI.new_zeros(sum(self.sizes), x_AI.shape[1])
        return zeros_PI.index_copy(0, self.places_A, x_AI[: self.owned])

    def cut(self, y_PO: Tensor) -> Tensor:
        """The rows in their places before padding, [A, O]; those without a group are 0."""
        return F.pad(y_PO.index_select(0, self.places_A), (0, 0, 0, self.rows - self.owned))
