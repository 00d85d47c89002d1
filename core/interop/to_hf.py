"""Converts a run to a Hugging Face folder that transformers, vLLM and SGLang read.

A converted run whose model was not changed is written as it was before: the same tensors, formats and files. Any other
run is written in the usual layout: one tensor for each projection of an expert, files of at most 5 GB, and copies of
embedding and output beside the modules of multi-token prediction.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.contracts.checkpoint_format import CheckpointFormat, TensorMapping
from core.contracts.errors import UserError
from core.data.tokenizer import END, END_TEXT
from core.interop.accounting import check_ours, wanted
from core.interop.blocks import INVERSE, grid_spec
from core.interop.finite import FiniteTensors
from core.interop.format_lookup import config_for, format_named, read_json
from core.interop.layout_file import read_layout
from core.interop.metadata import warn_of_disagreements
from core.interop.run_weights import model_specs, weights_of
from core.interop.source_folder import small_files
from core.interop.tensor_ops import Copy, Quantise, TensorOp, inverse
from core.interop.tensors import CODES, DTYPES, SCALE, TensorReader, TensorSpec, scale_spec
from core.interop.transfer import Conversion, check_target
from core.interop.writing import FilePlan, planned
from core.recipe.compose import compose_run
from core.training.run_folder import RunFolder

NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


@dataclass(frozen=True)
class ExportOptions:
    """Which weights are written, and in which number formats.

    Args:
        dtype: format of all weights but selection biases, a key of `DTYPES`; None: the formats of the source, or bf16
            for a run that was trained here.
        fp8: quantise matrices to FP8 blocks.
        keep_fp8: write matrices in the FP8 blocks that they were converted from.
        main_only: leave out the modules of loss heads, such as multi-token prediction.
        allow_non_finite: write numbers that are not finite, with a note, instead of an error.
        weights: the name of averaged weights to write; None: those that were trained.
    """

    dtype: str | None = None
    fp8: bool = False
    keep_fp8: bool = False
    main_only: bool = False
    allow_non_finite: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class SourceLayout:
    """What a converted run records about its source.

    Args:
        folder: the small files of the source.
        config: its config.json.
        plain: the number format of its weights that were not in FP8 blocks.
        files: names of tensors by file; empty if the model was changed since, so that the files cannot be restored.
        formats: number format by tensor; empty in the same case.
    """

    folder: Path
    config: dict[str, Any]
    plain: torch.dtype
    files: dict[str, list[str]]
    formats: dict[str, torch.dtype]


def to_hf(
    run: Path,
    checkpoint: Path,
    target: Path,
    options: ExportOptions,
    *,
    trust: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes a run's weights for other programs.

    Args:
        run: the run's folder.
        checkpoint: its weights.
        target: the folder; must not exist, or be empty.
        options: number formats, and which parts are written.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
        say: called with each message for the user.

    Returns:
        The name of the format, and the numbers of tensors and bytes.

    Raises:
        UserError: no architecture can express the model, or the target exists; the target is as before.
        NotFiniteError: a weight is not finite, or too large for its format; likewise.
    """
    check_target(target, "name another folder")
    folder = RunFolder(run)
    recipe = compose_run(folder.recipe, trust=trust).to_dict()
    weights = weights_of(checkpoint, options.weights)
    ours = _without_flags(model_specs(weights))
    if options.main_only:
        recipe, ours = _main_model(recipe, ours)
    checkpoint_format, config, source = _described(folder, recipe)
    mappings = _mappings_of(checkpoint_format, config, recipe, source)
    _check_mappings(mappings, ours, checkpoint_format, run, checkpoint)
    _check_options(options, checkpoint_format, weights, run)
    theirs = _export_specs(mappings, ours, options, source)
    plan = _file_plan(theirs, source)
    markers = folder.file_markers() or (END, END)
    config = _with_formats(config, theirs, checkpoint_format, options, source, markers)
    identity = _identity(checkpoint, config, theirs)
    if options.allow_non_finite:
        identity.append("allow-non-finite")
    if options.weights is not None:
        identity.append(f"weights {options.weights}")
    checked = FiniteTensors.to_convert(
        weights, checkpoint, say, allow=options.allow_non_finite, fp8=options.fp8
    )
    conversion = Conversion(target, identity, say)
    with conversion.partial_folder(plan.bytes) as place:
        conversion.run(export_ops(mappings, ours, theirs), checked, plan, place)
        _write_companions(RunFolder(place), folder, config, source, say)
        warn_of_disagreements(place, say)
    if source is None and options.dtype is None:
        say(
            "note: weights are written in bf16, as other programs expect; --dtype fp32 keeps every bit"
        )
    return {"format": checkpoint_format.label, "tensors": len(theirs), "bytes": plan.bytes}


def _without_flags(ours: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Returns the tensors without flags of a layer's training (bool): no format has them, and no logit needs them."""
    return {name: spec for name, spec in ours.items() if spec.dtype != torch.bool}


def _main_model(
    recipe: dict[str, Any], ours: Mapping[str, TensorSpec]
) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """Returns the recipe and the tensors without the modules of loss heads."""
    main = {**recipe, "model": {**recipe["model"], "heads": {}}}
    return main, {name: spec for name, spec in ours.items() if not name.startswith("heads.")}


def _described(
    folder: RunFolder, recipe: Mapping[str, Any]
) -> tuple[CheckpointFormat, dict[str, Any], SourceLayout | None]:
    """Returns the format, its configuration, and the layout of the source; None for a run that was trained here."""
    if not folder.source_layout.is_file():
        return *config_for(recipe, str(folder.recipe)), None
    folder.check_digests(folder.source_files.name)
    layout = read_layout(folder.source_layout)
    config = read_json(folder.source_files / "config.json")
    if layout.model != recipe["model"]:
        source = SourceLayout(folder.source_files, config, layout.plain, {}, {})
        return *config_for(recipe, str(folder.recipe)), source
    checkpoint_format, _ = format_named(layout.format)
    source = SourceLayout(folder.source_files, config, layout.plain, layout.files, layout.formats)
    return checkpoint_format, config, source


def _mappings_of(
    checkpoint_format: CheckpointFormat,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    source: SourceLayout | None,
) -> list[TensorMapping]:
    """Returns the mappings of the tensors to write; if files are restored, of the tensors that they held."""
    formats = source.formats if source is not None else {}
    mappings = list(checkpoint_format.tensor_mappings(config, recipe, formats or None))
    return wanted(mappings, formats) if formats else mappings


def _check_mappings(
    mappings: Sequence[TensorMapping],
    ours: Mapping[str, TensorSpec],
    checkpoint_format: CheckpointFormat,
    run: Path,
    checkpoint: Path,
) -> None:
    """Raises `UserError` unless the mappings account for every row of the model's tensors."""
    shapes = {name: spec.shape for name, spec in ours.items()}
    check_ours(mappings, shapes, f"{run}: checkpoint_format {checkpoint_format.label}")
    check_shapes(mappings, ours, str(checkpoint))


def check_shapes(
    mappings: Sequence[TensorMapping], ours: Mapping[str, TensorSpec], where: str
) -> None:
    """Raises `UserError` if a mapping that is a copy needs more rows than its tensor has."""
    for mapping in mappings:
        if mapping.ours is not None and mapping.copy:
            rows = TensorSpec(torch.float32, mapping.shape).rows
            if mapping.first + rows > ours[mapping.ours].rows:
                raise UserError(
                    f"{where}: tensor {mapping.ours} has too few rows for {mapping.theirs}"
                )


def _check_options(
    options: ExportOptions, checkpoint_format: CheckpointFormat, weights: TensorReader, run: Path
) -> None:
    """Raises `UserError` for options that these weights or this format cannot meet."""
    if options.fp8 and checkpoint_format.fp8_config is None:
        raise UserError(f"--fp8: checkpoint_format {checkpoint_format.label} has no FP8 form")
    if options.keep_fp8 and not any(spec.dtype == CODES for spec in weights.specs.values()):
        raise UserError(f"--keep-fp8: {run} holds no FP8 blocks; --fp8 makes some")


def _export_specs(
    mappings: Sequence[TensorMapping],
    ours: Mapping[str, TensorSpec],
    options: ExportOptions,
    source: SourceLayout | None,
) -> dict[str, TensorSpec]:
    """Returns the tensors to write in order; FP8 codes are followed by their grids of block scales."""
    theirs: dict[str, TensorSpec] = {}
    for mapping in mappings:
        dtype = _export_dtype(mapping, ours, options, source)
        theirs[mapping.theirs] = TensorSpec(dtype, mapping.shape)
        if dtype == CODES:
            theirs[mapping.theirs + INVERSE] = grid_spec(theirs[mapping.theirs])
    return theirs


def _export_dtype(
    mapping: TensorMapping,
    ours: Mapping[str, TensorSpec],
    options: ExportOptions,
    source: SourceLayout | None,
) -> torch.dtype:
    """Returns the number format in which a tensor is written."""
    if options.keep_fp8 and mapping.ours is not None and ours[mapping.ours].dtype == CODES:
        return CODES
    if options.fp8 and mapping.blocks:
        return CODES
    if options.dtype is None and source is not None:
        original = source.formats.get(mapping.theirs)
        if original is not None and original != CODES:
            return original
    if mapping.exact:
        return torch.float32
    if options.dtype is None and source is not None:
        return source.plain
    return DTYPES[options.dtype or "bf16"]


def _file_plan(theirs: Mapping[str, TensorSpec], source: SourceLayout | None) -> FilePlan:
    """Returns the files of the source if they held the same tensors, otherwise files of the usual size."""
    if source is None:
        return planned(theirs)
    files: dict[str, dict[str, TensorSpec]] = {}
    names: list[str] = []
    for file, listed in source.files.items():
        names += listed
        files[file] = {name: theirs[name] for name in listed if name in theirs}
    if sorted(names) != sorted(theirs):
        return planned(theirs)
    return FilePlan(files, len(files) > 1 or next(iter(files)) != "model.safetensors")


def export_ops(
    mappings: Sequence[TensorMapping],
    ours: Mapping[str, TensorSpec],
    theirs: Mapping[str, TensorSpec],
) -> list[TensorOp]:
    """Returns the operations that make the tensors of the checkpoint from ours."""
    ops: list[TensorOp] = []
    for mapping in mappings:
        name = mapping.ours
        if name is None:
            continue  # constants are 0, and new files are filled with zeros
        held = ours[name]
        written = theirs[mapping.theirs]
        rows = TensorSpec(held.dtype, mapping.shape)
        first = mapping.first
        order = inverse(mapping.order)
        if written.dtype == CODES and held.dtype != CODES:
            ops.append(Quantise(name, mapping.theirs, first, rows, order))
            continue
        ops.append(Copy(name, mapping.theirs, first, 0, rows, written.dtype, order))
        if written.dtype == CODES:
            target = mapping.theirs + SCALE
            scales = scale_spec(rows)
            ops.append(Copy(name + SCALE, target, first, 0, scales, torch.float32, order))
    return ops


def _with_formats(
    config: Mapping[str, Any],
    theirs: Mapping[str, TensorSpec],
    checkpoint_format: CheckpointFormat,
    options: ExportOptions,
    source: SourceLayout | None,
    markers: tuple[int, int],
) -> dict[str, Any]:
    """Returns the configuration with its keys of number formats and, unless files are restored, of markers."""
    has_fp8 = any(spec.dtype == CODES for spec in theirs.values())
    fp8 = checkpoint_format.fp8_config if has_fp8 else None
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if fp8 is not None:
        result["quantization_config"] = config.get("quantization_config", dict(fp8))
    restored = source is not None and bool(source.formats)
    if not restored or options.dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        result |= dict.fromkeys(keys, NAMES[_main_format(theirs, fp8 is not None)])
    if not restored:
        for key, marker in zip(("bos_token_id", "eos_token_id"), markers, strict=True):
            result[key] = marker if source is None else source.config.get(key)
        result["pad_token_id"] = None if source is None else source.config.get("pad_token_id")
    return result


def _identity(
    checkpoint: Path, config: Mapping[str, Any], theirs: Mapping[str, TensorSpec]
) -> list[Any]:
    """Returns what must be equal for a stopped conversion to be continued: the weights and all that is written."""
    return [
        "to-hf",
        str(checkpoint.resolve()),
        checkpoint.stat().st_mtime_ns,
        config,
        sorted(map(str, theirs.items())),
    ]


def _main_format(theirs: Mapping[str, TensorSpec], has_fp8: bool) -> torch.dtype:
    """Returns the format of most matrices; beside FP8 blocks, that of the first tensor that is not quantised."""
    if has_fp8:
        for name, spec in theirs.items():
            if spec.dtype in NAMES and not name.endswith(INVERSE):
                return spec.dtype
    plain = [spec.dtype for spec in theirs.values() if spec.dtype in NAMES and len(spec.shape) > 1]
    return max(dict.fromkeys(plain), key=plain.count, default=torch.bfloat16)


def _write_companions(
    target: RunFolder,
    run: RunFolder,
    config: Mapping[str, Any],
    source: SourceLayout | None,
    say: Callable[[str], None],
) -> None:
    """Writes config.json and every other file that holds no weights."""
    if source is not None:
        for file in small_files(source.folder, say):
            if file.name not in (run.source_layout.name, "config.json"):
                shutil.copyfile(file, target.path / file.name)
    else:
        markers = run.file_markers()
        begin, end = markers or (END, END)
        ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
        target.write_json("generation_config.json", {"_from_model_config": True, **ids})
        if markers:
            _write_given_tokenizer(target, run)
        elif run.tokenizer.exists():
            settings = tokenizer_config(config["max_position_embeddings"])
            target.write_text("tokenizer.json", run.load_tokenizer().marked_json())
            target.write_json("tokenizer_config.json", settings)
    target.write_text("config.json", json.dumps(config, indent=2) + "\n")


def _write_given_tokenizer(target: RunFolder, run: RunFolder) -> None:
    """Copies the files of a tokenizer that came from a file: it goes back as it came, with its chat template."""
    run.load_tokenizer()  # compares it with its checksum
    for file in (run.tokenizer, run.tokenizer_config, run.chat_template):
        if file.exists():
            run.check_digests(file.name)
            shutil.copyfile(file, target.path / file.name)


def tokenizer_config(length: int) -> dict[str, Any]:
    """Returns tokenizer_config.json for a tokenizer of ours: one marker begins, ends and pads a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TEXT,
        "eos_token": END_TEXT,
        "pad_token": END_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
