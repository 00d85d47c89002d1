"""Losses by source: which corpus of a mixture a sequence comes from decides where its loss is reported."""

from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.record import MeanMetric, Metric

SOURCE = "source/"
"""What the name of a source's metric begins with. A step without a sequence of the source has no value there."""


def losses_by_source(
    context: SequenceContext, losses_T: Tensor, counted_BL: Tensor
) -> dict[str, Metric]:
    """The mean loss of each source, by `source/` and its name.

    Args:
        context: the sequences, with their sources.
        losses_T: the loss of each position, T = B x L; 0 where nothing is predicted.
        counted_BL: which positions count.
    """
    assert context.source_B is not None
    losses_BL = losses_T.detach().double().view_as(counted_BL)
    metrics: dict[str, Metric] = {}
    for number, name in enumerate(context.source_names):
        of_source_B1 = (context.source_B == number)[:, None]
        total = (losses_BL * of_source_B1).sum()
        metrics[f"{SOURCE}{name}"] = MeanMetric(total, (counted_BL & of_source_B1).sum())
    return metrics
