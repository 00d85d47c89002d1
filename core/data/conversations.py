"""Conversations as token ids, with which of them are learned."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.contracts.corpus import TokenBlock
from core.contracts.errors import UserError
from core.data.chat_template import ASSISTANT, ChatTemplate, Messages
from core.data.tokenizer import Tokenizer

_PROBE = "zqx"
"""The text of a turn that shows which marker ends one."""


class ChatTokenizer:
    """A tokenizer with its chat template.

    Args:
        tokenizer: the tokenizer.
        template: its template.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTokenizer":
        """The tokenizer with the template beside its file.

        Raises:
            UserError: there is none.
        """
        if tokenizer.source is None:
            raise UserError("a tokenizer that is trained here has no chat template")
        begin, end = [tokenizer.text_of(token) for token in (tokenizer.begin, tokenizer.end)]
        template = ChatTemplate.beside(tokenizer.source, begin=begin, end=end)
        return cls(tokenizer, template)

    def conversation(self, messages: Messages) -> TokenBlock:
        """The tokens of a conversation, of which the assistant's are learned, with the marker that ends its turns.

        The bytes of the block are those of the learned text, without markers: the denominator of bits per byte.

        Raises:
            UserError: the template does not take the messages, or nothing of them is learned.
        """
        text, turns = self.template.turns(messages)
        ids, places = self.tokenizer.spans_marked(text)
        learned = learned_tokens(places, turns)
        if not any(learned):
            raise UserError(f"has no turn of the role {ASSISTANT}, of which something is learned")
        added = self.tokenizer.added
        own = [
            place
            for token, place, is_learned in zip(ids, places, learned, strict=True)
            if is_learned and token not in added
        ]
        return TokenBlock(ids, learned=learned, text_bytes=_bytes_of(text, own, turns))

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens of a conversation up to where the assistant answers."""
        text = self.template.render(messages, answer=True, clock=True)
        return self.tokenizer.encode_marked(text)

    def turn_end(self) -> int:
        """The marker that ends a turn of the assistant; the end of a document where the template writes none."""
        asked = [{"role": "user", "content": _PROBE}]
        answered = [*asked, {"role": ASSISTANT, "content": _PROBE}]
        try:
            before = self.template.render(asked, answer=True)
            text = self.template.render(answered)
        except UserError:
            return self.tokenizer.end
        rest = text[text.rfind(_PROBE) + len(_PROBE) :] if len(text) > len(before) else ""
        for token in self.tokenizer.encode_marked(rest):
            if token in self.tokenizer.added:
                return token
        return self.tokenizer.end


def check_messages(value: Any) -> list[Mapping[str, Any]]:
    """The messages of a record.

    Raises:
        UserError: they are none; the message is the end of a sentence about the record.
    """
    if not isinstance(value, list) or not value:
        raise UserError("must be a list of messages, each with a role and a content")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number} must have a role: user, {ASSISTANT}, system, ...")
    return value


def learned_tokens(
    places: Sequence[tuple[int, int]], turns: Iterable[tuple[int, int]]
) -> list[bool]:
    """Which tokens hold something of the assistant's turns.

    Args:
        places: where each token begins and ends in the text.
        turns: the same for turns.
    """
    learned = [False] * len(places)
    for first, last in turns:
        inside = [i for i, (begin, end) in enumerate(places) if begin < last and end > first]
        if inside:
            for index in range(inside[0], inside[-1] + 1):
                learned[index] = True
    return learned


def _bytes_of(
    text: str, places: Sequence[tuple[int, int]], turns: Iterable[tuple[int, int]]
) -> int:
    """The bytes of the characters of some tokens inside the turns; those that several tokens share count once."""
    marked = bytearray(len(text))
    for begin, end in places:
        marked[begin:end] = b"\1" * (end - begin)
    total = 0
    for first, last in turns:
        total += sum(
            len(letter.encode())
            for letter, is_own in zip(text[first:last], marked[first:last], strict=True)
            if is_own
        )
    return total
