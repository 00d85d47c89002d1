"""`generate` and `evaluate` on the finished small run."""

import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, rows
from tiers import first_by_default

import core.run.loading
from core.data.tokenizer import Tokenizer
from core.generation import pass_times
from core.generation.options import GenerationOptions
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
    completions = core.complete(model, [[0, 5]] * 400, tokens=1, temperature=0.7, batch=400)
    drawn = [one.tokens[0] for one in completions]
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
        (["--top-k", "0"], "--top-k = 0: must be at least 1"),
        (["--batch", "0"], "--batch = 0: must be at least 1"),
        (["--stop", "\udcff"], "--stop is not UTF-8 text"),
        (["--stop", ""], "--stop '': must have at least one character"),
        (["--speculative", "0"], "--speculative = 0: must be at least 1"),
        (["--speculative", "99"], "--speculative = 99: must be 0 to 64"),
        (["--stream", "--json"], "--stream cannot be combined with --json"),
        (["--prompts", "a.txt"], "give one of --prompt TEXT, --prompt-ids IDS and --prompts FILE"),
        (["--device", "nonsense"], "--device nonsense: is no device; give cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device meta: the model cannot go there: "),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: the model cannot go there: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(
    lab: Lab,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    """Before the model is loaded."""
    monkeypatch.setattr(core.run.loading, "load", None)
    result = lab.command("generate", finished, "--prompt", "a", *arguments)
    assert result.code == 2
    assert sentence in result.sentence


PROMPTS = ["abc", "de fg", "a longer prompt: xyz"]


def prompts_file(folder: Path, ending: str) -> Path:
    """A file with three prompts, the second of them on line 3."""
    file = folder / f"prompts{ending}"
    if ending == ".txt":
        text = "{}\n\n{}\r\n{}\n".format(*PROMPTS)
    else:
        first, second, third = map(json.dumps, PROMPTS)
        text = f'{first}\n\n{{"id": 7, "prompt": {second}}}\n{third}'
    file.write_bytes(text.encode("utf-8-sig"))  # with a byte order mark
    return file


@pytest.mark.parametrize("ending", first_by_default([".jsonl", ".txt"]))
def test_prompts_of_a_file_are_continued_as_each_by_itself(
    lab: Lab, finished: Path, tmp_path: Path, ending: str
) -> None:
    file = prompts_file(tmp_path, ending)
    arguments = ("--prompts", file, "--tokens", "12", "--stop", "ab")
    result = lab.command("generate", finished, *arguments, "--batch", "2", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert set(document) == {
        "completions",
        "tokens_per_second",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "notices",
    }
    assert [one["prompt"] for one in document["completions"]] == PROMPTS
    tokenizer = Tokenizer.load(finished / "tokenizer.json")
    for one in document["completions"]:
        ids = [0, *tokenizer.encode(one["prompt"])]
        whole = list(takewhile(lambda token: token != 0, greedy(finished, ids, 12)))
        text = tokenizer.decode(whole)
        ended = "stop" if "ab" in text else "end" if len(whole) < 12 else "length"
        assert (one["text"], one["ended"]) == (text.partition("ab")[0], ended)
        assert one["prompt_tokens"] == len(ids)
    texts = [one["text"] for one in document["completions"]]
    blocks = [f"--- prompt {n} ---\n{PROMPTS[n - 1]}{texts[n - 1]}\n" for n in (1, 2, 3)]
    for more in ((), ("--stream",)):
        assert lab.command("generate", finished, *arguments, *more).out == "".join(blocks)


def test_a_stream_is_the_text_of_the_document(lab: Lab, finished: Path) -> None:
    arguments = ("--prompt", "abc", "--tokens", "24", "--temperature", "2", "--seed", "4")
    document = json.loads(lab.command("generate", finished, *arguments, "--json").out)
    result = lab.command("generate", finished, *arguments, "--stream")
    assert result.out == f"abc{document['text']}\n"
    assert "24 tokens, " in result.err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "missing.txt: there is no such file"),
        ("empty.txt", b" \n\n", "empty.txt: holds no prompt"),
        ("prompts.csv", b"a", "prompts.csv: must end in .txt or .jsonl"),
        ("bad.txt", b"\xff", "bad.txt: cannot be read: it is not UTF-8 text"),
        ("bad.jsonl", b'"a"\n{"text": "b"}', "bad.jsonl, line 2: must have the key prompt"),
        ("bad.jsonl", b'"a"\n\nb', "bad.jsonl, line 3: cannot be read as JSON: "),
        ("bad.jsonl", b"[1.5]", "bad.jsonl, line 1: must be a string or a list of token ids, or"),
        (
            "bad.jsonl",
            b'"\\ud800"',
            "bad.jsonl, line 1: must be a string or a list of token ids, or",
        ),
        ("long.txt", b"a\n\n" + b"abc " * 3000, "long.txt, line 3: a prompt of "),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_one_sentence(
    lab: Lab,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    sentence: str,
) -> None:
    """Before the model is loaded."""
    monkeypatch.setattr(core.run.loading, "load", None)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = lab.command("generate", finished, "--prompts", tmp_path / name)
    assert result.code == 2
    assert f"--prompts {tmp_path}/{sentence}" in result.sentence


def test_streams_of_several_texts_come_one_after_another(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    file = prompts_file(tmp_path, ".txt")
    result = lab.command("generate", finished, "--prompts", file, "--stream", "--batch", "2")
    assert result.code == 2
    assert result.sentence.startswith("--batch 2 cannot be combined with --stream: ")


def test_one_of_the_prompts_is_needed_and_must_be_text(lab: Lab, finished: Path) -> None:
    result = lab.command("generate", finished, "--prompt", "a\udcff")
    assert (result.code, result.sentence) == (2, "--prompt is not UTF-8 text")
    result = lab.command("generate", finished)
    assert (result.code, result.sentence) == (
        2,
        "give one of --prompt TEXT, --prompt-ids IDS and --prompts FILE",
    )


def test_token_ids_are_taken_as_they_are(lab: Lab, finished: Path, tmp_path: Path) -> None:
    text = lab.command("generate", finished, "--prompt", "abc", "--tokens", "4", "--json")
    ids = [0, *Tokenizer.load(finished / "tokenizer.json").encode("abc")]
    listed = ", ".join(map(str, ids))
    found = lab.command("generate", finished, "--prompt-ids", listed, "--tokens", "4", "--json")
    assert found.code == 0, found.err
    (document, other) = (json.loads(found.out), json.loads(text.out))
    assert document["prompt"] == ids
    assert document["token_ids"] == other["token_ids"]
    assert document["text"] == other["text"]
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{json.dumps(ids)}\n{{"prompt": {json.dumps(ids)}}}\n"abc"\n')
    several = lab.command("generate", finished, "--prompts", file, "--tokens", "4", "--json")
    texts = [one["text"] for one in json.loads(several.out)["completions"]]
    assert texts == [other["text"]] * 3


def test_without_a_tokenizer_ids_are_read_and_printed(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "tokenizer.json").unlink()
    with_it = lab.command("generate", finished, "--prompt-ids", "0 5", "--tokens", "3", "--json")
    found = lab.command("generate", run, "--prompt-ids", "0 5", "--tokens", "3")
    assert found.code == 0, found.err
    ids = json.loads(with_it.out)["token_ids"]
    assert found.out == " ".join(map(str, [0, 5, *ids])) + "\n"
    assert "note: " in found.err
    for more in (("--prompt", "abc"), ("--prompt-ids", "5", "--stop", "a")):
        refused = lab.command("generate", run, *more)
        assert refused.code == 2
        assert f"{run}/tokenizer.json" in refused.sentence


@pytest.mark.parametrize("ids", ["", "1,x", "-1", "1.5", "300"])
def test_ids_that_the_model_does_not_know_are_one_sentence(
    lab: Lab, finished: Path, ids: str
) -> None:
    found = lab.command("generate", finished, f"--prompt-ids={ids}")
    assert found.code == 2
    assert found.err.count("\n") == 1
    assert found.sentence.startswith("--prompt-ids")


def test_drafts_leave_the_text_and_are_counted(lab: Lab, finished: Path) -> None:
    arguments = ("--prompt", "abc", "--tokens", "24", "--json")
    plain = json.loads(lab.command("generate", finished, *arguments).out)
    result = lab.command("generate", finished, *arguments, "--speculative", "2")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert (document["text"], document["tokens"]) == (plain["text"], plain["tokens"])
    assert "speculative" not in plain
    found = document["speculative"]
    assert found["drafts"] == len(found["drafted"]) == 2
    rates = [a / d for a, d in zip(found["accepted"], found["drafted"], strict=True)]
    assert found["acceptance"] == rates
    assert found["tokens_per_pass"] == 1 + sum(found["accepted"]) / found["drafted"][0]
    seconds = found["pass_seconds"]
    cost = (seconds["verify"] + seconds["draft"]) / seconds["plain"]
    assert found["break_even"] == pytest.approx(cost - 1)
    assert found["speed_up"] == pytest.approx(found["tokens_per_pass"] / cost)
    assert seconds["rounds"] == 9


@pytest.mark.full
def test_passes_are_timed_with_no_more_drafts_than_the_text_had(
    lab: Lab, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = pass_times.measure_passes, tmp_path / "drafts"

    def measured(model: Any, texts: Any, options: GenerationOptions) -> Any:
        seen.write_text(str(options.drafts))
        return measure(model, texts, options)

    monkeypatch.setattr(pass_times, "measure_passes", measured)
    arguments = ("--prompt", "abc", "--tokens", "4", "--speculative", "64", "--json")
    result = lab.command("generate", finished, *arguments)
    assert result.code == 0, result.err
    drafted = json.loads(result.out)["speculative"]["drafted"]
    assert len(drafted) == int(seen.read_text()) <= 3


@pytest.mark.full
def test_what_drafts_are_worth_is_printed(lab: Lab, finished: Path) -> None:
    """`--speculative` alone means one draft."""
    result = lab.command("generate", finished, "--prompt", "abc", "--tokens", "24", "--speculative")
    assert result.code == 0, result.err
    assert "drafts accepted by place in a pass: " in result.err
    assert "drafts pay from " in result.err
    assert result.err.count("%") == 1


@pytest.mark.full
def test_a_run_without_a_drafting_head_is_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = "model.heads.mtp=null"
    lab.fit(tmp_path / "run", heads, "budget.steps=1")
    monkeypatch.setattr(core.run.loading, "load", None)
    result = lab.command("generate", tmp_path / "run", "--prompt", "a", "--speculative")
    assert result.code == 2
    assert result.sentence == (
        "--speculative: none of the model's loss heads drafts (next_token): train with a head such as mtp"
    )


@pytest.mark.full
def test_a_router_that_chooses_over_batches_is_named(lab: Lab, tmp_path: Path) -> None:
    router = "model.blocks.moe.ffn.router={name: switch, group: batch}"
    balance = "model.blocks.moe.ffn.balance=[]"
    heads = "model.heads.mtp=null"
    lab.fit(tmp_path / "run", router, balance, heads, "budget.steps=1")
    file = prompts_file(tmp_path, ".txt")
    arguments = ("generate", tmp_path / "run", "--prompts", file, "--tokens", "3")
    note = (
        "note: the router of blocks.1 chooses over a whole batch, so a text depends on the others"
    )
    assert note in lab.command(*arguments).err
    assert note not in lab.command(*arguments, "--batch", "1").err


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
    assert "the run has held out nothing to validate on; --text FILE scores" in result.sentence
