"""Trains a recipe into a run folder, from nothing or from where a stopped run was."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.analysis.budget import plan_of
from core.analysis.describe import obstacles
from core.analysis.size import Size, size_of
from core.assemble import build, compile_parts, make
from core.contracts.errors import Interrupted, RunFailed, UserError
from core.data.module import TextData
from core.data.tokenizer import Tokenizer
from core.model.sampling import sample
from core.recipe.compose import Recipe
from core.run.data import text_data
from core.run.loading import load_weights
from core.run.summary import summarise
from core.training.checkpoints import is_disk_full
from core.training.folder import RunFolder, provenance
from core.training.module import TrainingModule
from core.training.ranks import leads, one_group
from core.training.resume import Resume, check_data, check_same, newest, newest_checkpoint
from core.training.setup import Watchers, make_trainer, watch
from core.training.throughput import measured_peak_flops


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
        say: receives what a person at the terminal wants to know.

    Raises:
        UserError, RunFailed, Interrupted.
    """
    try:
        if not leads():
            return _join(recipe, folder, resume=resume)
        check_environment(recipe)
        if not resume or folder.is_stillborn():
            folder.create()
            return _fit(recipe, folder, None, say)
        check_same(recipe, folder, say)
        if folder.summary.exists():
            say(f"run folder: {folder.path} (this run is complete)")
            return dict(json.loads(folder.summary.read_text(encoding="utf-8")))
        folder.sweep()
        return _fit(recipe, folder, newest(folder), say)
    except OSError as error:
        if is_disk_full(error):
            how = f"continue with --resume {folder.path}" if folder.recipe.exists() else "start again"
            raise UserError(f"{folder.path}: no space is left on the disk; make room and {how}") from error
        raise


def _join(recipe: Recipe, folder: RunFolder, *, resume: bool) -> dict[str, Any]:
    """One of several ranks, all but the first: it trains along, and leaves files and words to the first."""
    try:
        return _fit(recipe, folder, newest(folder) if resume else None, say=lambda _: None)
    except (Interrupted, RunFailed):
        return {}


def _fit(recipe: Recipe, folder: RunFolder, start: Resume | None, say: Callable[[str], None]) -> dict[str, Any]:
    started = time.perf_counter()
    for notice in recipe.notices():
        say(f"note: {notice}")
    plan = plan_of(recipe)
    data = text_data(recipe, plan)
    data.prepare()
    model = build(recipe, token_counts=data.token_counts)
    size = size_of(model)
    if recipe.compile:
        compile_parts(model)
    if recipe.initial_weights and start is None:
        source = newest_checkpoint(Path(recipe.initial_weights))
        load_weights(model, source)
        _warn_other_tokenizer(source, data, say)
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
    module.started = started
    if folder.recipe.exists():
        check_data(folder, data.fingerprint)
    elif leads():
        _write_identity(recipe, folder, data)
    watchers = _train(recipe, folder, module, data, peak, start, say)
    return _finish(folder, module, data, size, watchers, recipe.notices()) if leads() else {}


def _warn_other_tokenizer(source: Path, data: TextData, say: Callable[[str], None]) -> None:
    """Warn if the initial weights were trained with another tokenizer: ids then stand for other text."""
    known = RunFolder(source.parent.parent).tokenizer
    if known.is_file() and Tokenizer.load(known).entries() != data.tokenizer.entries():
        say(f"note: {known} is another tokenizer than this run's, so its weights have to learn the tokens anew")


def _write_identity(recipe: Recipe, folder: RunFolder, data: TextData) -> None:
    """What the run is; the recipe last, because its presence makes the folder a run."""
    shaped_by = provenance(recipe.sections(), data=data.fingerprint, threads=torch.get_num_threads())
    folder.write_json("provenance.json", shaped_by)
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
) -> Watchers:
    """Lightning's part; it validates after the last step too."""
    watchers = watch(folder.path, peak)
    resumed_at = start.step if start else None
    callbacks = [make(section).make(folder.path) for section in recipe.callbacks]
    trainer = make_trainer(
        recipe,
        folder.path,
        steps=module.plan.steps,
        loggers=[make(section).make(folder.path, resumed_at=resumed_at) for section in recipe.loggers],
        watchers=[watchers.throughput, watchers.loads, *callbacks],
        stop=watchers.stop,
        strategy=make(recipe.strategy).trainer_arguments(),
    )
    say(f"run folder: {folder.path}" + (f" (resumed after step {start.step})" if start else ""))
    with watchers.stop.listening(), one_group(folder.path):
        trainer.fit(module, datamodule=data, ckpt_path=str(start.path) if start else None, weights_only=True)
    return watchers


def _finish(
    folder: RunFolder, module: TrainingModule, data: TextData, size: Size, watchers: Watchers, notices: list[str]
) -> dict[str, Any]:
    """Write what the run measured; the summary last, because its presence makes the run complete."""
    watchers.loads.write()
    module.eval()
    opening, length = data.tokenizer.end, min(128, module.model.max_length)
    written = sample(module.model, [opening], tokens=length, temperature=0.8, top_p=0.9, stop=opening)
    folder.write_text("sample.txt", data.tokenizer.decode(list(written)) + "\n")
    summary = summarise(module, data, size, watchers, notices)
    folder.write_json("summary.json", summary)
    return summary


def check_environment(recipe: Recipe) -> None:
    """Raises `UserError` for shapes that a part of the model refuses, and where a component cannot run here."""
    try:
        build(recipe, device="meta")
    except UserError as refused:
        raise UserError(f"{recipe.source}: {refused}") from refused
    found = obstacles(recipe)
    if found:
        raise UserError(f"{recipe.source}: cannot run here: {'; '.join(found)}")
