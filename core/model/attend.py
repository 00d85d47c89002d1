"""Softmax attention over positions, and the plain cache, shared by every attention plugin."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.contracts.attention import Cache
from core.contracts.context import SequenceContext

KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Kernels of scaled dot-product attention, best first; torch takes the first that supports the inputs."""


class TensorCache(Cache):
    """Keeps each part in one buffer of rows x capacity x ..., allocated when the first tokens show its format.

    Args:
        rows: sequences that are decoded together.
        capacity: tokens of each row that it can hold.
        device: the buffers' device.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device | None = None) -> None:
        self.capacity = capacity
        self.device = torch.get_default_device() if device is None else device
        self._lengths = [0] * rows
        self._buffers: tuple[Tensor, ...] = ()

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self._lengths, device=self.device)

    @property
    def longest(self) -> int:
        return max(self._lengths)

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    def append(self, *parts: Tensor) -> tuple[Tensor, ...]:
        new = parts[0].shape[1]
        if self.longest + new > self.capacity:
            raise ValueError(
                f"{self.longest} tokens and {new} more do not fit into a cache of {self.capacity}"
            )
        if not self._buffers:
            self._buffers = tuple(self._new_buffer(part) for part in parts)
        self._lengths = [length + new for length in self._lengths]
        slots_BL = self.slots(new)
        rows_B1 = torch.arange(len(self._lengths), device=self.device)[:, None]
        for buffer, part in zip(self._buffers, parts, strict=True):
            if slots_BL is None:
                buffer[:, self.longest - new : self.longest] = part.detach()
            else:
                buffer[rows_B1, slots_BL] = part.detach()
        if self.constant_shapes:
            return self._buffers
        return tuple(buffer[:, : self.longest] for buffer in self._buffers)

    def _new_buffer(self, part: Tensor) -> Tensor:
        """Zeros of rows x capacity x ... in the format of a part."""
        shape = (len(part), self.capacity, *part.shape[2:])
        return torch.zeros(shape, dtype=part.dtype, device=part.device)

    def slots(self, new: int) -> Tensor | None:
        if min(self._lengths) == self.longest and not self.constant_shapes:
            return None
        return self.lengths[:, None] - new + torch.arange(new, device=self.device)

    def truncate(self, lengths_B: Tensor) -> None:
        wanted = lengths_B.tolist()
        self._lengths = [min(old, int(new)) for old, new in zip(self._lengths, wanted, strict=True)]


def attend(
    q_BLHR: Tensor,
    k_BSHR: Tensor,
    v_BSHV: Tensor,
    scale: float,
    context: SequenceContext,
    slots_BL: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention.

    Keys and values may have fewer heads than queries (grouped or multi-query attention).

    Args:
        q_BLHR: queries.
        k_BSHR: keys of the queries' own tokens and of those before them.
        v_BSHV: values.
        scale: factor of the scores.
        context: keeps documents apart if it says so.
        slots_BL: which of the S slots is each query's own, from `Cache.slots`; None: the last L slots of every row.

    Returns:
        L x H x V outputs for every sequence, in the format of the values.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHR, k_BSHR, v_BSHV))
    new = q.shape[2]
    seen = k.shape[2]
    if slots_BL is None:
        mask = _mask(new, seen, context)
    else:
        mask = _row_mask(slots_BL, seen)
    grouped = k.shape[1] != q.shape[1]
    causal = mask is None and new > 1
    width = v.shape[-1]
    missing = q.shape[-1] - width
    if missing > 0 and v.device.type == "cpu":
        # The fused CPU kernel needs values as wide as keys; the other kernel stores all scores.
        v = F.pad(v, (0, missing))
    with _best_kernel(q, mask):
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return o[..., :width].transpose(1, 2)


def _best_kernel(q: Tensor, mask: Tensor | None) -> AbstractContextManager[Any]:
    """Prefers cuDNN's kernel on GPUs: by default torch gives values of another width to its slowest kernel."""
    # With one new token cuDNN would need a plan for every length of the cache, which costs more.
    one_token = q.shape[2] == 1
    if not q.is_cuda or mask is not None or one_token:
        return nullcontext()
    chosen: AbstractContextManager[Any] = sdpa_kernel(KERNELS, set_priority=True)
    return chosen


def _row_mask(slots_BL: Tensor, seen: int) -> Tensor:
    """The mask B x 1 x L x S under which each query sees the slots up to its own."""
    return (slots_BL[:, :, None] >= torch.arange(seen, device=slots_BL.device))[:, None]


def _mask(new: int, seen: int, context: SequenceContext) -> Tensor | None:
    """The mask L x S or B x 1 x L x S; None where the kernel's own causal mask is right."""
    if context.documents_BM is None and (new == seen or new == 1):
        return None
    rows = torch.arange(seen - new, seen, device=context.tokens_BL.device)
    mask = rows[:, None] >= torch.arange(seen, device=rows.device)[None, :]
    if context.documents_BM is not None:
        documents_BL = context.documents_BM[:, :new]
        mask = mask & (documents_BL[:, :, None] == documents_BL[:, None, :])
        return mask[:, None]
    return mask
