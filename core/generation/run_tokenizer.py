"""The tokenizer of a run, with the tokens that begin and end a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.data.tokenizer import Tokenizer
from core.generation.markers import Markers, markers_of
from core.training.run_folder import RunFolder

if TYPE_CHECKING:
    from core.data.conversations import ChatTokenizer


@dataclass(frozen=True)
class RunTokenizer:
    """Turns prompts into token ids and token ids into text.

    Args:
        tokenizer: text to ids and back, without markers.
        markers: the tokens that begin and end a text.
    """

    tokenizer: Tokenizer
    markers: Markers = Markers()

    @classmethod
    def of(cls, folder: RunFolder) -> "RunTokenizer":
        """Reads the tokenizer of a run.

        Raises:
            UserError: it cannot be read, or the run's source has no token that begins a text.
        """
        return cls(folder.load_tokenizer(), markers_of(folder))

    def chat(self) -> "ChatTokenizer":
        """The tokenizer with its chat template, whose `prompt` writes a conversation.

        Raises:
            UserError: the run has no template.
        """
        from core.data.conversations import (
            ChatTokenizer,
        )  # imports Jinja, which other texts do not need

        markers = self.markers
        return ChatTokenizer.of(self.tokenizer.with_markers(markers.begin, markers.end))

    @property
    def end(self) -> int:
        """The token that ends a text."""
        return self.markers.end

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, which begins with the marker as every text did in training."""
        return [self.markers.begin, *self.tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids)
