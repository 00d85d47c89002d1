"""A run becomes a Hugging Face folder that transformers, vLLM and SGLang read.

A converted run whose model is as it came is given back as it came: the same tensors, formats and files. Any other run
is written in the usual layout: one tensor for each expert's projection, files of at most 5 GB, the multi-token
module's copies of embedding and output beside it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.contracts.checkpoint_format import CheckpointFormat, Piece
from core.contracts.errors import UserError
from core.data.tokenizer import END, END_TEXT, Tokenizer
from core.interop.accounting import check_ours, wanted
from core.interop.blocks import INVERSE, grid_kind
from core.interop.formats import config_for, format_named, read_json
from core.interop.moves import Copy, Move, Quantise, inverse
from core.interop.run_weights import own_kinds, weights_of
from core.interop.tensors import CODES, DTYPES, SCALE, Kind, Tensors, scale_kind
from core.interop.transfer import Conversion, check_target
from core.interop.writing import Plan, planned
from core.recipe.compose import compose
from core.training.folder import RunFolder

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass(frozen=True)
class Wish:
    """In which formats weights are written.

    Args:
        dtype: of all but selection biases, a key of `DTYPES`; None: as they came, bf16 for a run that was trained here.
        fp8: matrices in FP8 blocks, quantised now.
        keep_fp8: matrices in the FP8 blocks that they came in.
        main_only: without the modules of loss heads, such as multi-token prediction.
    """

    dtype: str | None = None
    fp8: bool = False
    keep_fp8: bool = False
    main_only: bool = False


@dataclass(frozen=True)
class Origin:
    """What a converted run remembers of its source.

    Args:
        folder: its small files.
        config: its configuration.
        plain: the format of what was not in FP8 blocks.
        files: names by file; none where the model was changed since, so that the files cannot come back as they were.
        formats: of every tensor, likewise.
    """

    folder: Path
    config: dict[str, Any]
    plain: torch.dtype
    files: dict[str, list[str]]
    formats: dict[str, torch.dtype]


def to_hf(
    run: Path, checkpoint: Path, target: Path, wish: Wish, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Write a run's weights for other programs.

    Args:
        run: the run's folder.
        checkpoint: its weights.
        target: the folder; must not exist, or be empty.
        wish: number formats.
        say: told what nobody who uses the folder may overlook.

    Raises:
        UserError: the architectures cannot express the model, or the target is taken; it is as before.
    """
    check_target(target, "name another folder")
    folder = RunFolder(run)
    values, weights = compose(folder.recipe).to_dict(), weights_of(checkpoint)
    kinds = own_kinds(weights)
    if wish.main_only:
        values["model"]["heads"] = {}
        kinds = {name: kind for name, kind in kinds.items() if not name.startswith("heads.")}
    made, config, origin = _described(folder, values)
    came = origin.formats if origin is not None else {}
    pieces = list(made.pieces(config, values, came or None))
    if came:
        pieces = wanted(pieces, came)
    check_ours(pieces, {name: kind.shape for name, kind in kinds.items()}, f"{run}: checkpoint_format {made.label}")
    check_shapes(pieces, kinds, str(checkpoint))
    _check_wish(wish, made, weights, run)
    theirs = _kinds(pieces, kinds, wish, origin)
    plan = _planned(theirs, wish, origin)
    moves = moves_out(pieces, kinds, theirs)
    in_fp8 = any(kind.dtype == CODES for kind in theirs.values())
    config = _with_formats(config, theirs, made.fp8_config if in_fp8 else None, wish, origin)
    identity = [
        "to-hf",
        str(checkpoint.resolve()),
        checkpoint.stat().st_mtime_ns,
        config,
        sorted(map(str, theirs.items())),
    ]
    conversion = Conversion(target, identity, say)
    with conversion.folder_in_the_making(plan.bytes) as place:
        conversion.move(moves, weights, plan, place)
        _write_companions(RunFolder(place), folder, config, origin)
    if origin is None and wish.dtype is None:
        say("note: weights are written in bf16, as other programs expect; --dtype fp32 keeps every bit")
    return {"format": made.label, "tensors": len(theirs), "bytes": plan.bytes}


def _described(folder: RunFolder, values: Mapping[str, Any]) -> tuple[CheckpointFormat, dict[str, Any], Origin | None]:
    """The format, its configuration, and what a converted run remembers."""
    if not folder.source_layout.is_file():
        return *config_for(values, str(folder.recipe)), None
    layout, source = read_json(folder.source_layout), read_json(folder.source_files / "config.json")
    plain = getattr(torch, layout["plain"])
    if layout["model"] != values["model"]:
        return *config_for(values, str(folder.recipe)), Origin(folder.source_files, source, plain, {}, {})
    formats = {name: getattr(torch, dtype) for name, dtype in layout["formats"].items()}
    made, _ = format_named(layout["format"])
    return made, source, Origin(folder.source_files, source, plain, layout["files"], formats)


def check_shapes(pieces: Sequence[Piece], kinds: Mapping[str, Kind], where: str) -> None:
    """Raises `UserError` where a piece takes rows that its tensor has not."""
    for piece in pieces:
        if piece.ours is not None and piece.copy:
            size = Kind(torch.float32, piece.shape).rows
            if piece.first + size > kinds[piece.ours].rows:
                raise UserError(f"{where}: tensor {piece.ours} has too few rows for {piece.theirs}")


def _check_wish(wish: Wish, made: CheckpointFormat, weights: Tensors, run: Path) -> None:
    """Raises `UserError` for what these weights or this format cannot give."""
    if wish.fp8 and made.fp8_config is None:
        raise UserError(f"--fp8: checkpoint_format {made.label} has no FP8 form")
    if wish.keep_fp8 and not any(kind.dtype == CODES for kind in weights.kinds.values()):
        raise UserError(f"--keep-fp8: {run} holds no FP8 blocks; --fp8 makes some")


def _kinds(pieces: Sequence[Piece], kinds: Mapping[str, Kind], wish: Wish, origin: Origin | None) -> dict[str, Kind]:
    """Their tensors in order, in the formats that are wished for; grids of block scales beside their codes."""
    theirs: dict[str, Kind] = {}
    for piece in pieces:
        dtype = _dtype(piece, kinds, wish, origin)
        theirs[piece.theirs] = Kind(dtype, piece.shape)
        if dtype == CODES:
            theirs[piece.theirs + INVERSE] = grid_kind(theirs[piece.theirs])
    return theirs


def _dtype(piece: Piece, kinds: Mapping[str, Kind], wish: Wish, origin: Origin | None) -> torch.dtype:
    held = kinds[piece.ours].dtype if piece.ours is not None else torch.float32
    if wish.keep_fp8 and held == CODES:
        return CODES
    if wish.fp8 and piece.blocks:
        return CODES
    came = origin.formats.get(piece.theirs) if origin is not None else None
    if wish.dtype is None and came is not None and came != CODES:
        return came
    if piece.exact:
        return torch.float32
    if wish.dtype is None and origin is not None:
        return origin.plain
    return DTYPES[wish.dtype or "bf16"]


def _planned(theirs: Mapping[str, Kind], wish: Wish, origin: Origin | None) -> Plan:
    """The files that they came in, where the tensors are the same."""
    if origin is not None and sorted(name for names in origin.files.values() for name in names) == sorted(theirs):
        files = {file: {name: theirs[name] for name in names} for file, names in origin.files.items()}
        return Plan(files, len(files) > 1 or next(iter(files)) != "model.safetensors")
    return planned(theirs)


def moves_out(pieces: Sequence[Piece], kinds: Mapping[str, Kind], theirs: Mapping[str, Kind]) -> list[Move]:
    """From our tensors to theirs."""
    moves: list[Move] = []
    for piece in pieces:
        if piece.ours is None:
            continue  # the files are made of zeros
        held, wanted_kind = kinds[piece.ours], theirs[piece.theirs]
        rows = Kind(held.dtype, piece.shape)
        order = inverse(piece.order)
        if wanted_kind.dtype == CODES and held.dtype != CODES:
            moves.append(Quantise(piece.ours, piece.theirs, piece.first, rows, order))
            continue
        moves.append(Copy(piece.ours, piece.theirs, piece.first, 0, rows, wanted_kind.dtype, order))
        if wanted_kind.dtype == CODES:
            scales = scale_kind(rows)
            names = piece.ours + SCALE, piece.theirs + SCALE
            moves.append(Copy(*names, piece.first, 0, scales, torch.float32, order))
    return moves


def _with_formats(
    config: Mapping[str, Any],
    theirs: Mapping[str, Kind],
    fp8: Mapping[str, Any] | None,
    wish: Wish,
    origin: Origin | None,
) -> dict[str, Any]:
    """The configuration with what it says of number formats and, for a run of ours, of markers."""
    told = {key: value for key, value in config.items() if key != "quantization_config"}
    if fp8 is not None:
        told["quantization_config"] = config.get("quantization_config", dict(fp8))
    plain = [kind.dtype for kind in theirs.values() if kind.dtype in NAMES and len(kind.shape) > 1]
    common = max(dict.fromkeys(plain), key=plain.count, default=torch.bfloat16)
    if fp8 is not None:
        common = next(kind.dtype for name, kind in theirs.items() if kind.dtype in NAMES and not name.endswith(INVERSE))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    anew = origin is None or not origin.formats
    if anew or wish.dtype is not None:
        told |= dict.fromkeys(keys, NAMES[common])
    if anew:
        told |= {key: END if origin is None else origin.config.get(key) for key in ("bos_token_id", "eos_token_id")}
        told["pad_token_id"] = None if origin is None else origin.config.get("pad_token_id")
    return told


def _write_companions(place: RunFolder, run: RunFolder, config: Mapping[str, Any], origin: Origin | None) -> None:
    """config.json and everything that is no weight."""
    if origin is not None:
        for file in sorted(origin.folder.iterdir()):
            if file.name not in (run.source_layout.name, "config.json"):
                (place.path / file.name).write_bytes(file.read_bytes())
    else:
        ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
        place.write_json("generation_config.json", {"_from_model_config": True, **ids})
        if run.tokenizer.exists():
            place.write_text("tokenizer.json", Tokenizer.load(run.tokenizer).marked_json())
            place.write_json("tokenizer_config.json", tokenizer_config(config["max_position_embeddings"]))
    place.write_text("config.json", json.dumps(config, indent=2) + "\n")


def tokenizer_config(length: int) -> dict[str, Any]:
    """For a tokenizer of ours: one marker begins, ends and pads."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TEXT,
        "eos_token": END_TEXT,
        "pad_token": END_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
