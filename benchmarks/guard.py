"""python benchmarks/guard.py: `make bench`, a guard against lost speed on ratios that are measured in one run.

Speeds of this machine say little, because it may do other work; ratios of versions that took turns hold. One below its
bound in `core.speed.thresholds` ends the command with exit code 1 and a sentence that names it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from core.analysis.budget import plan_of
from core.command import run_command
from core.contracts.errors import RunFailed
from core.speed.batches import step_batches
from core.speed.bench import BenchOptions, measured_rows
from core.speed.our_steps import OurSteps
from core.speed.shapes import BASE, DECODED, Shape, comparable
from core.speed.thresholds import THRESHOLDS, complaints
from core.speed.turns import in_turns
from core.training.host_memory import keep_freed_memory

CPU = torch.device("cpu")
FEW = "16"
MANY = "256"
"""Experts of the two models whose steps are compared."""


def parser() -> argparse.ArgumentParser:
    """The command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/guard.py", description="A guard against lost speed."
    )
    p.add_argument("--seconds", type=float, default=40.0, help="time for each ratio, about (40)")
    return p


def step_with_experts(experts: str) -> Any:
    """A step of `dsv3_small` with some number of experts, of which a token still takes four."""
    override = f"model.blocks.moe.ffn.experts={experts}"
    recipe = comparable(Shape(experts, BASE, (override,))).recipe
    return OurSteps(recipe, step_batches(recipe, CPU), CPU, plan_of(recipe)).run


def cost_of_experts(seconds: float) -> float:
    """The time of a step with many experts over that with few."""
    keep_freed_memory()  # as `core.fit` does
    versions = {experts: step_with_experts(experts) for experts in (FEW, MANY)}
    return in_turns(versions, CPU, seconds=seconds).ratio(FEW, MANY).median


def measure(seconds: float) -> dict[str, Any]:
    """The ratios by the names of `THRESHOLDS`."""
    smallest = DECODED[0]
    options = BenchOptions(
        recipe=smallest.recipe,
        overrides=smallest.overrides,
        what=("train", "decode"),
        device="cpu",
        seconds=seconds,
        compiles=False,
    )
    found: dict[str, Any] = {}
    for row in measured_rows(options, lambda sentence: print(sentence, file=sys.stderr)):
        found[row["what"]] = row["ratio"]
        if row["what"] == "train":
            found["limit"] = row["fraction_of_limit"]
    print("experts", file=sys.stderr)
    found["experts"] = cost_of_experts(seconds)
    return found


def main(arguments: argparse.Namespace) -> None:
    """Measures the ratios and compares them with their bounds.

    Raises:
        RunFailed: one is out of its bounds.
    """
    found = measure(arguments.seconds)
    for name, threshold in THRESHOLDS.items():
        value = found.get(name)
        shown = "not measured" if value is None else f"{value:.2f}"
        print(f"{shown:>12}  {threshold.name}")
    wrong = complaints(found)
    if wrong:
        raise RunFailed("; ".join(wrong))


if __name__ == "__main__":
    run_command(main, parser())
