"""GPU-hours of a run: its FLOPs divided by what a GPU achieves."""

from dataclasses import dataclass
from typing import Any

from core.contracts.errors import UserError
from core.contracts.precision import Precision

H800_MFU = 0.3894
"""Model FLOPs utilisation of DeepSeek-V3's training on 2,048 H800: a part of the bf16 peak, with causal attention
(arXiv 2505.09343, table 4)."""

H800_PEAK = 989e12
"""Dense bf16 FLOPs per second of one H800, as of an H100 SXM."""


@dataclass(frozen=True)
class Speed:
    """The training speed of one GPU.

    Args:
        mfu: the part of its peak that the model's FLOPs get.
        peak: FLOPs per second.
        gpu: its name.
        source: where both come from.
    """

    mfu: float
    peak: float
    gpu: str
    source: str


def speed(precision: Precision, mfu: float | None, tflops: float | None) -> Speed | None:
    """The speed that the user gives, completed by DeepSeek-V3's published figures; None where these do not fit.

    They fit products in 16 or 8 bits: the peak is that of bf16, of which the published utilisation is a part, although
    the report's products were FP8.

    Args:
        precision: the recipe's.
        mfu: utilisation, in (0, 1]; None: the published one.
        tflops: a GPU's dense peak in TFLOPS; None: an H800's.

    Raises:
        UserError: a value is outside its range.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu:g} must be more than 0 and at most 1 (38.94% is 0.3894)")
    if tflops is not None and not 0 < tflops < 1e6:
        allowed = "must be a GPU's dense peak in TFLOPS, for example 989 for an H800"
        raise UserError(f"--gpu-peak: {tflops:g} {allowed}")
    fits = all(precision.compute_dtype(role).itemsize <= 2 for role in ("experts.down", "ffn.down"))
    if mfu is not None and tflops is not None:
        return Speed(mfu, tflops * 1e12, "GPU", "as given")
    if not fits:
        return None
    sources = []
    if mfu is None:
        mfu = H800_MFU
        measured = "DeepSeek-V3's, in FP8 on 2,048 H800, arXiv 2505.09343, table 4"
        sources.append(f"utilisation: {measured}; --mfu sets another")
    if tflops is None:
        gpu = "H800"
        peak = H800_PEAK
        sources.append("peak: an H800's in dense bf16; --gpu-peak sets another")
    else:
        gpu = "GPU"
        peak = tflops * 1e12
    return Speed(mfu, peak, gpu, "; ".join(sources))


def gpu_hours(flops_per_token: float, tokens: int, speed: Speed | None) -> dict[str, Any] | None:
    """The hours that one GPU would take, and what they were computed from; None where the speed is unknown.

    hours = FLOPs per token x tokens / (mfu x peak x 3600). The FLOPs are Megatron-LM's count of the main model, since
    the published utilisation is in that count: 38.94% of 989 TFLOPS, 2,048 GPUs and 19.926 s for a step of 15,360
    sequences give 249.7 GFLOPs per token.
    """
    if speed is None:
        return None
    hours = flops_per_token * tokens / (speed.mfu * speed.peak * 3600)
    return {
        "gpu": speed.gpu,
        "hours": hours,
        "flops_per_token": flops_per_token,
        "tokens": tokens,
        "mfu": speed.mfu,
        "peak_flops": speed.peak,
        "source": speed.source,
        "convention": "flops_per_token_megatron_main (no multi-token modules) x tokens / (mfu x peak_flops x 3600)",
    }
