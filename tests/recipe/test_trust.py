"""What a recipe may run and read: modules that a downloaded run names, and the environment."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign_code import downloaded_sweep, sentence, write_module
from omegaconf import OmegaConf

from core.contracts.errors import UserError
from core.recipe.compose import compose, compose_run
from core.recipe.trust import is_of_a_run, record
from core.storage import records
from core.study.sweep_file import read_sweep
from recipe.conftest import MessageOf, Write


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of its own for each test."""
    folder = tmp_path / "state" / "moeloom"
    monkeypatch.setenv("MOELOOM_STATE", str(folder))
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the module `loom_evil` writes when it is imported; Python finds the module."""
    file = tmp_path / "it-ran"
    folder = tmp_path / "site"
    folder.mkdir()
    write_module(folder, file)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("loom_evil", None)
    yield file
    sys.modules.pop("loom_evil", None)


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """The recipe of a run folder, which names the module."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    text = base.read_text().replace("loggers: []", "loggers: []\nplugins: [loom_evil]")
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_downloaded_run_runs_no_module(run: Path, marker: Path, message_of: MessageOf) -> None:
    assert message_of(run) == sentence(run)
    with pytest.raises(UserError, match="--trust allows it"):
        compose_run(run)
    assert not marker.exists()
    assert compose(run, trust=True).plugins == ["loom_evil"]
    assert marker.exists()


@pytest.mark.parametrize("name", ["provenance.json", "checkpoints", "weights"])
def test_any_file_of_a_run_folder_is_of_the_run(
    run: Path, marker: Path, message_of: MessageOf, name: str
) -> None:
    (run.parent / "checkpoints").rmdir()
    (run.parent / name).mkdir()
    other = run.parent / "notes" / "other.yaml"
    other.parent.mkdir()
    shutil.copy(run, other)
    assert message_of(other) == sentence(other)
    link = run.parent.parent / "link.yaml"
    link.symlink_to(other)
    assert message_of(link) == sentence(link)
    assert not marker.exists()


def test_a_command_that_opens_a_run_looks_at_nothing_else(run: Path, marker: Path) -> None:
    (run.parent / "checkpoints").rmdir()
    assert not is_of_a_run(run)
    with pytest.raises(UserError, match="would run"):
        compose_run(run)
    assert not marker.exists()
    assert compose_run(run, named=["loom_evil"]).plugins == ["loom_evil"]


@pytest.mark.parametrize("where", ["extends", "smoke", "item", "text"])
def test_every_way_to_name_a_module_asks(
    run: Path, marker: Path, message_of: MessageOf, write: Write, where: str
) -> None:
    text = run.read_text()
    if where == "extends":
        assert message_of(write("extends: run/recipe.yaml\nseed: 1\n")) == sentence(run)
    elif where == "smoke":
        text = text.replace("plugins: [loom_evil]\n", "")
        run.write_text(text.replace("smoke: {", "smoke: {plugins: [loom_evil], "))
        assert compose(run).plugins == []
        assert message_of(run, smoke=True) == sentence(run)
        own = write("extends: run/recipe.yaml\nsmoke: {seed: 1}\n")
        assert message_of(own, smoke=True) == sentence(run)
        assert message_of(own, "smoke.plugins=[]", smoke=True) == sentence(run)
    elif where == "item":
        run.write_text(text.replace("[loom_evil]", "[plugins.mla, loom_evil]"))
        assert message_of(run, "plugins.0=plugins.mha") == sentence(run)
    else:
        run.write_text(text.replace("[loom_evil]", "loom_evil"))
        assert message_of(run) == sentence(run)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["absolute", "current folder"])
def test_what_a_run_extends_is_of_the_run_wherever_it_is(
    run: Path, marker: Path, message_of: MessageOf, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    base = run.parent.parent / "elsewhere" / "base.yaml"
    base.parent.mkdir()
    shutil.move(run, base)
    monkeypatch.chdir(base.parent)
    named = base if form == "absolute" else "/proc/self/cwd/base.yaml"
    run.write_text(f"extends: {named}\n")
    assert "the module 'loom_evil' would run" in message_of(run)
    run.write_text("extends: dsv3_small\n")
    assert compose(run).plugins == []
    assert not marker.exists()


@pytest.mark.parametrize(
    "keys",
    [
        "overrides: {' plugins': [loom_evil]}",
        "overrides: {\"plugins=['loom_evil'] #\": 1}",
        "grid: {' plugins': [[loom_evil]]}",
        "overrides: {plugins: [loom_evil]}",
        "budget: {'steps=3 #': 1}",
    ],
)
def test_the_overrides_of_a_downloaded_sweep_name_nothing(
    base: Path, marker: Path, tmp_path: Path, keys: str
) -> None:
    folder = downloaded_sweep(tmp_path / "sweep")
    file = folder / "again.yaml"
    body = f"base: {base}\nseeds: [1]\nvariants: {{a: {{}}}}\nbaseline: a\n{keys}\n"
    file.write_text(body)
    with pytest.raises(UserError, match=r"would run|key path|not a key"):
        read_sweep(file)
    assert not marker.exists()


def test_the_base_of_a_downloaded_sweep_is_the_sweeps(
    run: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = downloaded_sweep(tmp_path / "sweep")
    shutil.copy(run, tmp_path / "base.yaml")
    monkeypatch.chdir(tmp_path)
    file = folder / "again.yaml"
    file.write_text("base: base.yaml\nseeds: [1]\nvariants: {a: {}}\nbaseline: a\n")
    with pytest.raises(UserError, match="the module 'loom_evil' would run"):
        read_sweep(file)
    assert not marker.exists()


def test_a_link_is_followed_in_a_run_where_it_was_made(run: Path, tmp_path: Path) -> None:
    run.write_text(run.read_text().replace("plugins: [loom_evil]\n", ""))
    (run.parent / "checkpoints").rmdir()
    (tmp_path / "scratch").mkdir()
    (run.parent / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match=r"leads out of .*; --trust allows it"):
        compose_run(run)
    record(run)
    compose_run(run)
    shutil.copytree(run.parent, tmp_path / "copy", symlinks=True)
    with pytest.raises(UserError, match=r"leads out of .*; --trust allows it"):
        compose_run(tmp_path / "copy" / "recipe.yaml")


def test_a_module_cannot_be_named_by_an_interpolation(
    run: Path, marker: Path, message_of: MessageOf, write: Write
) -> None:
    """In the user's own recipe, it could name what a downloaded one holds."""
    file = write("extends: run/recipe.yaml\nplugins: ['${seed}']\n")
    assert (
        message_of(file)
        == f"{file}: plugins: '${{seed}}' must be the name of a module or a file itself"
    )
    assert not marker.exists()


def test_what_the_user_names_runs_without_a_flag(run: Path, marker: Path, write: Write) -> None:
    assert compose(run, ["plugins=[]"]).plugins == []
    assert not marker.exists()
    assert compose(run, ["plugins=[loom_evil]"]).plugins == ["loom_evil"]
    own = write(run.read_text(), "own.yaml")
    assert compose(own).plugins == ["loom_evil"]
    assert marker.exists()


def test_installed_plugins_need_no_flag_and_no_search_of_the_current_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.recipe.compose.search_current_folder", None)
    run.write_text(run.read_text().replace("[loom_evil]", "[plugins.mla]"))
    assert compose_run(run).plugins == ["plugins.mla"]


def test_an_own_run_is_known_wherever_it_is_until_it_is_edited(
    run: Path, marker: Path, message_of: MessageOf
) -> None:
    record(run)
    moved = run.parent.rename(run.parent.with_name("moved")) / "recipe.yaml"
    assert compose_run(moved).plugins == ["loom_evil"]
    marker.unlink()
    sys.modules.pop("loom_evil")
    moved.write_text(moved.read_text() + "# edited\n")
    assert message_of(moved) == sentence(moved)
    assert not marker.exists()


def test_a_sweeps_recipe_is_asked_about_too(run: Path, message_of: MessageOf) -> None:
    sweep = run.parent.parent / "sweep"
    (sweep / "recipes").mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    file = shutil.copy(run, sweep / "recipes" / "bias.yaml")
    assert message_of(file) == sentence(file)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:LOOM_SECRET}",
        "${oc.env:LOOM_SECRET,default}",
        "${oc.decode:${oc.env:LOOM_SECRET}}",
        "${oc.${title}:LOOM_SECRET}",
        "before ${oc.env:LOOM_SECRET} after",
    ],
)
def test_a_recipe_cannot_read_the_environment(
    base: Path, message_of: MessageOf, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LOOM_SECRET", "hidden-value")
    base.write_text(f"{base.read_text()}title: env\ntrainer: {{profiler: '{value}'}}\n")
    text = message_of(base)
    assert text.startswith(f"{base}: trainer.profiler: ${{oc.env:LOOM_SECRET")
    assert "reads the environment, which a recipe may not do" in text
    assert "hidden-value" not in text


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=${oc.env:LOOM_SECRET}", "seed"),
        ("loggers=[{name: '${oc.env:LOOM_SECRET}'}]", "loggers[0].name"),
        # a text that only becomes an interpolation when it is read
        ("seed=${oc.decode:'$\\{oc.env:LOOM_SECRET\\}'}", "seed"),
        ("trainer={profiler: '\\${oc.env:LOOM_SECRET}'}", "trainer"),
    ],
)
def test_nor_can_an_override(
    base: Path, message_of: MessageOf, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("LOOM_SECRET", "3")
    text = message_of(base, override)
    assert text.startswith(f"command line ({override}): {key}: ${{oc.env:LOOM_SECRET}} reads the")


def test_no_resolver_imports_or_runs_anything(
    base: Path, marker: Path, message_of: MessageOf
) -> None:
    """`oc.coerce` imports the module that it is given; other resolvers may do anything."""
    OmegaConf.register_resolver("loom_run", lambda: marker.touch())
    try:
        for value in ("${oc.coerce:loom_evil.X,1}", "${loom_run:}"):
            assert "Unsupported interpolation type" in message_of(base, f"seed={value}")
    finally:
        OmegaConf.clear_resolver("loom_run")
    assert not marker.exists()


def test_the_resolvers_are_as_before_afterwards(
    base: Path, message_of: MessageOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOM_SECRET", "3")
    message_of(base, "seed=${oc.env:LOOM_SECRET}")
    assert OmegaConf.create({"a": "${oc.env:LOOM_SECRET}"}).a == "3"
    assert compose(base, ["seed=${oc.decode:'7'}"]).seed == 7


def test_records_are_lines_that_only_the_user_reads(state: Path) -> None:
    assert not records.contains("recipes", "abc")
    for value in ("abc", "def", "abc"):
        records.add("recipes", value)
    assert (state / "recipes.txt").read_text() == "abc\ndef\n"
    assert (state / "recipes.txt").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    assert records.contains("recipes", "def")
    assert not records.contains("data", "def")
    assert not records.contains("recipes", "de")


def test_a_state_folder_that_cannot_be_written_costs_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOELOOM_STATE", str(tmp_path / "file"))
    for value in ("abc", "def"):
        records.add("recipes", value)
        assert not records.contains("recipes", value)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: nothing can be recorded in {tmp_path / 'file'} (")


def test_where_the_records_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.setenv("MOELOOM_STATE", "~/mine")
    assert records.state_folder() == Path("/home/me/mine")
    monkeypatch.delenv("MOELOOM_STATE")
    assert records.state_folder() == Path("/state/moeloom")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert records.state_folder() == Path("/home/me/.local/state/moeloom")
