"""moeloom: a laboratory for DeepSeek-V3-style language models.

`core.compose(path, overrides)` returns a validated recipe, `core.build(recipe)` its model, and
`core.load(run_or_checkpoint)` a trained one. Nothing heavy is imported until one of them is used.

`import moeloom` gives the same functions, and also `moeloom.fit`, which trains a recipe, and `moeloom.describe`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["build", "compose", "load"]

_MODULES = {"compose": "core.recipe.compose", "build": "core.assemble", "load": "core.run.loading"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'core' has no attribute {name!r}")
