"""Prints what a model writes."""

from collections.abc import Sequence

from core.generation.completion import Completions
from core.generation.prompts import GivenPrompt
from core.generation.run_tokenizer import RunTokenizer


class TextPrinter:
    """Prints texts for a reader: as they come, or when all are done.

    Args:
        prompts: what is continued.
        tokenizer: the run's; None: token ids are printed.
        streams: whether texts are printed as they come.
        is_file: whether the prompts come from a file, and are numbered.
        is_chat: whether they are turns that are answered, and not printed.
    """

    def __init__(
        self,
        prompts: Sequence[GivenPrompt],
        tokenizer: RunTokenizer | None,
        *,
        streams: bool,
        is_file: bool,
        is_chat: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.streams = streams
        self.is_file = is_file
        self.is_chat = is_chat
        self.prompts = prompts
        self.begun = 0

    def on_text(self, number: int, piece: str) -> None:
        """Prints a piece of a text."""
        if self.streams:
            self._begin(number)
            print(piece, end="", flush=True)

    def finish(self, completions: Completions) -> None:
        """Prints what was not printed yet."""
        for number, found in enumerate(completions):
            self._begin(number)
            if found.text is None:
                print("", *found.tokens, end="")
            elif not self.streams:
                print(found.text, end="")
        print()

    def _begin(self, number: int) -> None:
        """Prints the prompts up to one, each after the end of the text before it."""
        while self.begun <= number:
            if self.begun:
                print()
            if self.is_file:
                print(f"--- prompt {self.begun + 1} ---")
            if not self.is_chat or self.is_file:
                print(self._shown(self.prompts[self.begun]), end="", flush=self.streams)
            if self.is_chat and self.is_file:
                print()  # an answer begins on a line of its own
            self.begun += 1

    def _shown(self, prompt: GivenPrompt) -> str:
        """The text of a prompt, or its ids without a tokenizer."""
        if isinstance(prompt.content, str):
            return prompt.content
        if self.tokenizer is None:
            return " ".join(map(str, prompt.content))
        return self.tokenizer.decode(prompt.content)
