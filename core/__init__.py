"""moeloom: a laboratory for DeepSeek-V3-style language models.

`core.compose(path, overrides)` returns a validated recipe, `core.build(recipe)` its model, and
`core.load(run_or_checkpoint)` a trained one, `core.load_tokenizer(run_or_checkpoint)` its tokenizer,
`core.load_run(run_or_checkpoint)` both, `core.complete(model, prompts)` continues texts, and
`core.trace(model, tokens)` returns which experts every token chose. `core.plan_placement(loads)` plans redundant
experts, and `core.place(model, plan)` makes a model run on them. Nothing heavy is imported until one is used.

`import moeloom` gives the same functions, and also `moeloom.fit`, which trains a recipe, and `moeloom.describe`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "build",
    "complete",
    "compose",
    "load",
    "load_run",
    "load_tokenizer",
    "place",
    "plan_placement",
    "trace",
]

_MODULES = {
    "build": "core.assemble",
    "complete": "core.generation.completion",
    "compose": "core.recipe.compose",
    "load": "core.run.loading",
    "load_run": "core.run.loaded",
    "load_tokenizer": "core.run.loading",
    "place": "core.deployment.placed",
    "plan_placement": "core.deployment.plan",
    "trace": "core.model.trace",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'core' has no attribute {name!r}")
