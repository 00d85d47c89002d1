"""From a Hugging Face checkpoint and a text to a continued model that transformers loads and that answers."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import Lab

import core
from core.interop.metadata import disagreements
from interop.hf_models import transformers_or_skip

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
"""Files that a continued model brings back as they were; a chat template may be a file of its own."""


def words(count: int, seed: int = 0) -> str:
    """Made-up text."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 5))) for _ in range(40)]
    return " ".join(draw.choices(known, k=count))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 with a tokenizer of its own, as transformers saves them."""
    transformers = transformers_or_skip()
    import tokenizers

    folder = tmp_path_factory.mktemp("hf") / "source"
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unused>", *MARKS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([words(2000)], trainer)
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    config = transformers.DeepseekV3Config(
        vocab_size=engine.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(lab: Lab, source: Path) -> Path:
    """The same as a run folder."""
    folder = source.parent / "run"
    done = lab.command("convert", "from-hf", source, folder)
    assert done.code == 0, done.err
    return folder


def loaded(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer as transformers reads them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def assert_same_files(folder: Path, source: Path) -> None:
    names = [*KEPT, *(file.name for file in source.glob("*.jinja"))]
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def assert_answers(folder: Path, run: Path) -> None:
    """Compares logits with ours, and lets the model answer with its own template."""
    model, tokenizer = loaded(folder)
    chat = [{"role": "user", "content": "ab cd"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>ab cd<|end|><|assistant|>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=True)
    with torch.no_grad():
        theirs = model(**ids).logits
        ours = core.load(run).logits(ids["input_ids"])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    answer = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]
    assert isinstance(tokenizer.decode(answer[0]), str)


def test_training_on_ids_keeps_tokenizer_template_and_metadata(
    lab: Lab, source: Path, run: Path, tmp_path: Path
) -> None:
    _, tokenizer = loaded(source)
    ids: list[int] = []
    for number in range(40):
        ids += [*tokenizer(words(30, number))["input_ids"], 2]
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "train.bin")
    corpus = f"data.corpus={{name: tokens, paths: ['{tmp_path}/train.bin'], dtype: uint16, end: 2}}"
    settings = (corpus, "data.sequence_length=16", "budget.steps=3", "optimizer.lr=0.01")
    trained = tmp_path / "trained"
    done = lab.command("fit", run / "recipe.yaml", *settings, "--out", trained)
    assert done.code == 0, done.err
    before, after = core.load(run).state_dict(), core.load(trained).state_dict()
    assert not torch.equal(before["embedding.weight"], after["embedding.weight"])
    longer = tmp_path / "longer"
    given = (trained / "recipe.yaml", "budget.steps=4", "--from", trained, "--out", longer)
    done = lab.command("fit", *given)
    assert done.code == 0, done.err
    for number, folder in enumerate((trained, longer)):
        out = tmp_path / f"out-{number}"
        done = lab.command("convert", "to-hf", folder, out)
        assert done.code == 0, done.err
        assert "note:" not in done.err
        assert_same_files(out, source)
        assert disagreements(out) == []
        assert_answers(out, folder)


def test_a_folder_of_text_and_a_checkpoint_become_a_model_that_answers(
    lab: Lab, source: Path, run: Path, tmp_path: Path
) -> None:
    """The whole way: .jsonl.gz, convert, fit, to-hf; with the checkpoint's own tokenizer all along."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": words(25, 20 * part + line)}) for line in range(20)]
        with gzip.open(texts / f"part-{part}.jsonl.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    corpus = f"data.corpus={{name: files, paths: ['{texts}/*.jsonl.gz']}}"
    settings = (corpus, "data.sequence_length=16", "budget.steps=4", "optimizer.lr=0.02")
    trained = tmp_path / "trained"
    done = lab.command("fit", run / "recipe.yaml", *settings, "--out", trained)
    assert done.code == 0, done.err
    assert "another tokenizer" not in done.err
    assert core.load_tokenizer(trained).markers == core.load_tokenizer(run).markers
    done = lab.command("generate", trained, "--prompt", "ab", "--tokens", "4")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    done = lab.command("convert", "to-hf", trained, out)
    assert done.code == 0, done.err
    assert "note:" not in done.err
    assert_same_files(out, source)
    assert disagreements(out) == []
    assert_answers(out, trained)
    longer = tmp_path / "longer"
    given = (run / "recipe.yaml", *settings[:2], "budget.steps=6", "--from", trained)
    done = lab.command("fit", *given, "--out", longer)
    assert done.code == 0, done.err
    done = lab.command("convert", "to-hf", longer, tmp_path / "again")
    assert done.code == 0, done.err
    assert_same_files(tmp_path / "again", source)


def test_new_tokens_and_more_experts_still_agree_with_their_metadata(
    lab: Lab, source: Path, run: Path, tmp_path: Path
) -> None:
    """The model has changed, so that its files are written anew; the tokenizer is still the source's."""
    corpus = f"data.corpus={{name: files, paths: ['{lab.texts}/*.txt']}}"
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"] + 20
    changes = (
        f"initial_weights={{path: {run}, vocabulary: mean, experts: split}}",
        f"data.tokenizer.vocab={vocabulary}",
        "model.blocks.moe.ffn={experts: 8, expert_hidden: 8, shared_experts: 2}",
        "model.blocks.moe.ffn.router.top_k=4",
    )
    settings = (corpus, "data.sequence_length=16", "budget.steps=1", "optimizer.lr=0")
    trained = tmp_path / "trained"
    done = lab.command("fit", run / "recipe.yaml", *settings, *changes, "--out", trained)
    assert done.code == 0, done.err
    assert "20 new rows after" in done.err
    out = tmp_path / "out"
    done = lab.command("convert", "to-hf", trained, out, "--dtype", "fp32")
    assert done.code == 0, done.err
    assert disagreements(out) == []
    assert_answers(out, trained)
