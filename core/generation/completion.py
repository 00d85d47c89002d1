"""Continues prompts: `complete`, and what it returns."""

import operator
import reprlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import torch

from core.contracts.errors import UserError
from core.generation.options import GenerationOptions
from core.generation.run_tokenizer import RunTokenizer
from core.generation.text_stream import TextStream
from core.generation.writer import Prompt, Row, Writer
from core.model.language_model import LanguageModel

OnText = Callable[[int, str], None]
"""Called with the number of a prompt and the next piece of its text."""


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Args:
        prompt: the prompt's token ids, with the marker if it was given as text.
        tokens: the token ids that were written, without the token that ended the text; those of a stop string are
            there, and what was written after it in the same token.
        text: their text up to the stop string; None without a tokenizer.
        ended: why the text ended: at the `end` token, at a `stop` string, or at its greatest `length`.
        drafted: how many drafts were verified, by place in a pass; empty without drafts.
        accepted: how many of these were accepted, by place.
    """

    prompt: list[int]
    tokens: list[int]
    text: str | None
    ended: Literal["end", "stop", "length"]
    drafted: list[int]
    accepted: list[int]


@dataclass
class Speed:
    """How long the passes of a call took.

    Args:
        prompt_tokens: tokens of all prompts, padding not counted.
        prefill_seconds: time until the first token of each batch was known.
        tokens: tokens that were written after the first one of each row.
        decode_seconds: time for these.
        passes: passes of the model for these, of a whole batch each.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    passes: int = 0


def sum_by_place(counts: Sequence[Sequence[int]]) -> list[int]:
    """The sums of counts at each place, over lists that may be of different lengths."""
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]


@dataclass
class Completions:
    """The completions of all prompts, in their order: a sequence of them, with the numbers of the whole call.

    Args:
        items: one for each prompt.
        speed: how long they took.
    """

    items: list[Completion] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)

    def __getitem__(self, index: int) -> Completion:
        return self.items[index]

    def __iter__(self) -> Iterator[Completion]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def drafted(self) -> list[int]:
        """The number of verified drafts, by place in a pass, over all rows."""
        return sum_by_place([item.drafted for item in self.items])

    @property
    def accepted(self) -> list[int]:
        """The number of drafts that were accepted, by place in a pass, over all rows."""
        return sum_by_place([item.accepted for item in self.items])

    @property
    def tokens_per_pass(self) -> float | None:
        """The mean number of tokens that a row gets from a pass with drafts; None without drafts."""
        if not self.drafted:
            return None
        return 1 + sum(self.accepted) / self.drafted[0]


@torch.no_grad()
def complete(
    model: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: RunTokenizer | None = None,
    tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    end: int | None = None,
    batch: int = GenerationOptions.batch,
    drafts: int = 0,
    on_text: OnText | None = None,
) -> Completions:
    """Continues prompts with a trained model, several side by side.

    The text of a prompt does not depend on the others, up to the rounding of the model's products, unless a router
    chooses over whole batches. With drafts the text is the same at temperature 0, and has the same distribution
    otherwise.

    Args:
        model: the model in evaluation mode, on the device where it is to run.
        prompts: texts, which need a tokenizer and begin with its marker, or token ids, which are taken as they are.
        tokenizer: the tokenizer of the run, from `load_tokenizer`; None: completions have no text.
        tokens: most tokens of each text; None: 128, or as many as the model reads after the prompt.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: draw from this many most likely tokens only; None: from all.
        top_p: draw from the smallest set of most likely tokens whose probabilities add up to this.
        seed: seed of the draws; prompt number i of any call with this seed has the same draws.
        stop: strings that end a text, which ends before them; they need a tokenizer.
        end: the token that ends a text; None: the tokenizer's, or none without a tokenizer.
        batch: rows that are decoded together.
        drafts: tokens that the model's drafting head proposes for each pass (speculative decoding); 0: none.
        on_text: called with the number of a prompt and each piece of its text as it comes; needs a tokenizer.

    Raises:
        UserError: a setting or prompt that cannot be used.
        NotFiniteError: the model's logits are not finite.
    """
    if isinstance(stop, str):
        raise UserError(f"stop = {stop!r}: must be a list of strings")
    options = GenerationOptions(
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop),
        batch=batch,
        drafts=drafts,
    )
    options.check()
    if model.training:
        raise UserError("the model is in training mode: call model.eval() first")
    if tokenizer is None and (stop or on_text):
        raise UserError("stop strings and pieces of text need a tokenizer")
    if tokenizer is not None and end is None:
        end = tokenizer.end
    rows = []
    for number, ids in enumerate(prompt_ids(prompts, tokenizer, len(model.embedding.weight))):
        where = f"prompt {number} of {len(ids)} tokens"
        rows.append(Prompt(ids, options.limit(len(ids), model.max_length, where), number))
    return Completer(model, options, tokenizer, end, on_text).complete(rows)


def prompt_ids(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: RunTokenizer | None,
    vocabulary: int,
) -> list[list[int]]:
    """The token ids of prompts.

    Raises:
        UserError: one text instead of a list, texts without a tokenizer, a prompt without tokens, or a token that is
            no integer or not in the vocabulary.
    """
    if isinstance(prompts, str):
        raise UserError("prompts: must be a list of texts, or of lists of token ids")
    found = []
    given: Sequence[str | Sequence[int]] = prompts
    for number, prompt in enumerate(given):
        if not isinstance(prompt, str):
            ids = _integers(prompt, number)
        elif tokenizer is None:
            raise UserError(f"prompt {number} is text: give the tokenizer of the run too")
        else:
            ids = tokenizer.prompt(prompt)
        if not ids:
            why = "give at least the token that begins a text"
            raise UserError(f"prompt {number} has no token: {why}")
        for token in ids:
            if not 0 <= token < vocabulary:
                why = f"which is not in a vocabulary of {vocabulary}"
                raise UserError(f"prompt {number} has the token {token}, {why}")
        found.append(ids)
    return found


def _integers(prompt: Sequence[int], number: int) -> list[int]:
    """The token ids of one prompt: a sequence, an array or a tensor of integers."""
    why = f"prompt {number} must be a text or a list of token ids, not {reprlib.repr(prompt)}"
    if isinstance(prompt, bytes | bytearray):
        raise UserError(why)
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as cause:
        raise UserError(why) from cause


class _Text:
    """The text of a row, and why it has ended.

    Args:
        row: the row.
        end: the token that ends a text.
        tokenizer: the tokenizer; None: there is no text.
        stops: stop strings.
        say: called with each piece of text.
    """

    def __init__(
        self,
        row: Row,
        end: int | None,
        tokenizer: RunTokenizer | None,
        stops: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self.row = row
        self.end = end
        self.say = say
        self.tokens: list[int] = []
        self.ended: Literal["end", "stop", "length"] | None = None
        self.stream: TextStream | None = None
        if tokenizer is not None:
            self.stream = TextStream(tokenizer.decode, stops)

    def add(self, tokens: Sequence[int]) -> None:
        """Takes the tokens of a pass, up to the one that ends the text."""
        for token in tokens:
            if token == self.end:
                self.ended = "end"
                return
            self.tokens.append(token)
            if self.stream is not None:
                self._say(self.stream.add(token))
                if self.stream.stopped:
                    self.ended = "stop"
                    return

    def completion(self) -> Completion:
        """The completion, at the end of the text."""
        text = None
        if self.stream is not None:
            self._say(self.stream.finish())
            text = self.stream.text
            if self.stream.stopped:
                self.ended = "stop"
        return Completion(
            list(self.row.prompt.tokens),
            self.tokens,
            text,
            self.ended or "length",
            self.row.drafted,
            self.row.accepted,
        )

    def _say(self, piece: str) -> None:
        if piece:
            self.say(piece)


class Completer:
    """Continues prompts, a batch at a time.

    Args:
        model: the model in evaluation mode, on the device where it is to run.
        options: checked options.
        tokenizer: the tokenizer; None: completions have no text.
        end: the token that ends a text; None: there is none.
        on_text: called with the number of a prompt and each piece of its text.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: GenerationOptions,
        tokenizer: RunTokenizer | None,
        end: int | None,
        on_text: OnText | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.tokenizer = tokenizer
        self.end = end
        self.on_text = on_text

    def complete(self, prompts: Sequence[Prompt]) -> Completions:
        """The completions of prompts, in their order."""
        found: dict[int, Completion] = {}
        speed = Speed()
        for batch in self._batches(prompts):
            completions = self._batch([prompts[index] for index in batch], speed)
            found.update(zip(batch, completions, strict=True))
        return Completions([found[index] for index in range(len(prompts))], speed)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """The prompts of each batch: in order, but together only with equals where a cache cannot be truncated."""
        if self.options.batch == 1:
            yield from ([index] for index in range(len(prompts)))
            return
        groups: dict[tuple[int, int], list[int]] = {}
        truncates = all(cache.truncates for cache in self.model.new_caches(1, 1))
        for index, prompt in enumerate(prompts):
            key = (0, 0) if truncates else (len(prompt.tokens), prompt.limit)
            groups.setdefault(key, []).append(index)
        for indices in groups.values():
            for begin in range(0, len(indices), self.options.batch):
                yield indices[begin : begin + self.options.batch]

    def _batch(self, prompts: Sequence[Prompt], speed: Speed) -> list[Completion]:
        """The completions of one batch."""
        writer = Writer(self.model, prompts, self.options)
        texts = [self._text(row) for row in writer.rows]
        begin = time.perf_counter()
        self._pass(writer, texts)
        first = time.perf_counter()
        before = sum(len(text.tokens) for text in texts)
        while writer.is_open:
            self._pass(writer, texts)
            speed.passes += 1
        speed.prompt_tokens += sum(len(prompt.tokens) for prompt in prompts)
        speed.prefill_seconds += first - begin
        speed.tokens += sum(len(text.tokens) for text in texts) - before
        speed.decode_seconds += time.perf_counter() - first
        return [text.completion() for text in texts]

    def _pass(self, writer: Writer, texts: Sequence[_Text]) -> None:
        for number, tokens in enumerate(writer.advance()):
            texts[number].add(tokens)
            if texts[number].ended is not None:
                writer.finish(number)

    def _text(self, row: Row) -> _Text:
        def say(piece: str) -> None:
            if self.on_text is not None:
                self.on_text(row.prompt.number, piece)

        return _Text(row, self.end, self.tokenizer, self.options.stop, say)
