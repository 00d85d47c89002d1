"""Finds layouts of a recipe on a cluster under a limit of memory, the fastest first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from core.cluster.assumptions import assumptions
from core.cluster.cluster_file import RECOMPUTE, Cluster, Inner, Layout, Strategy
from core.cluster.predict import (
    fullest_bytes,
    least_seconds,
    plan_of_layout,
    predict,
    with_micro_batches,
)
from core.cluster.subject import Subject
from core.contracts.errors import UserError

BEST = 10
CHUNKS = (2, 4)
MICRO_BATCHES = (1, 2, 4)


def search(subject: Subject, cluster: Cluster, limit: float | None = None) -> dict[str, Any]:
    """The best layouts on as many GPUs, for steps of as many tokens, as the cluster file's own layout.

    Tried are pipeline ranks, schedules, chunks, expert ranks, micro-batches and recomputation; the rest is the file's.

    Args:
        subject: the recipe.
        cluster: its layout names GPUs and tokens.
        limit: bytes that a GPU may need; None: its memory.

    Raises:
        UserError: no layout fits.
    """
    cluster = with_micro_batches(subject, cluster)
    most = cluster.device.memory if limit is None else limit
    tried = 0
    fitting: list[tuple[float, Cluster]] = []
    for candidate in _candidates(subject, cluster):
        try:
            plan = plan_of_layout(subject, candidate)
        except UserError:
            continue  # the schedule does not take so many micro-batches, or the experts so many ranks
        tried += 1
        if fullest_bytes(subject, candidate, plan) <= most:
            fitting.append((least_seconds(subject, candidate, plan), candidate))
    if not fitting:
        raise UserError(
            f"{cluster.source}: none of {tried:,} layouts on {cluster.gpus:,} GPUs needs at most {most / 1e9:g} GB; "
            "give more GPUs, or a larger --memory-limit"
        )
    fitting.sort(key=lambda pair: pair[0])
    found: list[tuple[dict[str, Any], Cluster]] = []
    for least, one in fitting:
        if len(found) == BEST and least > found[-1][0]["step_seconds"]:
            break  # neither this one nor those after it can be among the best
        found.append((_row(one, predict(subject, one).document), one))
        found.sort(key=lambda pair: (pair[0]["step_seconds"], pair[0]["largest_bytes"]))
        del found[BEST:]
    rows = [row for row, _ in found]
    _, fastest = found[0]
    about = (
        f"{tried:,} layouts on {cluster.gpus:,} GPUs, of which {len(fitting):,} need at most {most / 1e9:g} GB; "
        f"{rows[0]['tokens_per_step']:,} tokens a step; {cluster.layout.precision}"
    )
    return {
        "recipe": subject.recipe.source,
        "cluster": cluster.source,
        "tried": tried,
        "fitting": len(fitting),
        "memory_limit": most,
        "best": rows,
        "about": about,
        "assumptions": assumptions(fastest),
    }


def _candidates(subject: Subject, cluster: Cluster) -> Iterator[Cluster]:
    """Every layout that divides GPUs, experts and sequences without a rest."""
    own = cluster.layout
    assert own.micro_batches is not None
    sequences = own.micro_batches * own.micro_batch * own.strategy.inner.ranks
    gpus = cluster.gpus // own.strategy.tensor
    layers = subject.layers
    experts = min((c.experts for c in subject.choices.values()), default=1)
    for ranks in _divisors(gpus):
        if ranks > layers:
            continue
        data = gpus // ranks
        for schedule, chunks in _schedules(ranks, layers):
            for expert in _divisors(data):
                if experts % expert or (expert > 1 and not subject.choices):
                    continue
                inner = Inner(name=_inner(own, expert), ranks=data, expert_ranks=expert)
                strategy = Strategy(
                    ranks=ranks,
                    schedule=schedule,
                    chunks=chunks,
                    tensor=own.strategy.tensor,
                    inner=inner,
                )
                for micro_batch in MICRO_BATCHES:
                    if sequences % (data * micro_batch):
                        continue
                    for recompute in RECOMPUTE:
                        layout = replace(
                            own,
                            strategy=strategy,
                            micro_batch=micro_batch,
                            micro_batches=sequences // (data * micro_batch),
                            recompute=recompute,
                        )
                        yield replace(cluster, layout=layout)


def _schedules(ranks: int, layers: int) -> Iterator[tuple[str, int]]:
    """Schedules with chunks that so many ranks and layers allow."""
    yield "1f1b", 1
    if ranks == 1:
        return
    yield "zb1p", 1
    for chunks in CHUNKS:
        if ranks * chunks <= layers:
            yield "interleaved_1f1b", chunks
    if ranks % 2 == 0:
        yield "dualpipe", 1
    if 2 * ranks <= layers:
        yield "dualpipev", 1


def _inner(own: Layout, expert: int) -> str:
    """The file's own inner strategy, if it can have expert ranks where there are some."""
    name = own.strategy.inner.name
    if name == "single":
        return "zero1"
    return "expert_parallel" if name == "fsdp" and expert > 1 else name


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _row(cluster: Cluster, document: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of the best."""
    strategy = cluster.layout.strategy
    keys = (
        "step_seconds",
        "tokens_per_step",
        "tokens_per_second_per_gpu",
        "tokens_per_day",
        "bubble_share",
        "largest_bytes",
    )
    return {
        "pipeline": strategy.ranks,
        "schedule": strategy.schedule if strategy.ranks > 1 else "none",
        "chunks": strategy.chunks,
        "data": strategy.inner.ranks,
        "expert": strategy.inner.expert_ranks,
        "tensor": strategy.tensor,
        "micro_batch": cluster.layout.micro_batch,
        "micro_batches": cluster.layout.micro_batches,
        "recompute": cluster.layout.recompute,
        **{key: document[key] for key in keys},
    }
