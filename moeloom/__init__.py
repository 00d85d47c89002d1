"""moeloom from Python: compose a recipe, build its model, train and describe it, load it, write text with it.

    recipe = moeloom.compose("dsv3_small", ["optimizer.lr=0.002"])
    model = moeloom.build(recipe)

The functions are defined in the package `core`. Importing this package imports neither `core` nor torch: each name is
imported when it is used for the first time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeloom.search_path import check_packages

if TYPE_CHECKING:
    from core import __version__
    from core.analysis.describe import document_of as describe
    from core.assemble import build
    from core.deployment.placed import place
    from core.deployment.plan import plan_placement
    from core.generation.completion import complete
    from core.model.trace import trace
    from core.recipe.compose import compose
    from core.run.loaded import load_run
    from core.run.loading import load, load_tokenizer
    from core.run.training import fit
    from core.training.run_folder import RunFolder

__all__ = [
    "RunFolder",
    "__version__",
    "build",
    "complete",
    "compose",
    "describe",
    "fit",
    "load",
    "load_run",
    "load_tokenizer",
    "place",
    "plan_placement",
    "trace",
]

_DEFINITIONS = {
    "RunFolder": "core.training.run_folder:RunFolder",
    "__version__": "core:__version__",
    "build": "core.assemble:build",
    "complete": "core.generation.completion:complete",
    "compose": "core.recipe.compose:compose",
    "describe": "core.analysis.describe:document_of",
    "fit": "core.run.training:fit",
    "load": "core.run.loading:load",
    "load_run": "core.run.loaded:load_run",
    "load_tokenizer": "core.run.loading:load_tokenizer",
    "place": "core.deployment.placed:place",
    "plan_placement": "core.deployment.plan:plan_placement",
    "trace": "core.model.trace:trace",
}
"""The module and the name under which each public name is defined."""


def __getattr__(name: str) -> Any:
    """Imports a public name from the module that defines it.

    Raises:
        ImportError: another package named `core` or `plugins` hides ours.
    """
    if name not in _DEFINITIONS:
        raise AttributeError(f"module 'moeloom' has no attribute {name!r}")
    check_packages()
    module, _, attribute = _DEFINITIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return sorted(__all__)
