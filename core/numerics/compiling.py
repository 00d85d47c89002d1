"""Marks for torch.compile that do not import the compiler, which takes seconds that most commands do not need."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """Marks a function as `torch.compiler.assume_constant_result` does; a test compares the two marks."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_rows_dynamic(tensor: Tensor) -> None:
    """Tells the compiler that the first size of a tensor differs from call to call; nothing if none has been imported.

    Otherwise a graph is compiled for the first size alone, and another one when the second comes.
    """
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.maybe_mark_dynamic(tensor, 0)
