"""GPU-hours of a run: FLOPs over what a GPU gets done."""

from dataclasses import dataclass
from typing import Any

from core.contracts.errors import UserError
from core.contracts.precision import Precision

H800_MFU = 0.3894
"""Of the bf16 peak, causal attention: DeepSeek-V3's training on 2,048 H800 (arXiv 2505.09343, table 4)."""
H800_PEAK = 989e12
"""Dense bf16 FLOPs per second of one H800, as of an H100 SXM."""


@dataclass(frozen=True)
class Speed:
    """What one GPU does.

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
    """What the user says, and DeepSeek-V3's published figures for what is left out; None where these do not fit.

    They fit products in 16 or 8 bits: the peak is that of bf16, of which the published utilisation is a part, although
    the report's products were FP8.

    Args:
        mfu: in (0, 1].
        tflops: a GPU's dense peak in TFLOPS.

    Raises:
        UserError: outside these ranges.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu:g} must be more than 0 and at most 1 (38.94% is 0.3894)")
    if tflops is not None and not 0 < tflops < 1e6:
        raise UserError(f"--gpu-peak: {tflops:g} must be a GPU's dense peak in TFLOPS, for example 989 for an H800")
    fits = all(precision.compute_dtype(role).itemsize <= 2 for role in ("experts.down", "ffn.down"))
    if mfu is not None and tflops is not None:
        return Speed(mfu, tflops * 1e12, "GPU", "as given")
    if not fits:
        return None
    told = []
    if mfu is None:
        told.append("utilisation: DeepSeek-V3's, in FP8 on 2,048 H800, arXiv 2505.09343, table 4; --mfu sets another")
    if tflops is None:
        told.append("peak: an H800's in dense bf16; --gpu-peak sets another")
    gpu, peak = ("H800", H800_PEAK) if tflops is None else ("GPU", tflops * 1e12)
    return Speed(mfu or H800_MFU, peak, gpu, "; ".join(told))


def gpu_hours(flops_per_token: float, tokens: int, speed: Speed | None) -> dict[str, Any] | None:
    """Hours of one GPU, and what they were worked out from; None where nothing is known of the GPU.

    hours = FLOPs per token x tokens / (mfu x peak x 3600). The FLOPs are Megatron-LM's count of the main model, since
    the published utilisation is in that count: 38.94% of 989 TFLOPS, 2,048 GPUs and 19.926 s for a step of 15,360
    sequences give 249.7 GFLOPs per token.
    """
    if speed is None:
        return None
    return {
        "gpu": speed.gpu,
        "hours": flops_per_token * tokens / (speed.mfu * speed.peak * 3600),
        "flops_per_token": flops_per_token,
        "tokens": tokens,
        "mfu": speed.mfu,
        "peak_flops": speed.peak,
        "source": speed.source,
        "convention": "flops_per_token_megatron_main (no multi-token modules) x tokens / (mfu x peak_flops x 3600)",
    }
