"""python benchmarks/growth.py [--quick]: how the cost of a training step grows with the parts of a model.

One axis after the other, with everything else as in `dsv3_small` without its multi-token module: the number of experts
at equal active size, the length of sequences at equal tokens per step, blocks, vocabulary, and micro-batches at equal
tokens per step. The models of an axis take their steps in turns, so that ratios between them hold on a machine that
also does other work; peak memory is that of a process for each. What is measured is written at once into
records/speed/growth.json, and a second call goes on from there; the table and the figure are made from that file.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from core.analysis.budget import plan_of
from core.command import run_command
from core.speed.batches import step_batches
from core.speed.growth_figure import figure
from core.speed.our_steps import OurSteps
from core.speed.product_shapes import product_shapes
from core.speed.shapes import BASE, Shape, comparable
from core.speed.sides import Sides
from core.speed.surroundings import surroundings
from core.speed.task import Task
from core.speed.turns import in_turns
from core.training.host_memory import keep_freed_memory

OUT = Path(__file__).resolve().parents[1] / "records" / "speed"
CPU = torch.device("cpu")
SECONDS = 40.0
"""Time for the turns of one axis, about."""

TOKENS = 8192
"""Tokens of a step where the length or the number of micro-batches grows."""


def _shape(axis: str, value: int, *overrides: str) -> Shape:
    return Shape(f"{axis} = {value}", BASE, overrides)


def axes(*, quick: bool) -> dict[str, dict[int, Shape]]:
    """The models of each axis, by their value on it."""
    found: dict[str, dict[int, Shape]] = {}
    experts = (8, 16) if quick else (8, 16, 32, 64, 128, 256)
    lengths = (128, 256) if quick else (128, 256, 512, 1024, 2048, 4096, 8192)
    blocks = (1, 2) if quick else (1, 2, 4, 8)
    vocabularies = (1024, 2048) if quick else (1024, 4096, 16384, 65536)
    parts = (1, 2) if quick else (1, 2, 4, 8)
    tokens = 256 if quick else TOKENS
    small = ("model.dim=32", "batch.sequences=2") if quick else ()
    found["experts"] = {}
    for value in experts:
        key = f"model.blocks.moe.ffn.experts={value}"
        found["experts"][value] = _shape("experts", value, *small, key)
    found["length"] = {}
    for value in lengths:
        sizes = (
            f"data.sequence_length={value}",
            f"model.rope.max_length={value}",
            f"batch.sequences={tokens // value}",
        )
        found["length"][value] = _shape("length", value, *small, *sizes)
    found["blocks with experts"] = {}
    for value in blocks:
        key = f"model.blocks.moe.count={value}"
        found["blocks with experts"][value] = _shape("blocks", value, *small, key)
    found["vocabulary"] = {}
    for value in vocabularies:
        key = f"data.tokenizer.vocab={value}"
        found["vocabulary"][value] = _shape("vocabulary", value, *small, key)
    found["micro-batches"] = {}
    for value in parts:
        sizes = (f"batch.accumulate={value}", f"batch.sequences={8 // value}")
        found["micro-batches"][value] = _shape("micro-batches", value, *small, *sizes)
    return found


def measure_times(models: dict[int, Shape], seconds: float, fewest: int) -> dict[str, Any]:
    """Seconds of a step of each model of an axis, in turns, with what explains them."""
    steps = {}
    points: dict[str, Any] = {}
    for value, shape in models.items():
        recipe = comparable(shape).recipe
        batches = step_batches(recipe, CPU)
        made = OurSteps(recipe, batches, CPU, plan_of(recipe))
        made.run()
        steps[str(value)] = made
        points[str(value)] = {
            "tokens": sum(batch.tokens_BL.numel() for batch in batches),
            "parameters": sum(weight.numel() for weight in made.weights),
            "flops": sum(product.flops for product in product_shapes(recipe, made.loads)),
        }
    versions = {value: made.run for value, made in steps.items()}
    turns = in_turns(versions, CPU, seconds=seconds, fewest=fewest)
    first = next(iter(versions))
    for value, point in points.items():
        ratio = turns.ratio(first, value)
        point["seconds"] = turns.median(value)
        point["times_the_first"] = ratio.median
        point["interval"] = ratio.interval
        point["tokens_per_second"] = point["tokens"] / point["seconds"]
    return points


def measure_memory(shape: Shape) -> dict[str, Any]:
    """Peak memory of one model, in a process of its own."""
    found = Sides(Task(comparable(shape), CPU, 1.0), None, {"work": "train"}).ours()
    if "error" in found:
        return {"error": found["error"]}
    return {key: found[key] for key in ("peak_bytes", "state_bytes")}


def slope(points: dict[str, Any], key: str) -> float:
    """The exponent of growth: the least-squares slope of log(key) over log(value on the axis)."""
    pairs = [(math.log(int(value)), math.log(point[key])) for value, point in points.items()]
    mean_x = sum(x for x, _ in pairs) / len(pairs)
    mean_y = sum(y for _, y in pairs) / len(pairs)
    above = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    below = sum((x - mean_x) ** 2 for x, _ in pairs)
    return above / below


def table(document: dict[str, Any]) -> list[str]:
    """The measurements as Markdown."""
    lines = [
        "| axis | value | step, s | times the first | tokens/s | GFLOPs | M parameters | peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for axis, points in document["axes"].items():
        for value, point in points.items():
            peak = point.get("memory", {}).get("peak_bytes")
            cells = [
                axis,
                value,
                f"{point['seconds']:.3f}",
                f"{point['times_the_first']:.2f}",
                f"{point['tokens_per_second']:,.0f}",
                f"{point['flops'] / 1e9:,.1f}",
                f"{point['parameters'] / 1e6:.2f}",
                f"{peak / 1e6:,.0f}" if peak else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| axis | step grows as | products grow as |", "|---|---|---|"]
    for axis, points in document["axes"].items():
        time, flops = slope(points, "seconds"), slope(points, "flops")
        lines.append(f"| {axis} | value^{time:.2f} | value^{flops:.2f} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """The command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/growth.py", description="How the cost of a training step grows."
    )
    p.add_argument("--quick", action="store_true", help="two tiny models for each axis")
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: records/speed")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Measures what the file lacks, and writes file, table and figure."""
    keep_freed_memory()  # as `core.fit` does
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "growth.json"
    document: dict[str, Any] = {"axes": {}}
    if file.exists():
        document = json.loads(file.read_text(encoding="utf-8"))

    def keep() -> None:
        document.update(surroundings(CPU, None))
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    seconds, fewest = (0.2, 2) if arguments.quick else (SECONDS, 3)
    for axis, models in axes(quick=arguments.quick).items():
        if axis not in document["axes"]:
            print(f"time: {axis}", file=sys.stderr, flush=True)
            document["axes"][axis] = measure_times(models, seconds, fewest)
            keep()
        for value, shape in models.items():
            point = document["axes"][axis][str(value)]
            if "memory" not in point:
                print(f"memory: {axis} = {value}", file=sys.stderr, flush=True)
                point["memory"] = measure_memory(shape)
                keep()
    (arguments.out / "growth.svg").write_text(figure(document["axes"]), encoding="utf-8")
    print("\n".join(table(document)))


if __name__ == "__main__":
    run_command(main, parser())
