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
"""Best first; each passes on what it cannot take."""


class TensorCache(Cache):
    """Keeps each part as one tensor, B x S x ...; plain and correct."""

    def __init__(self) -> None:
        self._parts: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        return self._parts[0].shape[1] if self._parts else 0

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._parts)

    def append(self, *parts: Tensor) -> tuple[Tensor, ...]:
        if self._parts:
            parts = tuple(torch.cat(pair, dim=1) for pair in zip(self._parts, parts, strict=True))
        self._parts = parts
        return parts

    def truncate(self, length: int) -> None:
        self._parts = tuple(part[:, :length] for part in self._parts)


def attend(q_BLHR: Tensor, k_BSHR: Tensor, v_BSHV: Tensor, scale: float, context: SequenceContext) -> Tensor:
    """Causal softmax attention; the last L of the S positions are the queries'.

    Keys and values may have fewer heads than queries (grouped or multi-query attention).

    Returns:
        L x H x V outputs for every sequence, in the format of the values.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHR, k_BSHR, v_BSHV))
    new, seen = q.shape[2], k.shape[2]
    mask = _mask(new, seen, context)
    grouped = k.shape[1] != q.shape[1]
    causal = mask is None and new > 1
    width, missing = v.shape[-1], q.shape[-1] - v.shape[-1]
    if missing > 0 and v.device.type == "cpu":
        v = F.pad(v, (0, missing))  # the fused CPU kernel wants one width; without it all scores are stored
    with _best_kernel(q, mask):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o[..., :width].transpose(1, 2)


def _best_kernel(q: Tensor, mask: Tensor | None) -> AbstractContextManager[Any]:
    """On GPUs cuDNN's where it fits: left to itself torch gives values of another width to its slowest kernel."""
    if not q.is_cuda or mask is not None or q.shape[2] == 1:  # a plan of cuDNN's for every length of a cache costs more
        return nullcontext()
    chosen: AbstractContextManager[Any] = sdpa_kernel(KERNELS, set_priority=True)
    return chosen


def _mask(new: int, seen: int, context: SequenceContext) -> Tensor | None:
    """None where causality alone decides and the kernel's own mask is right."""
    if context.documents_BM is None and (new == seen or new == 1):
        return None
    rows = torch.arange(seen - new, seen, device=context.tokens_BL.device)
    mask = rows[:, None] >= torch.arange(seen, device=rows.device)[None, :]
    if context.documents_BM is not None:
        documents_BL = context.documents_BM[:, :new]
        mask = mask & (documents_BL[:, :, None] == documents_BL[:, None, :])
        return mask[:, None]
    return mask
