"""Block-quantised checkpoints as DeepSeek-V3 is released: E4M3 codes with one fp32 scale for each block of a matrix.

Written as loops over blocks from README_WEIGHTS of the release: a stored matrix is `weight` (float8_e4m3fn) with
`weight_scale_inv` [ceil(rows / block), ceil(columns / block)], and a value is code x scale. Embedding, output, norms,
router and the multi-token projection stay as they are.
"""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

LARGEST = 448.0
"""Largest number of E4M3."""

KEPT = (
    "embed_tokens",
    "lm_head",
    "norm",
    "mlp.gate.",
    "eh_proj",
    "shared_head",
    "e_score_correction_bias",
)


def quantisation(block: tuple[int, int]) -> dict[str, Any]:
    """The section of config.json."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def blocks(
    shape: tuple[int, ...], block: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Each block's place among the scales, and its rows and columns; the last ones may be ragged."""
    for i in range(ceil(shape[0] / block[0])):
        for j in range(ceil(shape[1] / block[1])):
            yield (
                (i, j),
                (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])),
            )


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes and scales; a block's largest value becomes the largest code, a block of zeros has scale 1."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(
        ceil(weight.shape[0] / block[0]), ceil(weight.shape[1] / block[1]), dtype=torch.float32
    )
    for place, part in blocks(tuple(weight.shape), block):
        values = weight[part].to(torch.float32)
        scale = values.abs().max() / LARGEST
        scales[place] = scale if scale > 0 else 1.0
        codes[part] = (values / scales[place]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """code x scale, in fp32."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    for place, part in blocks(tuple(codes.shape), block):
        values[part] = codes[part].to(torch.float32) * scales[place]
    return values


def quantised(tensors: Mapping[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """A whole checkpoint with the matrices quantised that the release has so."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or any(word in name for word in KEPT):
            found[name] = tensor
        else:
            found[name], found[f"{name}_scale_inv"] = quantise(tensor, block)
    return found


def dequantised(
    tensors: Mapping[str, Tensor], block: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same checkpoint without codes and scales, in one number format."""
    found = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            found[name] = dequantise(tensor, tensors[f"{name}_scale_inv"], block).to(dtype)
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found
