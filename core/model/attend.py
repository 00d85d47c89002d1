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
        self._lengths_B = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._places_S = torch.arange(capacity, device=self.device)
        self._rows_B1 = torch.arange(rows, device=self.device)[:, None]
        self._counts = [0] * rows  # the lengths once more, on the host
        self._slots_BL: Tensor | None = None
        self._buffers: tuple[Tensor, ...] = ()

    @property
    def lengths(self) -> Tensor:
        return self._lengths_B

    @property
    def longest(self) -> int:
        return max(self._counts)

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    def append(self, *parts: Tensor) -> tuple[Tensor, ...]:
        new = parts[0].shape[1]
        first = self.longest
        self.advance(new)
        if not self._buffers:
            self._buffers = tuple(self._new_buffer(part) for part in parts)
        if self._even:
            self._slots_BL = None
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer[:, first : first + new] = part.detach()
        else:
            self._slots_BL = self._lengths_B[:, None] + self._places_S[:new]
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer[self._rows_B1, self._slots_BL] = part.detach()
        self._lengths_B += new
        if self.constant_shapes:
            return self._buffers
        return tuple(buffer[:, : self.longest] for buffer in self._buffers)

    @property
    def _even(self) -> bool:
        """Whether the new tokens of every row are at the same places, and may be found by the host."""
        return not self.constant_shapes and min(self._counts) == self.longest

    def _new_buffer(self, part: Tensor) -> Tensor:
        """Zeros of rows x capacity x ... in the format of a part."""
        shape = (len(part), self.capacity, *part.shape[2:])
        return torch.zeros(shape, dtype=part.dtype, device=part.device)

    def advance(self, new: int) -> None:
        if self.longest + new > self.capacity:
            raise ValueError(
                f"{self.longest} tokens and {new} more do not fit into a cache of {self.capacity}"
            )
        self._counts = [count + new for count in self._counts]

    def slots(self, new: int) -> Tensor | None:
        if self._even:
            return None
        if self._slots_BL is not None and self._slots_BL.shape[1] == new:
            return self._slots_BL
        return self._lengths_B[:, None] - new + self._places_S[:new]

    def truncate(self, lengths_B: Tensor) -> None:
        wanted = lengths_B.tolist()
        counts = zip(self._counts, wanted, strict=True)
        self._counts = [min(old, int(new)) for old, new in counts]
        self._slots_BL = None
        wanted_B = lengths_B.to(self.device, non_blocking=True)
        torch.minimum(self._lengths_B, wanted_B, out=self._lengths_B)


def attend(
    q_BLHR: Tensor,
    k_BSHR: Tensor,
    v_BSHV: Tensor,
    scale: float,
    context: SequenceContext,
    slots_BL: Tensor | None = None,
    chosen_BLS: Tensor | None = None,
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
        chosen_BLS: bool, the slots that each query attends to, instead of all that `visible_positions` returns.

    Returns:
        L x H x V outputs for every sequence, in the format of the values.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHR, k_BSHR, v_BSHV))
    new = q.shape[2]
    seen = k.shape[2]
    mask = chosen_BLS[:, None] if chosen_BLS is not None else None
    if mask is None:
        mask = attention_mask(slots_BL, new, seen, context)
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


def attention_mask(
    slots_BL: Tensor | None, new: int, seen: int, context: SequenceContext
) -> Tensor | None:
    """The mask L x S or B x 1 x L x S of what each query sees; None where the kernel's own causal mask is right.

    In decoding it is made once for all layers.
    """
    if slots_BL is not None:
        slots = slots_BL
        return context.once(("row mask", new, seen), lambda: _row_mask(slots, seen))
    return _mask(new, seen, context)


def visible_positions(
    slots_BL: Tensor | None, new: int, seen: int, context: SequenceContext
) -> Tensor:
    """The slots that each query may see: bool, B x L x S, or 1 x L x S if it is the same in every row.

    Arguments are those of `attention_mask`.
    """
    mask = attention_mask(slots_BL, new, seen, context)
    if mask is None:
        own_L1 = torch.arange(seen - new, seen, device=context.tokens_BL.device)[:, None]
        mask = own_L1 >= torch.arange(seen, device=own_L1.device)
    return mask[:, 0] if mask.ndim == 4 else mask[None]


def max_logits(
    q_BLHR: Tensor, k_BSHR: Tensor, scale: float, visible_BLS: Tensor, queries: int = 256
) -> Tensor:
    """The largest scaled logit of every query and head over the positions that it sees: B x L x H.

    Args:
        q_BLHR: queries.
        k_BSHR: keys, which may have fewer heads than the queries.
        scale: factor of the logits.
        visible_BLS: bool, the positions that each query sees; B may be 1.
        queries: how many queries are computed at once, which bounds the memory.
    """
    k_BSHR = k_BSHR.repeat_interleave(q_BLHR.shape[2] // k_BSHR.shape[2], dim=2)
    found = []
    for start in range(0, q_BLHR.shape[1], queries):
        part = slice(start, start + queries)
        logits_BHLS = torch.einsum("blhr,bshr->bhls", q_BLHR[:, part], k_BSHR) * scale
        hidden_BHLS = ~visible_BLS[:, None, part]
        found.append(logits_BHLS.masked_fill(hidden_BHLS, -torch.inf).amax(dim=-1).transpose(1, 2))
    return torch.cat(found, dim=1)


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
