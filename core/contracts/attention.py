"""The attention slot and the cache that decoding uses."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.layer import LayerExtras
from core.contracts.record import Record


class Cache(ABC):
    """What one attention layer keeps of the tokens it has seen."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens kept."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes that the kept tokens take, over all sequences of the batch."""

    @abstractmethod
    def append(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Keep B x L x ... parts of new tokens; returns every part with all tokens so far, B x S x ..."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget all tokens past `length` (rejected drafts)."""


class Attention(LayerExtras, nn.Module, Component, ABC):
    """Mixes information between positions: `(x_BLD, context, cache) -> x_BLD` or `(x_BLD, record)`.

    Causal: row i depends on rows up to i only. Where `context.documents_BM` is given, only on rows of the
    same document. With a cache the result equals the full forward over all tokens. Positions come from
    the context, never from the shape. Only the cache it was handed may be written.

    Capabilities: `causal`; `rows_in_order` where the order of rows matters beside their positions (short
    convolutions, windows over rows); `exact_mixing` where `costs().mixing` is what the layer does, and not the causal
    half of a square that kernels without a mask compute whole (windows, linear attention).
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"causal"})

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Record]:
        """Attend.

        Args:
            x_BLD: the normed input of the block.
            context: the micro-batch.
            cache: in decoding, what this layer keeps of earlier tokens.

        Returns:
            The output B x L x D; beside it a record, where the layer has losses, tallies or metrics of its own.
        """

    @abstractmethod
    def new_cache(self) -> Cache:
        """An empty cache for this layer."""

    @abstractmethod
    def costs(self) -> Costs:
        """For one token of a sequence of the build context's length."""
