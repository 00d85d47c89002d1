"""The run folder: its files, and writing to it so that a kill leaves whole files."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from core.contracts.errors import UserError
from core.contracts.schema import Section
from core.recipe import trust
from core.training.machine import code, machine

WEIGHTS_INDEX = "model.safetensors.index.json"
"""The file that names the safetensors file of every tensor, in a converted run as in other programs' folders."""


class RunFolder:
    """A run's files by name.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run's tokens were made with."""
        return self.path / "tokenizer.json"

    @property
    def provenance(self) -> Path:
        """The components, versions, commit, machine and command that shaped the run."""
        return self.path / "provenance.json"

    @property
    def summary(self) -> Path:
        """The results of the run; the file exists once the run is complete."""
        return self.path / "summary.json"

    @property
    def converted_weights(self) -> Path:
        """The index of a converted run's weights, which stand in place of checkpoints."""
        return self.path / "weights" / WEIGHTS_INDEX

    @property
    def source_files(self) -> Path:
        """The folder of a converted run that holds the small files which came with the weights."""
        return self.path / "hf"

    @property
    def source_layout(self) -> Path:
        """The file of a converted run that says which tensor of its source stood in which file and format."""
        return self.source_files / "layout.json"

    def never_started(self) -> bool:
        """Whether a run was killed here before it wrote its recipe, so that it has to start anew.

        Raises:
            UserError: there is no run in this folder at all, or one without its recipe.
        """
        if self.recipe.exists():
            return False
        begun = (self.path / "checkpoints").is_dir()
        if not begun or any((self.path / "checkpoints").iterdir()):
            missing = "there is no run in this folder (no recipe.yaml)"
            raise UserError(f"--resume {self.path}: {missing}")
        return True

    def create(self) -> None:
        """Makes the folder.

        Raises:
            UserError: it cannot be written, or holds a run already.
        """
        if self.recipe.exists():
            how = f"continue it with --resume {self.path}, or name another"
            raise UserError(f"--out {self.path}: holds a run already; {how}")
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            probe.write_text("")
            probe.unlink()
        except OSError as cause:
            raise UserError(f"--out {self.path}: cannot be written: {cause.strerror}") from cause

    def remove_partial_files(self) -> None:
        """Deletes the half-written checkpoints that a kill left; they can be large."""
        for half in (self.path / "checkpoints").glob(".*.tmp"):
            half.unlink()

    def write_text(self, name: str, text: str) -> None:
        """Writes a file under a temporary name and moves it into place."""
        target = self.path / name
        temporary = target.with_name(f".{name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON document."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_recipe(self, values: dict[str, Any]) -> None:
        """Writes the resolved recipe, and records that it was written here."""
        self.write_text("recipe.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        trust.record(self.recipe)


RUNS = Path("runs")
"""The folder of all runs that are started without `--out`."""


def start_folder(out: Path | None, name: str) -> Path:
    """The folder of a new run: `out`, or `runs/name`, `runs/name-2`, ... whichever holds no run yet."""
    if out is not None:
        return out
    folder = RUNS / name
    number = 1
    while (folder / "recipe.yaml").exists():
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def resumable(resume: str | None, out: Path | None, name: str) -> Path | None:
    """The folder of the run to continue; None where a new run is to start.

    `auto` means `out` if it holds a run, without `out` the newest run of this recipe that has no summary.

    Raises:
        UserError: a run named with `--resume` and another folder with `--out`.
    """
    if resume is None:
        return None
    if resume != "auto":
        if out is not None and out.resolve() != Path(resume).resolve():
            raise UserError(f"--out {out}: a resumed run stays in its own folder, {resume}")
        return Path(resume)
    if out is not None:
        return out if (out / "recipe.yaml").exists() else None
    incomplete = []
    for recipe in RUNS.glob(f"{name}*/recipe.yaml"):
        run = recipe.parent
        if _is_named_after(run.name, name) and not (run / "summary.json").exists():
            incomplete.append(run)
    return max(incomplete, key=lambda run: (run / "recipe.yaml").stat().st_mtime, default=None)


def _is_named_after(folder: str, name: str) -> bool:
    """Whether `start_folder` gives this folder name to a recipe: its name, alone or with `-` and a number."""
    rest = folder.removeprefix(name)
    return rest == "" or (rest.startswith("-") and rest[1:].isdigit())


def provenance(sections: Iterable[Section], **rest: Any) -> dict[str, Any]:
    """Everything that shaped a run: components with their owners, versions, the commit, the machine, the command.

    Lightning's own entry-point group adds callbacks to every Trainer without any mention; they are listed too.
    """
    components = [
        {
            "slot": section.slot,
            "name": section.name,
            "distribution": section.provenance.distribution,
            "version": section.provenance.version,
            "module": section.provenance.module,
            "file": str(section.provenance.file) if section.provenance.file else None,
        }
        for section in sections
    ]
    unseen = metadata.entry_points(group="lightning.pytorch.callbacks_factory")
    packages = ("torch", "lightning", "torchmetrics", "tokenizers", "numpy", "omegaconf", "pluggy")
    return {
        "components": [dict(t) for t in dict.fromkeys(tuple(c.items()) for c in components)],
        "lightning_callback_factories": [f"{point.name} = {point.value}" for point in unseen],
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine(),
        **code(),
        "packages": {name: metadata.version(name) for name in packages},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **rest,
    }
