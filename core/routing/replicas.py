"""Physical experts at inference: a choice of a logical expert goes to one of its copies.

Which one is a hash of the token's sequence, its position and the expert. So it does not depend on how a batch is
split, on ranks, or on whether a token is read with its prompt or decoded, and copies share the tokens of their expert
evenly, up to chance: of n tokens and c copies each gets n / c, with the standard deviation of a binomial count.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Routing
from core.numerics.draw import address
from core.routing.chance import hashed, token_places

_FIRST = address(0, "replicas")


class Replicas(nn.Module):
    """Maps logical experts to physical ones. P physical experts, E logical ones, at most X copies of one.

    It has no state of its own: its tables move with the layer, and are in no state dict.

    Args:
        expert_P: the logical expert of each physical one; every logical expert has one or more.
        experts: E.
    """

    copies_E: Tensor
    physical_EX: Tensor

    def __init__(self, expert_P: Sequence[int], experts: int) -> None:
        super().__init__()
        rows: list[list[int]] = [[] for _ in range(experts)]
        for physical, expert in enumerate(expert_P):
            rows[expert].append(physical)
        most = max(map(len, rows))
        table = [[*row, *[-1] * (most - len(row))] for row in rows]
        self.physical = len(expert_P)
        self.register_buffer("copies_E", torch.tensor(list(map(len, rows))), persistent=False)
        self.register_buffer("physical_EX", torch.tensor(table), persistent=False)

    def of_routing(self, routing: Routing, context: SequenceContext) -> Routing:
        """The same assignments, to physical experts; scores and logits remain those of logical experts."""
        sequence_T, position_T = token_places(context)
        physical_A = self.choose(
            routing.expert_A,
            sequence_T.index_select(0, routing.token_A),
            position_T.index_select(0, routing.token_A),
        )
        return replace(routing, expert_A=physical_A)

    def of_choices(self, expert_TK: Tensor, context: SequenceContext) -> Tensor:
        """The physical experts of each token's choices: int64 T x K."""
        sequence_T, position_T = token_places(context)
        physical_TK: Tensor = self.choose(expert_TK, sequence_T[:, None], position_T[:, None])
        return physical_TK

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def choose(self, expert: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        """The physical expert for each logical one.

        It is never compiled: compiled integer products, which overflow here on purpose, were other numbers on a CPU.

        Args:
            expert: int64, logical experts.
            sequence, position: int64, the token's sequence and its position; they broadcast with `expert`.
        """
        number = hashed(_FIRST, sequence, position, expert) & (2**63 - 1)
        copies = self.copies_E[expert]
        physical: Tensor = self.physical_EX[expert, number % copies]
        return physical


def refuse_training(name: str) -> None:
    """Raises `UserError`: copies of an expert would be trained apart.

    Args:
        name: what has them, as the beginning of a sentence.
    """
    raise UserError(
        f"{name} has redundant experts, which are for inference: load the run again without a placement to train it"
    )
