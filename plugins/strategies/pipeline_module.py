"""A stage as torch's pipelining runs it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from plugins.strategies.pipeline_stages import Segment

if TYPE_CHECKING:
    from plugins.strategies.pipeline_run import PipelineRun


class _WithLoss(torch.autograd.Function):
    """Returns a stream unchanged, and adds the gradients of a loss of this stage when the stream's gradient arrives.

    So a loss of a layer (a balance loss, for example) needs not travel to the last stage. Its gradient is 1, because
    the losses of all stages add up to the objective.
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.shape, loss.dtype, loss.device
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss
        return gradient, torch.ones(shape, dtype=dtype, device=device)


class StageModule(nn.Module):
    """A segment as torch's pipelining runs it: the stream of one micro-batch to the next stream, or to a loss.

    It owns no weight, so that torch's pipelining leaves those of the model alone. Micro-batches come in their order.

    Args:
        run: the stages of this process.
        segment: which one.
    """

    def __init__(self, run: "PipelineRun", segment: Segment) -> None:
        super().__init__()
        self._run = (run,)
        self.segment = segment
        self.next = 0

    def forward(self, given: Tensor) -> Tensor:
        """The segment's stream, with its losses attached; of the last segment the loss, a scalar.

        Args:
            given: the stream before the segment; token ids for the first one.
        """
        run = self._run[0]
        work = run.work
        assert work is not None
        context = work.contexts[self.next]
        self.next += 1
        stream = None if self.segment.is_first else given
        after: Tensor
        after, losses = run.run_segment(self.segment, stream, context)
        loss = work.loss_of(losses)
        if self.segment.is_last:
            return loss
        if loss.requires_grad:
            after = _WithLoss.apply(after, loss)  # type: ignore[no-untyped-call]
        return after


class Stage(PipelineStage):
    """torch's stage, which lets the inner strategy exchange gradients in the last backward of a window."""

    def __init__(self, run: "PipelineRun", *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._run = run

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """Runs a micro-batch backwards through the segment."""
        assert self.chunks is not None
        self._run.begin_backward(last=bwd_chunk_id == self.chunks - 1)
        return super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
