"""The checks of the kit: each is one promise of a contract, for some slots, as a function that can fail."""

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
    """The clause does not apply to this component; the message gives the reason."""


@dataclass(frozen=True)
class Check:
    """One clause of a contract as something that can fail.

    Args:
        name: the short name that pytest shows.
        slots: the slots whose components it checks.
        clause: the promise, one sentence.
        where: the file, and the class or field in it, that states the promise.
        run: raises `BrokenClauseError` if the promise is broken, `NotApplicable` if it does not apply.
    """

    name: str
    slots: tuple[str, ...]
    clause: str
    where: str
    run: Callable[["Subject"], None]


CHECKS: list[Check] = []
"""Every check, in the order in which they are run."""


def check(*slots: str, clause: str, where: str) -> Callable[[F], F]:
    """Registers a function of a `Subject` as the check of a clause; a decorator."""

    def keep(run: F) -> F:
        CHECKS.append(Check(run.__name__, slots, clause, where, run))
        return run

    return keep


def require(holds: Any, found: str) -> None:
    """Requires that the clause under check holds.

    Args:
        holds: whether it does.
        found: what was found if it does not.

    Raises:
        BrokenClauseError: it does not hold.
    """
    if not holds:
        raise BrokenClauseError(found)


def skip_unless(applies: Any, why: str) -> None:
    """Skips the check unless its clause applies to this component.

    Args:
        applies: whether it does.
        why: the reason if it does not.

    Raises:
        NotApplicable: it does not apply.
    """
    if not applies:
        raise NotApplicable(why)
