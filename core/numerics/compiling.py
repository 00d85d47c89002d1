"""What model code asks about torch.compile, without importing the compiler, which takes seconds."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """Marks a function as `torch.compiler.assume_constant_result` does; a test compares the two marks."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes with x one operation at a time.

    Functions with a backward of their own then take fewer passes over memory. Compilers fuse the plain operations
    themselves, and GPUs have kernels for them.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
