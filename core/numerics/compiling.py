"""A mark for torch.compile that does not import the compiler, which takes seconds that most commands do not need."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """Marks a function as `torch.compiler.assume_constant_result` does; a test compares the two marks."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
