"""The residual stream of DeepSeek-V3 and of nearly every transformer: each layer's output is added to its input."""

from dataclasses import dataclass

from torch import Tensor

from core.contracts.residual import Residual


class AddResidual(Residual):
    """The plain residual stream x + layer(norm(x)), which is the states themselves."""

    paper = "Deep Residual Learning (arXiv 1512.03385), equation 1; pre-norm as in the DeepSeek-V3 report, figure 2"
    example = {"name": "add"}

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def expand(self, embedded_BLD: Tensor) -> Tensor:
        """The stream that starts as the embedding."""
        return embedded_BLD

    def read(self, stream: Tensor) -> Tensor:
        """The input of a layer: the stream itself."""
        return stream

    def write(self, stream: Tensor, output_BLD: Tensor) -> Tensor:
        """The sum of the stream and a layer's output."""
        return stream + output_BLD

    def collapse(self, stream: Tensor) -> Tensor:
        """The states after the last layer: the stream itself."""
        return stream
