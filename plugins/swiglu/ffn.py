"""The dense SwiGLU layer: down(silu(gate(x)) * up(x)), clamped or not."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.ffn import FeedForward, Networks
from core.contracts.schema import setting
from core.model.activation import check_limit, swiglu_product


class SwiGLU(FeedForward):
    """The dense feed-forward layer with three matrices, of which gate and up are kept as one weight."""

    paper = "GLU Variants Improve Transformer (arXiv 2002.05202)"
    example = {"name": "swiglu", "hidden": 64}

    @dataclass(kw_only=True)
    class Config:
        """The width of the dense layer, and its limit."""

        hidden: int = setting(doc="inner width")
        swiglu_limit: float | None = setting(
            None, doc="clamp of the gate (from above) and of up (both sides); null: none"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a layer without width, or a limit that is none."""
            if self.hidden < 1:
                raise ConfigError("hidden", "must be at least 1")
            check_limit(self.swiglu_limit)

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.hidden = config.hidden
        self.limit = config.swiglu_limit
        self.gate_up = build.linear(build.dim, 2 * config.hidden, "ffn.gate_up")
        self.down = build.linear(config.hidden, build.dim, "ffn.down", residual=True)

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, None]:
        """The layer's output for each position by itself, and no record."""
        return swiglu_product(self.gate_up(x_BLD), self.down, self.limit), None

    def networks(self) -> Networks:
        """The one network, which every token passes."""
        matrices = ("gate_up.weight", "down.weight")
        return Networks(always=matrices, hidden=self.hidden, limit=self.limit)

    def costs(self) -> Costs:
        """The costs of one token: all weights are active."""
        return Costs(active=sum(p.numel() for p in self.parameters()))
