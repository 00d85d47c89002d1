"""Reads prompts from a file; torch is not needed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.documents import is_text, read_text


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt, and where it comes from.

    Args:
        content: a text, or token ids, which are taken as they are.
        where: begins a sentence about it: the option, or the file with the line.
    """

    content: str | tuple[int, ...]
    where: str


def one_prompt(text: str) -> GivenPrompt:
    """The prompt of the command line.

    Raises:
        UserError: it is not text.
    """
    if not is_text(text):
        raise UserError("--prompt is not UTF-8 text")
    return GivenPrompt(text, "--prompt")


def prompt_of_ids(text: str) -> GivenPrompt:
    """The prompt of the command line that is written as token ids, with commas or spaces between them.

    Raises:
        UserError: it has no ids, or something else.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(
            f"--prompt-ids {text!r}: must be whole numbers from 0 with commas between them"
        )
    return GivenPrompt(tuple(map(int, words)), "--prompt-ids")


def read_prompts(file: Path) -> list[GivenPrompt]:
    """The prompts of a file, in order; lines with nothing but space are left out.

    A `.txt` file has a prompt on each line. In a `.jsonl` file each line is a JSON string, a list of token ids, or an
    object whose key `prompt` is one of these.

    Raises:
        UserError: the file cannot be read, has another ending, has no prompt, or a line that is none.
    """
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--prompts {file}: must end in .txt or .jsonl")
    try:
        text = read_text(file).removeprefix("\ufeff")  # a byte order mark
    except UserError as cause:
        raise UserError(f"--prompts {cause}") from cause
    prompts = []
    for number, line in _lines(text):
        where = f"--prompts {file}, line {number}"
        content = _prompt_of(line, where) if file.suffix == ".jsonl" else line
        prompts.append(GivenPrompt(content, f"{where}: a prompt"))
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt")
    return prompts


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that hold more than space, with their numbers from 1."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def _prompt_of(line: str, where: str) -> str | tuple[int, ...]:
    """The prompt in a line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise UserError(f"{where}: cannot be read as JSON: {cause}") from cause
    if isinstance(value, dict):
        if "prompt" not in value:
            raise UserError(f"{where}: must have the key prompt")
        value = value["prompt"]
    if isinstance(value, str) and is_text(value):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return tuple(value)
    raise UserError(
        f"{where}: must be a string or a list of token ids, or an object whose key prompt is one"
    )
