"""Every command that opens a run: code of somebody else's run needs `--trust`, code of one's own does not."""

import shutil
from pathlib import Path

import pytest
from foreign_code import downloaded_sweep, sentence, write_module
from lab import ROOT, SMALL, Lab
from tiers import first_by_default

import core
from core.contracts.errors import UserError
from core.run.evaluation import evaluate
from core.training.resume import newest_checkpoint

SWEEP = """\
title: which seed?
base: base.yaml
seeds: [0, 1]
variants: {{one: {{}}, two: {{overrides: {overrides}}}}}
baseline: one
budget: {{steps: 1}}
"""


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the module `loom_evil` of the current folder writes when it is imported."""
    write_module(tmp_path, tmp_path / "it-ran")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOELOOM_STATE", str(tmp_path / "state"))
    return tmp_path / "it-ran"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run that somebody else has made, which names the module."""
    folder = tmp_path / "downloaded"
    shutil.copytree(finished, folder)
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("plugins: [loom_evil]\n")
    text = (folder / "recipe.yaml").read_text().replace("plugins: []\n", "", 1)
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("describe", "{run}/recipe.yaml"),
        pytest.param(
            ("describe", "--compare", "dsv3_small", "{run}/recipe.yaml"), marks=pytest.mark.full
        ),
        ("evaluate", "{run}"),
        ("generate", "{run}", "--prompt", "a", "--tokens", "1"),
        ("convert", "to-hf", "{run}", "{run}-hf"),
        pytest.param(("fit", "{run}/recipe.yaml", "budget.steps=1"), marks=pytest.mark.full),
        ("fit", "{small}", "--resume", "{run}"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_no_command_runs_the_code_of_a_downloaded_run(
    lab: Lab, run: Path, marker: Path, arguments: tuple[str, ...]
) -> None:
    command = [argument.format(run=run, small=lab.file) for argument in arguments]
    result = lab.command(*command)
    assert result.code == 2
    assert result.sentence == sentence(run / "recipe.yaml")
    assert not marker.exists()
    if command[0] == "generate":
        result = lab.command(*command, "--trust")
        assert result.code == 0, result.err
        assert marker.exists()


def test_nor_do_the_functions(run: Path, marker: Path) -> None:
    for call in (core.load, core.compose, lambda path: evaluate(newest_checkpoint(path.parent))):
        with pytest.raises(UserError) as caught:
            call(run / "recipe.yaml" if call is not core.load else run)
        assert str(caught.value) == sentence(run / "recipe.yaml")
    assert not marker.exists()


def test_an_own_run_never_asks(lab: Lab, tmp_path: Path, marker: Path) -> None:
    """It is resumed, read and moved without a flag, whatever it names."""
    own = tmp_path / "own"
    fit = ("fit", lab.file, "plugins=[loom_evil]", "budget.steps=1")
    assert lab.command(*fit, "--out", own).code == 0
    again = lab.command(*fit, "--resume", own)
    assert again.code == 0, again.err
    own = own.rename(tmp_path / "moved")
    marker.unlink()
    result = lab.command("generate", own, "--prompt", "a", "--tokens", "1")
    assert result.code == 0, result.err
    assert marker.exists()


def test_a_recipe_names_what_the_resumed_run_may_name(lab: Lab, run: Path, marker: Path) -> None:
    result = lab.command("fit", lab.file, "plugins=[loom_evil]", "--resume", run)
    assert result.code == 0, result.err
    assert marker.exists()


@pytest.mark.parametrize("where", first_by_default(["overrides", "base"]))
def test_a_downloaded_sweep_runs_no_code(
    lab: Lab, tmp_path: Path, marker: Path, where: str
) -> None:
    folder = downloaded_sweep(tmp_path / "sweep")
    small = SMALL.format(texts=lab.texts)
    overrides = "{plugins: [loom_evil]}" if where == "overrides" else "{}"
    (folder / "sweep.yaml").write_text(SWEEP.format(overrides=overrides))
    named = "plugins: [loom_evil]\n" if where == "base" else ""
    (folder / "base.yaml").write_text(named + small)
    result = lab.command("sweep", folder / "sweep.yaml", "--dry-run")
    assert result.code == 2
    assert "the module 'loom_evil' would run" in result.err
    assert not marker.exists()
    result = lab.command("sweep", folder / "sweep.yaml", "--dry-run", "--trust")
    assert result.code == 0, result.err
    assert marker.exists()


def test_a_sweep_file_cannot_read_the_environment(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOM_SECRET", "hidden-value")
    file = tmp_path / "mine.yaml"
    (tmp_path / "base.yaml").write_text(SMALL.format(texts=lab.texts))
    text = SWEEP.format(overrides="{trainer.profiler: '${oc.env:LOOM_SECRET}'}")
    for key, sweep in (
        (
            "title",
            text.replace("which seed?", "'${oc.env:LOOM_SECRET}'").replace("trainer.pro", "x"),
        ),
        ("variants.two.overrides", text),
    ):
        file.write_text(sweep)
        result = lab.command("sweep", file, "--dry-run")
        assert result.code == 2
        assert f"{key}: ${{oc.env:LOOM_SECRET}} reads the environment, which" in result.err
        assert "hidden-value" not in result.err


def test_the_example_of_the_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    printed = page.partition("```text\n")[2].partition("```")[0]
    exec(example, {})
    assert capsys.readouterr().out == printed
