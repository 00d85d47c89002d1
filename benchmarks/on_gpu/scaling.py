"""Throughput of two ranks over that of one at the same work for each, under `ddp`, `fsdp` and `expert_parallel`.

The model is `dsv3_1b` with DeepSeek-V3's attention and gates. Runs follow each other in turns, one rank, then two under
each strategy, so that other work of the machine affects all of them.
"""

import math
import statistics
import time
from typing import Any

from benchmarks.on_gpu.measure import Lab, failed, spread
from benchmarks.on_gpu.ranks import (
    NO_CHECKPOINTS,
    TOY_LENGTH,
    corpus,
    new_folder,
    step_seconds,
    threads_of,
    watched_run,
)
from benchmarks.on_gpu.shapes import MLA, V3_ROUTING
from core.assemble import build
from core.recipe.compose import compose

STRATEGIES = {
    "one": "{name: single}",
    "ddp": "{name: ddp, ranks: 2}",
    "fsdp": "{name: fsdp, ranks: 2}",
    "expert_parallel": "{name: expert_parallel, expert_ranks: 2}",
}
GOALS = {"ddp": 1.85, "fsdp": 1.85, "expert_parallel": 1.7}
TURNS = 2
SEQUENCES = 4
"""Sequences of a micro-batch for each rank."""

ACCUMULATE = 8
LENGTH = 4096
STEPS = 12
WARM = 4
VOCABULARY = 32_064
TOY = [
    "model.dim=128",
    "model.attention={name: mla, heads: 4, kv_rank: 32, nope_dim: 16, rope_dim: 8, value_dim: 16}",
    "model.blocks.dense.ffn.hidden=256",
    "model.blocks.moe.count=2",
    "model.blocks.moe.ffn.experts=8",
    "model.blocks.moe.ffn.expert_hidden=64",
    "model.blocks.moe.ffn.router.top_k=2",
    "precision={name: fp32}",
    "compile=false",
]


def changes(lab: Lab, name: str) -> list[str]:
    """The overrides of the recipe under a strategy; those of the command line come last."""
    ranks = 1 if name == "one" else 2
    length = TOY_LENGTH if lab.quick else LENGTH
    own = [
        *corpus(lab, VOCABULARY),
        f"model.attention={MLA}",
        f"model.blocks.moe.ffn.router={V3_ROUTING}",
        f"data.sequence_length={length}",
        f"model.rope.max_length={length}",
        f"strategy={STRATEGIES[name]}",
        f"batch={{sequences: {SEQUENCES * ranks}, accumulate: {ACCUMULATE}}}",
        f"budget={{steps: {STEPS}}}",
        "optimizer.lr=1.0e-5",
        "compile=true",
        "validation={every_steps: null, sequences: 8}",
        "callbacks=[{name: step_clock}]",
        NO_CHECKPOINTS,
    ]
    return [*own, *(TOY if lab.quick else []), *lab.overrides]


def run(lab: Lab) -> dict[str, Any]:
    """Runs every strategy in turns, and writes the ratios as they come."""
    deadline = time.monotonic() + lab.seconds
    folder = new_folder(lab, "scaling")
    received = {name: gradient_and_weight_bytes(lab, name) for name in GOALS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in STRATEGIES}
    for turn in range(TURNS):
        for name in STRATEGIES:
            left = deadline - time.monotonic()
            if left < 1:
                break
            ranks = 1 if name == "one" else 2
            found = watched_run(
                folder / f"{name}-{turn}",
                "dsv3_1b",
                changes(lab, name),
                ranks=ranks,
                threads=threads_of(lab, 2),
                seconds=left,
            )
            runs[name].append(found)
            lab.keep(results(runs, received))
    return results(runs, received)


def gradient_and_weight_bytes(lab: Lab, name: str) -> float:
    """Bytes of gradients and gathered weights that a rank receives in a step, computed; tokens are counted apart.

    `ddp` adds up fp32 gradients once. `fsdp` gathers the weights of blocks twice for each micro-batch, in the format of
    most products, and all others once in fp32; it scatters the sums of fp32 gradients once. `expert_parallel` does the
    same with all weights but the experts.
    """
    recipe = compose("dsv3_1b", changes(lab, name))
    model = build(recipe, device="meta")
    ranks = recipe.strategy.component.ranks_of(recipe.strategy.config)
    total, blocks = 0, 0
    for path, weight in model.named_parameters():
        if name == "expert_parallel" and weight.ndim == 3:
            continue
        total += weight.numel()
        if path.startswith("blocks."):
            blocks += weight.numel()
    share = (ranks - 1) / ranks
    if name == "ddp":
        return 2 * share * 4 * total
    width = model.blocks[0].precision.compute_dtype("ffn.down").itemsize
    gathered = 2 * width * blocks + 4 * (total - blocks)
    return share * (int(recipe.batch.accumulate) * gathered + 4 * total)


def results(runs: dict[str, list[dict[str, Any]]], received: dict[str, float]) -> dict[str, Any]:
    """Seconds of a step, memory, bytes, and the ratio of throughputs with its spread over turns, by strategy.

    Args:
        runs: for each strategy one result of `watched_run` for each turn.
        received: see `gradient_and_weight_bytes`, by strategy.
    """
    made: dict[str, Any] = {}
    medians: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for name, turns in runs.items():
        counted = [step_seconds(found["rows"], WARM) for found in turns]
        seconds = [spread(steps) for steps in counted if steps]
        medians[name] = [statistics.median(steps or [math.nan]) for steps in counted]
        cpu[name] = [_cpu_of_a_step(found["cpu_seconds"]) for found in turns]
        rows = [row for found in turns for row in found["rows"][-1:]]
        made[name] = {
            "step_seconds": seconds,
            "cpu_seconds_of_a_rank": cpu[name],
            "peak_bytes": [found["peak_bytes"] for found in turns],
            "exchanged": [{k: v for k, v in row.items() if "exchange/" in k} for row in rows],
            "start": [found["start"] for found in turns],
            "ended": [found.get("ended") for found in turns],
            "errors": [found["error"] for found in turns if "error" in found],
        }
        if turns:
            made[name]["overrides"] = turns[-1]["overrides"]
    for name in GOALS:
        ratios = _ratios(medians["one"], medians[name])
        if ratios:
            made[name]["ratio"] = spread(ratios)
            made[name]["cpu_ratio"] = spread(_ratios(cpu["one"], cpu[name]))
            made[name]["goal"] = GOALS[name]
            made[name]["computed_bytes_received"] = received[name]
    return made


def _ratios(one: list[float], two: list[float]) -> list[float]:
    """The throughput of two ranks over that of one, by turn, from seconds of a step; unfinished turns are left out.

    Both do the same work for each rank, so throughput is twice as high where a step takes as long.
    """
    pairs = zip(one, two, strict=False)
    return [2 * a / b for a, b in pairs if not math.isnan(a) and not math.isnan(b)]


def _cpu_of_a_step(by_rank: list[list[float]]) -> float:
    """Processor time that a rank needs for a step: the median over steps, and the mean over ranks.

    Waiting for another rank costs none under gloo. On a machine that other work shares it is steadier than wall time.
    """
    medians = [statistics.median(seconds[WARM:] or [math.nan]) for seconds in by_rank]
    return statistics.mean(medians) if medians else math.nan


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table."""
    if sentence := failed(found):
        return [("runs", sentence)]
    shown = []
    for name in STRATEGIES:
        part = found[name]
        seconds = ", ".join(f"{one['median']:.3f}" for one in part["step_seconds"])
        text = f"steps of {seconds} s; peak bytes {part['peak_bytes']}; ended {part['ended']}"
        if ratio := part.get("ratio"):
            span = f"({ratio['least']:.3f} to {ratio['most']:.3f}), goal {part['goal']}"
            received = f"received {part['computed_bytes_received'] / 1e6:.3g} MB beside tokens"
            cpu = f"by processor time {part['cpu_ratio']['median']:.3f}x"
            text = f"{ratio['median']:.3f}x {span}; {cpu}; {received}; {text}"
        shown.append((name, text))
    return shown
