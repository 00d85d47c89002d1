"""From objects to a run folder: train, resume, validate, summarise; and load what a run left."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.analysis.describe import obstacles
from core.analysis.size import Size, size_of
from core.assemble import build, compile_parts, make, plan_of
from core.contracts.errors import Interrupted, RunFailed, UserError
from core.data.baseline import xz_bits_per_byte
from core.data.documents import read_split
from core.data.loaders import ValidationLoader
from core.data.module import TextData
from core.data.tokenizer import Tokenizer
from core.interop.run_weights import load_into, weights_of
from core.model.language_model import LanguageModel
from core.model.sampling import sample
from core.recipe.compose import Recipe, compose
from core.recipe.plan import Plan
from core.training.checkpoints import is_disk_full, read_checkpoint
from core.training.folder import RunFolder, provenance
from core.training.module import TrainingModule
from core.training.ranks import leads, one_group, rank_and_world
from core.training.resume import Resume, check_data, check_same, check_trained, newest, newest_checkpoint
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
        say: told what a person at the terminal wants to know.

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
    _tell_notices(recipe, say)
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
        _tell_other_tokenizer(source, data, say)
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


def _tell_notices(recipe: Recipe, say: Callable[[str], None]) -> None:
    """What nobody who reads the results may overlook."""
    for notice in recipe.notices():
        say(f"note: {notice}")


def _tell_other_tokenizer(source: Path, data: TextData, say: Callable[[str], None]) -> None:
    """Weights know tokens by their numbers: under another tokenizer those stand for other text."""
    known = source.parent.parent / "tokenizer.json"
    if known.is_file() and Tokenizer.load(known).entries() != data.tokenizer.entries():
        say(f"note: {known} is another tokenizer than this run's, so its weights have to learn the tokens anew")


def text_data(recipe: Recipe, plan: Plan) -> TextData:
    """The recipe's data; nothing is read before `prepare()`."""
    return TextData(
        make(recipe.data.corpus),
        vocab=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        plan=plan,
        seed=recipe.seed,
        rank_and_world=rank_and_world,
        validation_sequences=recipe.validation.sequences,
    )


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


def summarise(
    module: TrainingModule, data: TextData, size: Size, watchers: Watchers, notices: list[str]
) -> dict[str, Any]:
    """The run's results under the names that `summary.json` promises; null where something was not measured."""
    values = module.validated
    acceptance = next((v for name, v in values.items() if name.endswith("acceptance_1")), None)
    tokens = module.plan.progress(module.windows_done - 1).tokens
    rate = tokens / module.seconds if module.seconds else None
    peak, recent = watchers.throughput.available_flops, watchers.loads.recent
    results = {
        "steps": module.windows_done,
        "tokens": tokens,
        "wall_seconds": module.wall_seconds,
        "train_seconds": module.seconds,
        "tokens_per_second": rate,
        "mfu": rate * size.flops_per_token / (peak * module.trainer.world_size) if rate and peak else None,
        "peak_flops": peak,
        "val_loss": values.get("val_loss"),
        "val_bits_per_byte": values.get("val_bits_per_byte"),
        "max_vio_global": values.get("val_max_vio_global"),
        "max_vio_batch": sum(recent) / len(recent) if recent else None,
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
        "precision_paths": module.model.paths().table(),
        "notices": notices,
    }
    return finite(results)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with null for what is no number: JSON has neither infinities nor NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def peak_memory_bytes() -> int:
    """The most memory this process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_environment(recipe: Recipe) -> None:
    """Raises `UserError` for shapes that a part of the model refuses, and where a component cannot run here."""
    try:
        build(recipe, device="meta")
    except UserError as refused:
        raise UserError(f"{recipe.source}: {refused}") from refused
    found = obstacles(recipe)
    if found:
        raise UserError(f"{recipe.source}: cannot run here: {'; '.join(found)}")


def load_weights(model: LanguageModel, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model; every tensor must find its place.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
    """
    if checkpoint.suffix == ".json":
        load_into(model, weights_of(checkpoint), checkpoint)
        return
    state = read_checkpoint(checkpoint)["state_dict"]
    weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            what = "missing" if name not in weights else "not of this model"
            raise UserError(f"{checkpoint}: tensor {name} is {what}")
        theirs, ours = tuple(weights[name].shape), tuple(own[name].shape)
        if theirs != ours:
            raise UserError(f"{checkpoint}: tensor {name} is {theirs}, the model's {ours}")
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


@torch.no_grad()
def evaluate(checkpoint: Path, *, xz: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Validation of a checkpoint over its recipe's whole validation split.

    Args:
        checkpoint: a file.
        xz: also say what `xz -9e` needs for the same bytes when it has the training text before them.
        say: told what nobody who reads the values may overlook.

    Raises:
        UserError: no run, a damaged checkpoint, data that differs from the run's, or no validation split.
    """
    folder = run_of(checkpoint)
    check_trained(folder, "score it with --tasks")
    recipe = compose(folder.recipe)
    _tell_notices(recipe, say)
    data = text_data(recipe, plan_of(recipe))
    data.prepare()
    check_data(folder, data.fingerprint)
    if not data.validation_bytes:
        raise UserError(f"{checkpoint}: the corpus has no validation split (fewer than 11 documents)")
    module = TrainingModule(
        load(checkpoint),
        plan=data.plan,
        optimizer=make(recipe.optimizer),
        flops_per_token=0.0,
        mask_documents=recipe.data.mask_documents,
        validation_bytes=data.validation_bytes,
    ).eval()
    loader = data.val_dataloader()
    assert isinstance(loader, ValidationLoader)
    for index, batch in enumerate(loader):
        module.validation_step(batch, index)
    values: dict[str, Any] = {"checkpoint": checkpoint.name, **module.validation.compute()}
    values["notices"] = recipe.notices()
    if xz:
        split = read_split(make(recipe.data.corpus))
        train, validation = (b"".join(d.data for d in part) for part in (split.train, split.validation))
        values["xz_bits_per_byte"] = xz_bits_per_byte(train, validation)
    return finite(values)


def run_of(path: Path) -> RunFolder:
    """The run that a folder is, or that a checkpoint belongs to.

    Raises:
        UserError: there is no recipe.
    """
    folder = RunFolder(path if path.is_dir() else path.parent.parent)
    if not folder.recipe.exists():
        raise UserError(f"{path}: no run here (no {folder.recipe})")
    return folder
