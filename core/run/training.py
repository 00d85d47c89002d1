"""Training of a recipe into a run folder, from the start or from where a stopped run was."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from core.analysis.budget import plan_of
from core.analysis.size import Size, size_of
from core.assemble import make
from core.checkpoints.averages import check_averages
from core.checkpoints.content import check_model, check_optimizers
from core.contracts.errors import Interrupted, RunFailed, UserError
from core.contracts.name_patterns import listed
from core.contracts.strategy import StrategyFactory
from core.data.module import TextData
from core.model.freezing import frozen_in
from core.recipe.compose import Recipe, compose_run
from core.run.data import text_data
from core.run.environment import check_environment
from core.run.identity import recorded_notices, write_identity
from core.run.parent import Parent, parent_at, recorded_parent
from core.run.reading import count_of, reading_line, source_lines
from core.run.run_model import RunModel, check_selection
from core.run.run_sample import SampleAtEnd
from core.run.shift import after_shift
from core.run.summary import divergence, summarise
from core.storage.files import is_disk_full
from core.training.averages import Averages, averages_of
from core.training.continued import Continued
from core.training.early_end import why_ended
from core.training.hyper_parameters import HyperParameters
from core.training.launchers import Launch, launch_of
from core.training.machine import code_version
from core.training.module import TrainingModule
from core.training.rank_logs import redirect_output
from core.training.rank_watch import RankLost
from core.training.ranks import is_rank_zero, process_group_scope, set_rank
from core.training.resume import (
    Resume,
    check_recipe_unchanged,
    newest,
)
from core.training.run_folder import RunFolder
from core.training.same_start import SameStart, Start, hash_of
from core.training.setup import RunCallbacks, make_run_callbacks, make_trainer
from core.training.throughput import measured_peak_flops

NO_VALIDATION = (
    "no document is held out for validation, which takes at least 11 documents ({}): "
    "the run has no validation loss; data.validation_fraction=0.1 holds out a tenth of the text, "
    "data.validation a corpus of its own"
)
"""The note of a run that trains on all of its text."""

NO_MORE_CHECKPOINTS = (
    "checkpoint.every_steps is null: no weights are saved, and {} stays the newest checkpoint"
)
"""The note of a run that is continued and saves nothing further."""


def fit(
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    parent: Path | None = None,
    trust: bool = False,
    launch: Launch | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a recipe into a run folder and returns its summary.

    User errors are found before training begins: in the environment, the folder, the data and the shapes. The notices
    of the summary say so if the run diverged: it is complete, and its model predicts nothing.

    Args:
        recipe: a validated recipe.
        folder: a new folder, or one with a run to continue.
        resume: continue from the folder's newest checkpoint, to the same bits as if it had never stopped
            (on CPUs with the same number of threads).
        parent: a run or checkpoint at whose end a new run begins, with its moments; None: the run begins by itself.
        trust: whether a run to continue that was made elsewhere may name modules that `recipe` does not name.
        launch: this process among the ranks; None: read from the environment.
        say: prints caveats and the path of the run folder.

    Raises:
        UserError: something in the recipe, the folder, the data or the environment is wrong.
        RunFailed: too many steps in a row had a gradient that was not finite.
        Interrupted: the run stopped at a signal, with a checkpoint.
    """
    launch = launch or launch_of(recipe.strategy)
    set_rank(launch)
    try:
        if not is_rank_zero():
            return _join(recipe, folder, launch, parent, resume=resume)
        if resume and not folder.never_started() and folder.summary.exists():
            return _completed(recipe, folder, say, trust=trust)
        option = "--resume" if resume else "--out"
        with folder.locked(option):
            return _start_or_resume(recipe, folder, launch, parent, say, resume=resume, trust=trust)
    except OSError as error:
        if not is_disk_full(error):
            raise
        how = "start again"
        if folder.recipe.exists():
            how = f"continue with --resume {folder.path}"
        raise UserError(
            f"{folder.path}: no space is left on the disk; free some space and {how}"
        ) from error


def _start_or_resume(
    recipe: Recipe,
    folder: RunFolder,
    launch: Launch,
    parent: Path | None,
    say: Callable[[str], None],
    *,
    resume: bool,
    trust: bool,
) -> dict[str, Any]:
    """Trains in a folder whose lock this process holds."""
    check_environment(recipe)
    if not resume or folder.never_started():
        if recipe.selection is not None:
            check_selection(recipe, recipe.selection, trust=trust)
        origin = None if parent is None else parent_at(parent, recipe, trust=trust)
        folder.create(trust=trust)
        return _fit(recipe, folder, launch, None, say, origin=origin, trust=trust)
    if folder.summary.exists():  # the process that held the lock has just completed the run
        return _completed(recipe, folder, say, trust=trust)
    moved = check_recipe_unchanged(recipe, folder, say, trust=trust)
    folder.remove_partial_files()
    folder.check_files()
    start = newest(folder)
    lost: list[str] = []
    origin = None
    if start is None:
        origin = recorded_parent(folder)
    else:
        every = int(recipe.trainer.get("log_every_n_steps", 1))
        for section in recipe.loggers:
            lost += make(section).check_resume(folder.path, step=start.step, every=every)
        if recipe.checkpoint.every_steps is None:
            lost.append(NO_MORE_CHECKPOINTS.format(start.path.name))
    for note in lost:
        say(f"note: {note}")
    return _fit(
        recipe, folder, launch, start, say, origin=origin, moved=moved, trust=trust, lost=lost
    )


def _completed(
    recipe: Recipe, folder: RunFolder, say: Callable[[str], None], *, trust: bool
) -> dict[str, Any]:
    """Returns the summary of a run that is complete; nothing is written."""
    moved = check_recipe_unchanged(recipe, folder, say, trust=trust)
    summary = folder.read_summary()
    if moved:
        text_data(recipe, plan_of(recipe), folder).prepare()
    say(f"run folder: {folder.path} (this run is complete)")
    return summary


def _join(
    recipe: Recipe, folder: RunFolder, launch: Launch, parent: Path | None, *, resume: bool
) -> dict[str, Any]:
    """Trains on a rank other than the first, which alone writes results; what this one prints goes to its log."""
    redirect_output(folder.path, launch)
    start = newest(folder) if resume else None
    origin = None
    if resume and start is None and folder.recipe.exists():
        origin = recorded_parent(folder)
    elif parent is not None and start is None:
        origin = parent_at(parent, recipe, trust=True)
    try:
        # the first rank checks what the run may name, and prints
        return _fit(recipe, folder, launch, start, say=lambda _: None, origin=origin, trust=True)
    except RankLost:
        raise
    except (Interrupted, RunFailed):
        return {}


def _fit(
    recipe: Recipe,
    folder: RunFolder,
    launch: Launch,
    start: Resume | None,
    say: Callable[[str], None],
    *,
    origin: Parent | None = None,
    moved: bool = False,
    trust: bool,
    lost: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepares data and model, trains, and writes the results.

    Args:
        recipe: a validated recipe.
        folder: the run folder.
        launch: this process among the ranks.
        start: the checkpoint to continue from; None: the run begins.
        say: prints caveats.
        origin: what the run begins from if it has no checkpoint of its own; None: from its initial weights.
        moved: whether the recipe names the corpus in another way than the run's recipe.
        trust: whether links may lead out of the folder of a run that gives the initial weights.
        lost: what is missing from the log of a run that is continued.
    """
    started = time.perf_counter()
    for notice in recipe.notices():
        say(f"note: {notice}")
    plan = plan_of(recipe)
    is_started = folder.recipe.exists()
    recorded = None if origin is None else origin.folder
    data = text_data(recipe, plan, folder if is_started else recorded)
    data.prepare()
    if moved:
        _record_moved_corpus(recipe, folder)
    notices = [*recipe.notices(), *lost, *_say_data(data, say)]
    strategy: StrategyFactory = make(recipe.strategy)
    run_model = RunModel(recipe, strategy, data)
    size = size_of(run_model.model)
    frozen = frozen_in(run_model.model)
    if recipe.freeze:
        notices.append(f"freeze: {len(frozen)} tensors are frozen: {listed(frozen)}")
        say(f"note: {notices[-1]}")
    run_model.compile()
    taken = None
    if origin is not None:
        start = origin.start()
    if recipe.selection is not None and start is None:
        taken = run_model.load_initial_weights(say, trust=trust)
        notices += taken.sentences
    elif recipe.selection is not None:
        notices += recorded_notices(folder if origin is None else origin.folder)
    peak = None
    if not torch.cuda.is_available():
        peak = measured_peak_flops(torch.device("cpu"))
    module = TrainingModule(
        run_model.model,
        plan=plan,
        optimizer=make(recipe.optimizer),
        strategy=strategy,
        shard_weights=run_model.shard_weights,
        flops_per_token=size.flops_per_token,
        mask_documents=recipe.data.mask_documents,
        gradient_clip=recipe.gradient_clip,
        max_skipped=recipe.max_skipped_steps,
        cuda_graph=recipe.cuda_graph,
        skip_spikes=recipe.skip_spikes,
        validation_bytes=data.validation_bytes,
        source_bytes=data.source_bytes,
    )
    module.started = started
    callbacks = [make(section).make(folder.path) for section in recipe.callbacks]
    if origin is not None:
        callbacks = [Continued(), *callbacks]
        say(f"continues {origin.folder.path} after step {origin.step}, with its moments")
    if start:
        _check_start(module, start)
        names = [f"model.{one.name}" for one in module.local_parameters.named]
        for note in check_averages(averages_of(callbacks), names, start.content, start.path):
            notices.append(note)
            say(f"note: {note}")
        # the content is as large as the model, and Lightning reads the file again
        start = replace(start, content={})
    if not is_started and is_rank_zero():
        write_identity(recipe, folder, data, taken, origin, say)
    own, sample = _train(recipe, folder, launch, module, data, callbacks, peak, start, say)
    if is_rank_zero():
        return _finish(folder, module, data, size, own, notices, sample)
    return {}


def _say_data(data: TextData, say: Callable[[str], None]) -> list[str]:
    """Prints how often the text is read and what is missing from it; returns what belongs into the summary."""
    for line in (reading_line(data), *source_lines(data)):
        say(line)
    notices = data.notes()
    if not data.validation_documents:
        notices.append(NO_VALIDATION.format(count_of(data.train_documents, "document")))
    for notice in notices:
        say(f"note: {notice}")
    return notices


def _record_moved_corpus(recipe: Recipe, folder: RunFolder) -> None:
    """Writes where the corpus is now into the run's recipe, so that later commands find the same documents."""
    values = compose_run(folder.recipe, trust=True, named=recipe.plugins).to_dict()
    for key in ("corpus", "validation"):
        values["data"][key] = recipe.to_dict()["data"][key]
    folder.write_recipe(values)


def _check_start(module: TrainingModule, start: Resume) -> None:
    """Raises `UserError` unless a checkpoint fits the model and the optimizers that continue from it."""
    check_model(module.model, start.content, start.path)
    optimizers = module.configure_optimizers()
    if not isinstance(optimizers, list):
        optimizers = [optimizers]
    check_optimizers(optimizers, start.content, start.path)


def _train(
    recipe: Recipe,
    folder: RunFolder,
    launch: Launch,
    module: TrainingModule,
    data: TextData,
    callbacks: list[L.Callback],
    peak: float | None,
    start: Resume | None,
    say: Callable[[str], None],
) -> tuple[RunCallbacks, SampleAtEnd]:
    """Runs Lightning's Trainer; it validates after the last step too, and then lets the model write."""
    sample = SampleAtEnd(folder, data.tokenizer)
    own = make_run_callbacks(recipe, folder.path, peak)
    step = start.step if start else 0
    averages = averages_of(callbacks)
    if averages:
        callbacks = [*callbacks, Averages(averages, own.stop)]
    if launch.world > 1:
        now = _start_of(recipe, launch, step, data.fingerprint)
        callbacks = [SameStart(now, folder.path), *callbacks]
    resumed_at = start.step if start else None
    loggers = [make(section).make(folder.path, resumed_at=resumed_at) for section in recipe.loggers]
    trainer = make_trainer(
        recipe,
        folder.path,
        steps=module.plan.steps,
        loggers=loggers,
        callbacks=[
            HyperParameters(recipe.to_dict()),
            own.throughput,
            own.loads,
            *callbacks,
            sample,
        ],
        stop=own.stop,
        strategy=module.strategy.trainer_arguments(),
        launch=launch,
    )
    resumed = f" (resumed after step {start.step})" if start else ""
    say(f"run folder: {folder.path}{resumed}")
    checkpoint = str(start.path) if start else None
    with own.stop.listening(), process_group_scope(folder.path, launch):
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
            if start is None or own.stop.has_begun:
                raise
            why = " ".join(f"{type(cause).__name__}: {cause}".split())
            raise UserError(
                f"{start.path}: the run cannot continue from it: {why[:300]}"
            ) from cause
    module.ended_early = why_ended(module.windows_done, module.plan.steps, callbacks)
    return own, sample


def _start_of(recipe: Recipe, launch: Launch, step: int, data: str) -> Start:
    """What this rank is about to train, and with which code."""
    return Start(
        node=launch.node,
        step=step,
        recipe=hash_of(recipe.to_dict()),
        data=data,
        code=code_version(section.provenance for section in recipe.sections()),
        torch=torch.__version__,
    )


def _finish(
    folder: RunFolder,
    module: TrainingModule,
    data: TextData,
    size: Size,
    callbacks: RunCallbacks,
    notices: list[str],
    sample: SampleAtEnd,
) -> dict[str, Any]:
    """Writes the results of the run; the summary last, because its presence makes the run complete."""
    callbacks.loads.write()
    if module.ended_early:
        notices = [*notices, module.ended_early]
    diverged = divergence(module, sample.error, sample.weight_not_finite)
    if diverged:
        notices = [*notices, diverged]
    summary = summarise(module, data, size, callbacks, notices)
    if data.shift_step is not None:
        summary |= after_shift(folder.path, data.shift_step, module.windows_done)
    folder.write_json("summary.json", summary)
    return summary
