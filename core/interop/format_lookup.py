"""Finds the format that reads a folder, and the format that can write a recipe."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.contracts.checkpoint_format import CheckpointFormat
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import Provenance
from core.extension.checks import format_error_at
from core.extension.loader import installed_registry
from core.interop.source_folder import check_inside
from core.storage.documents import read_object

SLOT = "checkpoint_format"


def format_named(name: str) -> tuple[CheckpointFormat, Provenance]:
    """Returns a format by its registered name, and the provenance of its plugin.

    Raises:
        UserError: no plugin offers it.
    """
    component, provenance = installed_registry().find(SLOT, name).load()
    checkpoint_format = component(component.Config())
    checkpoint_format.label = name
    return checkpoint_format, provenance


def all_formats() -> dict[str, CheckpointFormat]:
    """Returns every format that can be loaded, by name."""
    found = {}
    for name in installed_registry().names(SLOT):
        try:
            found[name] = format_named(name)[0]
        except UserError:
            continue
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder.

    Raises:
        UserError: there is no such file, it is a link to a place outside, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no config.json, so it is no Hugging Face checkpoint")
    return read_json(check_inside(file))


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        UserError: it cannot be read as one, or holds NaN or Infinity, which Python's reader takes and JSON has not.
    """
    value = read_object(file)
    found = _not_finite(value)
    if found:
        key, number = found
        raise UserError(f"{file}: {key} = {number}: must be a finite number")
    return value


def _not_finite(value: Any, key: str = "") -> tuple[str, float] | None:
    """Returns the key path and the value of the first number that is not finite; None without one."""
    if isinstance(value, float) and not math.isfinite(value):
        return key, value
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, item in items:
        path = f"{key}.{name}" if key else str(name)
        found = _not_finite(item, path)
        if found:
            return found
    return None


def format_of(config: Mapping[str, Any], file: Path) -> CheckpointFormat:
    """Returns the format that reads a configuration.

    Raises:
        UserError: no format does; the message lists the supported architectures.
    """
    formats = all_formats()
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    model_type = config.get("model_type")
    known: list[str] = []
    for checkpoint_format in formats.values():
        if architecture in checkpoint_format.architectures:
            return checkpoint_format
        types = (checkpoint_format.model_type, *checkpoint_format.other_model_types)
        if architecture is None and model_type in types:
            return checkpoint_format
        known += checkpoint_format.architectures
    found = f"architecture {architecture}" if architecture else f"model_type {model_type}"
    supported = ", ".join(sorted(known))
    raise UserError(f"{file}: {found} is not supported; supported: {supported}")


def config_for(recipe: Mapping[str, Any], source: str) -> tuple[CheckpointFormat, dict[str, Any]]:
    """Returns the first format that can express the model of a recipe, and the configuration.

    Raises:
        UserError: no format can; the message gives the reason of each.
    """
    reasons = []
    for name, checkpoint_format in all_formats().items():
        try:
            return checkpoint_format, checkpoint_format.config_of(recipe)
        except ConfigError as error:
            reasons.append(f"{name}: {error.key}: {error.why}")
        except Exception as cause:
            raised = format_error_at(cause)
            raise UserError(
                f"checkpoint_format {name} is broken: its config_of raises {raised}"
            ) from cause
    raise UserError(f"{source}: no format can write this model ({'; '.join(reversed(reasons))})")
