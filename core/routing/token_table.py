"""Fixed tables from token ids to experts (Hash Layers, arXiv 2106.04426), for one expert a token or several.

A table is a buffer that is saved with the weights, so a trained model needs neither the seed nor the data that made it.
"""

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Router
from core.routing.chance import uniform

UNKNOWN = -1
"""The entry of a table that was neither made nor loaded."""


class TokenTableRouter(Router):
    """A router that looks up each token's experts by the token's id.

    Its `Config` has `map`: `random`, drawn for each (seed, layer, id), or `balanced` on the training text. The buffer
    `table` is V, or V x K for several experts a token.
    """

    table: Tensor

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.config = config
        self.seed = build.seed
        self.layer = build.layer
        self.token_counts = DataCounts(build.token_counts)
        self.is_known = False
        shape: tuple[int, ...] = (build.vocabulary, self.top_k)
        if self.top_k == 1:
            shape = (build.vocabulary,)
        self.register_buffer("table", torch.full(shape, UNKNOWN, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Fills the table of this seed and layer, or the balanced one; without token counts that one stays unknown."""
        if self.config.map == "random":
            table_VK = random_table(
                self.seed, self.layer, len(self.table), self.top_k, self.experts
            )
            self.table.copy_(table_VK.view_as(self.table))
            self.is_known = True
            return
        count_V = self.token_counts()
        self.is_known = count_V is not None
        if count_V is None:
            self.table.fill_(UNKNOWN)
            return
        rows_VK = balanced_table(count_V.tolist(), self.top_k, self.experts)
        self.table.copy_(torch.tensor(rows_VK, device="cpu").view(self.table.shape))

    def looked_up(self, context: SequenceContext) -> Tensor:
        """The experts T x K of a micro-batch's tokens, int64.

        Raises:
            UserError: a balanced table was neither made from data nor loaded.
        """
        if not self.is_known:
            self._require_table()
        entry = self.table.index_select(0, context.tokens_BL.flatten())
        return entry.view(-1, self.top_k)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _require_table(self) -> None:
        """Looks whether the table has been loaded, in whichever way its numbers were written, and remembers it."""
        if bool((self.table == UNKNOWN).any()):
            why = "map = balanced is made from the training data's token counts, and this model was built without data"
            how = "use moeloom.fit, moeloom.load, or moeloom.build(..., token_counts=...)"
            raise UserError(f"{self.label or type(self).__name__}: {why}: {how}")
        self.is_known = True


class DataCounts:
    """The token counts of a run's data, for a table that is filled after its module was made.

    The data belong to the run and not to the model: a copy of the module shares them, and a pickled one has none.

    Args:
        counts: returns how often each token occurs in the training data, int64 V; None: no data is at hand.
    """

    def __init__(self, counts: Callable[[], Tensor] | None = None) -> None:
        self._counts = counts

    def __call__(self) -> Tensor | None:
        """The counts, or None without data."""
        return None if self._counts is None else self._counts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DataCounts":
        return self

    def __reduce__(self) -> tuple[type["DataCounts"], tuple[()]]:
        return DataCounts, ()


def random_table(seed: int, layer: int, vocabulary: int, top_k: int, experts: int) -> Tensor:
    """K different experts for each id, drawn without replacement for (seed, layer, id): int64 V x K.

    The k-th draw is a place among the experts that are left. The first one is the whole table of top_k = 1.
    """
    id_V = torch.arange(vocabulary, device="cpu")
    words = f"hash table:{layer}"
    chosen: list[Tensor] = []
    for draw in range(top_k):
        number_V = uniform(seed, words, id_V)
        if draw:
            number_V = uniform(seed, f"{words}:{draw}", id_V)
        expert_V = (number_V * (experts - draw)).to(torch.int64)
        if chosen:
            for earlier_V in torch.stack(chosen).sort(dim=0).values:
                expert_V = expert_V + (expert_V >= earlier_V)
        chosen.append(expert_V)
    return torch.stack(chosen, dim=1)


def balanced_table(count_V: list[int], top_k: int, experts: int) -> list[list[int]]:
    """The K experts of each id, found greedily: the most frequent id first, each to the K experts with the least text.

    Among experts with equal text the one with the fewest ids takes it, then the one with the lowest number. So ids that
    the training text does not hold are spread evenly too.
    """
    table: list[list[int]] = [[]] * len(count_V)
    heap = [(0, 0, expert) for expert in range(experts)]
    for token in sorted(range(len(count_V)), key=lambda token: (-count_V[token], token)):
        least = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in least]
        for text, ids, expert in least:
            heapq.heappush(heap, (text + count_V[token], ids + 1, expert))
    return table
