"""Reads prompts from a file; torch is not needed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.documents import is_text, read_text


@dataclass(frozen=True)
class TextPrompt:
    """A prompt, and where it comes from.

    Args:
        text: the prompt.
        where: begins a sentence about it: the option, or the file with the line.
    """

    text: str
    where: str


def one_prompt(text: str) -> TextPrompt:
    """The prompt of the command line.

    Raises:
        UserError: it is not text.
    """
    if not is_text(text):
        raise UserError("--prompt is not UTF-8 text")
    return TextPrompt(text, "--prompt")


def read_prompts(file: Path) -> list[TextPrompt]:
    """The prompts of a file, in order; lines with nothing but space are left out.

    A `.txt` file has a prompt on each line. In a `.jsonl` file each line is a JSON string, or an object whose key
    `prompt` is one.

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
        if file.suffix == ".jsonl":
            line = _prompt_of(line, where)
        prompts.append(TextPrompt(line, f"{where}: a prompt"))
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt")
    return prompts


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that hold more than space, with their numbers from 1."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def _prompt_of(line: str, where: str) -> str:
    """The prompt in a line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise UserError(f"{where}: cannot be read as JSON: {cause}") from cause
    if isinstance(value, dict):
        if "prompt" not in value:
            raise UserError(f"{where}: must have the key prompt")
        value = value["prompt"]
    if not isinstance(value, str) or not is_text(value):
        raise UserError(f"{where}: must be a string, or an object whose key prompt is one")
    return value
