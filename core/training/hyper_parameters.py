"""The recipe's resolved values as the hyper-parameters of a run, for loggers that have a place for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

Value = bool | int | float | str


class HyperParameters(L.Callback):
    """Hands the loggers every value of the recipe when training begins, on the first rank.

    Args:
        values: the resolved recipe.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = flatten(values)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hands over the values; a resumed run does so again."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_hyperparams(dict(self.values))


def flatten(values: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Value]:
    """Flattens nested sections into dotted names, as overrides write them: `optimizer.lr`, `loggers.0.name`.

    Null becomes the text "null", and an empty section "{}" or "[]", because trackers keep only numbers and texts.
    """
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    found: dict[str, Value] = {}
    for key, value in items:
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping | list | tuple)
        if nested and value:
            found.update(flatten(value, f"{name}."))
        elif value is None:
            found[name] = "null"
        elif isinstance(value, bool | int | float | str):
            found[name] = value
        else:
            found[name] = str(value)
    return found
