"""A trace of one run by torch's profiler, and the operators that take most of its time."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from core.speed.turns import wait

TOP = 15
"""Operators that are listed."""


def profiled(
    work: Callable[[], Any], device: torch.device, folder: Path, name: str
) -> dict[str, Any]:
    """Runs some work once to warm up and once under the profiler.

    Args:
        work: one step, or one call.
        device: where it runs.
        folder: receives the trace, which Perfetto (ui.perfetto.dev) and chrome://tracing read.
        name: begins the file's name.

    Returns:
        The path of the trace, and the operators with their own time, longest first: of a GPU its kernels'.
    """
    work()
    wait(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
        wait(device)
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json.gz"
    profiler.export_chrome_trace(str(file))
    return {"trace": str(file), "operators": _operators(profiler, device)}


def _operators(profiler: Any, device: torch.device) -> list[dict[str, Any]]:
    """The operators with the most own time, and its share of all."""
    on_gpu = device.type == "cuda"
    times = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            times[event.key] = (spent / 1e6, event.count)
    whole = sum(seconds for seconds, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:TOP]
    found = []
    for key, (seconds, calls) in longest:
        found.append({"name": key, "seconds": seconds, "share": seconds / whole, "calls": calls})
    return found


def operator_lines(row: dict[str, Any]) -> list[str]:
    """The operators of a row as a table; empty without a profile."""
    made = row.get("profile")
    if not made:
        return []
    lines = ["", f"{row['what']}, {row['name']}: own time of one run; trace {made['trace']}"]
    for operator in made["operators"]:
        name = operator["name"][:60]
        milliseconds = operator["seconds"] * 1e3
        lines.append(
            f"{operator['share']:6.1%} {milliseconds:10,.2f} ms {operator['calls']:7} x  {name}"
        )
    return lines
