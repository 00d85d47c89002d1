"""Tokenizers from files: a `tokenizer.json` as it is, a tiktoken file converted to one."""

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from core.contracts.errors import ConfigError, UserError
from core.data.tokenizer import Tokenizer
from core.recipe.tokenizer_file import TokenizerFile


def load_tokenizer_file(
    path: Path, *, pattern: str | None = None, begin: str | None = None, end: str | None = None
) -> Tokenizer:
    """Reads the tokenizer that a recipe names.

    Args:
        path: a `tokenizer.json`, a folder that holds one, a run or a tiktoken file.
        pattern: the regular expression that cuts text, for a tiktoken file.
        begin: the entry before every document; None: the file's.
        end: the entry that ends a document; None: the file's.

    Raises:
        ConfigError: the file is missing, of another kind or broken, or has no such entry.
    """
    found = TokenizerFile.read(path, pattern)
    first, last = found.markers(begin, end)
    tokenizer = _load(found, first, last)
    ids = [tokenizer.id_of(marker) for marker in (first, last)]
    for key, marker, number in zip(("begin", "end"), (first, last), ids, strict=True):
        if number is None:
            raise ConfigError(key, f"{marker!r} is no entry of {found.file}")
    return tokenizer.with_markers(ids[0] or 0, ids[1] or 0)


def _load(found: TokenizerFile, begin: str, end: str) -> Tokenizer:
    if not found.content:
        return _of_tiktoken(found, begin, end)
    try:
        return Tokenizer.load(found.file)
    except UserError as cause:
        raise ConfigError("file", str(cause)) from cause


def _of_tiktoken(found: TokenizerFile, begin: str, end: str) -> Tokenizer:
    """The byte-level BPE with the entries of a tiktoken file.

    tiktoken joins the two neighbours whose joined entry has the smallest number, and takes a whole piece that is an
    entry at once; the library has a list of merges, so each pair that makes an entry is one, in the order of entries.
    """
    assert found.pattern is not None
    try:
        cut = Regex(found.pattern)
    except Exception as cause:  # the library raises a bare `Exception`
        raise ConfigError("pattern", f"is no regular expression: {cause}") from cause
    letters = _byte_letters()

    def written(entry: bytes) -> str:
        return "".join(letters[byte] for byte in entry)

    merges: list[tuple[str, str]] = []
    for entry in sorted(found.ranks, key=lambda one: found.ranks[one]):
        pairs = []
        for place in range(1, len(entry)):
            left = found.ranks.get(entry[:place])
            right = found.ranks.get(entry[place:])
            if left is not None and right is not None:
                pairs.append((left, right, place))
        merges += [
            (written(entry[:place]), written(entry[place:])) for _, _, place in sorted(pairs)
        ]
    vocab = {written(entry): number for entry, number in found.ranks.items()}
    specials = found.specials(begin, end)
    engine = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(cut, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    text = _with_added(str(engine.to_str(pretty=True)), specials, found.file)
    return Tokenizer(tokenizers.Tokenizer.from_str(text), text=text)


def _with_added(text: str, specials: Mapping[str, int], file: Path) -> str:
    """A `tokenizer.json` with markers, each at its own id.

    The library gives an added entry the next free id, so an id between two markers is a reserved entry.

    Raises:
        ConfigError: the id of a marker is another entry's.
    """
    content = json.loads(text)
    first = len(content["model"]["vocab"])
    by_id = {number: marker for marker, number in specials.items()}
    if len(by_id) < len(specials) or min(by_id, default=first) < first:
        why = f"the markers beside {file} must have ids of their own, from {first} on"
        raise ConfigError("file", why)
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"] = [
        {
            "id": number,
            "content": by_id.get(number, f"<|reserved_token_{number}|>"),
            **flags,
            "normalized": False,
            "special": True,
        }
        for number in range(first, max(by_id, default=first - 1) + 1)
    ]
    return json.dumps(content, indent=2, ensure_ascii=False)


def _byte_letters() -> dict[int, str]:
    """The letter of each byte in a byte-level vocabulary: its own where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
