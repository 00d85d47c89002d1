"""How fast training is: our step beside transformers' and beside the matrix products that it needs, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.analysis.budget import plan_of
from core.speed import peer
from core.speed.batches import TokenBatch, step_batches
from core.speed.limit import Limit
from core.speed.our_steps import OurSteps
from core.speed.own_process import OwnProcess
from core.speed.peer import PeerSteps
from core.speed.product_shapes import product_shapes
from core.speed.profiling import profiled
from core.speed.real_run import run_against_steps
from core.speed.sides import Sides
from core.speed.task import LIMIT, OURS, THEIRS, Task, size_of
from core.speed.turns import Turns, in_turns
from core.speed.variants import Variants, against_peer, choose, exported, measured_apart

SAME = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference of the two losses before the first step, by the format of the peer's weights.

transformers computes norms, routers and losses in fp32 whatever the format is.
"""


def train_row(task: Task) -> dict[str, Any]:
    """One row of `core.bench`: training steps of one model."""
    recipe = task.measured.recipe
    batches = step_batches(recipe, task.device)
    tokens = sum(batch.tokens_BL.numel() for batch in batches)
    ours = OurSteps(recipe, batches, task.device, plan_of(recipe))
    with tempfile.TemporaryDirectory(prefix="moeloom-bench-") as folder:
        variants = exported(task, ours.model, Path(folder))
        sides = Sides(task, variants.folder, {"work": "train"})
        own = sides.ours()
        losses = _add_peer(task, ours, batches, variants, sides, own)
        turns, limit = _turns(task, ours, variants, sides.request)
        row = {
            "what": "train",
            "name": task.measured.shape.name,
            "size": {
                **size_of(task.measured, ours.model),
                "batch": recipe.batch.sequences,
                "length": recipe.data.sequence_length,
                "micro_batches": len(batches),
            },
            "tokens_per_second": tokens / turns.median(OURS),
            "seconds": turns.median(OURS),
            **against_peer(turns, variants, tokens),
            "losses": losses,
            **_against_limit(turns, limit, tokens),
            "rounds": len(turns.seconds[OURS]),
            "notes": list(task.measured.notes),
        }
        row |= measured_apart(row, variants, sides, own)
    row["fit"] = _fit(task, ours, batches, tokens)
    if task.profile is not None:
        row["profile"] = profiled(ours.run, task.device, task.profile, f"train {row['name']}")
    return row


def _fit(task: Task, ours: OurSteps, batches: list[TokenBatch], tokens: int) -> dict[str, Any]:
    """The speed of the step that `core.fit` takes."""
    recipe = replace(
        task.measured.recipe,
        checkpoint=replace(task.measured.recipe.checkpoint, every_steps=None),
        trainer={**task.measured.recipe.trainer, "enable_progress_bar": False},
    )
    found = run_against_steps(recipe, batches, ours, steps=task.fewest)
    return {"tokens_per_second": tokens / found["seconds"], **found}


def _add_peer(
    task: Task,
    ours: OurSteps,
    batches: list[TokenBatch],
    variants: Variants,
    sides: Sides,
    own: dict[str, Any],
) -> dict[str, float]:
    """Loads the peer, compares the losses, and chooses its variants; returns the losses of both sides."""
    if variants.folder is None:
        return {}
    theirs = PeerSteps(variants.folder, task.measured.recipe, batches, task.device)
    losses = {OURS: ours.loss(), THEIRS: theirs.loss()}
    difference = abs(losses[THEIRS] - losses[OURS]) / abs(losses[OURS])
    allowed = SAME[variants.folder.dtype]
    if not difference <= allowed:
        variants.why_not = f"the first losses differ by {difference:.1e}, more than {allowed:.0e}"
        return losses
    choose(task, variants, peer.experts_implementations(), theirs, sides, own)
    return losses


def _turns(
    task: Task, ours: OurSteps, variants: Variants, request: dict[str, Any]
) -> tuple[Turns, dict[str, Any]]:
    """Our step, that of each variant of the peer, and the limit, in turns; and what the limit consists of."""
    if task.device.type == "cpu":
        with OwnProcess(request) as own:
            works = {OURS: own.step, LIMIT: own.products, **variants.timed}
            turns = in_turns(works, task.device, seconds=task.seconds, fewest=task.fewest)
            return turns, own.limit
    ours.backward()  # the loads of the experts
    ours.forget()
    limit = Limit(product_shapes(task.measured.recipe, ours.loads), task.device)
    versions: dict[str, Callable[[], Any]] = {OURS: ours.run, LIMIT: limit.run, **variants.timed}
    turns = in_turns(versions, task.device, seconds=task.seconds, fewest=task.fewest)
    return turns, {"flops": limit.flops, "ways": limit.ways}


def _against_limit(turns: Turns, limit: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The comparison with the matrix products of the step."""
    ratio = turns.ratio(OURS, LIMIT)
    return {
        "fraction_of_limit": ratio.median,
        "limit": {
            "interval": ratio.interval,
            "tokens_per_second": tokens / turns.median(LIMIT),
            "flops": limit["flops"],
            "flops_per_second": limit["flops"] / turns.median(LIMIT),
            "experts": limit["ways"],
        },
    }
