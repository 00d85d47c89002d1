"""Auxiliary balance losses over a sequence (report, eq. 17-20), the whole batch (section 4.5.3) or a micro-batch.

All three are sum_i f_i P_i of `core.routing.share_loss`, with f_i from the plain top K by affinity: no bias, no group
limit. They differ in the tokens over which f and P are formed.
"""

from dataclasses import dataclass

from core.contracts.schedule import Scheduled
from core.contracts.schema import setting
from core.routing.share_loss import Coefficient, ShareLoss


class SequenceLoss(ShareLoss):
    """The share loss of each sequence by itself, so splitting a batch changes nothing."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), eq. 17-20"
    example = {"name": "sequence", "alpha": 0.0001}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of the sequence-wise loss."""

        alpha: Scheduled = setting(0.0001, doc="coefficient (DeepSeek-V3: 0.0001)")


class BatchLoss(ShareLoss):
    """The share loss of all tokens of the step, over micro-batches and data ranks.

    If a step has several micro-batches, each is read once more beforehand, because f is known only then.
    """

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 4.5.3"
    scope = "batch"
    example = {"name": "batch", "alpha": 0.001}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of the batch-wise loss."""

        alpha: Scheduled = setting(0.001, doc="coefficient")


class MicroBatchLoss(ShareLoss):
    """The share loss of one micro-batch, over all data ranks; accumulation changes it."""

    paper = "Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), section 2.2"
    scope = "micro_batch"
    example = {"name": "micro_batch", "alpha": 0.001}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of the loss over a micro-batch."""

        alpha: Scheduled = setting(
            0.001, doc="coefficient (arXiv 2408.15664, for sigmoid affinities: 0.001)"
        )
