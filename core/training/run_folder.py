"""The run folder: its files, and writing to it so that a kill leaves whole files."""

import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from core.checkpoints.listing import remove_partial_checkpoints
from core.command import command_line
from core.contracts.errors import UserError
from core.contracts.schema import Section
from core.data.recorded import RecordedData, read_documents
from core.data.tokenizer import VERSION, Tokenizer
from core.extension.plugin_file import is_plugin_file
from core.recipe import trust
from core.recipe.tokenizer_file import files_beside, text_of_marker
from core.storage.digests import DIGESTS, check_digests, set_digest, write_digests
from core.storage.documents import (
    DocumentError,
    check_regular,
    is_text,
    read_object,
    read_text,
)
from core.storage.files import check_links, remove_partial_files, write_text
from core.storage.lock import locked_folder
from core.training.machine import code, machine

WEIGHTS_INDEX = "model.safetensors.index.json"
"""The file that names the safetensors file of every tensor, in a converted run as in other programs' folders."""

FILES = (
    "recipe.yaml",
    "provenance.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "documents.txt",
    DIGESTS,
    "metrics.csv",
    "loads.safetensors",
    "sample.txt",
    "summary.json",
)
"""The files of a run that was trained here."""

FOLDERS = ("checkpoints", "logs", "tensorboard", "plugin_files")
"""Its folders."""


class RunFolder:
    """A run's files by name.

    Args:
        path: the folder.
        is_new: whether it was made for a run that is about to start, and may be removed if that fails.
    """

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        self.path = path
        self.is_new = is_new

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run's tokens were made with."""
        return self.path / "tokenizer.json"

    @property
    def tokenizer_config(self) -> Path:
        """The settings of a tokenizer from a file, as Hugging Face's libraries read them."""
        return self.path / "tokenizer_config.json"

    @property
    def chat_template(self) -> Path:
        """The chat template of a tokenizer from a file."""
        return self.path / "chat_template.jinja"

    @property
    def provenance(self) -> Path:
        """The components, versions, commit, machine and command that shaped the run."""
        return self.path / "provenance.json"

    @property
    def documents(self) -> Path:
        """The names of the corpus's documents, each with the beginning of its hash."""
        return self.path / "documents.txt"

    @property
    def summary(self) -> Path:
        """The results of the run; the file exists once the run is complete."""
        return self.path / "summary.json"

    @property
    def converted_weights(self) -> Path:
        """The index of a converted run's weights, which it has instead of checkpoints."""
        return self.path / "weights" / WEIGHTS_INDEX

    @property
    def source_files(self) -> Path:
        """The folder of a converted run that holds the small files which came with the weights."""
        return self.path / "hf"

    @property
    def source_layout(self) -> Path:
        """The file of a converted run that says which file and format each tensor of its source had."""
        return self.source_files / "layout.json"

    @property
    def plugin_files(self) -> Path:
        """The folder with copies of the recipe's plugin files."""
        return self.path / "plugin_files"

    def never_started(self) -> bool:
        """Whether a run was killed here before it wrote its recipe, so that it has to start anew.

        Raises:
            UserError: there is no run in this folder at all, or one without its recipe.
        """
        self.check_has_run()
        return not self.recipe.exists()

    def check_has_run(self) -> None:
        """Raises `UserError` if the folder holds no run; one that was killed at its start has empty `checkpoints`."""
        if self.recipe.exists():
            return
        checkpoints = self.path / "checkpoints"
        if not checkpoints.is_dir() or any(checkpoints.iterdir()):
            missing = "there is no run in this folder (no recipe.yaml)"
            raise UserError(f"--resume {self.path}: {missing}")

    @contextmanager
    def locked(self, where: str = "--out") -> Iterator[None]:
        """Makes the folder and holds its lock, so that no other process writes to it.

        A start that fails before its recipe is written leaves no folder behind that was not there.

        Args:
            where: the option that named the folder, with which error messages begin.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
        """
        with locked_folder(self.path, "run", where=where, is_new=self.is_new):
            try:
                yield
            except UserError:
                if not self.recipe.exists():
                    with suppress(OSError):
                        (self.path / "checkpoints").rmdir()
                raise

    def check_free(self) -> None:
        """Raises `UserError` if the run folder holds a run already."""
        if self.recipe.exists():
            how = f"continue it with --resume {self.path}, or name another"
            raise UserError(f"--out {self.path}: holds a run already; {how}")

    def create(self, *, trust: bool = False) -> None:
        """Makes the folder of the checkpoints; the run folder must be locked.

        Raises:
            UserError: the run folder holds a run already, or a link that leads out of it, or cannot be written.
        """
        self.check_free()
        if not trust:
            check_links(self.path)
        self.check_files()
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise UserError(f"--out {self.path}: cannot be written: {cause.strerror}") from cause

    def check_files(self) -> None:
        """Checks that no folder, pipe or device is in the place of a file of the run, nor a file in that of a folder.

        Raises:
            UserError: one is.
        """
        for name in FILES:
            path = self.path / name
            if path.is_symlink() or path.exists():
                check_regular(path)
        for path in sorted((self.path / "checkpoints").glob("*.ckpt")):
            if not path.is_dir():
                check_regular(path)
        for path in sorted(self.path.rglob("*")):
            if path.exists() and not path.is_dir():
                check_regular(path)  # a logger that opened a pipe would wait for its other end
        for name in FOLDERS:
            path = self.path / name
            if (path.is_symlink() or path.exists()) and not path.is_dir():
                raise UserError(f"{path}: must be a folder, in which the run writes")

    def remove_partial_files(self) -> None:
        """Deletes the half-written files that a kill left; the checkpoints among them can be large."""
        remove_partial_files(self.path)
        remove_partial_checkpoints(self.path / "checkpoints")

    def write_digests(self) -> None:
        """Writes the checksums of tokenizer and plugin files, and of a converted run's weights and source files."""
        files = (self.tokenizer, self.tokenizer_config, self.chat_template)
        names = [file.name for file in files if file.exists()]
        for folder in (self.converted_weights.parent, self.source_files, self.plugin_files):
            if folder.is_dir():
                names += [f"{folder.name}/{file.name}" for file in sorted(folder.iterdir())]
        write_digests(self.path, names)

    def check_digests(self, name: str) -> None:
        """Compares a file, or the files of a folder in the run, with their checksums.

        Raises:
            UserError: one has changed.
        """
        check_digests(self.path, name)

    def load_tokenizer(self) -> Tokenizer:
        """Reads the tokenizer, after comparing its file with its checksum.

        Raises:
            UserError: there is none, or it has changed.
        """
        if self.tokenizer.exists():
            check_digests(self.path, self.tokenizer.name)
        tokenizer = Tokenizer.load(self.tokenizer)
        markers = self.file_markers()
        return tokenizer.with_markers(*markers) if markers else tokenizer

    def file_markers(self) -> tuple[int, int] | None:
        """Reads the tokens before and after a document, for a tokenizer from a file; None: it was trained.

        Raises:
            UserError: the provenance is damaged.
        """
        if not self.provenance.exists():
            return None
        section = read_object(self.provenance).get("tokenizer")
        if section is None:
            return None
        begin, end = [
            section.get(key) if isinstance(section, dict) else None for key in ("begin", "end")
        ]
        if type(begin) is not int or type(end) is not int or min(begin, end) < 0:
            why = "tokenizer: must hold the numbers of two tokens, begin and end"
            raise UserError(f"{self.provenance}: {why}")
        return begin, end

    def write_tokenizer(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        """Writes a tokenizer, for one from a file with what Hugging Face's libraries read beside it.

        Args:
            tokenizer: the tokenizer.
            source: the file or folder that it comes from; None: it was trained.
        """
        tokenizer.save(self.tokenizer)
        if source is None:
            return
        config, template = files_beside(Path(source))
        begin, end = [tokenizer.text_of(token) for token in (tokenizer.begin, tokenizer.end)]
        if not config:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": end}
        for key, text in (("bos_token", begin), ("eos_token", end)):
            if text_of_marker(config.get(key)) != text:
                config[key] = text
        self.write_json(self.tokenizer_config.name, config)
        if template is not None:
            self.write_text(self.chat_template.name, template)

    def recorded_data(self) -> RecordedData:
        """Reads what the run recorded of its data.

        Raises:
            UserError: the provenance is missing or damaged, or the tokenizer has changed since it was written.
        """
        found = self.read_provenance()
        fingerprint = found.get("data")
        if not isinstance(fingerprint, str):
            missing = "data: the fingerprint of the run's data is missing"
            raise UserError(f"{self.provenance}: {missing}, so the run cannot be continued")
        packages = found.get("packages")
        version = packages.get("tokenizers") if isinstance(packages, dict) else None
        documents = None
        if self.documents.exists():
            documents = read_documents(read_text(self.documents))
        return RecordedData(
            folder=self.path,
            fingerprint=fingerprint,
            version=version if isinstance(version, str) and is_text(version) else VERSION,
            tokenizer=self.load_tokenizer() if self.tokenizer.exists() else None,
            documents=documents,
            is_from_file=self.file_markers() is not None,
        )

    def read_provenance(self) -> dict[str, Any]:
        """Reads the provenance.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return read_object(self.provenance)
        except DocumentError as cause:
            how = "put the file back from a copy, or start a run from its weights (initial_weights)"
            raise UserError(
                f"{cause}; it says which data the run was started with: {how}"
            ) from cause

    def read_summary(self) -> dict[str, Any]:
        """Reads the summary.

        Raises:
            UserError: it is damaged.
        """
        try:
            summary = read_object(self.summary)
            notices = summary.get("notices")
            if not isinstance(notices, list) or not all(isinstance(n, str) for n in notices):
                raise DocumentError(self.summary, "is damaged: notices must be a list of sentences")
        except DocumentError as cause:
            how = f"move the file away, and --resume {self.path} writes it again"
            raise UserError(f"{cause}; {how}") from cause
        return summary

    def write_text(self, name: str, text: str) -> None:
        """Writes a file under a temporary name and moves it into place."""
        write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON document."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_plugin_files(self, plugins: Iterable[str]) -> None:
        """Copies the plugin files of a recipe, so that the run keeps the code that it was trained with."""
        for name in filter(is_plugin_file, plugins):
            self.plugin_files.mkdir(exist_ok=True)
            copy = self.plugin_files / Path(name).name
            shutil.copyfile(name, copy)
            trust.record_code(copy)

    def write_recipe(self, values: dict[str, Any]) -> None:
        """Writes the resolved recipe and its checksum, and records that it was written here.

        Its plugin files and its tokenizer's file are those that the run holds, relative to the run folder.
        """
        plugins = []
        for name in values.get("plugins", []):
            held = self.plugin_files / Path(name).name
            is_held = is_plugin_file(name) and held.is_file()
            plugins.append(f"./{held.relative_to(self.path)}" if is_held else name)
        if plugins:
            values = {**values, "plugins": plugins}
        section = values["data"]["tokenizer"]
        if section.get("file") is not None and self.tokenizer.exists():
            # the run's own copy, so that a run is whole wherever it is moved
            section = {**section, "file": f"./{self.tokenizer.name}", "pattern": None}
            values = {**values, "data": {**values["data"], "tokenizer": section}}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        set_digest(self.path, self.recipe.name, text.encode())
        self.write_text(self.recipe.name, text)
        trust.record(self.recipe)


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
        "command": command_line(),
        **rest,
    }
