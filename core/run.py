"""From objects to a run folder: train, resume, validate, summarise; and load what a run left."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.assemble import Size, build, make, plan_of, size_of
from core.contracts.component import Environment
from core.contracts.errors import UserError
from core.data.module import TextData
from core.model.language_model import LanguageModel
from core.model.sampling import sample
from core.recipe.compose import Recipe, compose
from core.training.callbacks import LoadLog
from core.training.checkpoints import checkpoints_in, is_disk_full, read_checkpoint
from core.training.folder import RunFolder, provenance
from core.training.module import TrainingModule
from core.training.ranks import rank_and_world
from core.training.setup import make_trainer, watch
from core.training.throughput import measured_peak_flops

REPRODUCED = ("seed", "model", "precision", "data", "optimizer", "batch", "budget", "gradient_clip", "initial_weights")
"""Sections that a resumed run must share with the one it continues, or its bits would differ."""


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from.

    Args:
        path: the file.
        step: windows that it has done.
    """

    path: Path
    step: int


def fit(
    recipe: Recipe, folder: RunFolder, *, resume: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train a recipe into a run folder and return its summary.

    Everything that can be wrong is found first: the environment, the folder, the data, the shapes.

    Args:
        recipe: validated.
        folder: new, or one with a run to go on with.
        resume: continue from the folder's newest checkpoint, to the same bits as if it had never stopped
            (on CPUs with the same number of threads).
        say: told what a person at the terminal wants to know.

    Raises:
        UserError, RunFailed, core.training.callbacks.Interrupted.
    """
    try:
        return _fit(recipe, folder, resume=resume, say=say)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"{folder.path}: no space is left; make room and continue with --resume {folder.path}") from error
        raise


def _fit(recipe: Recipe, folder: RunFolder, *, resume: bool, say: Callable[[str], None]) -> dict[str, Any]:
    check_environment(recipe)
    start = newest(recipe, folder) if resume else None
    if not resume:
        folder.create()
    plan = plan_of(recipe)
    data = TextData(
        make(recipe.data.corpus),
        vocab=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        plan=plan,
        seed=recipe.seed,
        rank_and_world=rank_and_world,
        validation_sequences=recipe.validation.sequences,
    )
    data.prepare()
    model = build(recipe)
    size = size_of(model)
    if recipe.compile:
        for block in model.blocks:
            block.compile()
    if recipe.initial_weights and start is None:
        load_weights(model, newest_checkpoint(Path(recipe.initial_weights)))
    peak = measured_peak_flops(torch.device("cpu")) if not torch.cuda.is_available() else None
    module = TrainingModule(
        model,
        plan=plan,
        optimizer=make(recipe.optimizer),
        flops_per_token=size.flops_per_token,
        mask_documents=recipe.data.mask_documents,
        gradient_clip=recipe.gradient_clip,
        max_skipped=recipe.max_skipped_steps,
        validation_bytes=data.validation_bytes,
    )
    if not folder.recipe.exists():
        _write_identity(recipe, folder, data)
    loads = _train(recipe, folder, module, data, peak, start, say)
    return _finish(recipe, folder, module, data, size, loads, peak)


def _write_identity(recipe: Recipe, folder: RunFolder, data: TextData) -> None:
    """What the run is; the recipe last, because its presence makes the folder a run."""
    folder.write_json("provenance.json", provenance(recipe.sections(), data=data.fingerprint, threads=torch.get_num_threads()))
    data.tokenizer.save(folder.tokenizer)
    folder.write_recipe(recipe.to_dict())


def _train(
    recipe: Recipe,
    folder: RunFolder,
    module: TrainingModule,
    data: TextData,
    peak: float | None,
    start: Resume | None,
    say: Callable[[str], None],
) -> LoadLog:
    """Fit, then validate where the last validation was not after the last step."""
    loads, stop, throughput = watch(folder.path, peak)
    resumed_at = start.step if start else None
    trainer = make_trainer(
        recipe,
        folder.path,
        steps=module.plan.steps,
        loggers=[make(section).make(folder.path, resumed_at=resumed_at) for section in recipe.loggers],
        watchers=[throughput, loads, stop, *(make(section).make(folder.path) for section in recipe.callbacks)],
        strategy=make(recipe.strategy).trainer_arguments(),
    )
    stop.listen()
    say(f"run folder: {folder.path}" + (f" (resumed after step {start.step})" if start else ""))
    trainer.fit(module, datamodule=data, ckpt_path=str(start.path) if start else None, weights_only=True)
    if data.validation_bytes and module.validated_at != module.plan.steps:
        trainer.validate(module, datamodule=data, verbose=False)
    return loads


def _finish(
    recipe: Recipe,
    folder: RunFolder,
    module: TrainingModule,
    data: TextData,
    size: Size,
    loads: LoadLog,
    peak: float | None,
) -> dict[str, Any]:
    """Write what the run measured; the summary last, because its presence makes the run complete."""
    loads.write()
    module.eval()
    opening = data.tokenizer.end
    text = data.tokenizer.decode(list(sample(module.model, [opening], tokens=128, temperature=0.8, top_p=0.9, stop=opening)))
    folder.write_text("sample.txt", text + "\n")
    summary = summarise(module, data, size, loads, peak)
    folder.write_json("summary.json", summary)
    return summary


def summarise(
    module: TrainingModule, data: TextData, size: Size, loads: LoadLog, peak: float | None
) -> dict[str, Any]:
    """The run's results under the names that `summary.json` promises; null where something was not measured."""
    values = module.validation.compute() if module.validated_at is not None else {}
    acceptance = next((v for name, v in values.items() if name.endswith("acceptance_1")), None)
    rate = module.plan.tokens / module.seconds if module.seconds else None
    return {
        "steps": module.windows_done,
        "tokens": module.plan.tokens,
        "wall_seconds": module.seconds,
        "tokens_per_second": rate,
        "mfu": rate * size.flops_per_token / peak if rate and peak else None,
        "peak_flops": peak,
        "val_loss": values.get("val_loss"),
        "val_bits_per_byte": values.get("val_bits_per_byte"),
        "max_vio_global": values.get("val_max_vio_global"),
        "max_vio_batch": sum(loads.recent) / len(loads.recent) if loads.recent else None,
        "dropped_fraction": module.dropped_fraction(),
        "mtp_acceptance": acceptance,
        "params_total": size.params_total,
        "params_mtp": size.params_heads,
        "params_active": size.params_active,
        "flops_per_token": size.flops_per_token,
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped_steps": module.skipped_steps,
        "validation_bytes": data.validation_bytes,
        "threads": torch.get_num_threads(),
    }


def peak_memory_bytes() -> int:
    """The most memory this process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_environment(recipe: Recipe) -> None:
    """Raises `UserError` where a component cannot run here."""
    cuda = torch.cuda.is_available()
    environment = Environment(
        device="cuda" if cuda else "cpu",
        capability=torch.cuda.get_device_capability() if cuda else None,
        cuda=torch.version.cuda,
    )
    for section in recipe.sections():
        why = section.component.requires(section.config, environment)
        if why:
            raise UserError(f"{recipe.source}: {section.slot} {section.name!r} cannot run here: {why}")


def newest(recipe: Recipe, folder: RunFolder) -> Resume | None:
    """The checkpoint that a resumed run starts from, after checking that it is the same run.

    Raises:
        UserError: no run there, another recipe (the first difference is named), a damaged checkpoint, or
            another number of threads, under which the bits would differ.
    """
    if not folder.recipe.exists():
        raise UserError(f"--resume {folder.path}: there is no run in this folder (no recipe.yaml)")
    before, now = compose(folder.recipe).to_dict(), recipe.to_dict()
    difference = first_difference({k: before[k] for k in REPRODUCED}, {k: now[k] for k in REPRODUCED})
    if difference:
        path, old, new = difference
        raise UserError(f"--resume {folder.path}: {path} = {new} here, but the run was started with {old}")
    files = checkpoints_in(folder.path)
    if not files:
        return None
    own = read_checkpoint(files[-1])["moeloom"]
    if own["threads"] != torch.get_num_threads():
        raise UserError(
            f"--resume {folder.path}: the run used {own['threads']} threads and this process has "
            f"{torch.get_num_threads()}, which would change its bits; set OMP_NUM_THREADS={own['threads']}"
        )
    return Resume(files[-1], own["windows_done"])


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Key path and both values of the first place where two containers differ, in the old one's order."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            if found := first_difference(a, b, f"{path}.{index}"):
                return found
        return None
    return None if old == new else (path, old, new)


def newest_checkpoint(path: Path) -> Path:
    """A checkpoint file given as itself or as its run's folder.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    files = checkpoints_in(path)
    if not files:
        raise UserError(f"{path}: no checkpoint here: give a run folder or a checkpoint file")
    return files[-1]


def load_weights(model: LanguageModel, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model; every tensor must find its place.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
    """
    state = read_checkpoint(checkpoint)["state_dict"]
    weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            raise UserError(f"{checkpoint}: tensor {name} is {'missing' if name not in weights else 'not of this model'}")
        if weights[name].shape != own[name].shape:
            raise UserError(f"{checkpoint}: tensor {name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}")
    model.load_state_dict(weights)


def load(run_or_checkpoint: str | Path) -> LanguageModel:
    """A trained model in evaluation mode, from a run folder (its newest checkpoint) or one checkpoint file.

    Raises:
        UserError: no run there, or a damaged checkpoint.
    """
    checkpoint = newest_checkpoint(Path(run_or_checkpoint))
    model = build(compose(run_of(checkpoint).recipe))
    load_weights(model, checkpoint)
    return model.eval()


def run_of(path: Path) -> RunFolder:
    """The run that a folder is, or that a checkpoint belongs to.

    Raises:
        UserError: there is no recipe.
    """
    folder = RunFolder(path if path.is_dir() else path.parent.parent)
    if not folder.recipe.exists():
        raise UserError(f"{path}: no run here (no {folder.recipe})")
    return folder
