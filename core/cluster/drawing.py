"""Draws a plan with its times as one HTML page, which holds its data, style and script and loads nothing else."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from core.cluster.predict import Prediction
from core.cluster.simulate import TimedSlot, Timeline
from core.contracts.errors import UserError
from core.storage.files import write_text

PARTS = {
    "forward": "forwards",
    "backward": "whole backwards",
    "backward_inputs": "gradients of inputs",
    "backward_weights": "gradients of weights",
    "overlapped_forward_backward": "forwards beside backwards",
    "bubble": "bubble",
    "gradients": "sums of gradients",
    "gathers": "gathers of weights",
    "optimizer": "optimizer",
}
"""What each part of a step is called."""


def write(prediction: Prediction, file: Path) -> int:
    """Writes the page of a prediction and returns its size in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(file, render(prediction))
    except OSError as cause:
        raise UserError(f"--draw {file}: cannot be written: {cause.strerror}") from cause
    return file.stat().st_size


def render(prediction: Prediction) -> str:
    """The page as text."""
    page = _own("page.html")
    page = page.replace("/*STYLE*/", _own("page.css")).replace("/*SCRIPT*/", _own("page.js"))
    data = {**_facts(prediction.document), "plan": plan_data(prediction.timeline)}
    # a page ends its script at the first "</"
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return page.replace("/*DATA*/", embedded)


def plan_data(timeline: Timeline) -> dict[str, Any]:
    """A timeline as the page's script reads it: for each rank its slots as short lists."""
    plan = timeline.plan
    ranks = []
    chunks = 0
    for rank, slots in enumerate(timeline.ranks):
        places = {place: index for index, place in enumerate(plan.chunks(rank))}
        chunks = max(chunks, len(places))
        ranks.append([_slot(timed, places) for timed in slots])
    return {
        "name": plan.name,
        "seconds": timeline.seconds,
        "chunks": chunks,
        "ranks": ranks,
        "busy": [timeline.busy(rank) / timeline.seconds for rank in range(len(ranks))],
        "in_flight": [plan.peak_in_flight(rank) for rank in range(len(ranks))],
    }


def _slot(timed: TimedSlot, places: dict[tuple[int, int], int]) -> list[Any]:
    """A slot as start, end, and three values for each action: kind, chunk and micro-batch."""
    row: list[Any] = [round(timed.start, 6), round(timed.end, 6)]
    for action in timed.slot:
        row += [str(action.kind), places[action.route, action.position], action.micro_batch]
    return row


def _facts(document: dict[str, Any]) -> dict[str, Any]:
    """What the page says in words."""
    strategy = document["layout"]["strategy"]
    inner = strategy["inner"]
    title = f"{strategy['schedule']} on {strategy['ranks']} pipeline ranks"
    about = (
        f"{Path(document['recipe']).name} on {document['gpus']:,} GPUs: {document['micro_batches']:,} micro-batches, "
        f"{inner['ranks']:,} data ranks, {inner['expert_ranks']:,} expert ranks ({Path(document['cluster']).name})"
    )
    parts = [[PARTS[key], seconds] for key, seconds in document["parts"].items()]
    return {
        "title": title,
        "about": about,
        "step": document["step_seconds"],
        "rate": document["tokens_per_second_per_gpu"],
        "day": document["tokens_per_day"],
        "tflops": document["tflops_per_gpu"],
        "parts": parts,
        "memory": [[row["rank"], row["total"]] for row in document["memory"]],
        "assumptions": document["assumptions"],
    }


def _own(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("core.cluster").joinpath(name).read_text(encoding="utf-8")
