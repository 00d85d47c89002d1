"""Which collectives a recipe's strategy uses, and how large they are."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from core.assemble import build, make
from core.contracts.errors import UserError
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel exchanges at once."""


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Args:
        what: its kind.
        of: what it moves, in a few words.
        bytes: its size as nccl-tests counts it: of an all-reduce the tensor, of an all-gather what a rank receives, of
            a reduce-scatter and an all-to-all what a rank sends, its own part included.
        ranks: how many ranks take part; consecutive ones, if they are not all.
    """

    what: Kind
    of: str
    bytes: int
    ranks: int


def collectives_of(recipe: Recipe, ranks: int) -> list[Collective]:
    """The collectives of a recipe whose strategy works on some number of ranks.

    A strategy that shards weights gathers those of a block in the format of products, and scatters their gradients in
    the format in which they are kept; any other one adds up all gradients. Expert ranks exchange the rows of a
    micro-batch, one for each expert that a token chooses.

    Args:
        recipe: its model, batch and strategy decide the sizes.
        ranks: the number of ranks.

    Raises:
        UserError: the ranks cannot share the experts.
    """
    strategy = recipe.strategy
    expert_ranks = int(getattr(strategy.config, "expert_ranks", None) or 1)
    if ranks % expert_ranks:
        raise UserError(
            f"strategy.expert_ranks = {expert_ranks}: must divide the {ranks} ranks that are measured"
        )
    model = build(recipe, device="meta")
    if getattr(strategy.component, "shards", False):
        found = _of_sharded_weights(recipe, model, ranks, expert_ranks)
    else:
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        found = [Collective("all_reduce", "gradients, all", gradients, ranks)]
        if gradients > BUCKET:
            found.append(Collective("all_reduce", "gradients, one bucket", BUCKET, ranks))
    if expert_ranks > 1:
        found.append(_of_tokens(recipe, model, ranks, expert_ranks))
    return found


def _of_sharded_weights(
    recipe: Recipe, model: LanguageModel, ranks: int, expert_ranks: int
) -> list[Collective]:
    """All-gather and reduce-scatter of the largest block; without its experts, if these have ranks of their own."""
    width = max(2, make(recipe.precision).compute_dtype("ffn.down").itemsize)
    sizes: list[tuple[int, int]] = []
    for block in model.blocks:
        parameters = _sharded_parameters(block, with_experts=expert_ranks == 1)
        numbers = sum(p.numel() for p in parameters)
        kept = sum(p.numel() * p.element_size() for p in parameters)
        sizes.append((numbers * width, kept))
    gathered, scattered = max(sizes)
    return [
        Collective("all_gather", "weights of a block", gathered, ranks),
        Collective("reduce_scatter", "gradients of a block", scattered, ranks),
    ]


def _sharded_parameters(block: nn.Module, *, with_experts: bool) -> list[nn.Parameter]:
    """The parameters of a block; those of experts are stacks of matrices."""
    return [p for p in block.parameters() if with_experts or p.dim() < 3]


def _of_tokens(recipe: Recipe, model: LanguageModel, ranks: int, expert_ranks: int) -> Collective:
    """All-to-all of one micro-batch's assignments of one rank, in the format of the residual stream."""
    top_k = 1
    for layer in model.expert_layers().values():
        if layer.routing_properties is not None:
            top_k = max(top_k, layer.routing_properties.top_k)
    rows = max(1, recipe.batch.sequences // ranks) * recipe.data.sequence_length * top_k
    stream = make(recipe.precision).compute_dtype("embedding").itemsize
    return Collective(
        "all_to_all", "rows of a micro-batch", rows * recipe.model.dim * stream, expert_ranks
    )


def bus_factor(what: Kind, ranks: int) -> float:
    """The factor from algorithm bandwidth to bus bandwidth, as nccl-tests defines it (its PERFORMANCE.md)."""
    if what == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks


def row(collective: Collective, size: int, backend: str, times: list[float]) -> dict[str, Any]:
    """The measurement of one collective, as `--json` prints it.

    Args:
        collective: what the recipe uses.
        size: the bytes that were measured.
        backend: gloo or nccl.
        times: seconds of each repetition, of the slowest rank.
    """
    ordered = sorted(times)
    seconds = ordered[len(ordered) // 2]
    bandwidth = size / seconds
    return {
        "what": collective.what,
        "of": collective.of,
        "bytes": size,
        "bytes_of_recipe": collective.bytes,
        "ranks": collective.ranks,
        "backend": backend,
        "seconds": seconds,
        "spread": [ordered[0], ordered[-1]],
        "repetitions": len(ordered),
        "algorithm_bandwidth": bandwidth,
        "bus_bandwidth": bandwidth * bus_factor(collective.what, collective.ranks),
    }
