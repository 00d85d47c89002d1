"""Histograms of one number for each token and expert, and their quantiles, with counts that are exact integers.

Shape suffixes: T tokens, E experts, B bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.counting import count


@dataclass(frozen=True)
class Bins:
    """Bins of equal width; a number on the border of two belongs to the upper one.

    Args:
        low: scalar, the lower end of the first bin.
        width: scalar, the width of each bin.
        count: how many bins there are.
    """

    low: Tensor
    width: Tensor
    count: int

    @classmethod
    def around(cls, bias_E: Tensor, span: float, count: int) -> "Bins":
        """The bins from min(bias) - span to max(bias) + span, in fp64 (Kimi K3 report, appendix D)."""
        low = bias_E.min().double() - span
        high = bias_E.max().double() + span
        return cls(low, (high - low) / count, count)

    def histogram(self, values_TE: Tensor, counted_T: Tensor) -> Tensor:
        """Counts each expert's values by bin: int64 E x B.

        Values below the first bin count in the first, those above the last in the last; a NaN counts in the first.

        Args:
            values_TE: the numbers, in fp32 or wider.
            counted_T: bool, whether a token counts.
        """
        tokens, experts = values_TE.shape
        place_TE = ((values_TE - self.low) / self.width).nan_to_num(nan=0.0)
        bin_TE = place_TE.clamp(0, self.count - 1).to(torch.int64)
        first_E = torch.arange(experts, device=bin_TE.device) * self.count
        counted_TE = counted_T[:, None].expand(tokens, experts)
        index_TE = first_E + bin_TE
        size = experts * self.count
        return count(index_TE.flatten(), size, counted_TE.flatten()).view(experts, self.count)

    def quantile(self, histogram_EB: Tensor, part: int, parts: int) -> Tensor:
        """The part / parts quantile of each row, fp64 E; the lower end of the first bin for a row without counts.

        The counts of a bin are taken as evenly spread over it. The bin is found in integers: it is the first up to
        whose upper end part / parts of the row lie.
        """
        upto_EB = histogram_EB.cumsum(dim=1)
        total_E = upto_EB[:, -1]
        rank_E = (total_E * part + parts - 1) // parts
        bin_E1 = (upto_EB < rank_E[:, None]).sum(dim=1, keepdim=True)
        inside_E = histogram_EB.gather(1, bin_E1)[:, 0]
        before_E = upto_EB.gather(1, bin_E1)[:, 0] - inside_E
        missing_E = total_E * part - parts * before_E  # parts times the counts still missing
        fraction_E = missing_E.double() / (parts * inside_E.clamp(min=1)).double()
        return self.low + self.width * (bin_E1[:, 0] + fraction_E)
