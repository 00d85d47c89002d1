"""`generate` and `evaluate` on the finished small run."""

import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from lab import Lab, rows
from tiers import first_by_default

import core
from core.data.tokenizer import Tokenizer
from core.generation.sample import sample


def greedy(run: Path, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, each computed by a forward over the whole text."""
    model, text = core.load(run), list(prompt)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "prompt",
    first_by_default(["", "abc", "a longer prompt, of letters that the corpus lacks: xyz"], keep=1),
)
def test_greedy_text_is_the_argmax_of_the_full_forward_step_by_step(
    lab: Lab, finished: Path, prompt: str
) -> None:
    tokenizer = Tokenizer.load(finished / "tokenizer.json")
    expected = list(
        takewhile(lambda t: t != 0, greedy(finished, [0, *tokenizer.encode(prompt)], 24))
    )
    result = lab.command("generate", finished, "--prompt", prompt, "--tokens", "24", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document.keys() >= {"prompt", "text", "tokens", "tokens_per_second"}
    assert (document["prompt"], document["text"]) == (prompt, tokenizer.decode(expected))
    assert document["tokens"] == len(expected)
    assert (
        lab.command("generate", finished, "--prompt", prompt, "--tokens", "24").out
        == prompt + document["text"] + "\n"
    )


def test_sampling_is_fixed_by_its_seed_and_moved_by_it(finished: Path) -> None:
    model = core.load(finished)
    one, again, other = (
        list(sample(model, [0, 5], tokens=20, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_a_small_top_p_is_greedy(finished: Path) -> None:
    model = core.load(finished)
    assert list(sample(model, [0, 5], tokens=12, temperature=2.0, top_p=1e-6)) == greedy(
        finished, [0, 5], 12
    )


def test_sampling_follows_the_models_probabilities(finished: Path) -> None:
    model = core.load(finished)
    with torch.no_grad():
        expected_V = (model.logits(torch.tensor([[0, 5]]))[0, -1].double() / 0.7).softmax(dim=0)
    drawn = [
        next(sample(model, [0, 5], tokens=1, temperature=0.7, seed=seed)) for seed in range(400)
    ]
    found_V = torch.bincount(torch.tensor(drawn), minlength=300) / len(drawn)
    likeliest = expected_V.topk(5).indices
    assert torch.allclose(found_V[likeliest].double(), expected_V[likeliest], atol=0.06)


def test_a_stop_token_ends_the_text_and_is_not_written(finished: Path) -> None:
    model = core.load(finished)
    text = greedy(finished, [0, 5], 12)
    stop = text[4]
    assert list(sample(model, [0, 5], tokens=12, stop=stop)) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tokens", "0"], "--tokens = 0: must be at least 1"),
        (["--temperature", "-1"], "--temperature = -1.0: must be a number of at least 0"),
        (["--temperature", "nan"], "--temperature = nan: must be a number of at least 0"),
        (["--temperature", "inf"], "--temperature = inf: must be a number of at least 0"),
        (["--top-p", "nan"], "--top-p = nan: must be more than 0 and at most 1"),
        (["--top-p", "0"], "--top-p = 0.0: must be more than 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p = 1.5: must be more than 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    lab: Lab, finished: Path, arguments: list[str], sentence: str
) -> None:
    result = lab.command("generate", finished, "--prompt", "a", *arguments)
    assert result.code == 2
    assert sentence in result.sentence


def test_a_short_table_of_positions_is_filled_and_not_passed(lab: Lab, tmp_path: Path) -> None:
    """Its run is whole too, with a sample as long as the table."""
    summary = lab.fit(tmp_path / "run", "model.rope.max_length=24", "budget.steps=1")
    assert summary["steps"] == 1
    assert (tmp_path / "run/summary.json").exists()
    assert (tmp_path / "run/sample.txt").read_text().strip()
    result = lab.command("generate", tmp_path / "run", "--prompt", "ab", "--json")
    assert result.code == 0, result.err
    prompt = len(Tokenizer.load(tmp_path / "run/tokenizer.json").encode("ab")) + 1
    ends = greedy(
        tmp_path / "run",
        [0, *Tokenizer.load(tmp_path / "run/tokenizer.json").encode("ab")],
        25 - prompt,
    )
    assert 0 not in ends, "the text ended by itself"
    assert json.loads(result.out)["tokens"] == 25 - prompt
    for arguments in (("ab", "--tokens", str(26 - prompt)), ("abc " * 40,)):
        result = lab.command("generate", tmp_path / "run", "--prompt", *arguments)
        assert result.code == 2
        assert "together at most 25" in result.sentence
        assert "model.rope.max_length = 24" in result.sentence


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("evaluate",)])
def test_a_folder_without_a_run_is_refused(
    lab: Lab, tmp_path: Path, command: tuple[str, ...]
) -> None:
    result = lab.command(command[0], tmp_path, *command[1:])
    assert result.code == 2
    assert (
        result.sentence == f"{tmp_path}: no checkpoint here: give a run folder or a checkpoint file"
    )


def test_evaluate_gives_the_numbers_of_the_summary(lab: Lab, finished: Path) -> None:
    result = lab.command("evaluate", finished, "--json")
    assert result.code == 0, result.err
    found, summary = json.loads(result.out), json.loads((finished / "summary.json").read_text())
    assert found["checkpoint"] == "step-00000012.ckpt"
    for key, of_summary in (
        *(("val_loss", "val_loss"), ("val_bits_per_byte", "val_bits_per_byte")),
        *(("val_max_vio_global", "max_vio_global"), ("val/mtp/acceptance_1", "mtp_acceptance")),
    ):
        assert found[key] == summary[of_summary], key
    assert "val_bits_per_byte" in lab.command("evaluate", finished).out


def test_evaluate_sets_xz_beside_it(lab: Lab, finished: Path) -> None:
    document = json.loads(lab.command("evaluate", finished, "--xz", "--json").out)
    assert 0 < document["xz_bits_per_byte"] < 8


def test_evaluate_takes_one_checkpoint_too(lab: Lab, finished: Path) -> None:
    numbers = [
        json.loads(lab.command("evaluate", finished / "checkpoints" / name, "--json").out)
        for name in ("best.ckpt", "step-00000010.ckpt")
    ]
    assert [found["checkpoint"] for found in numbers] == ["best.ckpt", "step-00000010.ckpt"]
    logged = {float(row["val_loss"]) for row in rows(finished) if "val_loss" in row}
    assert numbers[0]["val_loss"] == min(logged)
    assert numbers[1]["val_loss"] not in logged


def test_evaluate_names_the_recipe_whose_corpus_is_not_there(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace(str(lab.texts), "/nowhere"), encoding="utf-8")
    result = lab.command("evaluate", run)
    assert result.code == 2
    where = f"{run}/recipe.yaml: data.corpus: the glob '/nowhere/*.txt'"
    assert f"moeloom: {where} (data.corpus.paths) matches no file" in result.err


def test_evaluate_refuses_another_corpus(lab: Lab, finished: Path) -> None:
    text = lab.texts / "doc-03.txt"
    kept = text.read_bytes()
    try:
        text.write_bytes(kept + b" more")
        result = lab.command("evaluate", finished)
    finally:
        text.write_bytes(kept)
    assert result.code == 2
    assert "the corpus has changed since this run began" in result.sentence


def test_evaluate_refuses_a_corpus_without_held_out_documents(lab: Lab, tmp_path: Path) -> None:
    few = f"data.corpus.paths=[{lab.texts}/doc-0*.txt]"
    lab.fit(tmp_path / "run", few, "data.tokenizer.vocab=270", "budget.steps=1")
    result = lab.command("evaluate", tmp_path / "run")
    assert result.code == 2
    assert "the corpus has no validation split (fewer than 11 documents)" in result.sentence
