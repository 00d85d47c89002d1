"""The attention slot and the cache that decoding uses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.layer import LayerExtras
from core.contracts.record import Record


class Cache(ABC):
    """What one attention layer keeps of the tokens that it has processed, for each row of a batch.

    A row is one sequence of the batch. Buffers are allocated once, for `capacity` tokens of each row; `lengths` says
    which part of them is valid. Rows may have different lengths. No gradient flows through a cache.

    Attributes:
        constant_shapes: whether `append` returns all `capacity` slots of each row instead of the longest row's, so that
            every decoding step has the same shapes, as CUDA graphs need it; it may be set between two steps.
        truncates: whether `truncate` can be called; a cache that compresses closed windows, for example, cannot.
    """

    truncates: ClassVar[bool] = True
    constant_shapes: bool = False

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """The number of tokens kept for each row: int64, on the cache's device. Later calls may change it in place."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The number of tokens kept for the longest row."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The size of the buffers in bytes, over all rows."""

    @abstractmethod
    def append(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Appends new tokens to those of each row; every part is B x L x ... (keys and values, for example).

        Returns:
            Every part with all tokens so far, B x S x ..., where S is the longest row's length, or `capacity` under
            `constant_shapes`. The entries past a row's own length are finite and have no meaning.

        Raises:
            ValueError: a row would hold more than `capacity` tokens.
        """

    @abstractmethod
    def slots(self, new: int) -> Tensor | None:
        """The positions of each row's last `new` tokens in what `append` returned: int64 B x new.

        None if they are the last `new` of the S positions in every row, which never holds under `constant_shapes`.
        """

    def advance(self, new: int) -> None:
        """Counts tokens that a replayed CUDA graph has appended to each row, for `longest`; `lengths` has them already.

        Raises:
            NotImplementedError: this cache cannot be replayed.
            ValueError: a row would hold more than `capacity` tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be replayed")

    def truncate(self, lengths_B: Tensor) -> None:
        """Forgets all tokens of each row past a length (rejected drafts, padding on the right of a prompt).

        Raises:
            NotImplementedError: this cache cannot be truncated (`truncates` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be truncated")


@dataclass(frozen=True)
class AttentionTrace:
    """What an attention layer shows of one forward.

    Args:
        latents: compressed states, B x L x C, by name: `key_value`, which the cache keeps, and `query`.
        max_logit_BLH: the largest scaled logit of each query head, over the positions that the query attends to;
            None: the layer has no such logits, or does not show them.
    """

    latents: dict[str, Tensor] = field(default_factory=dict)
    max_logit_BLH: Tensor | None = None


class Attention(LayerExtras, nn.Module, Component, ABC):
    """Mixes information between positions: `(x_BLD, context, cache) -> x_BLD` or `(x_BLD, record)`.

    Causal: the output for token i depends on the tokens up to i only and, where `context.documents_BM` is given, only
    on tokens of the same document. With a cache the result equals the full forward over all tokens. Positions come
    from the context, never from the shape. A forward writes nothing but the cache that it was given.

    Capabilities: `causal`; `rows_in_order` where the order of the tokens matters beside their positions (short
    convolutions, windows over tokens); `exact_mixing` where `costs().attention_flops` is what the layer computes, and
    not the causal half of a square that kernels without a mask compute whole (windows, linear attention).
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"causal"})

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Record]:
        """Computes the layer's output for a micro-batch, or for the next tokens in decoding.

        Args:
            x_BLD: the layer's normed input.
            context: the micro-batch.
            cache: what this layer keeps of earlier tokens in decoding; None: `x_BLD` holds whole sequences.

        Returns:
            The output B x L x D; with it a record, where the layer has losses, tallies or metrics of its own.
        """

    @abstractmethod
    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        """Makes an empty cache for this layer.

        Args:
            rows: sequences that are decoded together.
            capacity: tokens of each row that it can hold.
            device: the device of the buffers; None: torch's default device.
        """

    @abstractmethod
    def costs(self) -> Costs:
        """The costs of one token in a sequence of the build context's length."""

    def inspect(self, x_BLD: Tensor, context: SequenceContext) -> AttentionTrace:
        """Returns latents and largest logits for an input of `forward` without a cache; `core.trace` calls it.

        It is pure, like `forward`, and runs in evaluation mode. By default nothing is shown.
        """
        return AttentionTrace()

    def computed_mixing(self) -> float | None:
        """The FLOPs per token that a forward in training spends on what `costs().attention_flops` counts.

        None, as by default: twice as many, because kernels without a mask compute the whole square; just as many with
        the capability `exact_mixing`. A layer that computes more than it counts (masked scores, a loss of its own) says
        so here.
        """
        return None
