"""The residual slot: what flows from block to block, and how layers read it and write into it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs

Place = Literal["model", "attention", "ffn"]
"""What a residual belongs to: the whole model (`expand`, `collapse`), or one layer of one block (`read`, `write`)."""


class Residual(nn.Module, Component, ABC):
    """The stream between blocks: `expand` once, `read` and `write` around every layer, `collapse` once.

    The model's own instance turns the embedding into a stream and the last block's stream into states. Each attention
    and each feed-forward layer has an instance of its own, which may have weights:

        stream = model.expand(embedded_BLD)
        for every layer:  stream = layer.write(stream, layer_output(norm(layer.read(stream))))
        states_BLD = model.collapse(stream)

    A stream is a tensor whose first axes are B x L and whose last one is D. No position sees another one's stream. A
    loss head that owns blocks has a model's instance for them, and one that sets `reads_streams` also finds the stream
    before `collapse`.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any, build: BuildContext, *, place: Place) -> None:
        super().__init__()

    @property
    def streams(self) -> int:
        """The number of states of width D that the stream holds at each position."""
        return 1

    @abstractmethod
    def expand(self, embedded_BLD: Tensor) -> Tensor:
        """Returns the stream before the first block."""

    @abstractmethod
    def read(self, stream: Tensor) -> Tensor:
        """Returns a layer's input before its norm, B x L x D."""

    @abstractmethod
    def write(self, stream: Tensor, output_BLD: Tensor) -> Tensor:
        """Returns the stream after a layer with this output."""

    @abstractmethod
    def collapse(self, stream: Tensor) -> Tensor:
        """Returns the states B x L x D before the final norm."""

    def activation_bytes(self, stream: int, wide: int) -> int:
        """Bytes per token that the backward of a layer's `read` and `write` needs, beside the input of the norm.

        Args:
            stream: bytes per number of the stream.
            wide: bytes per number in fp32 or wider.
        """
        return 0

    def costs(self) -> Costs:
        """The costs of one token in this instance; by default none, as for one without weights."""
        return Costs()
