"""The attention slot and the cache that decoding uses."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.layer import LayerExtras
from core.contracts.record import Record


class Cache(ABC):
    """What one attention layer keeps of the tokens it has seen, row by row of a batch.

    Buffers are allocated once, for `capacity` tokens of each row; `lengths` says which part of them is valid. Rows
    may have different lengths. Nothing is differentiated through a cache. What `append` returns grows with the longest
    row; a decoding step of constant shapes, as CUDA graphs need it, is not in this version.

    Class attributes:
        truncates: whether `truncate` can be called; a cache that compresses closed windows, for example, cannot.
    """

    truncates: ClassVar[bool] = True

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """int64, tokens kept of each row, on the cache's device."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens kept of the longest row."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of the buffers, over all rows."""

    @abstractmethod
    def append(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Keep B x L x ... parts of new tokens behind those of each row.

        Returns:
            Every part with all tokens so far, B x S x ..., where S is the longest row's length; what stands past a
            row's own length is finite and has no meaning.

        Raises:
            ValueError: more tokens than `capacity`.
        """

    @abstractmethod
    def slots(self, new: int) -> Tensor | None:
        """Where the last `new` tokens of each row stand in what `append` returned: int64 B x new.

        None where all rows are equally long, so that these are the last `new` of the S slots.
        """

    def truncate(self, lengths_B: Tensor) -> None:
        """Forget all tokens of each row past a length (rejected drafts, padding on the right of a prompt).

        Raises:
            NotImplementedError: this cache cannot (`truncates` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot forget tokens that it has taken in")


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
    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        """An empty cache for this layer.

        Args:
            rows: sequences that are decoded together.
            capacity: tokens of each row that it can hold.
            device: of the buffers; None: torch's default device.
        """

    @abstractmethod
    def costs(self) -> Costs:
        """For one token of a sequence of the build context's length."""
