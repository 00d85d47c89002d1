"""What attention and feed-forward layers may have beside their output: losses, and an update at the end of a step."""

from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.record import StepTotals
from core.contracts.schedule import Progress


class LayerExtras:
    """Methods that a layer overrides if it has losses or state of its own; by default it has none.

    A layer with losses returns their sums as `Record.terms`. Their denominators come from `counts`, which reads the
    data alone, so that a loss is a mean over the whole window however it is split into micro-batches and ranks.
    """

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """The denominator of each of the layer's own losses for one micro-batch, int64 scalars by the loss's name."""
        return {}

    def coefficient(self, progress: Progress) -> float:
        """The factor of each of the layer's own mean losses at this position of the run."""
        return 0.0

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Updates the layer's state after an optimizer step that was not skipped.

        Args:
            totals: load, tallies and metrics of the step, over all its micro-batches and data ranks.
            progress: the position of the run at the end of the step.
        """
