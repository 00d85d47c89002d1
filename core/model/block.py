"""One transformer block: pre-norm attention and feed-forward around a residual stream (report, figure 2)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.contracts.attention import Attention, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.ffn import FeedForward
from core.contracts.record import Record
from core.contracts.residual import Residual
from core.contracts.schema import Section
from core.model.norm import RMSNorm
from core.model.recompute import compiled_contexts, contexts


class Block(nn.Module):
    """Attention and feed-forward around the residual stream; what the layers saw is returned as records.

    Args:
        attention, ffn: validated sections of the two slots.
        build: the model around the block.
        recompute: keep none of the block's activations and compute them again in the backward pass.

    Attributes:
        traceable: whether torch.compile can trace the block as one graph.
    """

    def __init__(
        self, attention: Section, ffn: Section, build: BuildContext, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.precision = build.precision
        self.attention_norm = RMSNorm(build.dim, build)
        self.attention: Attention = build.make(attention)
        self.attention_residual: Residual = build.stream("attention")
        self.ffn_norm = RMSNorm(build.dim, build)
        self.ffn: FeedForward = build.make(ffn)
        self.ffn_residual: Residual = build.stream("ffn")
        declared = [part.component.traceable_of(part.config) for part in (attention, ffn)]
        owned = [part.traceable for part in (self.precision, *self.ffn.dispatchers)]
        self.traceable = all([*declared, *owned])

    def compile_layers(self, **options: Any) -> None:
        """Compiles the layers and leaves the recomputation around them as it is; parameters keep their names.

        torch compiles a recomputed region as one graph or not at all.

        Args:
            options: options of `torch.compile`.
        """
        self._layers = torch.compile(self._layers, **options)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """A copy's state is without what was compiled for this block, as in `nn.Module.compile`."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_layers", None)
        return state

    def forward(
        self, stream: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> tuple[Tensor, dict[str, Record]]:
        """The stream after the block, and the records of its layers that have one, by name: `attention`, `ffn`.

        Recomputation runs to the end of the block, so that hooks of its modules and exchanges between ranks come in
        the same order as in the forward.
        """
        if self.recompute and cache is None and torch.is_grad_enabled():
            context_fn = contexts
            if torch.compiler.is_compiling():
                context_fn = compiled_contexts
            result: tuple[Tensor, dict[str, Record]] = checkpoint(
                self._layers,
                stream,
                context,
                None,
                use_reentrant=False,
                context_fn=context_fn,
                preserve_rng_state=False,
                early_stop=False,
            )
            return result
        return self._layers(stream, context, cache)

    def _layers(
        self, stream: Tensor, context: SequenceContext, cache: Cache | None
    ) -> tuple[Tensor, dict[str, Record]]:
        """Attention, then the feed-forward layer, each added to the stream."""
        records = {}
        with self.precision.context():
            x_BLD = self.attention_norm(self.attention_residual.read(stream))
            attended = self.attention(x_BLD, context, cache)
            if isinstance(attended, tuple):
                attended, records["attention"] = attended
            stream = self.attention_residual.write(stream, attended)
            x_BLD = self.ffn_norm(self.ffn_residual.read(stream))
            y_BLD, record = self.ffn(x_BLD, context)
            if record is not None:
                records["ffn"] = record
            return self.ffn_residual.write(stream, y_BLD), records

    def costs(self) -> Costs:
        """The costs of one token, norms included."""
        norms = self.attention_norm.dim + self.ffn_norm.dim
        residuals = self.attention_residual.costs() + self.ffn_residual.costs()
        return self.attention.costs() + self.ffn.costs() + Costs(active=norms) + residuals
