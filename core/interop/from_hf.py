"""Converts a Hugging Face folder to a run folder: its recipe, its tokenizer, and its weights under our names.

Weights keep their number formats, FP8 codes with their scales included, so that `to-hf` can give back every bit. What
`to-hf` needs for that is in the run's folder `hf`: copies of the small files, and the file and the number format of
each tensor.
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core.assemble import build
from core.contracts.checkpoint_format import CheckpointFormat, TensorMapping
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import Provenance
from core.data.tokenizer import Tokenizer
from core.interop.accounting import check_ours, check_theirs, owners, wanted
from core.interop.blocks import INVERSE, ReadBlocks
from core.interop.finite import FiniteTensors
from core.interop.format_lookup import format_named, format_of, read_config, read_json
from core.interop.shards import Shards, shards_of
from core.interop.source_folder import check_inside, small_files
from core.interop.tensor_ops import Compare, Copy, TensorOp
from core.interop.tensors import CODES, DTYPES, SCALE, TensorReader, TensorSpec, scale_spec
from core.interop.transfer import Conversion, check_target
from core.interop.translation import check_not_nested, composed, translated
from core.interop.writing import planned
from core.recipe.compose import Recipe
from core.recipe.tokenizer_file import TokenizerFile
from core.training.run_folder import RunFolder, provenance

OWN_FOLDER = "."
"""The folder of the recipe that names it."""

PRECISIONS = {torch.float64: "fp64", torch.bfloat16: "bf16"}
"""The recipe's precision for weights of a number format; fp32 for every other format."""


def from_hf(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    allow_non_finite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Converts a Hugging Face folder to a run folder.

    Args:
        source: a folder with config.json and safetensors files.
        target: the run folder; must not exist, or be empty.
        dtype: the format of all weights but selection biases, a key of `DTYPES`; None: their own formats.
        allow_non_finite: convert numbers that are not finite, with a note, instead of an error.
        say: called with each message for the user.

    Returns:
        The name of the format, and the numbers of tensors, parameters and bytes.

    Raises:
        UserError: something is wrong with the folder; the target is as before.
        NotFiniteError: a weight is not finite, or too large for its format; likewise.
    """
    check_target(target, "name another folder")
    config_file = source / "config.json"
    config = read_config(source)
    for name in ("tokenizer.json", "generation_config.json"):
        check_inside(source / name)
    check_not_nested(config, config_file)
    checkpoint_format = format_of(config, config_file)
    shards = shards_of(source, say=say)
    override = DTYPES[dtype] if dtype else None
    plain = override or plain_format(shards)
    precision = PRECISIONS.get(plain, "fp32")
    translation = translated(checkpoint_format, config, shards.specs, precision, config_file)
    theirs = ReadBlocks(shards)
    recipe = composed(translation.recipe, str(config_file))
    model = build(recipe, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weight_names = [name for name in theirs.specs if not _is_scale(name, theirs.codes)]
    listed = checkpoint_format.tensor_mappings(config, recipe.to_dict(), weight_names)
    mappings = wanted(listed, theirs.specs)
    check_theirs(mappings, theirs.specs, checkpoint_format, source)
    check_ours(mappings, ours, f"checkpoint_format {checkpoint_format.label}")
    specs = import_specs(mappings, theirs, ours, override, source)
    ops = import_ops(mappings, theirs, specs, str(source))
    layout = _source_layout(checkpoint_format, recipe, shards, mappings, plain, override)
    marked = markers(source, config)
    plan = planned(specs, index=True)
    for sentence in translation.notices:
        say(f"note: {sentence}")
    _warn_about_tokenizer(source, recipe.data.tokenizer.vocab, say)
    described = [f"{name} {spec.dtype} {spec.shape}" for name, spec in specs.items()]
    identity = ["from-hf", _file_stamps(source), layout, described]
    if allow_non_finite:
        identity.append("allow-non-finite")
    checked = FiniteTensors.to_convert(theirs, source, say, allow=allow_non_finite)
    conversion = Conversion(target, identity, say)
    with conversion.partial_folder(plan.bytes) as folder:
        run = RunFolder(folder)
        _write_companions(source, run, layout, say)
        conversion.run(ops, checked, plan, run.converted_weights.parent)
        _write_run(run, recipe, checkpoint_format, marked, source, translation.notices)
    return {
        "format": checkpoint_format.label,
        "tensors": len(theirs.specs),
        "parameters": sum(map(math.prod, ours.values())),
        "bytes": plan.bytes,
    }


def plain_format(shards: Shards) -> torch.dtype:
    """Returns the number format of most bytes that are neither FP8 codes nor their scales."""
    sizes: Counter[torch.dtype] = Counter({torch.bfloat16: 0})
    for name, spec in shards.specs.items():
        if spec.dtype.is_floating_point and spec.dtype != CODES and not name.endswith(INVERSE):
            sizes[spec.dtype] += spec.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _is_scale(name: str, codes: set[str]) -> bool:
    return name.endswith(SCALE) and name.removesuffix(SCALE) in codes


def import_specs(
    mappings: Sequence[TensorMapping],
    theirs: ReadBlocks,
    ours: Mapping[str, tuple[int, ...]],
    override: torch.dtype | None,
    source: Path,
) -> dict[str, TensorSpec]:
    """Returns the specifications of our tensors in the order of the model.

    Each has the widest number format of the tensors that fill it, or `override` if that is given.

    Raises:
        UserError: a tensor is not of floating-point numbers, or only some of the tensors that fill one are FP8 blocks.
    """
    formats: dict[str, torch.dtype] = {}
    for mapping in mappings:
        if mapping.ours is None or mapping.copy:
            continue
        found = theirs.specs[mapping.theirs].dtype
        if not found.is_floating_point:
            raise UserError(
                f"{source}: tensor {mapping.theirs} is {_dtype_name(found)}, "
                "which is not a format of weights"
            )
        if override is not None:
            found = override
        if mapping.exact:
            wide = found if found.itemsize > 1 else torch.float32
            found = torch.promote_types(wide, torch.float32)
        known = formats.setdefault(mapping.ours, found)
        if CODES in (known, found) and known != found:
            raise UserError(
                f"{source}: tensor {mapping.theirs} and the other tensors of {mapping.ours} "
                "must all be in FP8 blocks, or none of them"
            )
        if known != found:
            formats[mapping.ours] = torch.promote_types(known, found)
    specs = {}
    for name, shape in ours.items():
        specs[name] = TensorSpec(formats[name], shape)
        if formats[name] == CODES:
            specs[name + SCALE] = scale_spec(specs[name])
    return specs


def import_ops(
    mappings: Sequence[TensorMapping],
    theirs: TensorReader,
    specs: Mapping[str, TensorSpec],
    where: str,
) -> list[TensorOp]:
    """Returns the operations that make our tensors from those of the checkpoint.

    Comparisons come first, so that an error in the files is reported before hours of copying.
    """
    by_rows = owners(mappings)
    compares: list[TensorOp] = []
    copies: list[TensorOp] = []
    for mapping in mappings:
        ours = mapping.ours
        if ours is None:
            continue
        spec = theirs.specs[mapping.theirs]
        first = mapping.first
        order = mapping.order
        if mapping.copy:
            owner = by_rows[ours, first].theirs
            compares.append(Compare(mapping.theirs, owner, spec, where))
            continue
        dtype = specs[ours].dtype
        copies.append(Copy(mapping.theirs, ours, 0, first, spec, dtype, order))
        if dtype == CODES:
            source = mapping.theirs + SCALE
            scales = theirs.specs[source]
            copies.append(Copy(source, ours + SCALE, 0, first, scales, scales.dtype, order))
    return compares + copies


def _source_layout(
    checkpoint_format: CheckpointFormat,
    recipe: Recipe,
    shards: Shards,
    mappings: Sequence[TensorMapping],
    plain: torch.dtype,
    override: torch.dtype | None,
) -> dict[str, Any]:
    """Describes the files for `to-hf`, which can then write them again: tensors by file, formats, and the model."""
    files: dict[str, list[str]] = {}
    for name, file in shards.files.items():
        files.setdefault(file.name, []).append(name)
    formats: dict[str, str] = {}
    for mapping in mappings:
        dtype = shards.specs[mapping.theirs].dtype
        if override is not None and not mapping.exact:
            dtype = override
        formats[mapping.theirs] = _dtype_name(dtype)
    return {
        "format": checkpoint_format.label,
        "plain": _dtype_name(plain),
        "model": recipe.to_dict()["model"],
        "files": files,
        "formats": formats,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file_stamps(source: Path) -> list[tuple[str, int, int]]:
    """Returns name, size and time of each file, by which a source that was changed since is recognised."""
    stamps = []
    for file in sorted(source.iterdir()):
        if file.is_file():
            stat = file.stat()
            stamps.append((file.name, stat.st_size, stat.st_mtime_ns))
    return stamps


def _write_companions(
    source: Path, run: RunFolder, layout: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Copies the small files of the source, and writes the layout and our tokenizer.json."""
    place = run.source_files
    place.mkdir(exist_ok=True)
    for file in small_files(source, say):
        shutil.copyfile(file, place / file.name)
    RunFolder(place).write_json(run.source_layout.name, layout)
    if (place / "tokenizer.json").exists():
        shutil.copyfile(place / "tokenizer.json", run.tokenizer)


def _warn_about_tokenizer(source: Path, vocabulary: int, say: Callable[[str], None]) -> None:
    """Warns of a tokenizer that is missing or unusable; that is not an error, as the weights can be used without it."""
    file = source / "tokenizer.json"
    if not file.is_file():
        say(f"note: {source} holds no tokenizer.json: the run takes tokens, and no text")
        return
    try:
        last = Tokenizer.load(file).last
    except UserError as cause:
        say(f"note: {cause}")
        return
    if last >= vocabulary:
        say(
            f"note: {file} has a token {last}, and the model knows {vocabulary}, from 0: "
            "a text that needs it fails"
        )


def _write_run(
    run: RunFolder,
    recipe: Recipe,
    checkpoint_format: CheckpointFormat,
    marked: Mapping[str, int | None],
    source: Path,
    notices: Sequence[str],
) -> None:
    """Writes the provenance and, last as in every run folder, the recipe."""
    owner: Provenance = format_named(checkpoint_format.label)[1]
    converted = {
        "source": str(source.resolve()),
        "format": checkpoint_format.label,
        "distribution": owner.distribution,
        "version": owner.version,
        "notices": list(notices),
        **marked,
    }
    run.write_json("provenance.json", provenance(recipe.sections(), converted=converted))
    run.write_digests()
    run.write_recipe(_to_train_further(recipe.to_dict(), run))


def _to_train_further(values: dict[str, Any], run: RunFolder) -> dict[str, Any]:
    """The recipe of a converted run: it has the run's own weights and tokenizer, and asks for a corpus."""
    tokenizer = {**values["data"]["tokenizer"], **_own_tokenizer(run)}
    return {
        **values,
        "data": {**values["data"], "corpus": None, "tokenizer": tokenizer},
        "initial_weights": {"path": OWN_FOLDER},
    }


def _own_tokenizer(run: RunFolder) -> dict[str, Any]:
    """The keys of `data.tokenizer` that name the run's tokenizer; none where it cannot be used."""
    if not run.tokenizer.exists():
        return {}
    try:
        begin, end = TokenizerFile.read(run.tokenizer).markers(None, None)
        Tokenizer.load(run.tokenizer)
    except (ConfigError, UserError):
        return {}  # a note has said so, or no entry is known to end a text
    return {"file": OWN_FOLDER, "begin": begin, "end": end}


def markers(source: Path, config: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the ids that begin and end a text, from generation_config.json, or else from config.json.

    Raises:
        UserError: an id is not a whole number, or generation_config.json cannot be read.
    """
    file = source / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    configs = [(file, generation), (source / "config.json", config)]
    return {
        "begin": _marker(configs, "bos_token_id"),
        "end": _marker(configs, "eos_token_id"),
    }


def _marker(configs: Sequence[tuple[Path, Mapping[str, Any]]], key: str) -> int | None:
    """Returns the id under a key of the first configuration that has one; of a list, its first id."""
    for file, config in configs:
        value = config.get(key)
        if value is None:
            continue
        first = value[0] if isinstance(value, list) and value else value
        if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
            raise UserError(f"{file}: {key} = {value!r}: must be a token's number")
        return first
    return None
