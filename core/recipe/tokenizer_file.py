"""What a recipe has to know of a tokenizer's file: how many entries, and which of them begin and end a document.

The file is a `tokenizer.json`, or a `.tiktoken` file: a line for each entry, with its bytes in base 64 and its number.
Files beside it, as Hugging Face's folders have them, say which entries are markers. Nothing here encodes text.
"""

import base64
import binascii
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from core.contracts.errors import ConfigError, UserError
from core.recipe.recipe_layers import COMMAND_LINE, Layers
from core.recipe.values import show_value
from core.storage.documents import DocumentError, parse_object, read_bytes, read_object, read_text

SECTION = "data.tokenizer"

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
BESIDE = (TOKENIZER_CONFIG, CHAT_TEMPLATE)
"""Files beside a tokenizer's that a run keeps with it."""

TIKTOKEN_FILES = ("tiktoken.model", "qwen.tiktoken", "vocab.tiktoken")
"""The names of tiktoken files in folders, for an error message about a folder without a `tokenizer.json`."""

BEGINS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")  # noqa: RUF001
ENDS = (
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
)
"""Markers by their names, for files without a `tokenizer_config.json`."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer's file and the ones beside it.

    Args:
        file: a `tokenizer.json` or a tiktoken file.
        pattern: the regular expression that cuts text for a tiktoken file; None: a `tokenizer.json`.
        content: the `tokenizer.json`; empty for a tiktoken file.
        ranks: the entries of a tiktoken file, by their bytes; empty for a `tokenizer.json`.
        config: the `tokenizer_config.json` beside it; empty where there is none.
        generation: ids of markers from `generation_config.json` and `config.json` there.
        text: the bytes of the file.
    """

    file: Path
    pattern: str | None
    content: Mapping[str, Any]
    ranks: Mapping[bytes, int]
    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    text: bytes = b""

    @classmethod
    def read(cls, path: Path, pattern: str | None = None) -> "TokenizerFile":
        """Reads a file, or that of a folder: a Hugging Face folder or a run.

        Raises:
            ConfigError: there is none, or it is of another kind; the key is `file` or `pattern`.
        """
        file = _file_in(path)
        if not file.is_file():
            raise ConfigError("file", "there is no such file")
        try:
            return cls._read(file, pattern)
        except DocumentError as cause:
            raise ConfigError("file", str(cause)) from cause

    @classmethod
    def _read(cls, file: Path, pattern: str | None) -> "TokenizerFile":
        text = read_bytes(file)
        content: Mapping[str, Any] = {}
        ranks: Mapping[bytes, int] = {}
        if file.suffix == ".json":
            if pattern is not None:
                raise ConfigError("pattern", f"must be null, as {file.name} holds its own")
            content = parse_object(text, file)
            if not isinstance(content.get("model"), dict):
                why = f"{file} is no tokenizer: it has no section `model`; {KINDS}"
                raise ConfigError("file", why)
        else:
            ranks = _ranks(text, file)
            if pattern is None:
                why = "must be the regular expression that cuts text, as a tiktoken file has none"
                raise ConfigError("pattern", why)
        beside = companions(file)
        config_file = beside / TOKENIZER_CONFIG
        config = read_object(config_file) if config_file.is_file() else {}
        generation: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            if (beside / name).is_file():
                generation |= read_object(beside / name)
        return cls(file, pattern, content, ranks, config, generation, text)

    def added(self) -> dict[str, int]:
        """The ids of the entries that are added to the model's own, markers among them, by their text."""
        if self.content:
            listed = self.content.get("added_tokens") or []
            if not isinstance(listed, list):
                return {}
            found = [one for one in listed if isinstance(one, dict)]
        else:
            listed = self.config.get("added_tokens_decoder") or {}
            if not isinstance(listed, dict):
                return {}
            found = []
            for number, one in listed.items():
                if isinstance(one, dict) and str(number).isdecimal():
                    found.append({**one, "id": int(number)})
        return {
            one["content"]: one["id"]
            for one in found
            if isinstance(one.get("content"), str) and type(one.get("id")) is int
        }

    def specials(self, begin: str | None = None, end: str | None = None) -> dict[str, int]:
        """The added entries; markers that a tiktoken file lacks get the ids after its last."""
        found = dict(self.added())
        if not self.content:
            for marker in (begin, end):
                if marker is not None and marker not in found:
                    last = max([*self.ranks.values(), *found.values()], default=-1)
                    found[marker] = last + 1
        return found

    def ids(self, begin: str | None = None, end: str | None = None) -> dict[str, int]:
        """The ids of a tokenizer.json's whole vocabulary, or of a tiktoken file's markers, by their text."""
        found = dict(self.specials(begin, end))
        model = self.content.get("model", {})
        vocab = model.get("vocab", {})
        if isinstance(vocab, dict):
            # a damaged file may hold anything as an id, and the library says so when it reads it
            numbered = {text: number for text, number in vocab.items() if type(number) is int}
            found = {**numbered, **found}
        elif isinstance(vocab, list):  # a unigram model: an entry's place is its id
            pieces = [one[0] for one in vocab if isinstance(one, list) and one]
            found = {**{str(piece): number for number, piece in enumerate(pieces)}, **found}
        return found

    def size(self, begin: str | None = None, end: str | None = None) -> int:
        """The number after the largest id."""
        ids = self.ids(begin, end).values()
        numbers = [number for number in ids if type(number) is int]
        return max([*self.ranks.values(), *numbers], default=-1) + 1

    def markers(self, begin: str | None, end: str | None) -> tuple[str, str]:
        """The texts of the entries that begin and end a document, those that are given or else the file's own.

        Raises:
            ConfigError: none is known, or a given one is no entry.
        """
        ids = self.ids(begin, end)
        for key, given in (("begin", begin), ("end", end)):
            if given is not None and given not in ids:
                close = get_close_matches(given, list(self.added()), n=2)
                guess = f"; did you mean {' or '.join(close)}?" if close else ""
                why = f"must be an entry of {self.file}{guess}"
                raise ConfigError(key, why)
        first = begin or self._own("bos", BEGINS, ids)
        last = end or self._own("eos", ENDS, ids)
        if last is None and first is None and len(self.added()) == 1:
            (last,) = self.added()
        last = last or first
        if last is None:
            why = f"must name the entry that ends a document, which is not known from {self.file}"
            raise ConfigError("end", why)
        return first or last, last

    def _own(self, name: str, known: tuple[str, ...], ids: Mapping[str, int]) -> str | None:
        """The marker that the files name, in their order of precedence; None: none does."""
        value = text_of_marker(self.config.get(f"{name}_token"))
        if isinstance(value, str) and value in ids:
            return value
        number = self.generation.get(f"{name}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if type(number) is int:
            texts = {of: text for text, of in ids.items()}
            if number in texts:
                return texts[number]
        if self.config:
            return None  # the file says of its markers that this one is not among them
        added = self.added()
        return next((marker for marker in known if marker in added), None)


def files_beside(path: Path) -> tuple[dict[str, Any], str | None]:
    """What Hugging Face's libraries read beside a tokenizer's file: its settings, and its chat template.

    Args:
        path: the file, or the folder that holds it.

    Returns:
        The content of `tokenizer_config.json`, empty where there is none, and the template from `chat_template.jinja`
        or from those settings; None: none is known.
    """
    folder = companions(_file_in(path))
    config_file = folder / TOKENIZER_CONFIG
    config = read_object(config_file) if config_file.is_file() else {}
    template_file = folder / CHAT_TEMPLATE
    if template_file.is_file():
        return config, read_text(template_file)
    return config, template_in(config)


def text_of_marker(value: Any) -> Any:
    """The text of a marker in `tokenizer_config.json`, which may be a section with a key `content`."""
    return value.get("content") if isinstance(value, dict) else value


def template_in(config: Mapping[str, Any]) -> str | None:
    """The chat template of a `tokenizer_config.json`; of several, the one called default."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


KINDS = "it must be a tokenizer.json, a folder that holds one, a run, or a tiktoken file"


def companions(file: Path) -> Path:
    """The folder of the files beside a tokenizer's; a converted run keeps its source's in `hf`."""
    inner = file.parent / "hf"
    is_converted = (file.parent / "weights").is_dir() and (inner / TOKENIZER).is_file()
    if file.name == TOKENIZER and is_converted:
        return inner
    return file.parent


def _file_in(path: Path) -> Path:
    """The tokenizer's file that a path names; raises `ConfigError` for a folder without one."""
    if not path.is_dir():
        return path
    file = path / TOKENIZER
    if file.is_file():
        return file
    found = [name for name in TIKTOKEN_FILES if (path / name).is_file()]
    if found:
        how = f"name {path / found[0]} itself, and its pattern"
        raise ConfigError("file", f"this folder holds no {TOKENIZER}; {how}")
    if (path / "tokenizer.model").is_file():
        how = "transformers writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
        raise ConfigError("file", f"this folder holds tokenizer.model and no {TOKENIZER}; {how}")
    raise ConfigError("file", f"this folder holds no {TOKENIZER}; {KINDS}")


def _ranks(text: bytes, file: Path) -> dict[bytes, int]:
    """The entries of a tiktoken file.

    Raises:
        ConfigError: it is none.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as cause:
            raise ConfigError(
                "file", f"line {number} of {file} is none of tiktoken; {KINDS}"
            ) from cause
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        why = f"{file} has no entry for the byte {missing[0]}, which a tiktoken file must have; {KINDS}"
        raise ConfigError("file", why)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError("file", f"{file} must number its entries from 0 without gaps")
    return ranks


def padded(size: int, multiple: int) -> int:
    """The smallest multiple that is not below a size."""
    return -(-size // multiple) * multiple


def with_tokenizer_file(values: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The values of a recipe with what its tokenizer's file says in the section `data.tokenizer`.

    The path becomes a whole one. `vocab`, `begin` and `end` are read from the file where they are not given: then the
    resolved recipe holds them, and is read without the file. A layer that sets `file` replaces what earlier ones set
    beside it.

    Raises:
        UserError: the file is missing, of another kind, or does not fit the other keys.
    """
    data = values.get("data")
    section = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(section, dict) or "file" not in section:
        return values
    at = f"{SECTION}.file"
    kept = {
        key: value
        for key, value in section.items()
        if key == "file" or not layers.is_before(f"{SECTION}.{key}", at)
    }
    if kept["file"] is None:
        # keys that only a file's section has are null then, unless this layer sets them
        kept |= {key: section[key] for key in ("vocab",) if key in section and key not in kept}
    elif not isinstance(kept["file"], str):
        kept.setdefault("vocab", 1)  # the schema reports the file, not that this is missing
    else:
        origin = layers.origin(at)
        kept["file"] = str(_located(kept["file"], origin))
        try:
            kept |= _read_from(kept)
        except ConfigError as error:
            raise _at_key(error, kept, layers.origin) from error
    assert isinstance(data, dict)
    return {**values, "data": {**data, "tokenizer": kept}}


def _at_key(
    error: ConfigError, section: Mapping[str, Any], origin: Callable[[str], str]
) -> UserError:
    where = f"{SECTION}.{error.key}"
    value = section.get(error.key)
    return UserError(f"{origin(where)}: {where} = {show_value(value)}: {error.why}")


def _located(name: str, origin: str) -> Path:
    """The whole path of a file that is named relative to the recipe that names it."""
    folder = Path.cwd()
    if not origin.startswith(COMMAND_LINE):
        folder = Path(origin.removesuffix(" (smoke)")).parent
    return Path(os.path.abspath(folder / Path(name).expanduser()))


def _read_from(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the file gives."""
    begin = section.get("begin")
    end = section.get("end")
    vocab = section.get("vocab")
    if None not in (begin, end, vocab):
        return {}
    multiple = section.get("pad_to_multiple_of", 1)
    for key in ("begin", "end", "pattern"):
        if not isinstance(section.get(key), str | None):
            what = (
                "a regular expression" if key == "pattern" else "the text of an entry of the file"
            )
            raise ConfigError(key, f"must be {what}")
    if type(multiple) is not int or multiple < 1:
        return {"vocab": vocab or 1}  # the schema reports what is wrong
    found = TokenizerFile.read(Path(section["file"]), section.get("pattern"))
    first, last = found.markers(begin, end)
    size = found.size(first, last)
    if vocab is None:
        vocab = padded(size, multiple)
    elif type(vocab) is int and 0 < vocab < size:
        why = f"must be at least {size}, which {found.file} has; leave it out to take as many"
        raise ConfigError("vocab", why)
    return {"begin": first, "end": last, "vocab": vocab}
