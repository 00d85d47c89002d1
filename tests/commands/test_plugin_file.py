"""A plugin that is one file beside the recipe: from `catalog new` to a trained run that keeps its code."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import Lab
from tiers import first_by_default

import core
from core.authoring.skeleton import RECIPES
from core.contracts.errors import UserError
from core.recipe.compose import compose, compose_run

ROUTER = "model.blocks.moe.ffn.router={name: mine, top_k: 2}"


@dataclass(frozen=True)
class Own:
    """A folder with a router of one file and a recipe that names it."""

    folder: Path

    @property
    def plugin(self) -> Path:
        """The file."""
        return self.folder / "my_router.py"

    @property
    def recipe(self) -> Path:
        """The recipe."""
        return self.folder / "mine.yaml"

    def write(self, lab: Lab) -> None:
        """Writes both."""
        made = lab.command("catalog", "new", "router", "mine", self.plugin)
        assert made.code == 0, made.err
        text = lab.file.read_text()
        given = text[text.index("{name: deepseek_v3") : text.index("        balance:")]
        text = text.replace(given, "{name: mine, top_k: 2}\n")
        self.recipe.write_text(f"plugins: [./my_router.py]\n{text}")


@pytest.fixture
def own(lab: Lab, tmp_path: Path) -> Own:
    """A new folder."""
    made = Own(tmp_path / "own")
    made.write(lab)
    return made


@pytest.fixture(scope="module")
def trained(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with the router, which tests copy."""
    folder = tmp_path_factory.mktemp("trained")
    made = Own(folder / "own")
    made.write(lab)
    done = lab.command("fit", made.recipe, "budget.steps=2", "--out", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


def edit(file: Path) -> None:
    """Other code with the same components."""
    file.write_text(file.read_text() + "\n# edited\n")


@pytest.mark.parametrize("slot", first_by_default(list(RECIPES)))
def test_a_new_file_of_every_template_registers_its_component(
    lab: Lab, tmp_path: Path, slot: str
) -> None:
    file = tmp_path / "part.py"
    assert lab.command("catalog", "new", slot, "mine", file).code == 0
    found = lab.command("catalog", "--plugin", file, "show", slot, "mine", "--json")
    assert found.code == 0, found.err
    document = json.loads(found.out)
    assert (document["distribution"], document["status"]) == ("file", "ok")
    again = lab.command("catalog", "new", slot, "mine", file)
    assert (again.code, again.sentence) == (2, f"{file} exists already; name another file")


def test_a_recipe_finds_the_file_beside_it_from_any_folder(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = compose(own.recipe)
    assert recipe.plugins == [str(own.plugin)]
    assert recipe.model.blocks["moe"].ffn.config.router.name == "mine"


def test_the_command_line_names_files_from_the_current_folder(
    lab: Lab, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.folder)
    recipe = compose(lab.file, ["plugins=[./my_router.py]", ROUTER])
    assert recipe.plugins == [str(own.plugin)]
    extending = own.folder / "below" / "further.yaml"
    extending.parent.mkdir()
    extending.write_text("extends: ../mine.yaml\nseed: 4\n")
    assert compose(extending).plugins == [str(own.plugin)]


def test_a_run_keeps_the_code_and_its_hash(
    lab: Lab, own: Own, trained: Path, tmp_path: Path
) -> None:
    """So it can be moved without the file that it was started with."""
    held = trained / "plugin_files" / "my_router.py"
    assert held.read_bytes() == own.plugin.read_bytes()
    components = json.loads((trained / "provenance.json").read_text())["components"]
    (router,) = [part for part in components if part["slot"] == "router"]
    digest = hashlib.sha256(held.read_bytes()).hexdigest()
    assert router["version"] == f"sha256:{digest[:12]}"
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(trained, moved)
    recipe = compose_run(moved / "recipe.yaml")
    assert recipe.plugins == [str(moved / "plugin_files" / "my_router.py")]
    before, after = core.load(trained).state_dict(), core.load(moved).state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_a_run_continues_with_its_code_and_with_no_other(
    lab: Lab, own: Own, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "summary.json").unlink()
    edit(own.plugin)
    arguments = ("fit", own.recipe, "budget.steps=2", "--resume", run)
    other = lab.command(*arguments)
    assert other.code == 2
    assert other.sentence == (
        f"--resume {run}: {own.plugin} is not the code that the run was started with, which is "
        f"{run}/plugin_files/my_router.py"
    )
    shutil.copy(run / "plugin_files" / "my_router.py", own.plugin)
    again = lab.command(*arguments)
    assert again.code == 0, again.err
    assert (run / "summary.json").exists()


def test_code_of_a_run_that_was_made_elsewhere_does_not_run(
    lab: Lab, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    held = run / "plugin_files" / "my_router.py"
    mark = tmp_path / "it-ran"
    monkeypatch.setenv("MOELOOM_STATE", str(tmp_path / "other-machine"))
    held.write_text(f"open({str(mark)!r}, 'w').close()\n" + held.read_text())
    for command in (("describe", run / "recipe.yaml"), ("generate", run, "--prompt", "a")):
        refused = lab.command(*map(str, command))
        assert refused.code == 2
        assert refused.sentence.startswith(
            f"{run}/recipe.yaml: plugins: the code in {held} would run"
        )
        assert refused.sentence.endswith("--trust allows it")
    assert not mark.exists()
    assert lab.command("describe", run / "recipe.yaml", "--trust").code == 0
    assert mark.exists()


def test_edited_code_in_a_run_of_this_machine_does_not_run_either(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    compose_run(run / "recipe.yaml")
    edit(run / "plugin_files" / "my_router.py")
    with pytest.raises(UserError, match="would run, which was not put there by this machine"):
        compose_run(run / "recipe.yaml")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no file {file}"),
        ("def register(", "SyntaxError: "),
        ("import nowhere_at_all", "ModuleNotFoundError: "),
        ("", "my_router.py implements no hook: it needs"),
    ],
    ids=["missing", "syntax", "import", "no hook"],
)
def test_a_file_that_is_no_plugin_is_one_sentence(
    own: Own, content: str | None, sentence: str
) -> None:
    own.plugin.unlink()
    if content is not None:
        own.plugin.write_text(content)
    with pytest.raises(UserError) as caught:
        compose(own.recipe)
    assert str(caught.value).startswith(f"{own.recipe}: plugins: plugin {str(own.plugin)!r}")
    assert sentence.format(file=own.plugin) in str(caught.value)


def test_two_files_of_one_name_are_one_sentence(own: Own, tmp_path: Path) -> None:
    other = tmp_path / "other" / "my_router.py"
    text = own.recipe.read_text().replace("[./my_router.py]", f"[./my_router.py, {other}]")
    own.recipe.write_text(text)
    with pytest.raises(UserError, match="have the same name, and a run keeps both in one folder"):
        compose(own.recipe)


def test_the_kit_checks_a_file(own: Own) -> None:
    from core.testing.run import cases

    names = {case.name for case in cases(str(own.plugin))}
    assert "router/mine" in {name.partition("::")[0] for name in names}
    assert len(names) > 10
