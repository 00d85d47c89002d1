"""Random numbers whose seeds are made from names, so that no draw depends on another one.

Initial weights are drawn this way (`core.model.initialise`), and random choices in layers (`core.routing.chance`).
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from core.numerics.part_exchange import (
    PartExchange,
    local_part,
    local_tensor,
    part_of,
    ranks_of,
)

THREADED = 2**20
"""Stacks with fewer numbers are drawn by one thread, because starting others takes longer."""


def address(seed: int, name: str) -> int:
    """A 63-bit seed for a name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


_state = threading.local()


@contextmanager
def without_draws() -> Iterator[None]:
    """A context in which this thread draws no weights, so that constructors leave them without values.

    `initialise` sets all weights of a model anew, whatever the constructors of its modules drew.
    """
    before = _is_idle()
    _state.idle = True
    try:
        yield
    finally:
        _state.idle = before


def _is_idle() -> bool:
    """Whether this thread is in `without_draws`."""
    idle: bool = getattr(_state, "idle", False)
    return idle


@torch.no_grad()
def draw_normal(weight: Tensor, std: float, *, seed: int | None = None) -> None:
    """Fills a weight from N(0, std), drawn in fp32 so that every number format starts from the same model.

    If the weight is sharded, each rank draws all numbers and keeps its own part of them; `initialise` does better.

    Args:
        weight: any shape; nothing is done on the meta device or in `without_draws`.
        seed: seed of a generator for this weight; None draws from torch's.
    """
    if weight.is_meta or _is_idle():
        return
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    in_place = weight.dtype == torch.float32 and weight.is_contiguous()
    if in_place and not isinstance(weight, DTensor):
        weight.normal_(std=std, generator=generator)
        return
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    drawn.normal_(std=std, generator=generator)
    if isinstance(weight, DTensor):
        local_tensor(weight).copy_(local_part(drawn, weight))
    else:
        weight.copy_(drawn)


@torch.no_grad()
def draw_stack(
    weight: Tensor, std: float, *, first: int = 0, exchange: PartExchange | None = None
) -> None:
    """Fills a stack of matrices from N(0, std), each from a generator seeded by the current seed and its number.

    On CPUs several threads draw different matrices, which changes no number. If the stack is sharded along its first
    axis, each rank draws its own matrices and no other. Along another one, each matrix is drawn by one rank, which
    sends the others their parts; without an `exchange` every rank draws every matrix of its part.

    Args:
        weight: [groups, out, in].
        std: standard deviation.
        first: the number of the stack's first matrix; not 0 where the rest of the stack is on other ranks.
        exchange: carries parts between the ranks that share the stack, if it is sharded; all of them call this.
    """
    if weight.is_meta or _is_idle():
        return
    seed = torch.initial_seed()

    def draw(matrix: Tensor, number: int) -> None:
        draw_normal(matrix, std, seed=address(seed, str(first + number)))

    if not isinstance(weight, DTensor):
        _in_threads(draw, enumerate(weight.detach()), weight)
        return
    own = local_tensor(weight)
    numbers = local_part(torch.arange(len(weight)), weight).tolist()
    if not _divides_matrices(weight):
        _in_threads(draw, zip(numbers, own, strict=True), own)
    elif exchange is not None:
        _draw_and_send(draw, weight, exchange)
    else:
        whole = torch.empty(weight.shape[1:], dtype=weight.dtype, device=own.device)
        for number, matrix in zip(numbers, own, strict=True):
            draw(whole, number)
            matrix.copy_(local_part(whole[None], weight, from_axis=1)[0])


def _divides_matrices(weight: DTensor) -> bool:
    """Whether a sharded stack is divided along another axis than its first one."""
    return any(isinstance(part, Shard) and part.dim != 0 for part in weight.placements)


def _in_threads(
    draw: Callable[[Tensor, int], None], matrices: Iterable[tuple[int, Tensor]], stack: Tensor
) -> None:
    """Draws matrices, given with their numbers, by as many threads as torch uses; on a GPU or for few by one."""
    threads = torch.get_num_threads()
    if threads == 1 or stack.device.type != "cpu" or stack.numel() < THREADED:
        for number, matrix in matrices:
            draw(matrix, number)
        return
    with ThreadPoolExecutor(threads) as pool:
        started = [pool.submit(draw, matrix, number) for number, matrix in matrices]
        for one in started:
            one.result()


def _draw_and_send(
    draw: Callable[[Tensor, int], None], weight: DTensor, exchange: PartExchange
) -> None:
    """Draws the matrices of a stack that fall to this rank, and gives every rank its parts of all of them."""
    own = local_tensor(weight)
    held = {rank: _numbers_on(rank, weight) for rank in ranks_of(weight)}
    mine = held[exchange.rank]
    to_draw: list[int] = []
    for number in range(len(weight)):
        owner = exchange.next_owner(list(held), weight[0].numel())
        if owner == exchange.rank:
            to_draw.append(number)
        elif number in mine:
            exchange.receive(own[mine.index(number)], owner)
    threads = torch.get_num_threads()
    for start in range(0, len(to_draw), threads):
        together = to_draw[start : start + threads]
        drawn = torch.empty(len(together), *weight.shape[1:], dtype=weight.dtype, device=own.device)
        _in_threads(draw, zip(together, drawn, strict=True), drawn)
        for number, whole in zip(together, drawn, strict=True):
            for rank, numbers in held.items():
                if number not in numbers:
                    continue
                part = part_of(whole[None], weight, rank, from_axis=1)[0]
                if rank == exchange.rank:
                    own[mine.index(number)].copy_(part)
                else:
                    exchange.send(part, rank)
    exchange.wait()


def _numbers_on(rank: int, weight: DTensor) -> list[int]:
    """The numbers of the matrices of which a rank holds a part."""
    numbers: list[int] = part_of(torch.arange(len(weight)), weight, rank).tolist()
    return numbers
