"""Measures times in turns, and the two ceilings of the device: its rates of products and of copies.

A time is the wall clock between two waits for the device, so that work of the host which the device waits for counts
too. Versions that are compared take turns within one round, in an order that changes from round to round, so that other
work of the machine affects all of them.
"""

import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType


@dataclass(frozen=True)
class Lab:
    """The surroundings in which a part runs.

    Args:
        device: "cuda" or "cpu".
        quick: toy sizes, a dry run of every step.
        folder: a part may write files into a folder of its own name here.
        ceilings: see `ceilings`; measured before the first part.
        keep: receives the results of a part so far, whenever there are more, and writes them into the file.
        tokens: folder of token ids for runs on two GPUs.
        seconds: time limit of such a part.
        overrides: further overrides of their recipes.
    """

    device: str
    quick: bool
    folder: Path
    ceilings: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[dict[str, Any]], None] = lambda found: None
    tokens: Path = Path("build/tokens")
    seconds: float = 480.0
    overrides: list[str] = field(default_factory=list)


def attempt(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """The result of the function, or the message and the traceback of its exception, so that other parts go on."""
    try:
        return function(*arguments, **keywords)
    except Exception as cause:  # any error is recorded, and the other measurements go on
        lines = traceback.format_exc().splitlines()
        message = str(cause).strip().partition("\n")[0][:300]
        return {"error": f"{type(cause).__name__}: {message}", "traceback": lines[-14:]}
    finally:
        release()


def failed(found: Any) -> str | None:
    """The error message of an attempt that failed; None for any other result."""
    return found.get("error") if isinstance(found, Mapping) else None


def release() -> None:
    """Frees unused memory, and resets the peak of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(device: str) -> None:
    """Waits until the device has done all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """The wall time of one call, from an idle device to an idle device."""
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


def in_turns(
    functions: Mapping[str, Callable[[], Any]], device: str, *, rounds: int, warm: int
) -> dict[str, Any]:
    """The seconds of each function in each round, with median and range, after `warm` rounds that are not counted.

    Every round has an order of its own, so that no version always follows the same other one.
    """
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warm, rounds):
        for name in draw.sample(list(functions), len(functions)):
            spent = seconds_of(functions[name], device)
            if turn >= 0:
                seconds[name].append(spent)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """The median, the least, the most and all of the values."""
    rounded = [float(f"{value:.6g}") for value in values]
    return {
        "median": statistics.median(rounded),
        "least": min(rounded),
        "most": max(rounded),
        "all": rounded,
    }


def ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The speed of the second version relative to the first, round by round."""
    return spread([a / b for a, b in zip(one["all"], other["all"], strict=True)])


# ---- the two ceilings

STEADY = 0.05


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOPs per second of size^3 products of random operands, the median of twenty."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(25)][5:]
    return 2.0 * size**3 / statistics.median(seconds)


def fp8_rate(size: int) -> float:
    """FLOPs per second of products of E4M3 operands with a scale for each row, by torch's `scaled_mm`."""
    codes = [torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2)]
    ones = torch.ones(size, 1, device="cuda")

    def product() -> Tensor:
        return torch._scaled_mm(codes[0], codes[1].t(), ones, ones.t(), out_dtype=torch.bfloat16)

    seconds = [seconds_of(product, "cuda") for _ in range(25)][5:]
    return 2.0 * size**3 / statistics.median(seconds)


def tile_rate(size: int) -> float | None:
    """FLOPs per second of E4M3 products with the scales of `fp8_native`, 1x128 and 128x128; None without support."""
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(size // 128, size, device="cuda")
    rows, blocks = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128

    def product() -> Tensor:
        scales = ones.t(), rows, ones[:, : size // 128].contiguous().t(), blocks
        made: Tensor = F.scaled_mm(a, b.t(), *scales, output_dtype=torch.bfloat16)
        return made

    try:
        seconds = [seconds_of(product, "cuda") for _ in range(25)][5:]
    except (RuntimeError, ValueError):
        return None
    return 2.0 * size**3 / statistics.median(seconds)


def copy_rate(device: str, size: int) -> float:
    """Bytes per second of a copy within the device, with reads and writes counted."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), device) for _ in range(15)][5:]
    return 2.0 * source.nbytes / statistics.median(seconds)


def ceilings(device: str, *, quick: bool) -> dict[str, Any]:
    """The measured rates of products (FLOPs per second) and of copies (bytes), from which floors and MFU follow."""
    side = 256 if quick else 8192
    found: dict[str, Any] = {"side": side, "bf16": matmul_rate(device, torch.bfloat16, side)}
    found["fp32"] = matmul_rate(device, torch.float32, side)
    found["fp8"] = fp8_rate(side) if device == "cuda" else found["bf16"]
    found["fp8_tiles"] = tile_rate(side) if device == "cuda" else None
    size = 2**22 if quick else 2**32
    found["bytes"] = copy_rate(device, size)
    release()
    return found


def moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """The relative changes above `STEADY`, which show that others use the device or that its clocks changed."""
    changes = {name: after[name] / before[name] - 1 for name in ("bf16", "fp8", "bytes")}
    return {name: change for name, change in changes.items() if abs(change) > STEADY}
