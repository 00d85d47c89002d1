"""Trains `dsv3_16b`, 16 billion parameters, on two GPUs with real text: losses, balance, speed, memory, overlap.

A step reads 16 sequences of 4,096 tokens. Each rank holds half of the experts (`expert_parallel`), and everything else
is divided by FSDP. Weights and gradients are fp32 and moments bf16, about 95 GB a GPU; blocks are recomputed, and four
sequences of a rank then take about 23 GB.
"""

import json
from typing import Any

from benchmarks.on_gpu.measure import Lab, failed
from benchmarks.on_gpu.ranks import (
    NO_CHECKPOINTS,
    TOY_LENGTH,
    corpus,
    new_folder,
    threads_of,
    tokens_per_second,
    watched_run,
)
from core.analysis.size import size_of
from core.assemble import build
from core.recipe.compose import compose

RANKS = 2
SEQUENCES = 16
LENGTH = 4096
STEPS = 60
WARM = 10
PROFILED = 3
VOCABULARY = 129_280
H200_PEAK = 989e12
"""FLOPs per second of dense bf16 products, by the data sheet."""

RATE = "{unit: steps, start: 0.0, segments: [{shape: linear, to: 4.2e-4, until: 20}, {shape: constant, until: 1000}]}"
TOY = [
    "model.dim=32",
    "model.attention={heads: 2, kv_rank: 8, nope_dim: 8, rope_dim: 4, value_dim: 8}",
    "model.blocks.dense.ffn.hidden=32",
    "model.blocks.moe.count=2",
    "model.blocks.moe.ffn.experts=8",
    "model.blocks.moe.ffn.expert_hidden=16",
    "model.blocks.moe.ffn.router.top_k=2",
    "precision={name: fp32}",
    "compile=false",
    "budget.steps=8",
]


def changes(lab: Lab) -> list[str]:
    """The overrides of the recipe; those of the command line come last."""
    length = TOY_LENGTH if lab.quick else LENGTH
    own = [
        *corpus(lab, VOCABULARY),
        f"data.sequence_length={length}",
        f"model.rope.max_length={length}",
        f"strategy={{name: expert_parallel, expert_ranks: {RANKS}}}",
        f"batch={{sequences: {SEQUENCES // 2}, accumulate: 2}}",
        f"budget={{tokens: null, steps: {STEPS}}}",
        "optimizer.moments=bf16",
        f"optimizer.lr={RATE}",
        "recompute.blocks=[dense, moe]",
        "compile=true",
        f"validation={{every_steps: null, sequences: {SEQUENCES // 2}}}",
        f"callbacks=[{{name: step_clock, profiled_steps: {PROFILED}}}]",
        NO_CHECKPOINTS,
    ]
    return [*own, *(TOY if lab.quick else []), *lab.overrides]


def run(lab: Lab) -> dict[str, Any]:
    """Trains, and writes results whenever there are new steps."""
    recipe = compose("dsv3_16b", changes(lab))
    flops = size_of(build(recipe, device="meta")).flops_per_token
    tokens = recipe.batch.sequences * int(recipe.batch.accumulate) * recipe.data.sequence_length

    def analysed(found: dict[str, Any]) -> dict[str, Any]:
        return results(found, lab, flops=flops, tokens=tokens)

    found = watched_run(
        new_folder(lab, "large"),
        "dsv3_16b",
        changes(lab),
        ranks=RANKS,
        threads=threads_of(lab, RANKS),
        seconds=lab.seconds,
        seen=lambda found: lab.keep(analysed(found)),
    )
    return analysed(found)


def results(found: dict[str, Any], lab: Lab, *, flops: float, tokens: int) -> dict[str, Any]:
    """What the part reports, from the lines of a run.

    Args:
        found: see `watched_run`.
        lab: for the device's measured rate of products.
        flops: training FLOPs of a token.
        tokens: those of a step, over all ranks.
    """
    rows = found["rows"]
    per_gpu = tokens_per_second(rows, tokens / RANKS, 2 if lab.quick else WARM)
    made = {key: value for key, value in found.items() if key != "rows"}
    made["losses"] = [row["loss/total"] for row in rows]
    made["next_token_losses"] = [row.get("loss/next_token") for row in rows]
    made["max_vio"] = [row.get("load/max_vio_batch") for row in rows]
    made["step_seconds"] = [row["seconds"] for row in rows]
    made["exchanged"] = {
        name: value for name, value in (rows[-1] if rows else {}).items() if "exchange/" in name
    }
    made["flops_per_token"] = flops
    made["tokens_per_step"] = tokens
    made["tokens_per_second_per_gpu"] = per_gpu
    if per_gpu:
        made["mfu_of_measured_rate"] = per_gpu["median"] * flops / lab.ceilings["bf16"]
        made["mfu_of_989_tflops"] = per_gpu["median"] * flops / H200_PEAK
    return made


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table."""
    if sentence := failed(found):
        return [("run", sentence)]
    losses = found["losses"]
    shown = [("ended", str(found["ended"])), ("steps", str(len(losses)))]
    if found["start"]:
        shown.append(("seconds from the command", json.dumps(found["start"][0])))
    if losses:
        shown.append(("loss, first and last", f"{losses[0]:.4f}, {losses[-1]:.4f}"))
        shown.append(("MaxVio, first and last", f"{found['max_vio'][0]}, {found['max_vio'][-1]}"))
        shown.append(("bytes exchanged in a step", json.dumps(found["exchanged"])))
        shown.append(("peak bytes by rank", json.dumps(found["peak_bytes"])))
    if rate := found["tokens_per_second_per_gpu"]:
        shown.append(
            (
                "tokens/s per GPU",
                f"{rate['median']:.1f} ({rate['least']:.1f} to {rate['most']:.1f})",
            )
        )
        measured, sheet = found["mfu_of_measured_rate"], found["mfu_of_989_tflops"]
        shown.append(("MFU of the measured rate, of 989 TFLOP/s", f"{measured:.1%}, {sheet:.1%}"))
    for rank, overlap in enumerate(found["overlap"]):
        shown.append((f"exchange of rank {rank}", json.dumps(overlap)))
    return shown
