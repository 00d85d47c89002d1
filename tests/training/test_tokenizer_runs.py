"""Runs whose tokenizer comes from a file: they keep it, wherever they are moved, and notice another one."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from lab import Lab
from tokenizer_files import BEGIN, END, TEMPLATE, write_deepseek_like

from core.contracts.errors import UserError
from core.generation.run_tokenizer import RunTokenizer
from core.recipe.compose import compose, compose_run
from core.run.evaluation import evaluate
from core.run.training import fit
from core.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek_like(tmp_path_factory.mktemp("hf"), template=TEMPLATE)


@pytest.fixture(scope="module")
def run(lab: Lab, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small recipe with the tokenizer, moved after its end, and the tokenizer's folder removed."""
    source = tmp_path_factory.mktemp("source") / "hf"
    shutil.copytree(hf, source)
    folder = tmp_path_factory.mktemp("runs")
    lab.fit(
        folder / "first", f"data.tokenizer.file={source}", "data.tokenizer.pad_to_multiple_of=32"
    )
    shutil.move(folder / "first", folder / "moved")
    shutil.rmtree(source)
    return folder / "moved"


def test_a_moved_run_is_whole(run: Path, hf: Path) -> None:
    recipe = compose_run(run / "recipe.yaml")
    assert recipe.data.tokenizer.file == str(run / "tokenizer.json")
    assert recipe.data.tokenizer.vocab == 320
    assert yaml.safe_load((run / "recipe.yaml").read_text())["data"]["tokenizer"] == {
        "vocab": 320,
        "file": "./tokenizer.json",
        "pattern": None,
        "begin": BEGIN,
        "end": END,
        "pad_to_multiple_of": 32,
    }
    for name in ("tokenizer.json",):
        assert (run / name).read_bytes() == (hf / name).read_bytes()
    assert json.loads((run / "tokenizer_config.json").read_text()) == json.loads(
        (hf / "tokenizer_config.json").read_text()
    )
    assert (run / "chat_template.jinja").read_text() == TEMPLATE
    summary = json.loads((run / "summary.json").read_text())
    found = evaluate(RunFolder(run).path)
    assert found["val_bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"])


def test_its_prompts_begin_with_its_marker(run: Path) -> None:
    tokenizer = RunTokenizer.of(RunFolder(run))
    assert tokenizer.prompt("the")[0] == 0
    assert tokenizer.end == 1


def test_another_run_takes_the_tokenizer_of_a_run(lab: Lab, run: Path, tmp_path: Path) -> None:
    section = compose(lab.file, [f"data.tokenizer.file={run}"]).data.tokenizer
    assert (section.vocab, section.begin, section.end) == (303, BEGIN, END)


def test_provenance_names_file_checksum_and_markers(run: Path) -> None:
    found = json.loads((run / "provenance.json").read_text())["tokenizer"]
    assert (found["begin"], found["end"], len(found["sha256"])) == (0, 1, 64)
    assert found["file"].endswith("/hf")


@pytest.mark.full
def test_a_run_goes_on_with_its_own_tokenizer_and_refuses_another(
    lab: Lab, run: Path, hf: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(run, short)
    (short / "summary.json").unlink()
    for file in (short / "checkpoints").glob("*"):
        if "0005" not in file.name and "5" not in file.stem:
            file.unlink()
    fit(compose(short / "recipe.yaml"), RunFolder(short), resume=True, say=lambda _: None)
    assert (short / "metrics.csv").read_bytes().count(b"\n") > 1
    other = write_deepseek_like(tmp_path / "other", vocab=300)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    recipe = lab.recipe(f"data.tokenizer.file={other}", "data.tokenizer.pad_to_multiple_of=32")
    (short / "summary.json").unlink()
    with pytest.raises(UserError, match="is not the tokenizer that the run was started with"):
        fit(recipe, RunFolder(short), resume=True, say=lambda _: None)


def test_a_changed_copy_is_noticed(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    file = damaged / "tokenizer.json"
    file.write_text(file.read_text().replace("<think>", "<thinks>"))
    with pytest.raises(UserError, match="has changed since it was written"):
        RunFolder(damaged).load_tokenizer()


def test_mistakes_are_found_before_the_work(lab: Lab, hf: Path, tmp_path: Path) -> None:
    done = lab.command("fit", lab.file, "data.tokenizer.file=nowhere", "--out", tmp_path / "run")
    assert done.code == 2
    assert "nowhere': there is no such file" in done.sentence
    assert not (tmp_path / "run").exists()
    small = [f"data.tokenizer={{file: {hf}, vocab: 302, begin: '{BEGIN}', end: '{END}'}}"]
    done = lab.command("fit", lab.file, *small, "--out", tmp_path / "run")
    assert done.code == 2
    assert "data.tokenizer.vocab = 302: must be at least 303" in done.sentence
    assert not (tmp_path / "run").exists()
