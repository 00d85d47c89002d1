"""One transformer block: pre-norm attention and feed-forward around a residual stream (report, figure 2)."""

from torch import Tensor, nn

from core.contracts.attention import Attention, Cache
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.ffn import FeedForward
from core.contracts.record import Record
from core.contracts.schema import Section
from core.model.norm import RMSNorm


class Block(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x)). Pure: what it saw is returned as a record.

    Args:
        attention, ffn: validated sections of the two slots.
        build: the model around the block.
    """

    def __init__(self, attention: Section, ffn: Section, build: BuildContext) -> None:
        super().__init__()
        self.precision = build.precision
        self.attention_norm = RMSNorm(build.dim, build)
        self.attention: Attention = build.make(attention)
        self.ffn_norm = RMSNorm(build.dim, build)
        self.ffn: FeedForward = build.make(ffn)

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> tuple[Tensor, Record | None]:
        """The block's output and what its feed-forward layer saw."""
        with self.precision.context():
            x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), context, cache)
            y_BLD, record = self.ffn(self.ffn_norm(x_BLD), context)
            return x_BLD + y_BLD, record

    def costs(self) -> Costs:
        """For one token, norms included."""
        norms = self.attention_norm.dim + self.ffn_norm.dim
        return self.attention.costs() + self.ffn.costs() + Costs(active=norms)
