"""Our model as lm-evaluation-harness asks for one (`lm_eval.api.model`).

Every text that is scored or continued begins with a marker, as every document did in training, and as the exported
tokenizer has it for the harness's own `hf` model. A marker that a text spells out is text.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from core.contracts.errors import UserError
from core.data.tokenizer import Tokenizer
from core.harness.markers import Markers
from core.harness.scoring import Request, Score, score
from core.harness.writing import write
from core.model.language_model import LanguageModel
from core.model.sampling import sample

NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; the harness's own models take the same."""

WRITES = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
"""Settings of generation that this model has, after the harness has brought their synonyms to one name."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped to us
    """Answers the harness's requests with a trained model.

    Args:
        model: in evaluation mode, on the device where it is to run.
        tokenizer: the run's.
        markers: the run's.
        batch_size: sequences in a forward.
        say: told what nobody who reads the results may overlook.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        markers: Markers,
        *,
        batch_size: int,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.model, self.batch_size, self.say = model, batch_size, say
        self._tokenizer, self._markers = tokenizer, markers
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The marker that ends what is written."""
        return self._markers.end

    @property
    def prefix_token_id(self) -> int:
        """The marker that begins a text."""
        return self._markers.begin

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.model.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, after the marker unless that is declined."""
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats for each (context, continuation), and whether it is the greedy one.

        Where the two are cut follows the harness: spaces that end the context count to the continuation, and the tokens
        of the continuation are those of the whole text past as many as the context alone has. If that leaves none (the
        continuation went into the context's last token), it is encoded by itself.

        Raises:
            UserError: a continuation that is longer than the model's longest input.
        """
        pairs = [self._pair(*request.args) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats for each (text,): every token of it is predicted exactly once.

        A text that is longer than the model's longest input is read in windows, each of which begins where the one
        before it ended; the last one takes as much context as fits.
        """
        windows: list[Any] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            own = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(("", ""), *make_disjoint_window(window)) for window in own]
            counts.append(len(windows))
        values = [value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        return [sum(values[start:stop], 0.0) for start, stop in zip([0, *counts], counts, strict=False)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each (context, settings), cut before the first of the settings' stop strings.

        Greedy unless the settings ask for samples, which are drawn one by one from a seed that is the number of the
        request. Contexts are cut from the left to leave room for the answer.

        Raises:
            UserError: settings that this model has not, or no room for an answer.
        """
        answers: dict[int, str] = {}
        alike: dict[tuple[int, int, tuple[str, ...]], list[tuple[int, list[int]]]] = defaultdict(list)
        with self._bar("Writing answers", len(requests), disable_tqdm) as bar:
            for number, request in enumerate(requests):
                context, settings = request.args
                settings = self._settings(settings)
                prompt = self.tok_encode(context)[-(self.max_length - settings["max_gen_toks"]) :]
                stops = tuple(stop for stop in settings["until"] if stop)
                if settings["do_sample"] and settings["temperature"] > 0:
                    answers[number] = self._sampled(number, prompt, stops, settings)
                    bar.update(1)
                else:
                    alike[len(prompt), settings["max_gen_toks"], stops].append((number, prompt))
            for (_, tokens, stops), asked in sorted(alike.items(), reverse=True):
                for batch in _batches(asked, self.batch_size):
                    written = write(
                        self.model,
                        [prompt for _, prompt in batch],
                        tokens=tokens,
                        ended=lambda ids, stops=stops: ids[-1] == self.eot_token_id or self._stopped(ids, stops),  # type: ignore[misc]
                    )
                    for (number, _), ids in zip(batch, written, strict=True):
                        answers[number] = self._answer(ids, stops)
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _pair(self, context: str, continuation: str) -> tuple[tuple[str, str], list[int], list[int]]:
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            return (context, continuation), [self.prefix_token_id], ids
        before, after = self._encode_pair(context, continuation)
        return (context, continuation), before, after or self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """The same for (texts, ids of the context, ids of the continuation); contexts lose what does not fit."""
        asked, cut = [], 0
        for (_, continuation), before, after in requests:
            if len(after) > self.max_length:
                raise UserError(
                    f"an answer of {len(after)} tokens ({continuation[:40]!r} ...) is longer than what the model "
                    f"reads: model.rope.max_length = {self.max_length}"
                )
            ids = [*before, *after]
            cut += len(ids) > self.max_length + 1
            asked.append(Request(tuple(ids[-(self.max_length + 1) :]), len(after)))
        if cut:
            self.say(
                f"note: {cut} of {len(asked)} texts lost their beginning: the model reads {self.max_length} tokens"
            )
        with self._bar("Scoring answers", len(asked), disable_tqdm) as bar:
            scores: list[Score] = score(self.model, asked, batch_size=self.batch_size, done=bar.update)
        return [(found.log_likelihood, found.greedy) for found in scores]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        settings = dict(normalize_gen_kwargs(given, NEW_TOKENS))
        unknown = sorted(set(settings) - WRITES)
        if unknown:
            raise UserError(
                f"generation settings {', '.join(unknown)}: not of this model, which has {', '.join(WRITES)}"
            )
        if not 0 < settings["max_gen_toks"] < self.max_length:
            raise UserError(
                f"max_gen_toks = {settings['max_gen_toks']} leaves no room for a question: "
                f"the model reads and writes model.rope.max_length = {self.max_length} tokens in all"
            )
        return settings

    def _sampled(self, number: int, prompt: list[int], stops: tuple[str, ...], settings: dict[str, Any]) -> str:
        drawn = sample(
            self.model,
            prompt,
            tokens=settings["max_gen_toks"],
            temperature=settings["temperature"],
            top_p=settings.get("top_p", 1.0),
            seed=number,
            stop=self.eot_token_id,
        )
        ids: list[int] = []
        for token in drawn:
            ids.append(token)
            if self._stopped(ids, stops):
                break
        return self._answer(ids, stops)

    def _stopped(self, ids: list[int], stops: tuple[str, ...]) -> bool:
        text = self._tokenizer.decode(ids)
        return any(stop in text for stop in stops)

    def _answer(self, ids: list[int], stops: tuple[str, ...]) -> str:
        text = self._tokenizer.decode(ids[:-1] if ids and ids[-1] == self.eot_token_id else ids)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def _bar(self, what: str, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disable or not total)


def _batches(items: Sequence[Any], size: int) -> Any:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
