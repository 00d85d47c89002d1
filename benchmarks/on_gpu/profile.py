"""One optimizer step under torch's profiler: time by kind of kernel, time of waiting, and the least possible times.

The gap of a kind is its time minus its floor, the least time that is possible: for products, the model's own FLOPs at
the measured rate; for the optimizer, the bytes of weights, gradients and moments at the measured bandwidth. Passes over
memory and waiting have no floor, because they could be fused or hidden.
"""

import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.on_gpu.measure import Lab, attempt, failed, seconds_of, wait
from benchmarks.on_gpu.shapes import SHAPES, Stepper, eagerly

KINDS = {
    "attention": r"fmha|flash|sdpa|cudnn.*(fprop|bprop|dgrad|attention)|mha_",
    "grouped products": r"GemmUniversal.*Group|GroupProblemShape|grouped",
    "optimizer and norm": r"FusedOptimizer|multi_tensor_apply|adamw",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|xmma",
    "sorting and searching": r"sort|Sort|radix|bitonic|topk|TopK|searchsorted|bucketize|DeviceScan",
    "copies": r"Memcpy|Memset|copy_kernel",
}
"""Patterns of the names of kernels by kind, of which the first that fits counts; the rest are passes over memory."""
REST = "passes over memory"


def run(lab: Lab) -> dict[str, Any]:
    """Profiles the compiled step of two shapes."""
    found = {}
    for name in ("1b_mla", "3b_wide"):
        found[name] = attempt(one_step, lab, name)
        lab.keep(found)
        torch.compiler.reset()
    return found


def one_step(lab: Lab, name: str) -> dict[str, Any]:
    """The seconds of each kind, the longest kernels, and the gaps, largest first."""
    section = "{name: bf16}" if lab.device == "cuda" else "{name: fp32}"
    recipe = SHAPES[name].compose(section, quick=lab.quick)
    stepper = Stepper.of(recipe, lab.device, compiled=True)
    warmups = 1 if lab.quick else 4
    repetitions = 1 if lab.quick else 5
    for _ in range(warmups):
        stepper.step()
    wall = statistics.median(seconds_of(stepper.step, lab.device) for _ in range(repetitions))
    flops = _flops(stepper)
    with profiled(lab.device) as found:
        seconds_of(stepper.step, lab.device)
    kernels = found()
    kinds: dict[str, float] = {}
    for kernel, spent, _ in kernels:
        kind = kind_of(kernel)
        kinds[kind] = kinds.get(kind, 0.0) + spent
    busy = sum(kinds.values())
    floors = {kind: flops.get(kind, 0.0) / lab.ceilings["bf16"] for kind in kinds}
    weights = sum(p.numel() for p in stepper.model.parameters())
    if "optimizer and norm" in kinds:
        floors["optimizer and norm"] = (
            28.0 * weights / lab.ceilings["bytes"]
        )  # w, g, m, v read; w, m, v written
    gaps = {kind: spent - floors[kind] for kind, spent in kinds.items()} | {
        "waiting for the host": max(0, wall - busy)
    }
    return {
        "wall_seconds": wall,
        "busy_seconds": busy,
        "kinds": kinds,
        "flops": flops,
        "floors": floors,
        "gaps": dict(sorted(gaps.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": kernel[:160], "seconds": spent, "calls": calls}
            for kernel, spent, calls in kernels[:40]
        ],
    }


@contextmanager
def profiled(device: str) -> Iterator[Callable[[], list[tuple[str, float, int]]]]:
    """A context that gives a function, which returns the kernels that ran in the context once it is left."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        yield lambda: _kernels(profiler, device)
        wait(device)


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), REST)


def _kernels(profiler: Any, device: str) -> list[tuple[str, float, int]]:
    """Name, seconds and calls of each kernel, longest first; on a CPU those of its operations."""
    found = []
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if (
            spent > 0
            and on_gpu == (device == "cuda")
            and not event.key.startswith(("Optimizer.", "ProfilerStep"))
        ):
            found.append((event.key, spent / 1e6, event.count))
    return sorted(found, key=lambda kernel: -kernel[1])


def _flops(stepper: Stepper) -> dict[str, float]:
    """FLOPs of a forward and backward by torch's counter, without `torch.compile`; those of attention are halved."""
    with eagerly(stepper.model), FlopCounterMode(display=False) as counter:
        stepper.gradients()
    found = {"attention": 0.0, "grouped products": 0.0, "products": 0.0}
    for op, count in counter.get_flop_counts()["Global"].items():
        named = str(op)
        kind = (
            "attention"
            if "attention" in named
            else "grouped products"
            if "grouped" in named
            else "products"
        )
        found[kind] += count / (2 if kind == "attention" else 1)
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table: the step, its kinds, and the three largest gaps."""
    table_rows: list[tuple[str, str]] = []
    for name, part in found.items():
        if sentence := failed(part):
            table_rows.append((name, f"failed: {sentence}"))
            continue
        kinds = sorted(part["kinds"].items(), key=lambda item: -item[1])
        shown = ", ".join(
            f"{kind} {spent * 1e3:.1f} (floor {part['floors'][kind] * 1e3:.1f})"
            for kind, spent in kinds
        )
        table_rows.append(
            (
                name,
                f"step {part['wall_seconds'] * 1e3:.1f} ms, kernels {part['busy_seconds'] * 1e3:.1f}: {shown}",
            )
        )
        gaps = list(part["gaps"].items())[:3]
        table_rows.append(
            (f"{name}: largest gaps", ", ".join(f"{kind} {gap * 1e3:.1f} ms" for kind, gap in gaps))
        )
    return table_rows
