"""What to look at when gradients are not finite."""

from torch import Tensor


def non_finite_advice(weight: str | None, loss: Tensor, *, steps_done: int) -> str:
    """The end of the error message for too many steps with a gradient that is not finite.

    Args:
        weight: a sentence about a weight that is not finite; None: all are.
        loss: the loss of the last step, a scalar.
        steps_done: steps before that had finite gradients.
    """
    known = f"its loss is {float(loss):.4g}, {weight or 'all weights are finite'}"
    if weight:
        return f"{known}, so the weights had diverged before: try a lower optimizer.lr"
    if not steps_done:
        return (
            f"{known}, and no step had a finite gradient, so optimizer.lr is not the cause: "
            "look at the data, model.init and the precision"
        )
    if bool(loss.isfinite()):
        return f"{known}, so a backward overflowed: try another precision, or a lower optimizer.lr"
    return f"{known}, and steps before had finite gradients: try a lower optimizer.lr"
