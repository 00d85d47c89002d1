"""`fit`: its JSON, and every mistake as one sentence with exit code 2 that leaves nothing in the way."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, rows, write_texts
from tiers import first_by_default


@pytest.fixture(scope="module")
def chatty_run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A short run of the command that prints all it can, with overrides on both sides of an option."""
    run = tmp_path_factory.mktemp("command") / "run"
    chatty = (
        "trainer.enable_progress_bar=true",
        "trainer.enable_model_summary=true",
        "trainer.profiler=simple",
    )
    return lab.command("fit", lab.file, *chatty, "--out", run, "budget.steps=6", "--json"), run


def test_json_is_the_summary_and_nothing_else_on_stdout(chatty_run: tuple[Any, Path]) -> None:
    done, run = chatty_run
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((run / "summary.json").read_text())


def test_the_last_line_of_progress_shows_loss_and_speed_on_stderr(
    chatty_run: tuple[Any, Path],
) -> None:
    done, run = chatty_run
    assert f"run folder: {run}" in done.err
    assert re.search(r"^step 6/6  loss \d.*  lr 0.003  [\d,]+ tokens/s$", done.err, re.MULTILINE)


def test_without_json_one_line_sums_up(lab: Lab, tmp_path: Path) -> None:
    done = lab.command("fit", lab.file, "budget.steps=1", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    assert line.startswith("val_bits_per_byte ")


def test_a_recipe_may_be_named_and_out_left_away(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/small", "runs/small-2"):
        done = lab.command("fit", lab.file, "budget.steps=1")
        assert done.code == 0, done.err
        assert (tmp_path / expected / "summary.json").exists()


def few(folder: Path, count: int, words: int) -> str:
    write_texts(folder, count=count, words=words)
    return f"data.corpus.paths=[{folder}/*.txt]"


def empty(folder: Path) -> str:
    folder.mkdir()
    (folder / "none.txt").write_text("")
    return f"data.corpus.paths=[{folder}/*.txt]"


def latin(folder: Path) -> str:
    folder.mkdir()
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    return f"data.corpus.paths=[{folder}/*.txt]"


MISTAKES: dict[str, tuple[Any, str]] = {
    "a misspelt key": (
        lambda t: "batch.seqences=4",
        "batch.seqences: unknown key; did you mean sequences?",
    ),
    "a misspelt plugin": (lambda t: "model.attention.name=mlaa", "model.attention.name: "),
    "a wrong type": (
        lambda t: "budget.steps=many",
        "budget.steps = 'many': must be a whole number or null",
    ),
    "too many experts per token": (
        lambda t: "model.blocks.moe.ffn.router.top_k=5",
        "model.blocks.moe.ffn.router.top_k = 5: must be between 2 and 4",
    ),
    "groups that do not divide": (
        lambda t: "model.blocks.moe.ffn.experts=9",
        "groups = 4: must divide experts = 9",
    ),
    "a negative count": (
        lambda t: "model.blocks.moe.count=-1",
        "model.blocks.moe.count = -1: must be at least 0",
    ),
    "a sequence past the table": (
        lambda t: "data.sequence_length=5000",
        "data.sequence_length = 5000: must be at most model.rope.max_length = 4096",
    ),
    "an empty corpus": (
        lambda t: empty(t / "empty"),
        "the corpus is empty: 1 document, none with text",
    ),
    "no corpus": (lambda t: f"data.corpus.paths=[{t}/none/*.txt]", "matches no file"),
    "a corpus of three words": (
        lambda t: few(t / "short", 1, 3),
        "is more than the training text can fill",
    ),
    "a corpus below a sequence": (lambda t: "data.sequence_length=4000", "the corpus is too short"),
    "text that is not UTF-8": (
        lambda t: latin(t / "latin"),
        "latin.txt is not UTF-8: byte 0xe9 at offset 3",
    ),
    "a vocabulary too large": (
        lambda t: "data.tokenizer.vocab=9999",
        "data.tokenizer.vocab = 9999 is more than",
    ),
    "a vocabulary too small": (
        lambda t: "data.tokenizer.vocab=100",
        "data.tokenizer.vocab = 100: must be at least 257",
    ),
    "ranks that do not divide": (
        lambda t: "strategy={name: ddp, ranks: 3}",
        "must divide batch.sequences = 4",
    ),
    "ranks that do not divide a validation": (
        lambda t: ["strategy={name: ddp, ranks: 4}", "validation.sequences=6"],
        "must divide validation.sequences = 6",
    ),
    "weights from nowhere": (lambda t: "initial_weights=nowhere", "nowhere: no checkpoint here"),
}


@pytest.mark.parametrize("mistake", first_by_default(MISTAKES, keep=9))
def test_a_mistake_is_one_sentence_and_does_not_block_a_second_try(
    lab: Lab, tmp_path: Path, mistake: str
) -> None:
    make, sentence = MISTAKES[mistake]
    made, run = make(tmp_path), tmp_path / "run"
    done = lab.command(
        "fit", lab.file, *([made] if isinstance(made, str) else made), "--out", run, "--json"
    )
    assert (done.code, done.out) == (2, ""), done.err
    assert sentence in done.sentence
    assert not [file for file in run.rglob("*") if file.is_file()]


@pytest.mark.full
def test_a_second_try_into_the_folder_of_a_failed_one_works(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert lab.command("fit", lab.file, "data.sequence_length=4000", "--out", run).code == 2
    assert lab.command("fit", lab.file, "budget.steps=1", "--out", run).code == 0
    assert [row["step"] for row in rows(run)] == ["1", "1"]


def test_a_missing_recipe_is_reported_with_what_there_is(lab: Lab, tmp_path: Path) -> None:
    done = lab.command("fit", "dsv3_smal", "--out", tmp_path / "run")
    assert done.code == 2
    assert "dsv3_smal: no such recipe; did you mean dsv3_small" in done.sentence


def test_an_out_that_cannot_be_written_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = lab.command("fit", lab.file, "--out", tmp_path / "file" / "run")
    assert done.code == 2
    assert done.sentence == f"--out {tmp_path}/file/run: cannot be written: Not a directory"


def test_an_out_that_holds_a_run_is_refused_and_left_alone(lab: Lab, finished: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    done = lab.command("fit", lab.file, "--out", finished)
    assert done.code == 2
    assert done.sentence.startswith(
        f"--out {finished}: holds a run already; continue it with --resume {finished}"
    )
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_a_cache_that_cannot_be_written_is_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path / "file" / "cache"))
    done = lab.command("fit", lab.file, "--out", tmp_path / "run")
    assert done.code == 2
    assert "set MOELOOM_CACHE to another folder" in done.sentence


def test_an_error_of_ours_keeps_its_traceback(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is no user's mistake is printed with its traceback."""
    import core.run.environment

    def broken(recipe: Any, **_: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(core.run.environment, "build", broken)
    done = lab.command("fit", lab.file, "--out", tmp_path / "run")
    assert done.code == 1
    assert "ZeroDivisionError: ours" in done.err
