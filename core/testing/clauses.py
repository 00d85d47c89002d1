"""What is checked, for whom, and where it is promised."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from core.testing.subject import Subject

MODULES = ("attention", "ffn", "residual", "router", "balancer", "loss_head")
"""Slots that are filled by torch modules which a block or a model builds."""

F = TypeVar("F", bound=Callable[..., None])


class BrokenClauseError(AssertionError):
    """A component does not keep a clause of its contract."""


class NotApplicable(Exception):  # noqa: N818 - not an error
    """The clause says nothing about this component; the reason is told."""


@dataclass(frozen=True)
class Check:
    """One clause of a contract as something that can fail.

    Args:
        name: short, as pytest shows it.
        slots: whom it is for.
        clause: the promise, one sentence.
        where: the file, and the class or field in it, in which the promise is written.
        run: raises `BrokenClauseError` where the promise is broken.
    """

    name: str
    slots: tuple[str, ...]
    clause: str
    where: str
    run: Callable[["Subject"], None]


CHECKS: list[Check] = []
"""Every check, in the order in which they are run."""


def check(*slots: str, clause: str, where: str) -> Callable[[F], F]:
    """Declare a function of a `Subject` to be the check of a clause."""

    def keep(run: F) -> F:
        CHECKS.append(Check(run.__name__, slots, clause, where, run))
        return run

    return keep


def hold(kept: Any, found: str) -> None:
    """The clause under way holds; if not, what was found instead.

    Raises:
        BrokenClauseError: it does not.
    """
    if not kept:
        raise BrokenClauseError(found)


def spare(applies: Any, why: str) -> None:
    """Leave the check where its clause says nothing about this component.

    Raises:
        NotApplicable: it does not apply.
    """
    if not applies:
        raise NotApplicable(why)
