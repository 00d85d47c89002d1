"""Chat templates: conversations as one text, and which parts of it the assistant has written.

A template is Jinja, rendered in a sandbox with the settings that transformers uses, so that files of both work alike.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.contracts.errors import UserError
from core.recipe.tokenizer_file import files_beside, text_of_marker

ASSISTANT = "assistant"
"""The role whose turns are learned."""

Messages = Sequence[Mapping[str, Any]]

_MARKS = re.compile(r"{%[-+]?\s*generation\b")

_OPEN, _CLOSE = "\U000f5a00{}", "\U000f5a01{}"
"""What surrounds a marked part while a template is rendered; a number is added until no message holds them."""


class _Generation(Extension):  # type: ignore[misc]
    """The block `{% generation %}...{% endgeneration %}`, whose text the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Parses a block, whose rendered text goes through `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Any, caller: Callable[[], str]) -> str:
        text = caller()
        first, last = context.get("_around", ("", ""))
        return f"{first}{text}{last}"


class ChatTemplate:
    """A template with the markers that it writes.

    Args:
        source: the template.
        markers: the texts of `bos_token`, `eos_token` and others.
        where: the file, for error messages.

    Raises:
        UserError: it is no Jinja template.
    """

    def __init__(self, source: str, markers: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self.source = source
        self.where = where
        self._markers = dict(markers)
        try:
            self._template = environment.from_string(source)
        except TemplateError as cause:
            raise UserError(f"{where}: is no chat template: {_one_line(cause)}") from cause

    @classmethod
    def beside(cls, tokenizer: Path, *, begin: str | None, end: str | None) -> "ChatTemplate":
        """Reads the template beside a tokenizer's file.

        Args:
            tokenizer: the tokenizer's file.
            begin: the marker before a document, the `bos_token` of settings that name none.
            end: the marker that ends one, likewise.

        Raises:
            UserError: there is none, or it is no Jinja template.
        """
        config, source = files_beside(tokenizer)
        if source is None:
            why = "has no chat template: neither chat_template.jinja beside it nor chat_template in"
            raise UserError(f"{tokenizer}: {why} tokenizer_config.json")
        found = {"bos_token": begin, "eos_token": end}
        for key, value in config.items():
            if key.endswith("_token"):
                found[key] = text_of_marker(value) or found.get(key)
        markers = {key: value for key, value in found.items() if isinstance(value, str)}
        return cls(source, markers, f"the chat template of {tokenizer}")

    @property
    def marks_turns(self) -> bool:
        """Whether the template itself says what the assistant writes, by `{% generation %}`."""
        return _MARKS.search(self.source) is not None

    def render(
        self, messages: Messages, *, answer: bool = False, clock: bool = False, **around: Any
    ) -> str:
        """Writes a conversation as one text.

        Args:
            messages: its turns, each with the keys `role` and `content` at least.
            answer: whether the text ends where the assistant's next turn begins.
            clock: whether the template may write today's date; a corpus must be the same on every day.
            around: what the template's variables are beside these.

        Raises:
            UserError: the template fails, or says that it does not take such messages.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self._markers, **around}
        if clock:
            names["strftime_now"] = lambda style: datetime.now().strftime(style)
        try:
            text: str = self._template.render(
                messages=messages, add_generation_prompt=answer, **names
            )
        except Exception as cause:  # a template can fail in any way
            raise UserError(f"{self.where} fails: {_one_line(cause)}") from cause
        return text

    def turns(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """Writes a conversation, and says where the parts begin and end that the assistant has written.

        A template without `{% generation %}` is rendered up to each turn of the assistant and with it.

        Raises:
            UserError: the template fails, or writes a turn in another way when others follow it.
        """
        if self.marks_turns:
            return self._marked_turns(messages)
        text = self.render(messages)
        found = []
        for index, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            before = self.render(messages[:index], answer=True)
            with_turn = self.render(messages[: index + 1])
            if not with_turn.startswith(before) or not text.startswith(with_turn):
                raise UserError(
                    f"{self.where} writes turn {index + 1} in another way when others follow, so it is "
                    "unknown what is learned: mark it by {% generation %} in the template"
                )
            found.append((len(before), len(with_turn)))
        return text, found

    def _marked_turns(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        number = 0
        held = json.dumps(messages, ensure_ascii=False, default=str)
        while _OPEN.format(number) in held or _CLOSE.format(number) in held:
            number += 1
        first, last = _OPEN.format(number), _CLOSE.format(number)
        marked = self.render(messages, _around=(first, last))
        text = ""
        found = []
        for index, piece in enumerate(re.split(f"{first}|{last}", marked)):
            if index % 2:
                found.append((len(text), len(text) + len(piece)))
            text += piece
        return text, found


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """The filter `tojson` as transformers has it: nothing is escaped for HTML."""
    known = {key: settings[key] for key in ("indent", "separators", "sort_keys") if key in settings}
    return json.dumps(value, ensure_ascii=ensure_ascii, **known)


def _raise(message: str) -> str:
    raise TemplateError(message)


def _one_line(cause: Exception) -> str:
    text = " ".join(str(cause).split())
    return text[:200] or type(cause).__name__
