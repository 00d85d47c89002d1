"""A model with a chat template goes to TRL, is tuned on conversations, and comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, Lab
from repository.documents import blocks
from tokenizer_files import TEMPLATE, write_deepseek_like

import core
from core.data.conversations import ChatTokenizer
from core.data.tokenizer_file import load_tokenizer_file

from .conftest import GROUPS

pytest.importorskip("trl", reason="needs trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SMALL = "max_length=64, use_cpu=True, learning_rate=1e-3, max_steps=1, save_strategy='no', "


@pytest.fixture(scope="module")
def tuned(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of everything, and the trainer after one step of the document's block."""
    place = tmp_path_factory.mktemp("sft")
    hf = write_deepseek_like(place / "hf", template=TEMPLATE)
    keys = (f"data.tokenizer.file={hf}", "model.rope.max_length=64", "budget.steps=2")
    lab.fit(place / "run", GROUPS, *keys)
    done = lab.command("convert", "to-hf", place / "run", place / "export", "--dtype", "fp32")
    assert done.code == 0, done.err
    (code,) = [
        block.text
        for block in blocks(ROOT / "docs" / "post_training.md", "python")
        if "SFTTrainer(" in block.text
    ]
    for name, folder in (("EXPORT", "export"), ("TUNED", "tuned"), ("out", "out")):
        code = code.replace(f'"{name}"', repr(str(place / folder)))
    names: dict[str, Any] = {}
    exec(code.replace("bf16=True, ", f"bf16=False, {SMALL}"), names)
    return place, names["trainer"]


def test_trl_learns_the_tokens_that_we_learn(tuned: tuple[Path, Any]) -> None:
    place, trainer = tuned
    chat = ChatTokenizer.of(load_tokenizer_file(place / "hf"))
    block = chat.conversation(
        [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert block.learned is not None
    assert batch["input_ids"][0].tolist() == list(block.tokens)
    assert [label != -100 for label in batch["labels"][0].tolist()] == list(block.learned)


def test_what_comes_back_answers(lab: Lab, tuned: tuple[Path, Any]) -> None:
    place, _ = tuned
    done = lab.command("convert", "from-hf", place / "tuned", place / "back")
    assert done.code == 0, done.err
    words = ("--chat", "--prompt", "2 + 2 =", "--tokens", "3", "--json")
    done = lab.command("generate", place / "back", *words)
    assert done.code == 0, done.err
    before = core.load_tokenizer(place / "run").chat()
    prompt = before.prompt([{"role": "user", "content": "2 + 2 ="}])
    assert json.loads(done.out)["prompt_tokens"] == len(prompt)
    after = core.load_tokenizer(place / "back").chat()
    assert after.template.source == before.template.source
    assert after.turn_end() == before.turn_end() == 1
