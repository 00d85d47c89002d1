"""The part of a tensor that one rank holds, and its place in the whole."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LocalPart:
    """The part of a tensor that this rank holds.

    Args:
        tensor: the part.
        offsets: the place of its first number in the whole tensor.
        shape: the shape of the whole tensor.
    """

    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "LocalPart":
        """A tensor that this rank holds as a whole."""
        return cls(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
