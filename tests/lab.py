"""A small recipe on a made-up corpus, and ways to run it: by a call, as a command, or in a forked process.

A forked process starts at once and can be killed at an exact place; a new one takes seconds to import torch.
"""

import csv
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.analysis.budget import plan_of
from core.assemble import build, make
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.data.batch import Batch
from core.recipe.compose import Recipe, compose
from core.run.data import text_data
from core.run.training import fit
from core.training.module import TrainingModule
from core.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
SPEED = ("mfu", "tokens_per_second")
"""Columns whose values depend on the clock."""

MOE = ("blocks.1", "heads.mtp.depths.0.block")
"""The paths of the layers with experts, as logs name them."""

SMALL = """\
seed: 3
model:
  dim: 32
  attention: {{name: mla, heads: 2, q_rank: 16, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 8}}
  init: {{std: 0.1}}
  blocks:
    dense: {{count: 1, ffn: {{name: swiglu, hidden: 48}}}}
    moe:
      count: 1
      ffn:
        name: moe
        experts: 8
        expert_hidden: 16
        shared_experts: 1
        router: {{name: deepseek_v3, top_k: 2, groups: 4, group_limit: 2, scale: 2.5}}
        balance: [{{name: bias, rate: 0.01}}, {{name: sequence, alpha: 0.01}}]
  heads: {{next_token: {{name: next_token}}, mtp: {{name: mtp, depth: 1, weight: 0.3}}}}
data: {{corpus: {{name: files, paths: ["{texts}/*.txt"]}}, tokenizer: {{vocab: 300}}, sequence_length: 16}}
optimizer: {{name: adamw, lr: 0.003}}
batch: {{sequences: 4, accumulate: 2}}
budget: {{steps: 12}}
checkpoint: {{every_steps: 5, keep: 2}}
validation: {{every_steps: 6, sequences: 8}}
trainer: {{enable_progress_bar: false}}
"""


def write_texts(folder: Path, count: int = 31, words: int = 14) -> None:
    """Writes made-up documents, of which number 10 and number 30 are held out."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijkl", k=draw.randint(2, 6))) for _ in range(60)]
    for index in range(count):
        text = " ".join(draw.choices(vocabulary, k=words))
        (folder / f"doc-{index:02d}.txt").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class CommandResult:
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The only error message, without its prefix; a traceback or a second message is a failure."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("moeloom: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("moeloom: ")


@dataclass(frozen=True)
class Windows:
    """A loader of given windows, because Lightning takes a plain list for several loaders."""

    windows: Sequence[list[Batch]]

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[list[Batch]]:
        return iter(self.windows)


class Lab:
    """A corpus and a recipe, with ways to run it.

    Args:
        folder: the folder to write both into, or one that holds them already.
    """

    def __init__(self, folder: Path) -> None:
        self.texts = folder / "texts"
        self.file = folder / "small.yaml"
        if not self.texts.exists():
            write_texts(self.texts)
        self.file.write_text(SMALL.format(texts=self.texts), encoding="utf-8")

    def recipe(self, *overrides: str) -> Recipe:
        """Composes the small recipe with overrides."""
        return compose(self.file, overrides)

    def fit(self, folder: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
        """Trains a whole run in this process; returns its summary."""
        return fit(self.recipe(*overrides), RunFolder(folder), resume=resume, say=lambda _: None)

    def train(
        self,
        *overrides: str,
        windows: Sequence[list[Batch]] | None = None,
        callbacks: Sequence[L.Callback] = (),
        model: Callable[[Any], None] = lambda _: None,
    ) -> TrainingModule:
        """Trains without a run folder, on the recipe's own windows or on given ones.

        Args:
            windows: windows to read instead of the corpus.
            callbacks: callbacks of the Trainer.
            model: changes the model before the first step.
        """
        if windows:
            overrides = (*overrides, f"budget.steps={len(windows)}")
        recipe = self.recipe(*overrides)
        plan = plan_of(recipe)
        data = text_data(recipe, plan)
        module = TrainingModule(
            build(recipe),
            plan=plan,
            optimizer=make(recipe.optimizer),
            strategy=make(recipe.strategy),
            flops_per_token=1.0,
            mask_documents=recipe.data.mask_documents,
            gradient_clip=recipe.gradient_clip,
            max_skipped=recipe.max_skipped_steps,
            skip_spikes=recipe.skip_spikes,
            validation_bytes=1,
        )
        model(module.model)
        trainer = L.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            accelerator="cpu",
            max_epochs=1,
            check_val_every_n_epoch=None,
            val_check_interval=recipe.validation.every_steps,
            num_sanity_val_steps=0,
            limit_val_batches=0 if windows else 1.0,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
        )
        if windows:
            trainer.fit(module, train_dataloaders=Windows(windows))
        else:
            trainer.fit(module, datamodule=data)
        return module

    def command(self, name: str, *arguments: str | Path) -> CommandResult:
        """Runs `python -m core.NAME ...` in a forked process."""
        return forked(lambda: run_command_here(name, *arguments))


def run_command_here(name: str, *arguments: str | Path) -> None:
    """Runs a command in this process as `python -m core.NAME ...` would; it ends with SystemExit."""
    command = importlib.import_module(f"core.{name}")
    sys.argv = [f"core/{name}.py", *map(str, arguments)]
    importlib.import_module("core.command").run_command(command.main, command.parser())


def forked(work: Callable[[], object], seconds: float = 120.0) -> CommandResult:
    """Does something in a forked process; if a signal ends it, the code is 128 + its number, as in a shell."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_child(work, seconds))
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        printed = out.read().decode("utf-8", "replace")
        errors = err.read().decode("utf-8", "replace")
    return CommandResult(code if code >= 0 else 128 - code, printed, errors)


def _child(work: Callable[[], object], seconds: float) -> int:
    """Does the work in the forked process, within some seconds; returns its exit code."""
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(int(seconds))
    code = 0
    try:
        work()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[Path]:
    """Mounts a file system of that size at `folder`; the test is skipped where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0:
        pytest.skip("no small file system can be mounted here: not root")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Fills a disk to the last byte."""
    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(1 << 12)) == 1 << 12:
            pass


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`, without empty cells and without columns that depend on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v != "" and k not in SPEED} for row in read]


def loads(folder: Path) -> dict[str, Tensor]:
    """The tensors in `loads.safetensors`."""
    return load_file(folder / "loads.safetensors")


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of the newest checkpoint."""
    return read_checkpoint(checkpoints_in(folder)[-1])


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested containers by its path."""
    items: Any
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    leaves = {}
    for key, item in items:
        leaves.update(flat(item, f"{path}/{key}"))
    return leaves


def assert_same(actual: Any, expected: Any) -> None:
    """Asserts that nested containers hold the same tensors, bit by bit, and the same other values."""
    one = flat(actual)
    two = flat(expected)
    assert one.keys() == two.keys()
    for path, value in two.items():
        if isinstance(value, Tensor):
            assert one[path].dtype == value.dtype, path
            assert torch.equal(one[path], value), path
        else:
            assert one[path] == value, path


def assert_same_run(actual: Path, expected: Path) -> None:
    """Asserts that two run folders hold the same bits, the same rows and the same checkpoints."""
    one = last_checkpoint(actual)
    two = last_checkpoint(expected)
    for key in ("state_dict", "optimizer_states"):
        assert_same(one[key], two[key])
    assert_same(rows(actual), rows(expected))
    assert_same(loads(actual), loads(expected))
    assert checkpoint_names(actual) == checkpoint_names(expected)
    assert_same(best_weights(actual), best_weights(expected))


def checkpoint_names(folder: Path) -> list[str]:
    """The sorted names of all files in a run's folder of checkpoints."""
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def best_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a run's checkpoint of the best validation loss."""
    weights: dict[str, Tensor] = read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    return weights
