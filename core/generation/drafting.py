"""Drafts tokens with a loss head of the model: the state before the last token, then one draft from another.

A column is a token of the text with the state before it. Module 1 of the head reads, in the column of the token at
position p, the main model's state at p - 1; module k reads there the state of module k - 1 in the column before. So
module k has columns from position k on, and its cache holds `tokens - k` of a text whose last token is certain:

    position              1          2          3          4 (last token)
    main model's state    h_0        h_1        h_2        h_3
    module 1              g_1        g_2        g_3        g_4    -> draft 1
    module 2                         f_2 (g_1)  f_3 (g_2)  f_4 (g_3)
                                                           then draft 1 in module 2, from g_4  -> draft 2

Drafts are appended to the same caches, and forgotten before the tokens that were accepted are read, because the states
before these are known only after the model's pass.

A state is B x L x D, or the residual stream B x L x ... x D for a head that reads streams.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.contracts.attention import Cache
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.loss_head import Draft, LossHead, SharedModules
from core.generation.graphs import on_device
from core.model.language_model import Decoded, LanguageModel

ChooseDraft = Callable[[Tensor, int], Tensor]
"""Chooses a draft for each row from logits B x V; the number is how many drafts came before it."""


def drafting_head(model: LanguageModel) -> LossHead:
    """The first loss head of a model that drafts.

    Raises:
        UserError: there is none, or it reads states that decoding does not keep.
    """
    names = []
    for name, head in model.loss_heads():
        names.append(name)
        if not head.drafts:
            continue
        if head.reads_blocks:
            raise UserError(
                f"model.heads.{name} drafts from states of single blocks, which decoding does not keep"
            )
        return head
    raise UserError(
        f"none of the model's loss heads drafts ({', '.join(names)}): train with a head such as mtp"
    )


class Drafter:
    """The drafting head of a model, with its caches for some rows.

    Args:
        model: the model in evaluation mode.
        drafts: most drafts in a pass.
        rows: texts that are decoded together, B.
        capacity: tokens of each row that the caches can hold, drafts and padding included.
        device: where the model computes; None: where its weights are.

    Attributes:
        lengths: the number of tokens of each row that are certain, the first one included, which is in no column.
    """

    def __init__(
        self,
        model: LanguageModel,
        drafts: int,
        rows: int,
        capacity: int,
        device: torch.device | None = None,
    ) -> None:
        self.head = drafting_head(model)
        self.device = device or model.embedding.weight.device
        self.modules = min(self.head.draft_depths, drafts)
        self.embed = model.embedding
        self.output = model.output
        self.last_position = model.max_length - 1
        self.caches: list[list[Cache]] = []
        for depth in range(1, self.modules + 1):
            self.caches.append(self.head.new_draft_caches(rows, capacity, self.device, depth))
        self.lengths = [1] * rows
        self._last_states: list[Tensor] = []
        self._first_logits_BV: Tensor | None = None

    @property
    def truncates(self) -> bool:
        """Whether drafts can be forgotten."""
        return all(cache.truncates for caches in self.caches for cache in caches)

    def states_in(self, decoded: Decoded) -> Tensor:
        """The main model's states that the head reads, among what a pass of the model returned."""
        if not self.head.reads_streams:
            return decoded.hidden_BLD
        assert decoded.stream is not None
        return decoded.stream

    @torch.no_grad()
    def follow(self, states_BLD: Tensor, tokens_BL: Tensor, counts: Sequence[int]) -> None:
        """Reads tokens that are certain, in place of all drafts.

        Args:
            states_BLD: the main model's state before each token.
            tokens_BL: the tokens after those that were certain so far.
            counts: how many of these each row has, from the left; 0 for finished rows.
        """
        starts = self.lengths
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if not self._last_states:
            self._last_states = [torch.zeros_like(states_BLD[:, 0])] * self.modules
        last_B = self._last_columns(counts)
        row_B = torch.arange(len(last_B), device=self.device)
        before_BLD = states_BLD
        for depth in range(1, self.modules + 1):
            after_BLD = self._follow(depth, before_BLD, tokens_BL, counts)
            self._forget(depth, ends)
            # The next module reads, in each column, this module's state in the column before.
            before_first_B1D = self._last_states[depth - 1][:, None]
            before_BLD = torch.cat([before_first_B1D, after_BLD[:, :-1]], dim=1)
            self._last_states[depth - 1] = after_BLD[row_B, last_B]
        self.lengths = ends

    def _follow(
        self, depth: int, states_BLD: Tensor, tokens_BL: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Runs one module on tokens that are certain, in place of drafts; returns its states B x L x D.

        A module has no state from which it could read the first columns of a text; its states there have no meaning.
        """
        self._forget(depth, self.lengths)
        skipped = [max(depth - length, 0) for length in self.lengths]
        own = [max(count - skip, 0) for count, skip in zip(counts, skipped, strict=True)]
        width = max(own)
        if width == 0:
            return torch.zeros_like(states_BLD)
        length = tokens_BL.shape[1]
        begins = [start + skip for start, skip in zip(self.lengths, skipped, strict=True)]
        place_BW = self._places(skipped, width, length)
        wanted_B = self._last_columns(own) if depth == 1 else None
        draft = self._run(
            depth,
            _at(states_BLD, place_BW),
            tokens_BL.gather(1, place_BW),
            begins,
            own,
            wanted_B,
        )
        if depth == 1:
            self._first_logits_BV = draft.logits_BLV[:, 0]
        back_BL = self._places([-skip for skip in skipped], length, width)
        return _at(draft.state_BLD, back_BL)

    @torch.no_grad()
    def draft(self, drafts: int, choose: ChooseDraft) -> Tensor:
        """Drafts tokens after those that are certain: int64 B x drafts.

        Args:
            drafts: how many, at least 1.
            choose: takes a token from logits.
        """
        assert self._first_logits_BV is not None, "`follow` comes first"
        chosen = [choose(self._first_logits_BV, 0)]
        states = list(self._last_states)
        for number in range(1, drafts):
            logits_BV = self._read_draft(chosen[-1], number, states)
            chosen.append(choose(logits_BV, number))
        return torch.stack(chosen, dim=1)

    def _read_draft(self, tokens_B: Tensor, number: int, states: list[Tensor]) -> Tensor:
        """Reads a draft, and returns the logits B x V of the next one.

        Module `number` + 1, or the last one, gives the logits. The deeper modules read the draft too, because their
        later columns see this one.

        Args:
            tokens_B: the draft of each row.
            number: how many drafts there are with it.
            states: each module's state in the column before; they are replaced by those in the draft's column.
        """
        first = min(number + 1, self.modules)
        before = list(states)
        positions = [length + number - 1 for length in self.lengths]
        only_column_B = torch.zeros_like(tokens_B)
        logits_BV = torch.empty(0)
        for depth in range(first, self.modules + 1):
            state_BD = before[depth - 2]
            if number >= self.modules:
                state_BD = before[depth - 1]  # the last module goes on from its own state
            wanted_B = only_column_B if depth == first else None
            draft = self._run(
                depth, state_BD[:, None], tokens_B[:, None], positions, None, wanted_B
            )
            states[depth - 1] = draft.state_BLD[:, 0]
            if depth == first:
                logits_BV = draft.logits_BLV[:, 0]
            if min(positions) < depth:  # a text too short for this module has no column here
                self._forget(depth, [position + 1 for position in positions])
        return logits_BV

    def _run(
        self,
        depth: int,
        states_BLD: Tensor,
        tokens_BL: Tensor,
        begins: Sequence[int],
        counts: Sequence[int] | None,
        logits_at_B: Tensor | None,
    ) -> Draft:
        """Runs one module.

        Args:
            depth: the module.
            states_BLD: the state before each token.
            tokens_BL: the tokens.
            begins: the position of each row's first token.
            counts: how many tokens of each row are no padding; None: all.
            logits_at_B: the one column of each row whose logits are wanted; None: of none.
        """
        place_L = torch.arange(tokens_BL.shape[1], device=self.device)
        begin_B1 = torch.tensor(begins, device=self.device)[:, None]
        positions_BL = (begin_B1 + place_L).clamp(max=self.last_position)
        valid_BL = None
        if counts is not None and min(counts) < tokens_BL.shape[1]:
            valid_BL = place_L < torch.tensor(counts, device=self.device)[:, None]
        context = SequenceContext(tokens_BL, positions_BL, valid_BL=valid_BL)

        def logits(hidden_BLD: Tensor) -> Tensor:
            chosen_BLD = hidden_BLD[:, :0]
            if logits_at_B is not None:
                chosen_BLD = _at(hidden_BLD, logits_at_B[:, None])
            result: Tensor = self.output(chosen_BLD)
            return result

        shared = SharedModules(self.embed, logits)
        with on_device(self.device), torch.compiler.set_stance("force_eager"):
            return self.head.draft(states_BLD, context, shared, self.caches[depth - 1], depth)

    def _forget(self, depth: int, lengths: Sequence[int]) -> None:
        """Leaves the columns of a module that belong to texts of some lengths."""
        kept = torch.tensor([max(length - depth, 0) for length in lengths])
        for cache in self.caches[depth - 1]:
            cache.truncate(kept)

    def _last_columns(self, counts: Sequence[int]) -> Tensor:
        """The last column of each row, B; 0 for a row without any."""
        return torch.tensor([max(count, 1) - 1 for count in counts], device=self.device)

    def _places(self, offsets: Sequence[int], width: int, columns: int) -> Tensor:
        """The columns offset, offset + 1, ... of each row, B x width, bounded to those that there are."""
        offset_B1 = torch.tensor(offsets, device=self.device)[:, None]
        place_BW = offset_B1 + torch.arange(width, device=self.device)
        return place_BW.clamp(min=0, max=columns - 1)


def _at(states_BLD: Tensor, place_BW: Tensor) -> Tensor:
    """The states of some columns of each row: B x W x D."""
    row_B1 = torch.arange(len(states_BLD), device=states_BLD.device)[:, None]
    return states_BLD[row_B1, place_BW]
