"""What attention and feed-forward layers may have beside their output: losses, stages, and updates between steps."""

from collections.abc import Sequence

from torch import Tensor, nn

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

    def on_step_start(self, progress: Progress) -> None:
        """Prepares the layer for an optimizer step, before any of its forwards: a stage of training, for example.

        It must depend on `progress` alone, so that a resumed run does the same. What the forward reads must be a buffer
        that is changed in place: a compiled forward would be compiled again for every value of a Python attribute.

        Args:
            progress: the position of the run at the end of the step.
        """

    def added_state(self) -> Sequence[str]:
        """The names in the layer's state dict that weights to start from may lack, all of them or none.

        They are what the layer adds to another one that was trained before: an indexer, for example. Where
        `initial_weights` lacks them they keep their initial values, and what the layer no longer has is left out.
        """
        return ()

    def learns_alone(self, progress: Progress) -> Sequence[nn.Parameter] | None:
        """The layer's weights that are updated at this position of the run while the rest of the model is frozen.

        None, as by default: the layer freezes nothing. Where any layer returns weights, those of all such layers alone
        are updated in this step. Other weights, their optimizer states and all balancers stay as they are, and the
        gradient norm is that of what is updated.
        """
        return None

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Updates the layer's state after an optimizer step that was not skipped.

        Args:
            totals: load, tallies and metrics of the step, over all its micro-batches and data ranks.
            progress: the position of the run at the end of the step.
        """
