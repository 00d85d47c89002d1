"""The section `initial_weights`: which weights a run takes from another one, and how they become those of its model."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from core.contracts.errors import ConfigError
from core.contracts.name_patterns import check_patterns
from core.contracts.schema import setting


@dataclass(kw_only=True)
class Selection:
    """Weights that are taken from a run; what is not taken of the model is drawn, as in a run without them."""

    path: str = setting(doc="a run or checkpoint to take the weights from")
    include: list[str] = setting(["*"], doc="patterns of the tensors that are taken")
    exclude: list[str] = setting(
        [], doc="patterns of the tensors that are not: the model's are drawn, others are left out"
    )
    experts: Literal["copy", "split"] | None = setting(
        None,
        doc="how larger layers of experts are made: experts are copies of the source's networks, or parts "
        "of their width",
    )
    scale: float | None = setting(
        None, doc="factor on the made experts' outputs; null: the one that keeps the layer's output"
    )
    noise: float = setting(
        0.0, doc="part of a freshly drawn row that is added to the router rows of copied experts"
    )
    vocabulary: Literal["draw", "mean"] | None = setting(
        None, doc="rows of new tokens: drawn, or the mean of the source's rows"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for patterns, factors or keys that choose nothing."""
        check_patterns(self.include, "include")
        check_patterns(self.exclude, "exclude")
        if not self.path:
            raise ConfigError("path", "must name a run or a checkpoint")
        if not self.include:
            raise ConfigError("include", "must hold a pattern; leave initial_weights out for none")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ConfigError("scale", "must be more than 0 and finite, or null")
        if not 0 <= self.noise < math.inf:
            raise ConfigError("noise", "must be at least 0 and finite")
        if self.experts is None and (self.scale is not None or self.noise):
            key = "noise" if self.noise else "scale"
            raise ConfigError(key, "belongs to `experts`, which is null: no expert is made")
