"""What code asks of torch.compile and says to it, without importing the compiler, which takes seconds."""

import sys
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


def mark_rows_dynamic(tensor: Tensor) -> None:
    """Tells the compiler that the first size of a tensor differs from call to call; nothing if none has been imported.

    Otherwise a graph is compiled for the first size alone, and another one when the second comes.
    """
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.maybe_mark_dynamic(tensor, 0)
