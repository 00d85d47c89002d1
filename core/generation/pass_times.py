"""Measures what a pass with drafts costs beside a plain one.

Drafts pay where a pass brings more tokens than it costs in plain passes:

    speed-up   = tokens per pass x plain / (verify + draft)
    break-even = (verify + draft) / plain - 1 accepted drafts per pass

Both kinds of pass are timed in turns in one process, on the same texts, so that a busy machine slows both alike.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from core.generation.options import GenerationOptions
from core.generation.writer import Prompt, Writer
from core.model.language_model import LanguageModel

ROUNDS = 9
"""Pairs of passes that are timed."""


@dataclass(frozen=True)
class PassTimes:
    """Medians of the seconds that passes over all rows take, choosing tokens included.

    Args:
        plain: one new token of each row.
        verify: the last token and all drafts of each row.
        draft: making the drafts.
        rounds: how many pairs of passes were timed.
    """

    plain: float
    verify: float
    draft: float
    rounds: int

    @property
    def break_even(self) -> float:
        """Accepted drafts per pass from which on drafting is faster than plain decoding."""
        return (self.verify + self.draft) / self.plain - 1

    def speed_up(self, tokens_per_pass: float) -> float:
        """How many times faster than plain decoding a row gets its tokens."""
        return tokens_per_pass * self.plain / (self.verify + self.draft)


def measure_passes(
    model: LanguageModel, texts: Sequence[Sequence[int]], options: GenerationOptions
) -> PassTimes | None:
    """Times passes that continue texts, plain ones and ones with drafts in turns.

    Args:
        model: the model in evaluation mode, on the device where it runs.
        texts: the rows that were decoded together, as token ids; their ends are cut off where the model could read no
            more after them.
        options: options with drafts.

    Returns:
        The medians; None where the model reads too few tokens for two passes.
    """
    rounds = min(ROUNDS, (model.max_length - 1) // (2 * (options.drafts + 1)) - 1)
    if rounds < 1:
        return None
    limit = (rounds + 1) * (options.drafts + 1) + 1
    prompts = []
    for number, text in enumerate(texts):
        prompts.append(Prompt(text[: model.max_length + 1 - limit], limit, number))
    plain = Writer(model, prompts, replace(options, drafts=0))
    drafting = Writer(model, prompts, options)
    for writer in (plain, drafting):
        writer.advance()  # the prompts
        writer.advance()  # what happens in a first pass only
    plain_seconds = []
    verify_seconds = []
    draft_seconds = []
    for _ in range(rounds):
        plain_seconds.append(_seconds(plain))
        before = drafting.draft_seconds
        whole = _seconds(drafting)
        draft = drafting.draft_seconds - before
        draft_seconds.append(draft)
        verify_seconds.append(whole - draft)
    return PassTimes(median(plain_seconds), median(verify_seconds), median(draft_seconds), rounds)


def _seconds(writer: Writer) -> float:
    begin = time.perf_counter()
    writer.advance()
    return time.perf_counter() - begin
