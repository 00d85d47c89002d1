"""Our model with the interface of models in lm-evaluation-harness (`lm_eval.api.model`).

Every text that is scored or continued begins with a marker, as every document did in training, and as the exported
tokenizer has it for the harness's own `hf` model. A marker that a text spells out is text.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from core.contracts.errors import NotFiniteError, UserError
from core.data.conversations import ChatTokenizer
from core.generation.completion import Completer
from core.generation.options import GenerationOptions
from core.generation.run_tokenizer import RunTokenizer
from core.generation.writer import Prompt
from core.harness.scoring import Request, Score, score
from core.model.language_model import LanguageModel

NEW_TOKENS = 256
"""Longest answer if a task does not limit it; the harness's own models have the same default."""

WRITES = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
"""Supported settings of generation, by the names that the harness gives to synonyms."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped to us
    """Answers the harness's requests with a trained model.

    Args:
        model: the model in evaluation mode, on the device where it is to run.
        tokenizer: the tokenizer of the run, with its markers.
        batch_size: sequences in a forward.
        chat: the chat template, if questions are asked with it; texts then begin as it says, and markers in them count.
        say: called with each message that a reader of the results should know.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: RunTokenizer,
        *,
        batch_size: int,
        chat: ChatTokenizer | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.model = model
        self.batch_size = batch_size
        self.say = say
        self._tokenizer = tokenizer
        self._chat = chat
        self._end = tokenizer.end if chat is None else chat.turn_end()
        self._markers = tokenizer.markers
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The marker that ends a text that the model writes: in a conversation, its turn."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The marker that begins a text."""
        return self._markers.begin

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.model.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, after the marker unless `add_special_tokens` is False or a template wrote it."""
        if self._chat is not None:
            return self._tokenizer.tokenizer.encode_marked(string)
        ids = self._tokenizer.tokenizer.encode(string)
        if add_special_tokens is False:
            return ids
        return [self.prefix_token_id, *ids]

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps what it has rendered: that of the template."""
        assert self._chat is not None
        return self._chat.template.where

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template, for the harness's records."""
        return None if self._chat is None else self._chat.template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as one text, up to where the assistant answers or goes on with its last turn.

        Raises:
            UserError: the template does not take it.
        """
        assert self._chat is not None
        template = self._chat.template
        if add_generation_prompt:
            return template.render(chat_history, answer=True, clock=True)
        text = template.render(chat_history, clock=True)
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns log p(continuation | context) in nats for each pair, and whether greedy decoding would write it.

        The text is divided as the harness divides it: spaces that end the context belong to the continuation, and the
        tokens of the continuation are those of the whole text after as many as the context alone has. If none are left
        (the continuation was merged into the context's last token), the continuation is encoded by itself.

        Raises:
            UserError: a continuation is longer than the model's longest input.
        """
        pairs = [self._pair(*request.args) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log p(text) in nats for each (text,); every token of a text is predicted exactly once.

        A text that is longer than the model's longest input is read in windows, each of which begins where the one
        before it ended; the last one takes as much context as fits.
        """
        windows: list[Any] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            before = len(windows)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
            counts.append(len(windows) - before)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        values = iter([value for value, _ in scores])
        return [sum(islice(values, count), 0.0) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the model's answer to each (context, settings), cut before the first stop string of the settings.

        Decoding is greedy unless the settings say `do_sample`. Draws are addressed by the number of the request.
        Contexts are cut from the left so that context and answer fit into the longest input.

        Raises:
            UserError: the settings are unknown, or leave no tokens for context or answer.
        """
        answers: dict[int, str] = {}
        groups: dict[GenerationOptions, list[Prompt]] = defaultdict(list)
        with self._bar("Writing answers", len(requests), disable_tqdm) as bar:
            for number, request in enumerate(requests):
                context, given = request.args
                options = self._options(self._settings(given))
                assert options.tokens is not None
                prompt = self.tok_encode(context)[-(self.max_length - options.tokens) :]
                groups[options].append(Prompt(prompt, options.tokens, number))
            for options, group in groups.items():
                completer = Completer(self.model, options, self._tokenizer, self.eot_token_id)
                group.sort(key=lambda prompt: len(prompt.tokens), reverse=True)
                for batch in _batches(group, self.batch_size):
                    for one, found in zip(batch, completer.complete(batch), strict=True):
                        assert found.text is not None
                        answers[one.number] = found.text
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _options(self, settings: dict[str, Any]) -> GenerationOptions:
        """Returns the settings of a request as options of generation."""
        temperature = settings["temperature"] if settings["do_sample"] else 0.0
        return GenerationOptions(
            tokens=settings["max_gen_toks"],
            temperature=temperature,
            top_p=settings.get("top_p", 1.0),
            stop=tuple(filter(None, settings["until"])),
            batch=self.batch_size,
        )

    def _pair(
        self, context: str, continuation: str
    ) -> tuple[tuple[str, str], list[int], list[int]]:
        """Returns the texts, the ids of the context, and the ids of the continuation."""
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            return (context, continuation), [self.prefix_token_id], ids
        before, after = self._encode_pair(context, continuation)
        if not after:
            after = self.tok_encode(continuation, add_special_tokens=False)
        return (context, continuation), before, after

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores (texts, ids of the context, ids of the continuation); contexts are cut from the left where needed.

        Raises:
            UserError: a continuation is longer than the model's longest input.
            NotFiniteError: a score is NaN or infinite.
        """
        shortened = []
        cut = 0
        for (_, continuation), before, after in requests:
            if len(after) > self.max_length:
                raise UserError(
                    f"an answer of {len(after)} tokens ({continuation[:40]!r} ...) is longer than the model's "
                    f"longest input: model.rope.max_length = {self.max_length}"
                )
            ids = [*before, *after]
            cut += len(ids) > self.max_length + 1
            shortened.append(Request(tuple(ids[-(self.max_length + 1) :]), len(after)))
        if cut:
            self.say(
                f"note: {cut} of {len(shortened)} texts lost their beginning: the model reads {self.max_length} tokens"
            )
        with self._bar("Scoring answers", len(shortened), disable_tqdm) as bar:
            scores: list[Score] = score(
                self.model, shortened, batch_size=self.batch_size, done=bar.update
            )
        for (texts, _, _), found in zip(requests, scores, strict=True):
            if not math.isfinite(found.log_likelihood):
                raise NotFiniteError(
                    f"the model's log-likelihood of an answer is not finite ({found.log_likelihood} "
                    f"for {texts[1][:40]!r})"
                )
        return [(found.log_likelihood, found.greedy) for found in scores]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings of a request with their defaults; raises `UserError` if they are unusable."""
        settings = dict(normalize_gen_kwargs(given, NEW_TOKENS))
        unknown = sorted(set(settings) - WRITES)
        if unknown:
            raise UserError(
                f"unknown generation settings {', '.join(unknown)}; known: {', '.join(sorted(WRITES))}"
            )
        for key in ("temperature", "top_p"):
            value = settings.get(key, 1.0)
            if not 0 <= value < math.inf:
                raise UserError(f"{key} = {value}: must be a finite number of at least 0")
        if not 0 < settings["max_gen_toks"] < self.max_length:
            raise UserError(
                f"max_gen_toks = {settings['max_gen_toks']} leaves no tokens for question or answer: "
                f"the model reads and writes model.rope.max_length = {self.max_length} tokens in all"
            )
        return settings

    def _bar(self, what: str, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disable or not total)


def _batches(items: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
