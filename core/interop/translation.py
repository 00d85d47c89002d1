"""Turns a Hugging Face configuration into a recipe, beside weights or by itself."""

import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from core.contracts.checkpoint_format import CheckpointFormat, Translation
from core.contracts.errors import ConfigError, UserError
from core.extension.checks import format_error_at
from core.interop.format_lookup import format_of, read_config, read_json
from core.recipe.compose import Recipe, compose
from core.recipe.recipe_layers import COMMAND_LINE

NESTED = ("text_config", "language_config", "llm_config")
"""Keys under which the configuration of a multimodal model holds that of its language model."""

PRECISIONS = {"bfloat16": "bf16", "float64": "fp64"}
"""The recipe's precision for a configuration's number format; fp32 for every other format."""

NO_TRAINING = (
    "a configuration says nothing about training: optimizer, balancing, batch, steps, tokens and GPU-hours "
    "are those of an example, which KEY=VALUE changes"
)


def is_configuration(path: str | Path) -> bool:
    """Whether a path is a Hugging Face configuration: a .json file, or a folder with config.json and no recipe."""
    path = Path(path)
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "recipe.yaml").is_file()
    return path.suffix == ".json"


def recipe_of_config(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a configuration without weights.

    Args:
        path: a configuration file, or the folder with its config.json.
        overrides: `KEY.PATH=VALUE` each, which change the recipe.

    Returns:
        The recipe, whose model has every part that the configuration mentions; its caveats say what was left out.

    Raises:
        UserError: the file cannot be read, or a value gives no model that can be built here.
    """
    file = Path(path)
    if file.is_dir():
        config = read_config(file)
        file = file / "config.json"
    else:
        config = read_json(file)
    config, notices = _language_model(config, file)
    quantisation = config.pop("quantization_config", None)
    if quantisation is not None:
        notices.append("quantization_config is left out: weights are described unquantised")
    dtype = config.get("dtype") or config.get("torch_dtype")
    precision = PRECISIONS.get(str(dtype), "fp32")
    translation = translated(format_of(config, file), config, None, precision, file)
    recipe = composed(translation.recipe, str(file), overrides)
    recipe.source = str(file)
    recipe.name = file.stem if file.name != "config.json" else file.resolve().parent.name
    recipe.caveats = (*notices, *translation.notices, NO_TRAINING)
    return recipe


def _language_model(config: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the configuration of the language model, which a multimodal model nests, and a note if it is nested."""
    for key in NESTED:
        nested = config.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise UserError(f"{file}: {key} = {shown(nested)}: must be a section")
        note = f"only the language model ({key}) is described, and no encoder of images or audio"
        outer = {"dtype": config.get("dtype") or config.get("torch_dtype")}
        return {**outer, **nested}, [note]
    return dict(config), []


def check_not_nested(config: Mapping[str, Any], file: Path) -> None:
    """Raises `UserError` for the configuration of a multimodal model, whose weights are not converted."""
    for key in NESTED:
        if isinstance(config.get(key), Mapping):
            raise UserError(
                f"{file}: {key}: the checkpoint holds more than the language model that is described there, "
                "and convert reads language models only; core.describe takes this file"
            )


def translated(
    checkpoint_format: CheckpointFormat,
    config: Mapping[str, Any],
    names: Collection[str] | None,
    precision: str,
    file: Path,
) -> Translation:
    """Returns what the format makes of a configuration.

    Args:
        checkpoint_format: the format.
        config: the configuration.
        names: the tensors of the files; None without files.
        precision: the recipe's precision.
        file: the configuration file, for error messages.

    Raises:
        UserError: the format cannot express a value, or fails.
    """
    listed = None if names is None else list(names)
    try:
        return checkpoint_format.recipe_of(config, listed, precision)
    except ConfigError as error:
        value = f" = {shown(config[error.key])}" if error.key in config else ""
        raise UserError(f"{file}: {error.key}{value}: {error.why}") from error
    except Exception as cause:
        who = f"checkpoint_format {checkpoint_format.label}"
        raise UserError(f"{file}: {who} cannot read it: {format_error_at(cause)}") from cause


def composed(values: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Composes a raw recipe, which validates it.

    Args:
        values: the recipe as plain containers.
        source: what it was made from, for error messages.
        overrides: `KEY.PATH=VALUE` each.

    Raises:
        UserError: the recipe is invalid; the message names `source` instead of a recipe file.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
        try:
            return compose(file, overrides)
        except UserError as cause:
            if str(cause).startswith(COMMAND_LINE):
                raise
            why = str(cause).replace(f"{file}: ", "")
            raise UserError(f"{source}: gives no model that can be built here: {why}") from cause


def shown(value: Any) -> str:
    """A value of a configuration in an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
