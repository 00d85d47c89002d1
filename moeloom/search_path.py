"""Keeps packages named `core` or `plugins` in the user's current folder from hiding ours."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

OUR_FOLDER = Path(__file__).resolve().parents[1]
"""The folder that holds `moeloom`, `core` and `plugins`: site-packages, or a checkout."""


def leave_out_current_folder() -> None:
    """Removes the current folder from the front of the module search path, where `python -m` puts it.

    PYTHONSAFEPATH does the same in the Python processes that a command starts: the runs of a sweep, and further ranks.
    In a checkout the current folder stays first, because `core` is imported from there. Modules of the current folder
    can still be imported: `core.command` puts the folder at the end of the search path.
    """
    current = Path.cwd().resolve()
    if sys.path and Path(sys.path[0]).resolve() == current:
        if current == OUR_FOLDER:
            return
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"


def check_core() -> None:
    """Makes sure that `core` is the package that was installed together with `moeloom`.

    Raises:
        ImportError: Python would import, or has imported, another package of that name, or finds none.
    """
    spec = find_spec("core")
    if spec is None:
        raise ImportError(f"the package core is missing in {OUR_FOLDER}: install moeloom again")
    folders = [Path(folder).resolve() for folder in spec.submodule_search_locations or ()]
    if OUR_FOLDER / "core" not in folders:
        found = spec.origin or ", ".join(map(str, folders))
        raise ImportError(
            f"moeloom needs its own package core in {OUR_FOLDER}, but Python finds {found} under that name: "
            "rename that package, or start Python where it is not found"
        )
