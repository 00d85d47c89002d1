"""A model that was trained here, under transformers: its loss, its text, its tokenizer."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from tokenizers import Tokenizer as TokenizersEngine
from torch.nn import functional as F

import core
from core.data.tokenizer import Tokenizer, train

from .hf_models import (
    BASE,
    in_dtype,
    random_model,
    read_config,
    read_tensors,
    save,
    transformers_or_skip,
)
from .parity import assert_same_bits

GROUP = "model.blocks.moe.ffn.router.group_score=2"
"""transformers adds up a group's two best affinities, whatever top_k and the limit are."""

STEPS, LENGTH, END = 24, 16, 0
HELD_OUT = ("doc-10.txt", "doc-30.txt")
TEXTS = [
    "a plain text, of letters that the corpus lacks: XYZ",
    "  spaces   before, between  and after   ",
    "line\nends\r\n\r\nand\ttabs 12345678 3.14",
    "naïve café, Ελλάδα, Россия, 日本語, עברית, 👩‍👩‍👧 and \u0000 and \x7f",
    unicodedata.normalize("NFD", "naïve café"),
    "it's they'll WE'RE",
    "",
]


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


@pytest.fixture(scope="module")
def run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that has learned something and whose selection biases have moved."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    lab.fit(folder, GROUP, f"budget.steps={STEPS}", "optimizer.lr=0.01")
    return folder


@pytest.fixture(scope="module")
def exported(hf: Any, lab: Lab, run: Path) -> Path:
    """The same as a checkpoint of Hugging Face."""
    folder = run.parent / "exported"
    result = lab.command("convert", "to-hf", run, folder, "--dtype", "fp32")
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="module")
def model(hf: Any, exported: Path) -> Any:
    """transformers' own, found by the folder alone."""
    return hf.AutoModelForCausalLM.from_pretrained(exported).eval()


def held_out(lab: Lab, tokenizer: Any) -> list[int]:
    """The validation stream: every held-out document with the marker before it."""
    tokens = []
    for name in HELD_OUT:
        text = (lab.texts / name).read_text(encoding="utf-8")
        tokens += [END, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return tokens


def test_the_run_has_learned_and_its_biases_have_moved(run: Path, exported: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_loss"] < 0.9 * torch.tensor(300.0).log()
    biases = [
        t for name, t in read_tensors(exported).items() if name.endswith("e_score_correction_bias")
    ]
    assert len(biases) == 2  # the layer with experts, and the multi-token layer's
    assert all(int((bias != 0).sum()) > 4 for bias in biases)


@torch.no_grad()
def test_the_loss_on_the_validation_text_is_transformers_own(
    hf: Any, lab: Lab, run: Path, exported: Path, model: Any
) -> None:
    stream = held_out(lab, hf.AutoTokenizer.from_pretrained(exported))
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(stream) - 1, LENGTH):
        window = torch.tensor([stream[start : start + LENGTH + 1]])
        logits_LV = model(window[:, :-1]).logits[0].double()
        total += F.cross_entropy(logits_LV, window[0, 1:], reduction="sum")
    summary = json.loads((run / "summary.json").read_text())
    assert float(total / (len(stream) - 1)) == pytest.approx(summary["val_loss"], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "prompt", ["", "abc", "a longer prompt, of letters that the corpus lacks: xyz"]
)
def test_greedy_text_is_the_same(
    hf: Any, lab: Lab, run: Path, exported: Path, model: Any, prompt: str
) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(exported)
    opening = [END, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    tokens = torch.tensor([opening])
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        min_new_tokens=0,
        max_new_tokens=32,
    )[0, len(opening) :]
    gaps = model(torch.cat([tokens[0], written])[None]).logits[0].topk(2).values
    assert (
        float((gaps[:, 0] - gaps[:, 1])[len(opening) - 1 : -1].min()) > 1e-5
    )  # no tie that could fall either way
    result = lab.command("generate", run, "--prompt", prompt, "--tokens", "32", "--json")
    assert result.code == 0, result.err
    text = tokenizer.decode(
        [token for token in written.tolist() if token != END], clean_up_tokenization_spaces=False
    )
    assert json.loads(result.out)["text"] == text


def test_without_a_wish_weights_are_rounded_once_to_bf16_and_that_is_said(
    hf: Any, lab: Lab, run: Path, exported: Path, tmp_path: Path
) -> None:
    result = lab.command("convert", "to-hf", run, tmp_path / "bf16")
    assert result.code == 0, result.err
    assert (
        len([line for line in result.err.splitlines() if "bf16" in line and "--dtype fp32" in line])
        == 1
    )
    expected = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        for name, tensor in read_tensors(exported).items()
    }
    assert_same_bits(read_tensors(tmp_path / "bf16"), expected)
    assert hf.AutoConfig.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
    assert hf.AutoConfig.from_pretrained(exported).dtype == torch.float32


def test_the_files_for_text_go_out_and_back_unchanged(
    lab: Lab, exported: Path, tmp_path: Path
) -> None:
    for command, source, target in (
        ("from-hf", exported, "run"),
        ("to-hf", tmp_path / "run", "again"),
    ):
        result = lab.command("convert", command, source, tmp_path / target)
        assert result.code == 0, result.err
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        one, two = (
            json.loads((folder / name).read_text()) for folder in (exported, tmp_path / "again")
        )
        assert one == two, name


def test_a_foreign_tokenizer_goes_through_unchanged(hf: Any, lab: Lab, tmp_path: Path) -> None:
    """Markers of its own, three different ones, and a chat template."""
    engine = train([lab.file.read_text()], 258)
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=TokenizersEngine.from_str(engine.to_json()),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template="{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}",
    )
    ids = {f"{kind}_token_id": getattr(fast, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    assert sorted(ids.values()) == [258, 259, 260]
    case = replace(BASE, config=ids)
    source = save(case, in_dtype(random_model(case), torch.float32), tmp_path / "checkpoint")
    fast.save_pretrained(source)
    for command, here, there in (("from-hf", source, "run"), ("to-hf", tmp_path / "run", "back")):
        result = lab.command("convert", command, here, tmp_path / there)
        assert result.code == 0, result.err
    one, two = (hf.AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    chat = [{"role": "user", "content": "naïve café"}]
    assert one.apply_chat_template(chat, tokenize=False) == two.apply_chat_template(
        chat, tokenize=False
    )
    for text in [*TEXTS, "<|begin|>a<|end|> <|pad|>"]:
        assert one(text)["input_ids"] == two(text)["input_ids"]
    assert one.special_tokens_map == two.special_tokens_map
    generation = hf.GenerationConfig.from_pretrained(tmp_path / "back")
    assert {key: getattr(generation, key) for key in ids} == ids
    assert {key: read_config(tmp_path / "back")[key] for key in ids} == ids


@torch.no_grad()
def test_out_and_back_again_changes_no_bit(
    lab: Lab, run: Path, exported: Path, tmp_path: Path
) -> None:
    result = lab.command("convert", "from-hf", exported, tmp_path / "again")
    assert result.code == 0, result.err
    one, two = core.load(run), core.load(tmp_path / "again")
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.logits(tokens), two.logits(tokens))
    weights = [
        sorted((p.shape, p.double().sum()) for p in model.parameters()) for model in (one, two)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_tokenizer_encodes_as_ours(
    hf: Any, run: Path, exported: Path, text: str
) -> None:
    theirs, ours = (
        hf.AutoTokenizer.from_pretrained(exported),
        Tokenizer.load(run / "tokenizer.json"),
    )
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs(text)["input_ids"] == [END, *ids]  # as every text of our training begins
    assert len(theirs) == ours.size


def test_special_tokens_are_reported_in_every_file(hf: Any, exported: Path, model: Any) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(exported)
    generation = json.loads((exported / "generation_config.json").read_text())
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    config = read_config(exported)
    for kind in ("bos", "eos", "pad"):
        assert settings[f"{kind}_token"]
        expected = getattr(tokenizer, f"{kind}_token_id")
        assert isinstance(expected, int)
        assert generation[f"{kind}_token_id"] == expected
        assert getattr(model.generation_config, f"{kind}_token_id") == expected
        assert config[f"{kind}_token_id"] == expected or (kind, config["pad_token_id"]) == (
            "pad",
            None,
        )
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == END
    assert tokenizer.convert_ids_to_tokens(END) == tokenizer.eos_token
    batch = tokenizer(["a", "abc abc abc"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1)[0] < batch["attention_mask"].sum(dim=1)[1]
