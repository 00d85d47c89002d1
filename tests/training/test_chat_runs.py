"""Supervised fine-tuning: only the assistant's turns are learned, while every token takes load."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import MOE, Lab, rows
from safetensors.torch import load_file
from tokenizer_files import ASSISTANT, TEMPLATE, write_deepseek_like

import core
from core.analysis.budget import plan_of
from core.contracts.context import SequenceContext
from core.run.data import text_data
from core.training.run_folder import RunFolder


def write_chats(file: Path, count: int = 40) -> None:
    lines = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 3):
            turns.append({"role": "user", "content": f"word{number} the tale {turn}"})
            turns.append({"role": "assistant", "content": f"houses {number * 37}, read; again é"})
        lines.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a run that learns conversations."""
    folder = tmp_path_factory.mktemp("chat")
    hf = write_deepseek_like(folder / "hf", template=TEMPLATE)
    write_chats(folder / "chats.jsonl")
    corpus = f"data.corpus={{name: chat, paths: ['{folder}/chats.jsonl']}}"
    return [corpus, f"data.tokenizer={{file: {hf}, vocab: null}}", "precision.name=fp64"]


@pytest.fixture(scope="module")
def run(lab: Lab, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-run") / "run"
    lab.fit(folder, *keys, "budget.steps=4", "validation.every_steps=2")
    return folder


def test_validation_counts_the_learned_tokens_and_their_bytes(
    lab: Lab, keys: list[str], run: Path
) -> None:
    recipe = core.compose(run / "recipe.yaml")
    data = text_data(recipe, plan_of(recipe), RunFolder(run))
    data.prepare()
    model = core.load(run).double()
    total, count, drafted = 0.0, 0, 0
    for batch in data.val_dataloader():
        assert batch.learned_BM is not None
        context = SequenceContext.of(
            batch.tokens_BL,
            targets_BL=batch.targets_BL,
            valid_BL=batch.valid_BL,
            learned_BM=batch.learned_BM,
        )
        drafted += sum(int(n) for n in model.heads["mtp"].counts(context).values())
        with torch.no_grad():
            logits = model.logits(batch.tokens_BL)
        for row in range(len(batch.tokens_BL)):
            for place in range(batch.tokens_BL.shape[1]):
                if not batch.valid_BL[row, place]:
                    continue
                if batch.learned_BM[row, place + 1]:
                    target = batch.targets_BL[row, place]
                    total -= float(logits[row, place].double().log_softmax(-1)[target])
                    count += 1
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < count < len(data._prepared.validation)
    assert drafted == count, "the denominator of a multi-token module is the main loss's"
    assert summary["val_loss"] == pytest.approx(total / count, rel=1e-9)
    expected = total / math.log(2) / data.validation_bytes
    assert summary["val_bits_per_byte"] == pytest.approx(expected, rel=1e-9)
    lines = Path(recipe.data.corpus.config.paths[0]).read_text(encoding="utf-8").splitlines()
    said = [
        turn["content"]
        for line in (lines[10], lines[30])
        for turn in json.loads(line)["messages"]
        if turn["role"] == "assistant"
    ]
    assert data.validation_bytes == sum(len(text.encode()) for text in said)


def test_every_valid_token_takes_load(lab: Lab, run: Path) -> None:
    loads = load_file(run / "loads.safetensors")
    layer = next(tensor for name, tensor in loads.items() if MOE[0] in name)
    tokens = 16 * 4 * 2  # length, sequences, micro-batches: every position of a step
    assert int(layer[-1].sum()) in (tokens * 2, 2 * tokens * len(layer))


@pytest.mark.parametrize(
    "split",
    [("batch.sequences=8", "batch.accumulate=1"), ("batch.sequences=2", "batch.accumulate=4")],
)
def test_losses_do_not_depend_on_how_a_batch_is_split(
    lab: Lab, keys: list[str], run: Path, tmp_path: Path, split: tuple[str, str]
) -> None:
    lab.fit(tmp_path / "run", *keys, "budget.steps=4", "validation.every_steps=2", *split)
    found: list[dict[str, Any]] = [rows(folder) for folder in (run, tmp_path / "run")]
    for one, other in zip(*found, strict=True):
        for name in one:
            if "loss" in name and one[name] not in ("", None):
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-9), name


def test_a_run_answers_in_the_words_of_its_template(lab: Lab, run: Path) -> None:
    done = lab.command(
        "generate",
        run,
        "--chat",
        "--prompt",
        "the tale",
        "--tokens",
        "4",
        "--json",
        "--system",
        "x",
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    tokenizer = core.load_tokenizer(run)
    prompt = tokenizer.chat().prompt(
        [{"role": "system", "content": "x"}, {"role": "user", "content": "the tale"}]
    )
    assert tokenizer.decode(prompt).endswith(f"the tale{ASSISTANT}")
    assert found["prompt_tokens"] == len(prompt)
    (same,) = core.complete(core.load(run), [prompt], tokenizer=tokenizer, tokens=4)
    assert found["token_ids"] == same.tokens


def test_mistakes_are_one_sentence(
    lab: Lab, keys: list[str], finished: Path, tmp_path: Path
) -> None:
    for wrong, sentence in (
        ([keys[0]], "data.tokenizer.file = null: must name a tokenizer with a chat template"),
        (
            [keys[0], f"data.tokenizer.file={write_deepseek_like(tmp_path / 'plain')}"],
            "has no chat template",
        ),
    ):
        done = lab.command("fit", lab.file, *wrong, "--out", tmp_path / "run")
        assert done.code == 2
        assert sentence in done.sentence
        assert not (tmp_path / "run").exists()
    done = lab.command("generate", finished, "--chat", "--prompt", "x")
    assert done.code == 2
    assert "has no chat template" in done.sentence
    done = lab.command("generate", finished, "--system", "x", "--prompt", "x")
    assert done.sentence == "--system needs --chat"


def test_a_step_without_a_learned_token_is_a_step(
    lab: Lab, keys: list[str], tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "the tale of " * 100},
        {"role": "assistant", "content": "x"},
    ]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    corpus = f"data.corpus={{name: chat, paths: ['{tmp_path}/one.jsonl']}}"
    split = ("batch.sequences=1", "batch.accumulate=1", "validation.every_steps=null")
    lab.fit(tmp_path / "run", corpus, *keys[1:], *split, "budget.steps=2")
    (first, _) = rows(tmp_path / "run")
    assert float(first["loss/next_token"]) == float(first["loss/mtp/depth_1"]) == 0
    assert float(first["loss/balance/sequence"]) > 0
    assert math.isfinite(float(first["grad_norm"]))
