"""Byte-level byte-pair encoding, trained on the run's own training documents.

Text is first cut into pieces that look like words; merges happen only inside a piece. The cut is the one of
GPT-4's tokenizer, on which DeepSeek's is modelled: a word keeps one leading space *or* one leading sign,
digits form groups of three at most, and runs of line ends stay together. Compared with GPT-2's cut it packs
1.4 % more bytes into a token on the default corpus (sotu) at 4096 entries, 1.6 % at 8192.

The alphabet is the 256 bytes, so every UTF-8 text can be encoded, nothing is normalised, and
`decode(encode(text)) == text`. Entry 0 is the end marker `<|endoftext|>`. It is never made from text, even from a
text that spells it out, so id 0 in a stream is always a document boundary.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from core.contracts.errors import UserError
from core.storage.documents import DocumentError, read_text

END = 0
"""The id of the end marker."""

END_TEXT = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and the end marker."""

LARGEST = 1 << 22
"""Most entries of a vocabulary that is trained: the library allocates memory for all of them before it begins."""

VERSION = tokenizers.__version__
"""The library's version: it is part of the cache's key, because merges may differ between versions."""

LONGEST_PIECE = 1000
"""Most characters of a piece in training, which cuts longer ones: its time grows with the square of their length."""

_RUNS = [
    re.compile(r"(?:[^\W\d_]|[^\w\s\x00-\x7f])*"),
    re.compile(r"(?:[^\w\s]|[_\x1c-\x1f])*"),
    re.compile(r"\s*"),
]
"""Runs of letters, of signs and of space: a long piece contains a long one of these.

The library may know letters that are newer than this Python, which takes them for signs; four controls are space in
Python alone.
"""

_SAFE = re.compile(r"[A-Za-z](?= [A-Za-z])|\n(?=[A-Za-z])")
"""Where a text may be cut between two pieces: a word ends before a space, and line ends end before a letter."""

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English endings after an apostrophe
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with one leading space or sign
    r"|\p{N}{1,3}"  # up to three digits
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, with the line ends after them
    r"|\s*[\r\n]+"  # line ends, with the space before them
    r"|\s+(?!\S)|\s+"  # other space; the last one belongs to the next word
)


class Tokenizer:
    """Converts text to ids and back.

    Args:
        engine: the tokenizer of the `tokenizers` library.
        text: the `tokenizer.json` that it was read from; None: it is written anew.
        begin: the token before every document.
        end: the token that ends a document; where it is another than `begin`, it is written after every document.
        source: the file that it was read from, beside which a chat template may be; None: it was trained here.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        *,
        text: str | None = None,
        begin: int = END,
        end: int = END,
        source: Path | None = None,
    ) -> None:
        self._text = text
        self.source = source
        self.begin = begin
        self.end = end
        # other programs' files declare only some of their markers as special; space is the one kind of added entry
        # that stands for itself
        added = engine.get_added_tokens_decoder()
        self.added = frozenset(added)
        names = [one.content for one in added.values() if not one.content.isspace()]
        engine.add_special_tokens(names)
        engine.encode_special_tokens = True  # a marker spelt out in a text is encoded as text
        self._engine = engine

    def with_markers(self, begin: int, end: int) -> "Tokenizer":
        """The same tokenizer with other tokens before and after a document."""
        same = copy(self)
        same.begin = begin
        same.end = end
        return same

    @property
    def ending(self) -> int | None:
        """The token after every document; None: the one before the next document ends it."""
        return None if self.begin == self.end else self.end

    def record(self) -> dict[str, Any]:
        """What a run's provenance says of a tokenizer from a file: the markers' ids and the file's checksum."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return {"begin": self.begin, "end": self.end, "sha256": digest}

    def identity(self) -> list[object]:
        """What makes the ids of a text: the `tokenizer.json`, and the markers around documents."""
        return [self.to_json(), self.begin, self.end]

    @property
    def size(self) -> int:
        """The number of entries of the vocabulary, the end marker included."""
        return int(self._engine.get_vocab_size())

    @property
    def last(self) -> int:
        """The largest id; other programs' tokenizers may leave some out."""
        return max(self._engine.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any marker: what looks like one is text."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which markers are spelt out, such as a prompt that a chat template has written."""
        self._engine.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._engine.encode_special_tokens = True

    def spans_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode_marked`, and where in the text each token begins and ends, in characters."""
        self._engine.encode_special_tokens = False
        try:
            encoding = self._engine.encode(text, add_special_tokens=False)
        finally:
            self._engine.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def id_of(self, entry: str) -> int | None:
        """The id of an entry by its text, markers included; None: there is none."""
        found: int | None = self._engine.token_to_id(entry)
        return found

    def text_of(self, token: int) -> str | None:
        """The entry of an id as the file writes it; None: there is none."""
        found: str | None = self._engine.id_to_token(token)
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, encoded on all cores."""
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def cut(self, text: str, length: int) -> Iterator[str]:
        """Yields a text in pieces of about `length` characters, which have the same ids one by one as together.

        A piece ends at a line end or before a space, with a letter after it, where the cut of `pre_tokenizer` has a
        boundary whatever else is around it. A text without such places stays whole, and so does every text of another
        program's tokenizer.
        """
        if len(text) <= length or not self.cuts_at_spaces:
            yield text
            return
        begin = 0
        while begin < len(text):
            place = _SAFE.search(text, begin + length)
            end = place.end() if place else len(text)
            yield text[begin:end]
            begin = end

    @cached_property
    def cuts_at_spaces(self) -> bool:
        """Whether a new piece begins at every space that follows a character which is no white space.

        It is known of the cut of `pre_tokenizer`, where nothing is normalised: each alternative of its pattern has
        white space at its beginning, or is nothing else, except line ends; and none looks at what is before a piece.
        """
        content = json.loads(self.to_json())
        ours = tokenizers.Tokenizer(models.BPE())
        ours.pre_tokenizer = pre_tokenizer()
        expected = json.loads(ours.to_str())["pre_tokenizer"]
        # an entry of spaces alone is found in a text before it is cut
        spaces = [token for token in content["added_tokens"] if token["content"].isspace()]
        as_ours = content["pre_tokenizer"] == expected and content["normalizer"] is None
        return as_ours and not spaces

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; markers are spelt out, bytes that are not UTF-8 become U+FFFD."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`, which Hugging Face's libraries read too."""
        if self._text is None:
            self._text = str(self._engine.to_str(pretty=True))
        return self._text

    def marked_json(self) -> str:
        """The same for other programs, which then begin a text with the end marker by default, as in training.

        `encode` itself adds no marker, whatever a file says.
        """
        engine = tokenizers.Tokenizer.from_str(self.to_json())
        engine.post_processor = processors.TemplateProcessing(
            single=f"{END_TEXT} $A",
            pair=f"{END_TEXT} $A {END_TEXT}:1 $B:1",
            special_tokens=[(END_TEXT, END)],
        )
        return str(engine.to_str(pretty=True))

    def entries(self) -> tuple[dict[str, int], list[list[str]], dict[int, str]]:
        """The vocabulary, the merges and the added tokens, which decide the text of each id.

        Other programs save the same tokenizer with other settings around these.
        """
        content = json.loads(self.to_json())
        model = content["model"]
        added = {token["id"]: token["content"] for token in content["added_tokens"]}
        return self._engine.get_vocab(with_added_tokens=False), model.get("merges", []), added

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json`."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def parse(cls, content: str) -> "Tokenizer":
        """The tokenizer of the contents of a `tokenizer.json` that this program wrote."""
        return cls(tokenizers.Tokenizer.from_str(content), text=content)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Raises:
            UserError: there is none, or it cannot be read as one.
        """
        try:
            text = read_text(path)
            return cls(tokenizers.Tokenizer.from_str(text), text=text, source=path)
        except DocumentError as cause:
            raise UserError(f"{path} cannot be read as a tokenizer: {cause.why}") from cause
        except Exception as cause:  # the library raises a bare `Exception` for any broken file
            raise UserError(f"{path} cannot be read as a tokenizer: {cause}") from cause


SAMPLE = 128 << 20
"""Bytes of text on which a tokenizer is trained at most, as long as documents are no larger."""


def sample_every(size: int) -> int:
    """n, where a tokenizer is trained on every n-th of the training documents, which have so many bytes; 1: on all."""
    return -(-size // SAMPLE) or 1


def has_long_piece(text: str) -> bool:
    """Whether a text may hold a piece of more than `LONGEST_PIECE` characters, which training cuts."""
    for middle in range(0, len(text), LONGEST_PIECE):  # one of these places is in every long run
        before = text[max(0, middle - LONGEST_PIECE) : middle][::-1]
        after = text[middle : middle + LONGEST_PIECE]
        for run in _RUNS:
            if _length(run, before) + _length(run, after) >= LONGEST_PIECE:
                return True
    return False


def _length(run: re.Pattern[str], text: str) -> int:
    """The length of the run that a text begins with."""
    match = run.match(text)
    return match.end() if match else 0


def pre_tokenizer(*, bounded: bool = False) -> pre_tokenizers.PreTokenizer:
    """Cuts a text into pieces of bytes; `bounded` also cuts those of more than `LONGEST_PIECE` characters."""
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    ]
    if bounded:
        bound = Regex(rf"[\s\S]{{1,{LONGEST_PIECE}}}")
        steps.append(pre_tokenizers.Split(bound, behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def train(texts: Iterable[str], vocab: int, *, bounded: bool | None = None) -> Tokenizer:
    """Learns a vocabulary of exactly `vocab` entries; the same texts give the same bytes of JSON.

    A piece of more than `LONGEST_PIECE` characters is cut for training; encoding takes it whole. Texts without such
    pieces give the same vocabulary as if there were no bound.

    Args:
        texts: the texts, which are read once, a few at a time, if `bounded` is given.
        vocab: entries of the vocabulary, the end marker included.
        bounded: whether some text may hold a longer piece; None: the texts are searched, in memory.

    Raises:
        UserError: `vocab` is below 257, or the texts run out of pairs to merge before `vocab` is reached.
    """
    if vocab < SMALLEST:
        least = f"it must be at least {SMALLEST} (256 bytes, {END_TEXT})"
        raise UserError(f"data.tokenizer.vocab = {vocab} is too small: {least}")
    if vocab > LARGEST:
        most = f"a tokenizer with at most {LARGEST} entries is trained"
        raise UserError(f"data.tokenizer.vocab = {vocab} is too large: {most}")
    engine = tokenizers.Tokenizer(models.BPE())
    if bounded is None:
        texts = list(texts)
        bounded = any(map(has_long_piece, texts))
    engine.pre_tokenizer = pre_tokenizer(bounded=bounded)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    engine.pre_tokenizer = pre_tokenizer()
    tokenizer = Tokenizer(engine)
    if tokenizer.size != vocab:
        most = f"at most {tokenizer.size} entries"
        raise UserError(
            f"data.tokenizer.vocab = {vocab} is more than the training text can fill: {most}"
        )
    return tokenizer
