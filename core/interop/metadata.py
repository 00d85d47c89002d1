"""Compares what the files of a Hugging Face folder say about the same thing: sizes, markers, the tokenizer."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.interop.format_lookup import read_json
from core.interop.shards import shards_of

MARKERS = ("bos", "eos", "pad")

EMBEDDING = "embed_tokens.weight"
"""How the name of the tensor with a row for each token ends."""


def disagreements(folder: Path) -> list[str]:
    """Returns one sentence for each contradiction between the files of a folder; none for a folder that is right.

    Compared are the rows of the embedding, the ids of the tokenizer, and the markers that begin, end and pad a text, in
    config.json, generation_config.json, tokenizer_config.json and tokenizer.json. The index of the weights is compared
    with the files when they are opened.

    Args:
        folder: a folder that holds at least config.json and weights.

    Raises:
        UserError: a file cannot be read.
    """
    config = read_json(folder / "config.json")
    generation = _optional(folder / "generation_config.json")
    ids = _ids(_optional(folder / "tokenizer.json"))
    settings = _optional(folder / "tokenizer_config.json")
    found = [*_about_rows(folder, config, ids), *_about_ids(config, generation)]
    for marker in MARKERS:
        found += _about_marker(marker, config, generation, settings, ids)
    return found


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The id of every token, the added ones included; empty where the file is missing or of another kind."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids.update({text: number for text, number in vocabulary.items() if type(number) is int})
    for token in tokenizer.get("added_tokens") or []:
        if isinstance(token, dict) and type(token.get("id")) is int:
            ids[str(token.get("content"))] = token["id"]
    return ids


def _about_rows(folder: Path, config: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[str]:
    """Compares the vocabulary's size with the embedding's rows and the tokenizer's ids."""
    size = config.get("vocab_size")
    for name, spec in shards_of(folder).specs.items():
        if name.endswith(EMBEDDING) and spec.shape[0] != size:
            yield f"config.json: vocab_size = {size}, and {name} has {spec.shape[0]} rows"
            break
    largest = max(ids.values(), default=-1)
    if type(size) is int and largest >= size:
        yield f"config.json: vocab_size = {size}, and tokenizer.json has the id {largest}"


def _about_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[str]:
    """Compares the markers of both configurations with the vocabulary's size."""
    size = config.get("vocab_size")
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        for marker in MARKERS:
            for number in _listed(values.get(f"{marker}_token_id")):
                if type(number) is not int or (type(size) is int and not 0 <= number < size):
                    yield f"{name}: {marker}_token_id = {number!r}, and vocab_size = {size}"


def _about_marker(
    marker: str,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    settings: Mapping[str, Any],
    ids: Mapping[str, int],
) -> Iterator[str]:
    """Compares what the files say about one marker; a generation may end at further tokens."""
    key = f"{marker}_token_id"
    own = _listed(config.get(key))
    other = _listed(generation.get(key))
    if own and other and not set(map(str, own)) & set(map(str, other)):
        yield f"config.json: {key} = {config[key]}, and generation_config.json has {generation[key]}"
    text = settings.get(f"{marker}_token")
    if isinstance(text, dict):
        text = text.get("content")
    if not isinstance(text, str) or not ids:
        return
    if text not in ids:
        yield f"tokenizer_config.json: {marker}_token = {text!r} is no token of tokenizer.json"
        return
    named = [*own, *other]
    if named and ids[text] not in named:
        where = f"is {ids[text]} in tokenizer.json, and {key} is {named[0]}"
        yield f"tokenizer_config.json: {marker}_token = {text!r} {where}"


def _listed(value: Any) -> list[Any]:
    """The ids under a key that holds one, several or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def warn_of_disagreements(folder: Path, say: Callable[[str], None]) -> None:
    """Prints a note for each contradiction; a folder whose files cannot be compared gets one about that."""
    try:
        found = disagreements(folder)
    except UserError as cause:
        found = [f"the written files cannot be compared: {cause}"]
    for sentence in found:
        say(f"note: {sentence}")
