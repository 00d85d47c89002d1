"""Decoding from latents: the up-projection of keys and values is absorbed into queries and outputs.

The score of a query and a cached token is q^C . (W^UK c) = (W^UK^T q^C) . c, so each head's query is taken to the width
of the latent once, instead of every latent to the width of the keys. Values follow in the same way: the softmax mixes
latents, and the mixture alone goes through W^UV. All heads then read one key of kv_rank + rope_dim elements, as in
multi-query attention (DeepSeek-V2, section 2.1.2 and appendix C).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.model import few_tokens
from core.numerics.promotion import wide_product


def absorption_pays(new: int, seen: int, latent: int, expanded: int) -> bool:
    """Whether absorption takes fewer multiplications than expanding the latents.

    For each head, expanding costs S C W for keys and values and L S W for scores and outputs (without the rotated part,
    which is the same in both); absorbing costs L C W for queries and outputs and 2 L S C for scores and mixtures. With
    DeepSeek-V3's widths and a long cache the break-even is at 171 new tokens.

    Args:
        new: new tokens L.
        seen: cached tokens S, the new ones included.
        latent: width C of the latent.
        expanded: width W of a head's key without its rotated part and of its value, together.
    """
    expanding = seen * latent * expanded + new * seen * expanded
    absorbing = new * latent * expanded + 2 * new * seen * latent
    return new < seen and absorbing < expanding


def attend_to_latents(
    q_BLHN: Tensor,
    q_BLHR: Tensor,
    cached_BSX: Tensor,
    up_HWC: Tensor,
    scale: float,
    mask_BAS: Tensor | None,
) -> Tensor:
    """Attention over cached latents; equal to attention over their keys and values.

    Args:
        q_BLHN: queries without position.
        q_BLHR: rotated queries.
        cached_BSX: the normed latent and the rotated shared key of each token, side by side.
        up_HWC: each head's rows of the up-projection: those of the keys, then those of the values.
        scale: factor of the scores.
        mask_BAS: bool, which tokens each of the A = L x H queries sees; None: all.

    Returns:
        L x H x V outputs for every sequence, in the format of the cache.
    """
    rows, new, heads, nope = q_BLHN.shape
    latent = up_HWC.shape[2]
    up_HNC = up_HWC[:, :nope]
    up_HVC = up_HWC[:, nope:]
    q_HTC = torch.bmm(q_BLHN.flatten(0, 1).transpose(0, 1), up_HNC)
    q_THC = q_HTC.transpose(0, 1)
    q_BAX = torch.cat([q_THC, q_BLHR.flatten(0, 1)], dim=-1).view(rows, new * heads, -1)
    mixed_BAC = _mix(q_BAX, cached_BSX, latent, scale, mask_BAS)
    mixed_HTC = mixed_BAC.reshape(rows * new, heads, latent).transpose(0, 1)
    o_HTV = torch.bmm(mixed_HTC, up_HVC.transpose(1, 2))
    return o_HTV.transpose(0, 1).view(rows, new, heads, -1)


def has_fused_kernel(device: torch.device) -> bool:
    """Whether torch has a kernel for keys of this width that does not store all scores: on CPUs alone."""
    return device.type == "cpu"


def _mix(
    q_BAX: Tensor, cached_BSX: Tensor, latent: int, scale: float, mask_BAS: Tensor | None
) -> Tensor:
    """The latents of the cache, mixed by the softmax of the scores: B x A x C."""
    if has_fused_kernel(q_BAX.device):
        # It needs values as wide as keys; the rotated part is mixed too, and cut off.
        cached_B1SX = cached_BSX[:, None]
        mask_B1AS = None if mask_BAS is None else mask_BAS[:, None]
        mixed = F.scaled_dot_product_attention(
            q_BAX[:, None], cached_B1SX, cached_B1SX, attn_mask=mask_B1AS, scale=scale
        )
        mixed_BAC: Tensor = mixed[:, 0, :, :latent]
        return mixed_BAC
    scores_BAS = wide_product(q_BAX, cached_BSX.transpose(1, 2))
    weights_BAS = _softmax(scores_BAS, mask_BAS, scale, cached_BSX.dtype)
    return torch.bmm(weights_BAS, cached_BSX[..., :latent])


def _softmax(
    scores_BAS: Tensor, mask_BAS: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """The softmax of scaled scores over the visible tokens, computed in their format and returned in another."""
    rows = scores_BAS.shape[0] * scores_BAS.shape[1]
    kernels = few_tokens.kernels(scores_BAS, rows, scores_BAS.shape[2])
    if mask_BAS is not None:
        mask_BAS = mask_BAS.expand_as(scores_BAS)
    if kernels is not None:
        own_mask = None if mask_BAS is None else mask_BAS.contiguous()
        weights_BAS: Tensor = kernels.masked_softmax(scores_BAS, own_mask, scale, dtype)
        return weights_BAS
    scores_BAS = scores_BAS * scale
    if mask_BAS is not None:
        scores_BAS = scores_BAS.masked_fill(~mask_BAS, -torch.inf)
    return scores_BAS.softmax(dim=-1).to(dtype)
