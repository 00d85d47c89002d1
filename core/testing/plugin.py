"""`pytest --moeloom-plugin PACKAGE`: the conformance kit as tests.

Registered with the installed distribution (entry-point group `pytest11`). It costs nothing where the option is not
given: everything else is imported when tests are collected.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

OPTION = "--moeloom-plugin"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option `--moeloom-plugin`, which may be given several times."""
    group = parser.getgroup("moeloom", "moeloom's conformance kit")
    group.addoption(
        OPTION,
        action="append",
        default=[],
        metavar="PACKAGE",
        help="run only the conformance kit: check what this plugin package, or plugin file (./my_router.py), registers "
        "against its slots' contracts",
    )


def pytest_collection(session: pytest.Session) -> None:
    """Collects the kit instead of the tests that pytest finds by itself, and in addition to paths that were named."""
    packages: list[str] = session.config.getoption(OPTION)
    if not packages:
        return
    from core.extension.plugin_file import is_plugin_file

    collect = session.collect
    paths_were_named = session.config.args_source is pytest.Config.ArgsSource.ARGS

    def with_kit() -> Iterator[Any]:
        if paths_were_named:
            yield from collect()
        for package in packages:
            folder = session.config.invocation_params.dir
            if is_plugin_file(package):
                package = os.path.abspath(folder / package)
            make_importable(package, folder)
            yield Conformance.from_parent(
                session, name=package, nodeid=f"moeloom::{package}", path=Path(session.path)
            )

    session.collect = with_kit  # type: ignore[method-assign]


def make_importable(package: str, folder: Path) -> None:
    """Puts a package that is not installed on `sys.path`: from a folder, its `src`, or a folder above it.

    pytest itself puts none of these there, so it would not find a package even from its own folder.
    """
    top = package.partition(".")[0]
    if not top.isidentifier() or find_spec(top) is not None:
        return
    for above in (folder, *folder.parents):
        for place in (above, above / "src"):
            if (place / top / "__init__.py").is_file() or (place / f"{top}.py").is_file():
                sys.path.insert(0, str(place))
                return


class Conformance(pytest.Collector):
    """All checks of one package."""

    def collect(self) -> Iterable["Item"]:
        """Returns an item for each check of each component."""
        from core.contracts.errors import UserError
        from core.testing.run import cases

        try:
            found = cases(self.name)
        except UserError as error:
            raise self.CollectError(str(error)) from error
        except ImportError as cause:
            raise self.CollectError(f"{OPTION} {self.name}: cannot be imported: {cause}") from cause
        return [Item.from_parent(self, name=case.name, case=case) for case in found]


class Item(pytest.Item):
    """One check of one component."""

    def __init__(self, *, case: Any, **rest: Any) -> None:
        super().__init__(**rest)
        self.case = case

    def runtest(self) -> None:
        """Runs the check; a clause that does not apply to the component is skipped with the reason."""
        from core.testing.clauses import NotApplicable

        try:
            self.case.run()
        except NotApplicable as why:
            pytest.skip(str(why))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Formats a broken clause without the kit's own stack."""
        from core.testing.clauses import BrokenClauseError

        if isinstance(excinfo.value, BrokenClauseError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The name of the check in the report."""
        return self.path, None, self.name
