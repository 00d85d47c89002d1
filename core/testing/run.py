"""Running the checks of a component: by pytest, or by a call."""

from dataclasses import dataclass

from core.extension.loader import installed_registry, registry_for
from core.extension.registry import Entry
from core.testing import attention, balancing, common, factories, formats, layers, products, residuals, routing  # noqa: F401 - they declare
from core.testing.clauses import CHECKS, BrokenClauseError, Check, NotApplicable
from core.testing.subject import Subject, entries_of


@dataclass(frozen=True)
class Case:
    """One check of one component."""

    subject: Subject
    check: Check

    @property
    def name(self) -> str:
        """As pytest shows it."""
        return f"{self.subject.entry.slot}/{self.subject.entry.name}::{self.check.name}"

    def run(self) -> None:
        """Hold the component to the clause.

        Raises:
            BrokenClauseError: it breaks it; the message says which clause, where it is written, and what was found.
            NotApplicable: the clause says nothing about it, or it cannot run on this machine.
        """
        if self.check.run is not common.component_can_be_built:
            if self.subject.fault is not None:
                raise NotApplicable("it cannot be built, which is a failure of its own")
            obstacle = self.subject.obstacle()
            if obstacle is not None:
                raise NotApplicable(f"it cannot run here: {obstacle}")
        try:
            self.check.run(self.subject)
        except NotApplicable:
            raise
        except BrokenClauseError as broken:
            raise BrokenClauseError(self.told(str(broken))) from broken
        except Exception as error:
            raise BrokenClauseError(self.told(f"{type(error).__name__}: {error}")) from error

    def told(self, found: str) -> str:
        """The failure in four lines."""
        entry = self.subject.entry
        return (
            f"{entry.slot} {entry.name!r} ({entry.target}) breaks a clause of its contract\n"
            f"  clause:  {self.check.clause}\n"
            f"  written: {self.check.where}\n"
            f"  found:   {found}"
        )


def cases(package: str) -> list[Case]:
    """Every check of everything that a package registers.

    Raises:
        UserError: the package cannot be read, or registers nothing.
    """
    return [case for entry in entries_of(package) for case in cases_of(entry, package)]


def cases_of(entry: Entry, package: str) -> list[Case]:
    """Every check of one offer."""
    installed = installed_registry()
    known = entry in installed.entries.get((entry.slot, entry.name), [])
    subject = Subject(entry, installed if known else registry_for([package]))
    return [Case(subject, check) for check in CHECKS if entry.slot in check.slots]
