"""What recomputation keeps: the chosen experts and positions, because a tie may be broken the other way again."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from core.numerics import exchange, highest

CHOICES = (
    torch.ops.aten.topk.default,
    torch.ops.aten.argmax.default,
    *highest.OPERATORS,
    *exchange.OPERATORS,
)
"""The operations that select experts or positions, and those by which ranks exchange choices; results are kept. Places,
budgets and random draws are computed again from them and from recomputed affinities; the two could only differ on a
device whose kernels are not deterministic."""

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def contexts() -> Contexts:
    """The contexts of a forward and of its recomputation, for `torch.utils.checkpoint`."""
    kept: list[Any] = []
    return _Keep(kept), _UseAgain(kept)


def compiled_contexts() -> Contexts:
    """The same for a compiled block.

    These are torch's own, the only ones that a compiler takes. They expect every operation as often as in the forward,
    and the hooks that gather divided weights run others the second time; a compiled block has no such hooks in it.
    """
    forward, recompute = create_selective_checkpoint_contexts(_policy)
    return forward, recompute


def _policy(
    _: object, op: Callable[..., object], *args: object, **kwargs: object
) -> CheckpointPolicy:
    if op in CHOICES:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Mode(TorchDispatchMode):
    """A mode that leaves compiled parts of a block compiled."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.used = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether compilers may ignore this mode."""
        return True


class _Keep(_Mode):
    """Keeps copies of the results of `CHOICES`, in their order."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation."""
        result = func(*args, **(kwargs or {}))
        if func in CHOICES:
            self.kept.append(_copied(result))
        return result


class _UseAgain(_Mode):
    """Returns the kept results of `CHOICES`, in their order, and runs every other operation."""

    def __enter__(self) -> Any:
        """Starts with the first result."""
        self.used = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Returns a kept result, or runs an operation."""
        if func not in CHOICES:
            return func(*args, **(kwargs or {}))
        result = _copied(self.kept[self.used])
        self.used += 1
        return result


def _copied(result: Any) -> Any:
    """A copy of the tensors of a result, which may be changed in place later."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, result)
