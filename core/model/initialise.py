"""Initial weights by address: each module draws from a generator seeded by (seed, module name).

Swapping one part of a model therefore leaves every other initial weight as it was, whatever the order in
which modules are built. Sharded weights have the same values, and no number of them is drawn twice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.numerics.draw import address
from core.numerics.part_exchange import PartExchange, local_tensor, part_of, ranks_of


def initialise(model: nn.Module, seed: int) -> None:
    """Resets every module that owns parameters or buffers, each under its own seed.

    A module with sharded weights is reset by one rank alone, with whole weights, and every rank gets its parts; another
    rank resets the next module meanwhile. A module with a method `reset_shards(exchange)` draws sharded weights itself.

    Args:
        model: a model that has left the meta device. If weights are sharded, every rank of the run calls this.
        seed: the recipe's seed.

    Raises:
        TypeError: a module owns some and has no `reset_parameters`, so a model built on the meta device
            could not be given values.
    """
    exchange: PartExchange | None = None
    if _sharded(model.parameters()) is not None:
        exchange = PartExchange()
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not tensors:
            continue
        if getattr(module, "reset_parameters", None) is None:
            raise TypeError(
                f"{name} ({type(module).__name__}) owns parameters or buffers but has no reset_parameters"
            )
        weight = _sharded(tensors)
        with _seeded(address(seed, name), tensors):
            if exchange is None or weight is None:
                module.reset_parameters()  # type: ignore[operator]
            elif _draws_shards(module):
                module.reset_shards(exchange)  # type: ignore[operator]
            else:
                _reset_on_one_rank(module, ranks_of(weight), exchange)
    if exchange is not None:
        exchange.close()


def leave_meta(model: nn.Module, device: str) -> None:
    """Gives the tensors of a model memory without values, but for the weights that the model says are absent.

    Args:
        model: a language model on the meta device.
        device: where the memory is.
    """
    absent: frozenset[str] = model.absent  # type: ignore[assignment]
    kept = {id(weight) for name, weight in model.named_parameters() if name in absent}

    def made(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in kept else torch.empty_like(tensor, device=device)

    model._apply(made)


@contextmanager
def _seeded(seed: int, tensors: list[Tensor]) -> Iterator[None]:
    """A context in which torch's generator has a seed; outside of it nothing changes."""
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` seeds every kind of device and keeps a stack trace for each that has not been used
        on_cpu = all(tensor.device.type in ("cpu", "meta") for tensor in tensors)
        if on_cpu:
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield


def _sharded(tensors: Iterable[Tensor]) -> DTensor | None:
    """The first of some tensors that several ranks share and that has values; None if there is none."""
    for tensor in tensors:
        if isinstance(tensor, DTensor) and not tensor.is_meta and tensor.device_mesh.size() > 1:
            return tensor
    return None


def _draws_shards(module: nn.Module) -> bool:
    """Whether a module has `reset_shards`, and no class derived later has given it another `reset_parameters`."""
    for kind in type(module).__mro__:
        if "reset_shards" in vars(kind):
            return True
        if "reset_parameters" in vars(kind):
            return False
    return False


@torch.no_grad()
def _reset_on_one_rank(module: nn.Module, ranks: list[int], exchange: PartExchange) -> None:
    """Resets a module with whole weights on the rank whose turn it is, and gives every rank its parts."""
    parameters = {name: w for name, w in module._parameters.items() if w is not None}
    buffers = list(module.buffers(recurse=False))
    owner = exchange.next_owner(ranks, sum(weight.numel() for weight in parameters.values()))
    if owner != exchange.rank:
        for tensor in (*parameters.values(), *buffers):
            exchange.receive(local_tensor(tensor), owner)
        return
    drawn: list[nn.Parameter] = []
    for name, weight in parameters.items():
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=local_tensor(weight).device)
        drawn.append(nn.Parameter(whole, requires_grad=weight.requires_grad))
        module._parameters[name] = drawn[-1]
    module.reset_parameters()  # type: ignore[operator]
    module._parameters.update(parameters)
    for whole, weight in zip(drawn, parameters.values(), strict=True):
        _give(whole.detach(), weight, ranks, exchange)
    for buffer in buffers:
        _give(buffer, buffer, ranks, exchange)


def _give(whole: Tensor, tensor: Tensor, ranks: list[int], exchange: PartExchange) -> None:
    """Copies this rank's part of a whole tensor to where the module has it, and sends the other ranks theirs."""
    for rank in ranks:
        part = whole
        if isinstance(tensor, DTensor):
            part = part_of(whole, tensor, rank)
        if rank == exchange.rank:
            local_tensor(tensor).copy_(part)
        else:
            exchange.send(part, rank)
