"""Runs the checks of components, for pytest or for a call."""

from dataclasses import dataclass

from core.extension.loader import installed_registry, registry_for
from core.extension.registry import Entry
from core.testing import (  # noqa: F401 - importing them registers their checks
    attention,
    balancing,
    checkpoint_formats,
    common,
    dispatchers,
    factories,
    growing,
    layers,
    products,
    records,
    replicating,
    residuals,
    routing,
)
from core.testing.clauses import CHECKS, BrokenClauseError, Check, NotApplicable
from core.testing.subject import Subject, entries_of


@dataclass(frozen=True)
class Case:
    """One check of one component."""

    subject: Subject
    check: Check

    @property
    def name(self) -> str:
        """The name that pytest shows."""
        return f"{self.subject.entry.slot}/{self.subject.entry.name}::{self.check.name}"

    def run(self) -> None:
        """Checks the component against the clause.

        Raises:
            BrokenClauseError: it breaks the clause; the message says which, where it is written, and what was found.
            NotApplicable: the clause does not apply to it, or it cannot run on this machine.
        """
        if self.check.run is not common.component_can_be_built:
            if self.subject.fault is not None:
                raise NotApplicable("it cannot be built, which is a failure of its own")
            unmet = self.subject.unmet_requirement()
            if unmet is not None:
                raise NotApplicable(f"it cannot run here: {unmet}")
        try:
            self.check.run(self.subject)
        except NotApplicable:
            raise
        except BrokenClauseError as broken:
            raise BrokenClauseError(self._format_failure(str(broken))) from broken
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise BrokenClauseError(self._format_failure(found)) from error

    def _format_failure(self, found: str) -> str:
        """The error message of a broken clause, in four lines."""
        entry = self.subject.entry
        return (
            f"{entry.slot} {entry.name!r} ({entry.target}) breaks a clause of its contract\n"
            f"  clause:  {self.check.clause}\n"
            f"  written: {self.check.where}\n"
            f"  found:   {found}"
        )


def cases(package: str) -> list[Case]:
    """Every check of every component that a package registers.

    Raises:
        UserError: the package cannot be read, or registers nothing.
    """
    return [case for entry in entries_of(package) for case in cases_of(entry, package)]


def cases_of(entry: Entry, package: str) -> list[Case]:
    """Every check of one component."""
    registry = installed_registry()
    if entry not in registry.entries.get((entry.slot, entry.name), []):
        registry = registry_for([package])
    subject = Subject(entry, registry)
    return [Case(subject, check) for check in CHECKS if entry.slot in check.slots]
