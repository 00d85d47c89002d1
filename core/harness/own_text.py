"""Scores a user's own text: bits per byte and perplexity, as the harness's rolling log-likelihood defines them.

lm-evaluation-harness itself is not needed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.contracts.errors import NotFiniteError, UserError
from core.data.tokenizer import Tokenizer
from core.generation.markers import Markers
from core.harness.scoring import Request, score
from core.model.language_model import LanguageModel
from core.storage.documents import read_text


@dataclass(frozen=True)
class TextScore:
    """A model's score of a text.

    Args:
        bytes: size of the text in UTF-8; None for token ids.
        tokens: number of predicted tokens, which is all of the text's.
        context: longest input in tokens.
        loss: mean of -log p over the tokens, in nats.
        perplexity: exp of the loss.
        bits_per_byte: sum of -log2 p over the bytes of the text; None for token ids.
    """

    bytes: int | None
    tokens: int
    context: int
    loss: float
    perplexity: float
    bits_per_byte: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for a JSON document."""
        return asdict(self)


def read_own_text(file: Path) -> str | list[int]:
    """Reads a file of UTF-8 text, without its byte order mark, or the token ids in a .npy file.

    Raises:
        UserError: it cannot be read, is not UTF-8 or no list of whole numbers from 0, or is empty.
    """
    if file.suffix == ".npy":
        return _read_ids(file)
    try:
        text = read_text(file).removeprefix("\ufeff")
    except UserError as cause:
        raise UserError(f"--text {cause}") from cause
    if not text:
        raise UserError(f"--text {file}: holds no text")
    return text


def _read_ids(file: Path) -> list[int]:
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as cause:
        why = getattr(cause, "strerror", None) or cause
        raise UserError(f"--text {file}: cannot be read as token ids: {why}") from cause
    is_list = isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu"
    if not is_list or not len(ids) or int(ids.min()) < 0:
        raise UserError(f"--text {file}: must hold one axis of whole numbers from 0, the token ids")
    return [int(token) for token in ids]


def score_text(
    model: LanguageModel,
    markers: Markers,
    text: str | Sequence[int],
    tokenizer: Tokenizer | None,
    *,
    context: int,
    batch_size: int = 16,
    done: Callable[[int], object] = lambda _: None,
) -> TextScore:
    """Scores a text, of which every token is predicted exactly once.

    A text of more than `context` tokens is cut into pieces of that many, which are read apart. The first begins with
    the marker that begins a text, each other one with the last token of the piece before it. The last piece is
    shorter and takes as much of the text before it as fits.

    Args:
        model: the model in evaluation mode, on the device where it is to run.
        markers: the tokens that begin and end a text.
        text: the text, or its token ids; not empty.
        tokenizer: the tokenizer of the run; token ids need none.
        context: longest input in tokens, at most the model's own.
        batch_size: pieces in a forward; it changes the score by rounding only.
        done: called with the number of pieces that were scored since its last call.

    Raises:
        UserError: the text needs a token that the model does not have.
        NotFiniteError: the score is NaN or infinite.
    """
    size = None
    if isinstance(text, str):
        assert tokenizer is not None
        ids: Sequence[int] = tokenizer.encode(text)
        size = len(text.encode("utf-8"))
    else:
        ids = text
    vocabulary = model.embedding.weight.shape[0]
    if max(ids) >= vocabulary:
        raise UserError(
            f"the text needs token {max(ids)}, and the model knows {vocabulary}, from 0"
        )
    requests = list(pieces(ids, markers.begin, context))
    scores = score(model, requests, batch_size=batch_size, done=done)
    nats = -math.fsum(found.log_likelihood for found in scores)
    if not math.isfinite(nats):
        raise NotFiniteError(f"the loss of the text is {nats}: the model has no score")
    loss = nats / len(ids)
    return TextScore(
        bytes=size,
        tokens=len(ids),
        context=context,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=None if size is None else nats / math.log(2) / size,
    )


def pieces(ids: Sequence[int], begin: int, context: int) -> Iterator[Request]:
    """Yields the pieces of a text, each as the tokens that are read and those that are scored.

    Args:
        ids: the text.
        begin: the marker before it.
        context: longest input.
    """
    marked = [begin, *ids]
    for start in range(0, len(ids), context):
        end = min(start + context, len(ids))
        first = max(0, end - context)
        yield Request(tuple(marked[first : end + 1]), scored=end - start)
