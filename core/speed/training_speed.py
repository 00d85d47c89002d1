"""How fast training is: our step beside transformers' and beside the matrix products that it needs, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.analysis.budget import plan_of
from core.speed import peer
from core.speed.batches import TokenBatch, step_batches
from core.speed.limit import Limit
from core.speed.our_steps import OurSteps
from core.speed.peer import NoPeerError, PeerFolder, PeerSteps
from core.speed.product_shapes import product_shapes
from core.speed.shapes import Comparable
from core.speed.sides import Sides, memory, start
from core.speed.turns import Turns, in_turns

OURS = "ours"
LIMIT = "limit"

SAME = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2}
"""Largest relative difference of the two losses before the first step, by the format of the peer's weights."""

FAR = 3.0
"""An implementation of experts whose step takes this many times the fastest one's is not timed any further."""


@dataclass
class Peers:
    """The peer of one measurement.

    Args:
        why_not: a sentence about the missing peer, or about the difference that forbids a ratio.
        folder: the model as transformers reads it.
        steps: the model in transformers.
        experts: its implementations of experts that are timed.
        left_out: why each other one is not, by its name.
        losses: the losses of both sides before the first step.
    """

    why_not: str | None = None
    folder: PeerFolder | None = None
    steps: PeerSteps | None = None
    experts: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a row measures.

    Args:
        measured: the model.
        device: where.
        seconds: the time for its turns, about.
        with_peer: whether transformers takes part.
        trust: whether the recipe may name code of its own.
        fewest: rounds that are measured in any case.
    """

    measured: Comparable
    device: torch.device
    seconds: float
    with_peer: bool = True
    trust: bool = False
    fewest: int = 8


def train_row(task: Task) -> dict[str, Any]:
    """One row of `core.bench`: training steps of one model."""
    recipe = task.measured.recipe
    batches = step_batches(recipe, task.device)
    ours = OurSteps(recipe, batches, task.device, plan_of(recipe))
    with tempfile.TemporaryDirectory(prefix="moeloom-bench-") as folder:
        peers = find_peers(task, ours, batches, Path(folder))
        sides = Sides(task.measured, peers.folder, task.device, trust=task.trust)
        own = sides.ours()
        choose_experts(peers, sides, own)
        turns, limit = _turns(task, ours, batches, peers)
        tokens = sum(batch.tokens_BL.numel() for batch in batches)
        row = {
            "what": "train",
            "name": task.measured.shape.name,
            "size": size_of_row(task.measured, ours),
            "tokens_per_second": tokens / turns.median(OURS),
            "step_seconds": turns.median(OURS),
            **_against_peer(turns, peers, tokens),
            **_against_limit(turns, limit, tokens),
            "rounds": len(turns.seconds[OURS]),
            "notes": list(task.measured.notes),
        }
        other = sides.theirs(row["peer"]["best"]) if row["peer"] else None
    return {**row, **memory(own, other), **start(own, other)}


def size_of_row(measured: Comparable, ours: OurSteps) -> dict[str, Any]:
    """The sizes that a row names."""
    recipe = measured.recipe
    experts = [layer.experts for layer in ours.model.expert_layers().values()]
    return {
        "parameters": sum(weight.numel() for weight in ours.weights),
        "experts": max(experts, default=0),
        "batch": recipe.batch.sequences,
        "length": recipe.data.sequence_length,
        "micro_batches": len(ours.contexts),
        "precision": recipe.precision.name,
    }


def find_peers(task: Task, ours: OurSteps, batches: list[TokenBatch], folder: Path) -> Peers:
    """Loads our weights into transformers, and compares the losses of both sides."""
    if not task.with_peer:
        return Peers("--no-peer")
    recipe = task.measured.recipe
    try:
        peer.check_expressible(recipe)
    except NoPeerError as error:
        return Peers(str(error))
    exported = peer.export(recipe, ours.model, folder)
    steps = PeerSteps(exported, recipe, batches, task.device)
    losses = {OURS: ours.loss(), "theirs": steps.loss()}
    difference = abs(losses["theirs"] - losses[OURS]) / abs(losses[OURS])
    allowed = SAME[exported.dtype]
    why_not = None
    if not difference <= allowed:
        why_not = f"the first losses differ by {difference:.1e}, more than {allowed:.0e}"
    return Peers(why_not, exported, steps, losses=losses)


def choose_experts(peers: Peers, sides: Sides, own: dict[str, Any]) -> None:
    """Finds the implementations of experts that run here, and are not far slower than the fastest one."""
    if peers.why_not is not None:
        return
    times = {}
    for name, row in sides.screened(own).items():
        if "error" in row:
            peers.left_out[name] = row["error"]
        else:
            times[name] = row["step_seconds"]
    for name, spent in times.items():
        times_slower = spent / min(times.values())
        if times_slower <= FAR:
            peers.experts.append(name)
        else:
            peers.left_out[name] = f"{times_slower:.1f} times slower than the best one"


def _turns(
    task: Task, ours: OurSteps, batches: list[TokenBatch], peers: Peers
) -> tuple[Turns, Limit]:
    """Our step, that of each implementation of the peer, and the limit, in turns."""
    ours.backward()  # the loads of the experts
    ours.forget()
    limit = Limit(product_shapes(task.measured.recipe, ours.loads, len(batches)), task.device)
    versions: dict[str, Callable[[], Any]] = {OURS: ours.step, LIMIT: limit.run}
    for name in peers.experts:
        versions[name] = _step_with(peers.steps, name)
    turns = in_turns(versions, task.device, seconds=task.seconds, fewest=task.fewest)
    return turns, limit


def _step_with(steps: PeerSteps | None, experts: str) -> Callable[[], None]:
    """A step of the peer with an implementation of experts."""
    assert steps is not None

    def step() -> None:
        steps.use(experts)
        steps.step()

    return step


def _against_peer(turns: Turns, peers: Peers, tokens: int) -> dict[str, Any]:
    """The comparison with the best of the peer's implementations; ratios are null without one."""
    row: dict[str, Any] = {"ratio": None, "interval": None, "peer": None}
    variants: dict[str, Any] = {}
    for name in peers.experts:
        ratio = turns.ratio(OURS, name)
        variants[name] = {
            "tokens_per_second": tokens / turns.median(name),
            "ratio": ratio.median,
            "interval": ratio.interval,
        }
    if variants:
        best = min(variants, key=lambda name: variants[name]["ratio"])
        row["ratio"] = variants[best]["ratio"]
        row["interval"] = variants[best]["interval"]
        row["peer"] = {"best": best, "tokens_per_second": variants[best]["tokens_per_second"]}
    row["no_ratio"] = peers.why_not
    row["variants"] = variants
    row["left_out"] = peers.left_out
    row["losses"] = peers.losses
    return row


def _against_limit(turns: Turns, limit: Limit, tokens: int) -> dict[str, Any]:
    """The comparison with the matrix products of the step."""
    ratio = turns.ratio(OURS, LIMIT)
    return {
        "fraction_of_limit": ratio.median,
        "limit": {
            "interval": ratio.interval,
            "tokens_per_second": tokens / turns.median(LIMIT),
            "flops": limit.flops,
            "flops_per_second": limit.flops / turns.median(LIMIT),
            "experts": limit.ways,
        },
    }
