"""Keeps packages named `core` or `plugins` in the user's current folder from hiding ours."""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

OUR_FOLDER = Path(__file__).resolve().parents[1]
"""The folder that holds `moeloom`, `core` and `plugins`: site-packages, or a checkout."""


def leave_out_current_folder() -> None:
    """Removes the current folder from the front of the module search path, where `python -m` puts it.

    PYTHONSAFEPATH does the same in the Python processes that a command starts: the runs of a sweep, and further ranks.
    In a checkout the current folder stays first, because `core` is imported from there. Modules of the current folder
    can still be imported if a recipe names one: the folder is then put at the end of the search path.
    """
    current = Path.cwd().resolve()
    if sys.path and Path(sys.path[0]).resolve() == current:
        if current == OUR_FOLDER:
            return
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"


def check_packages() -> None:
    """Makes sure that `core` and `plugins` are the packages that were installed together with `moeloom`.

    Raises:
        ImportError: Python would import, or has imported, another package of such a name, or finds none.
    """
    for name in ("core", "plugins"):
        _check_package(name)


def _check_package(name: str) -> None:
    try:
        spec = find_spec(name)
    except ValueError:  # a module of this name was imported or made without a spec
        raise _another_package(name, _file_of(name)) from None
    if spec is None:
        raise ImportError(f"the package {name} is missing in {OUR_FOLDER}: install moeloom again")
    folders = _folders(spec)
    if OUR_FOLDER / name not in folders:
        raise _another_package(name, spec.origin or ", ".join(map(str, folders)))


def _folders(spec: ModuleSpec) -> list[Path]:
    return [Path(folder).resolve() for folder in spec.submodule_search_locations or ()]


def _file_of(name: str) -> str:
    file = getattr(sys.modules[name], "__file__", None)
    return str(file or "a module without a file")


def _another_package(name: str, found: str) -> ImportError:
    return ImportError(
        f"moeloom needs its own package {name} in {OUR_FOLDER}, but Python finds {found} under that name: "
        "rename that package, or start Python where it is not found"
    )
