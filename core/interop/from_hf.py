"""A Hugging Face folder becomes a run folder: its recipe, its tokenizer, and its weights under our names.

Weights keep the number formats they came in, FP8 codes with their scales included, so nothing is lost on the way and
`to-hf` can give back every bit. What `to-hf` must know for that lies in the run's folder `hf`: the small files as they
were, and which tensor stood where in which format.
"""

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from core.assemble import build
from core.contracts.checkpoint_format import CheckpointFormat, Piece, Translation
from core.contracts.errors import UserError, Wrong
from core.contracts.schema import Provenance
from core.data.tokenizer import Tokenizer
from core.extension.checks import told_where
from core.interop.accounting import check_ours, check_theirs, owners, wanted
from core.interop.blocks import INVERSE, ReadBlocks
from core.interop.formats import format_named, format_of, read_config, read_json
from core.interop.moves import Compare, Copy, Move
from core.interop.shards import Shards, shards_of
from core.interop.tensors import CODES, DTYPES, SCALE, Kind, Tensors, scale_kind
from core.interop.transfer import Conversion, check_target
from core.interop.writing import planned
from core.recipe.compose import Recipe, compose
from core.training.folder import RunFolder, provenance

LARGEST_COMPANION = 128 * 2**20
WEIGHT_SUFFIXES = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx"]
)
PRECISIONS = {torch.float64: "fp64", torch.bfloat16: "bf16"}
"""The precision that suits a format; fp32 for every other."""


def from_hf(
    source: Path, target: Path, *, dtype: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Convert a folder.

    Args:
        source: with config.json and safetensors files.
        target: the run folder; must not exist, or be empty.
        dtype: the format of all weights but selection biases, a key of `DTYPES`; None: as they came.
        say: told what nobody who uses the run may overlook.

    Returns:
        What was done: the format's name, how many tensors and parameters.

    Raises:
        UserError: anything that is wrong with the folder; the target is as before.
    """
    check_target(target, "name another folder")
    config = read_config(source)
    made = format_of(config, source / "config.json")
    shards = shards_of(source)
    wished = DTYPES[dtype] if dtype else None
    plain = wished or plain_format(shards)
    translation = _translated(made, config, shards.kinds, PRECISIONS.get(plain, "fp32"), source)
    theirs = ReadBlocks(shards)
    recipe = composed(translation.recipe, f"{source / 'config.json'}")
    model = build(recipe, device="meta")
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    listed = made.pieces(config, recipe.to_dict(), [name for name in theirs.kinds if not _is_scale(name, theirs.codes)])
    pieces = wanted(listed, theirs.kinds)
    check_theirs(pieces, theirs.kinds, made, source)
    check_ours(pieces, ours, f"checkpoint_format {made.label}")
    kinds = kinds_in(pieces, theirs, ours, wished, source)
    moves = moves_in(pieces, theirs, kinds, str(source))
    layout = _layout(made, recipe, shards, pieces, plain, wished)
    marked = markers(source, config)
    plan = planned(kinds, index=True)
    for notice in translation.notices:
        say(f"note: {notice}")
    _tell_tokenizer(source, recipe.data.tokenizer.vocab, say)
    conversion = Conversion(target, ["from-hf", _stamps(source), layout, _spelt(kinds)], say)
    with conversion.folder_in_the_making(plan.bytes) as folder:
        _write_companions(source, folder, layout)
        conversion.move(moves, theirs, plan, RunFolder(folder).converted_weights.parent)
        _write_run(RunFolder(folder), recipe, made, marked, source, translation.notices)
    count = sum(math.prod(shape) for shape in ours.values())
    return {"format": made.label, "tensors": len(theirs.kinds), "parameters": count, "bytes": plan.bytes}


def _translated(
    made: CheckpointFormat, config: Mapping[str, Any], names: Mapping[str, Kind], precision: str, source: Path
) -> Translation:
    try:
        return made.recipe_of(config, list(names), precision)
    except Wrong as wrong:
        value = f" = {config[wrong.key]!r}" if wrong.key in config else ""
        raise UserError(f"{source / 'config.json'}: {wrong.key}{value}: {wrong.why}") from wrong
    except Exception as cause:
        who = f"checkpoint_format {made.label}"
        raise UserError(f"{source / 'config.json'}: {who} cannot read it: {told_where(cause)}") from cause


def plain_format(shards: Shards) -> torch.dtype:
    """The format of most of what is not in FP8 blocks."""
    sizes: Counter[torch.dtype] = Counter({torch.bfloat16: 0})
    for name, kind in shards.kinds.items():
        if kind.dtype.is_floating_point and kind.dtype != CODES and not name.endswith(INVERSE):
            sizes[kind.dtype] += kind.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def composed(values: Mapping[str, Any], source: str) -> Recipe:
    """A raw recipe, validated.

    Raises:
        UserError: what is wrong with it, told of `source`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
        try:
            return compose(file)
        except UserError as cause:
            raise UserError(
                f"{source}: gives no model that can be built here: {cause}".replace(f"{file}: ", "")
            ) from cause


def _is_scale(name: str, codes: set[str]) -> bool:
    return name.endswith(SCALE) and name.removesuffix(SCALE) in codes


def kinds_in(
    pieces: Sequence[Piece],
    theirs: ReadBlocks,
    ours: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    source: Path,
) -> dict[str, Kind]:
    """Our tensors in the order of the model, with the widest format of their pieces."""
    formats: dict[str, torch.dtype] = {}
    for piece in pieces:
        if piece.ours is None or piece.copy:
            continue
        found = theirs.kinds[piece.theirs].dtype
        if not found.is_floating_point:
            raise UserError(
                f"{source}: tensor {piece.theirs} is {found}, which is no format of weights".replace("torch.", "")
            )
        if dtype is not None:
            found = dtype
        if piece.exact:
            found = torch.promote_types(found if found.itemsize > 1 else torch.float32, torch.float32)
        known = formats.setdefault(piece.ours, found)
        if CODES in (known, found) and known != found:
            raise UserError(
                f"{source}: tensor {piece.theirs} and its neighbours must be FP8 blocks all, or none of them"
            )
        formats[piece.ours] = known if known == found else torch.promote_types(known, found)
    kinds = {}
    for name, shape in ours.items():
        kinds[name] = Kind(formats[name], shape)
        if formats[name] == CODES:
            kinds[name + SCALE] = scale_kind(kinds[name])
    return kinds


def moves_in(pieces: Sequence[Piece], theirs: Tensors, kinds: Mapping[str, Kind], where: str) -> list[Move]:
    """From their tensors to ours; comparisons first, because what is wrong should be told before hours of copying."""
    by_rows = owners(pieces)
    compares: list[Move] = []
    copies: list[Move] = []
    for piece in pieces:
        if piece.ours is None:
            continue
        kind = theirs.kinds[piece.theirs]
        if piece.copy:
            owner = by_rows[piece.ours, piece.first].theirs
            compares.append(Compare(piece.theirs, owner, kind, where))
            continue
        dtype = kinds[piece.ours].dtype
        copies.append(Copy(piece.theirs, piece.ours, 0, piece.first, kind, dtype, piece.order))
        if dtype == CODES:
            scales = theirs.kinds[piece.theirs + SCALE]
            names = piece.theirs + SCALE, piece.ours + SCALE
            copies.append(Copy(*names, 0, piece.first, scales, scales.dtype, piece.order))
    return compares + copies


def _layout(
    made: CheckpointFormat,
    recipe: Recipe,
    shards: Shards,
    pieces: Sequence[Piece],
    plain: torch.dtype,
    wished: torch.dtype | None,
) -> dict[str, Any]:
    """What `to-hf` needs to give the same files back: names by file, formats, and the model they belong to."""
    files: dict[str, list[str]] = {}
    for name, file in shards.files.items():
        files.setdefault(file.name, []).append(name)
    formats = {p.theirs: shards.kinds[p.theirs].dtype if wished is None or p.exact else wished for p in pieces}
    spelt = {name: str(dtype).removeprefix("torch.") for name, dtype in {**formats, "": plain}.items()}
    return {
        "format": made.label,
        "plain": spelt.pop(""),
        "model": recipe.to_dict()["model"],
        "files": files,
        "formats": spelt,
    }


def _spelt(kinds: Mapping[str, Kind]) -> list[str]:
    return [f"{name} {kind.dtype} {kind.shape}" for name, kind in kinds.items()]


def _stamps(source: Path) -> list[tuple[str, int, int]]:
    """What tells a changed source from the one that a conversion was begun with."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _write_companions(source: Path, folder: Path, layout: Mapping[str, Any]) -> None:
    """The small files as they were, and our tokenizer.json."""
    run = RunFolder(folder)
    place = run.source_files
    place.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        index = file.name.endswith(".index.json")
        if not file.is_file() or index or file.suffix in WEIGHT_SUFFIXES or file.name.startswith("."):
            continue
        if file.stat().st_size <= LARGEST_COMPANION:
            shutil.copyfile(file, place / file.name)
    RunFolder(place).write_json(run.source_layout.name, layout)
    if (place / "tokenizer.json").exists():
        shutil.copyfile(place / "tokenizer.json", run.tokenizer)


def _tell_tokenizer(source: Path, vocabulary: int, say: Callable[[str], None]) -> None:
    """Weights are of use without text, so what is wrong with a tokenizer is told and not refused."""
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
        say(f"note: {file} has a token {last}, and the model knows {vocabulary}, from 0: a text that needs it fails")


def _write_run(
    run: RunFolder,
    recipe: Recipe,
    made: CheckpointFormat,
    marked: Mapping[str, int | None],
    source: Path,
    notices: Sequence[str],
) -> None:
    """What the run is; the recipe last, as always."""
    owner: Provenance = format_named(made.label)[1]
    converted = {
        "source": str(source.resolve()),
        "format": made.label,
        "distribution": owner.distribution,
        "version": owner.version,
        "notices": list(notices),
        **marked,
    }
    run.write_json("provenance.json", provenance(recipe.sections(), converted=converted))
    run.write_recipe(recipe.to_dict())


def markers(source: Path, config: Mapping[str, Any]) -> dict[str, int | None]:
    """The ids that begin and end a text, as the generation's configuration, or else the model's, has them.

    Raises:
        UserError: one is no whole number, or the generation's configuration cannot be read.
    """
    generation, found = source / "generation_config.json", {}
    places = {generation: read_json(generation) if generation.is_file() else {}, source / "config.json": config}
    for name, key in (("begin", "bos_token_id"), ("end", "eos_token_id")):
        given = ((file, place[key]) for file, place in places.items() if place.get(key) is not None)
        file, value = next(given, (source, None))
        first = value[0] if isinstance(value, list) and value else value
        if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
            raise UserError(f"{file}: {key} = {value!r}: must be a token's number")
        found[name] = first
    return found
