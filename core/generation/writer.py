"""Continues the prompts of some rows: in each pass of the model one token of each row, or several that were drafted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.generation.decoder import Decoder
from core.generation.drafting import Drafter
from core.generation.options import GenerationOptions
from core.generation.sampling import Draws, check_logits, draw, probabilities
from core.generation.speculation import Verified, verify, verify_greedy
from core.model.language_model import LanguageModel


@dataclass(frozen=True)
class Prompt:
    """What one row begins with.

    Args:
        tokens: at least one token id.
        limit: most tokens that are written after it, at least 1; the last one is not read by the model.
        number: its number among all prompts, which addresses its draws.
    """

    tokens: Sequence[int]
    limit: int
    number: int = 0


@dataclass
class Row:
    """The text of one row so far.

    Args:
        prompt: what it begins with.

    Attributes:
        written: the tokens after the prompt.
        open: whether it still grows.
        drafted: how many drafts were verified, by place in a pass, from the first.
        accepted: how many of these were accepted, by place; all drafts before such a one are accepted too.
    """

    prompt: Prompt
    written: list[int] = field(default_factory=list)
    open: bool = True
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The position of the next token in the text."""
        return len(self.prompt.tokens) + len(self.written)

    @property
    def remaining(self) -> int:
        """How many more tokens may be written."""
        return self.prompt.limit - len(self.written)

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Counts the drafts of a pass, and how many of the first ones were accepted."""
        missing = max(drafted - len(self.drafted), 0)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted


class Writer:
    """Continues prompts side by side, a pass of the model for all rows at a time.

    A row ends after `limit` tokens, or when `finish` is called for it; then it is computed but counts nowhere, as
    padding.

    Args:
        model: the model in evaluation mode.
        prompts: one for each row.
        options: how tokens are chosen, and how many are drafted; its `tokens`, `stop` and `batch` are not used here.
        device: where the model computes; None: where its weights are.
        agreed: maps each chosen token to the one that is taken; ranks that decode together, without drafts, agree on
            one by it.

    Attributes:
        draft_seconds: time spent on making drafts so far.

    Raises:
        UserError: drafts are wanted from a model that cannot draft.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        *,
        device: torch.device | None = None,
        agreed: Callable[[int], int] = int,
    ) -> None:
        self.rows = [Row(prompt) for prompt in prompts]
        self.options = options
        self.agreed = agreed
        self.draft_seconds = 0.0
        longest = max(len(prompt.tokens) + prompt.limit for prompt in prompts)
        capacity = longest + options.drafts  # the columns of finished rows included
        self.decoder = Decoder(model, len(prompts), capacity, device)
        self.device = self.decoder.device
        self.drafter: Drafter | None = None
        if options.drafts:
            self.drafter = Drafter(model, options.drafts, len(prompts), capacity, device)
            if not (self.decoder.truncates and self.drafter.truncates):
                raise UserError("an attention of this model cannot forget drafts that are rejected")
        self._draws = Draws(options.seed, [prompt.number for prompt in prompts], self.device)
        # The tokens of each row that the drafter has not read yet, and the model's states before them.
        self._unread: list[list[int]] = []
        self._states_BLD: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a row still grows."""
        return any(row.open for row in self.rows)

    def finish(self, row: int) -> None:
        """Ends a row."""
        self.rows[row].open = False

    def advance(self) -> list[list[int]]:
        """Runs the next pass; returns the new tokens of each row, none for finished ones.

        Raises:
            NotFiniteError: the model's logits are not finite, so that no token is more likely than another.
        """
        if not self.decoder.lengths[0]:
            new = self._prefill()
        else:
            most = max(self._draft_counts(), default=0)
            new = self._speculate(most) if most else self._step()
        for row, tokens in zip(self.rows, new, strict=True):
            row.written += tokens
            row.open = row.open and row.remaining > 0
        return new

    def _prefill(self) -> list[list[int]]:
        """Reads all prompts, and writes a token of each row."""
        prompts = [row.prompt.tokens for row in self.rows]
        decoded = self.decoder.prefill(prompts)
        tokens = self._choose(decoded.logits_BLV[:, 0])
        new = [[token] for token in tokens]
        if self.drafter is not None:
            self._states_BLD = self.drafter.states_in(decoded)
            self._unread = [
                [*row.prompt.tokens[1:], *one] for row, one in zip(self.rows, new, strict=True)
            ]
        return new

    def _step(self) -> list[list[int]]:
        """Reads the last token of each row, and writes the next one."""
        counts = None
        if self.decoder.truncates and not all(row.open for row in self.rows):
            counts = [int(row.open) for row in self.rows]
        decoded = self.decoder.step(self._last_tokens(), counts)
        tokens = self._choose(decoded.logits_BLV[:, 0])
        new = [[token] if row.open else [] for row, token in zip(self.rows, tokens, strict=True)]
        if self.drafter is not None:
            self._states_BLD = self.drafter.states_in(decoded)  # no row will draft again
            self._unread = [[] for _ in self.rows]
        return new

    def _speculate(self, most: int) -> list[list[int]]:
        """Drafts tokens, verifies them in one pass, and writes those that are accepted and one more."""
        assert self.drafter is not None
        assert self._states_BLD is not None
        begin = time.perf_counter()
        self.drafter.follow(self._states_BLD, *self._unread_tokens())
        positions_BM = self._positions()[:, None] + torch.arange(most + 1, device=self.device)
        q: list[Tensor] = []

        def choose(logits_BV: Tensor, number: int) -> Tensor:
            check_logits(logits_BV)
            if self.options.greedy:
                return logits_BV.argmax(dim=-1)
            q.append(probabilities(logits_BV, self.options))
            return draw(q[-1], self._draws("draft", positions_BM[:, number]))

        drafts_BN = self.drafter.draft(most, choose)
        self.draft_seconds += time.perf_counter() - begin
        drafted = self._draft_counts()
        counts = [count + row.open for row, count in zip(self.rows, drafted, strict=True)]
        before = list(self.decoder.lengths)
        decoded = self.decoder.step(torch.cat([self._last_tokens(), drafts_BN], dim=1), counts)
        check_logits(decoded.logits_BLV)
        drafted_B = torch.tensor(drafted, device=self.device)
        verified = self._verify(drafts_BN, drafted_B, decoded.logits_BLV, q, positions_BM)
        return self._take(verified, drafts_BN, drafted, before, self.drafter.states_in(decoded))

    def _verify(
        self,
        drafts_BN: Tensor,
        drafted_B: Tensor,
        logits_BMV: Tensor,
        q: list[Tensor],
        positions_BM: Tensor,
    ) -> Verified:
        """Accepts drafts as the model's logits say."""
        if self.options.greedy:
            return verify_greedy(drafts_BN, drafted_B, logits_BMV.argmax(dim=-1))
        return verify(
            drafts_BN,
            drafted_B,
            probabilities(logits_BMV, self.options),
            torch.stack(q, dim=1),
            self._draws("accept", positions_BM[:, :-1]),
            self._draws("token", positions_BM),
        )

    def _take(
        self,
        verified: Verified,
        drafts_BN: Tensor,
        drafted: list[int],
        before: list[int],
        states_BLD: Tensor,
    ) -> list[list[int]]:
        """Keeps the accepted drafts and the token after them, and forgets the rest."""
        columns = [verified.accepted_B[:, None], verified.next_B[:, None], drafts_BN]
        new: list[list[int]] = []
        for row, count, (accepted, after, *drafts) in zip(
            self.rows, drafted, torch.cat(columns, dim=1).tolist(), strict=True
        ):
            row.count_drafts(count, accepted)
            new.append([*drafts[:accepted], after] if row.open else [])
        self.decoder.truncate(
            [length + len(tokens) for length, tokens in zip(before, new, strict=True)]
        )
        self._states_BLD = states_BLD
        self._unread = new
        return new

    def _choose(self, logits_BV: Tensor) -> list[int]:
        """The next token of each row."""
        check_logits(logits_BV)
        if self.options.greedy:
            tokens_B = logits_BV.argmax(dim=-1)
        else:
            p_BV = probabilities(logits_BV, self.options)
            tokens_B = draw(p_BV, self._draws("token", self._positions()))
        return [self.agreed(token) for token in tokens_B.tolist()]

    def _draft_counts(self) -> list[int]:
        """How many drafts each row can use: with the token after them, at most as many as may still be written."""
        most = self.options.drafts
        return [min(most, row.remaining - 1) if row.open else 0 for row in self.rows]

    def _positions(self) -> Tensor:
        """The position of the next token of each row: int64 B."""
        return torch.tensor([row.position for row in self.rows], device=self.device)

    def _last_tokens(self) -> Tensor:
        """The last token of each row, B x 1."""
        return torch.tensor([[row.written[-1]] for row in self.rows], device=self.device)

    def _unread_tokens(self) -> tuple[Tensor, list[int]]:
        """The tokens that the drafter has not read yet, padded on the right, and how many each row has."""
        unread = [
            tokens if row.open else [] for row, tokens in zip(self.rows, self._unread, strict=True)
        ]
        assert self._states_BLD is not None
        width = self._states_BLD.shape[1]
        padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in unread]
        return torch.tensor(padded, device=self.device), [len(tokens) for tokens in unread]
