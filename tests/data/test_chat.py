"""Conversations: which tokens are learned, one by one, and what a corpus of them refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import (
    ASSISTANT,
    BEGIN,
    END,
    PLAIN_TEMPLATE,
    TEMPLATE,
    THINK,
    USER,
    write_deepseek_like,
)

from core.contracts.errors import UserError
from core.data.chat_template import ChatTemplate
from core.data.conversations import ChatTokenizer
from core.data.held_out import HeldOut
from core.data.prepare import prepare
from core.data.tokenizer_file import load_tokenizer_file
from plugins.text_files.chat import Chat

CHAT = [
    {"role": "system", "content": "word1 help"},
    {"role": "user", "content": "the tale"},
    {"role": "assistant", "content": "houses é!"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": f"{THINK} said"},
]


@pytest.fixture(scope="module", params=["marked", "prefixes"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    template = TEMPLATE if request.param == "marked" else PLAIN_TEMPLATE
    folder = write_deepseek_like(tmp_path_factory.mktemp("hf"), template=template)
    return ChatTokenizer.of(load_tokenizer_file(folder))


def test_the_mask_token_by_token(chat: ChatTokenizer) -> None:
    block = chat.conversation(CHAT)
    assert block.learned is not None
    learned = dict.fromkeys([True, False], "")
    shown = []
    for token, is_learned in zip(block.tokens, block.learned, strict=True):
        text = chat.tokenizer.decode([token])
        learned[is_learned] += "" if "\ufffd" in text else text
        shown.append((chat.tokenizer.text_of(token), is_learned))
    marker = [pair for pair in shown if pair[0] in (BEGIN, USER, ASSISTANT, END, THINK)]
    assert marker == [
        (BEGIN, False),
        (USER, False),
        (ASSISTANT, False),
        (END, True),
        (USER, False),
        (ASSISTANT, False),
        (THINK, True),
        (END, True),
    ]
    assert learned[False] == f"{BEGIN}word1 help{USER}the tale{ASSISTANT}{USER}again{ASSISTANT}"
    assert learned[True].replace("houses ", "", 1).endswith(f"!{END}{THINK} said{END}")
    assert block.text_bytes == len("houses é! said".encode())


def test_a_message_that_spells_out_a_mark_of_the_mask_moves_nothing(chat: ChatTokenizer) -> None:
    odd = [*CHAT[:2], {"role": "assistant", "content": "a\U000f5a000b\U000f5a010"}]
    block = chat.conversation(odd)
    assert block.learned is not None
    first = block.learned.index(True)
    assert all(block.learned[first:])
    assert chat.tokenizer.decode(block.tokens).endswith("a\U000f5a000b\U000f5a010" + END)


def test_what_nobody_answers_is_refused(chat: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="no turn of the role assistant"):
        chat.conversation(CHAT[:2])


def test_the_marker_after_a_turn_ends_a_text(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    write_deepseek_like(tmp_path, template=template)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for number, text in ((303, "<|im_start|>"), (304, "<|im_end|>")):
        content["added_tokens"].append(
            {**content["added_tokens"][-1], "id": number, "content": text}
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    chat = ChatTokenizer.of(load_tokenizer_file(tmp_path))
    assert chat.turn_end() == 304
    assert chat.tokenizer.decode(chat.prompt(CHAT[1:2])) == (
        "<|im_start|>user\nthe tale<|im_end|>\n<|im_start|>assistant\n"
    )
    block = chat.conversation(CHAT[1:3])
    assert block.learned is not None
    learned = [t for t, is_on in zip(block.tokens, block.learned, strict=True) if is_on]
    assert chat.tokenizer.decode(learned) == "houses é!<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_asks_for_marks() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}", {}, "T"
    )
    with pytest.raises(UserError, match=r"turn 3 in another way .* \{% generation %\}"):
        template.turns(CHAT)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% if %}", "T: is no chat template: "),
        ("{{ raise_exception('roles must alternate') }}", "T fails: roles must alternate"),
        ("{{ messages[9].content }}", "T fails: "),
        ("{{ ''.__class__.__mro__ }}", "T fails: access to attribute"),
        ("{{ messages.append(1) }}", "T fails: access to attribute"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(source: str, sentence: str) -> None:
    with pytest.raises(UserError) as found:
        ChatTemplate(source, {}, "T").render(CHAT)
    assert str(found.value).startswith(sentence)


def test_a_corpus_is_the_same_on_every_day() -> None:
    template = ChatTemplate(
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}x", {}, "T"
    )
    assert template.render(CHAT) == "x"
    assert template.render(CHAT, clock=True).startswith("20")


def corpus(folder: Path, records: list[Any], **keys: Any) -> Chat:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Chat(Chat.Config(paths=[str(file)], **keys))


def test_records_become_blocks_and_bad_ones_are_named(tmp_path: Path) -> None:
    hf = write_deepseek_like(tmp_path / "hf", template=TEMPLATE)
    tokenizer = load_tokenizer_file(hf)
    chat = ChatTokenizer.of(tokenizer)
    records: list[Any] = [{"data": {"messages": CHAT[: 3 + 2 * (i % 2)]}} for i in range(22)]
    held = corpus(tmp_path, records, messages_key="data.messages")
    data = prepare(held, 303, given=tokenizer)
    assert (data.train.documents, data.validation.documents) == (21, 1)
    block = chat.conversation(CHAT[:3])
    assert block.learned is not None
    assert data.train.learned is not None
    assert data.train.tokens[: len(block.tokens)].tolist() == list(block.tokens)
    assert data.train.learned[: len(block.tokens)].tolist() == list(block.learned)
    assert data.validation.bytes == block.text_bytes
    for record, sentence in (
        ({"x": 1}, "line 23 has no messages under the key 'data.messages'"),
        ({"data": {"messages": [{"content": "x"}]}}, "line 23 (data.messages): message 1 must"),
        ({"data": {"messages": CHAT[:1]}}, "line 23 has no turn of the role assistant"),
    ):
        held = corpus(tmp_path, [*records, record], messages_key="data.messages")
        with pytest.raises(UserError) as found:
            prepare(held, 303, given=tokenizer)
        assert sentence in str(found.value)
        held = corpus(tmp_path, [*records, record], messages_key="data.messages", on_error="skip")
        assert prepare(held, 303, given=tokenizer).train.documents == 21
        assert held.notes() == ["1 record without readable text left out of the corpus"]


def test_conversations_need_a_tokenizer_with_a_template(tmp_path: Path) -> None:
    held = corpus(tmp_path, [{"messages": CHAT}])
    with pytest.raises(UserError, match=r"data\.tokenizer\.file = null: must name a tokenizer"):
        prepare(held, 303)
    plain = load_tokenizer_file(write_deepseek_like(tmp_path / "plain"))
    with pytest.raises(UserError, match="has no chat template"):
        prepare(held, 303, given=plain)
    with pytest.raises(UserError, match="has no chat template"):
        prepare(held, 303, held_out=HeldOut(corpus=held), given=plain)
