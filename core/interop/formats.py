"""Which format reads a folder, and which one can write a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.contracts.checkpoint_format import CheckpointFormat
from core.contracts.errors import UserError, Wrong
from core.contracts.schema import Provenance
from core.extension.checks import told_where
from core.extension.loader import installed_registry

SLOT = "checkpoint_format"


def format_named(name: str) -> tuple[CheckpointFormat, Provenance]:
    """A format by its registered name, and whose it is.

    Raises:
        UserError: nobody offers it.
    """
    component, provenance = installed_registry().find(SLOT, name).load()
    made = component(component.Config())
    made.label = name
    return made, provenance


def all_formats() -> dict[str, CheckpointFormat]:
    """Every format that can be loaded, by name."""
    found = {}
    for name in installed_registry().names(SLOT):
        try:
            found[name] = format_named(name)[0]
        except UserError:
            continue
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no config.json, so it is no Hugging Face checkpoint")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise UserError(f"{file}: cannot be read as JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def format_of(config: Mapping[str, Any], file: Path) -> CheckpointFormat:
    """The format that reads a configuration.

    Raises:
        UserError: none does; which ones there are is told.
    """
    formats = all_formats()
    named = config.get("architectures")
    asked = named[0] if isinstance(named, list) and named else None
    for made in formats.values():
        if asked in made.architectures or (asked is None and config.get("model_type") == made.model_type):
            return made
    known = ", ".join(sorted(name for made in formats.values() for name in made.architectures))
    told = f"architecture {asked}" if asked else f"model_type {config.get('model_type')}"
    raise UserError(f"{file}: {told} is not supported; supported: {known}")


def config_for(recipe: Mapping[str, Any], source: str) -> tuple[CheckpointFormat, dict[str, Any]]:
    """The first format that can say what a recipe builds, and its configuration.

    Raises:
        UserError: none can; each one's reason is told.
    """
    reasons = []
    for name, made in all_formats().items():
        try:
            return made, made.config_of(recipe)
        except Wrong as wrong:
            reasons.append(f"{name}: {wrong.key}: {wrong.why}")
        except Exception as cause:
            raise UserError(f"checkpoint_format {name} is broken: its config_of raises {told_where(cause)}") from cause
    raise UserError(f"{source}: no format can write this model ({'; '.join(reversed(reasons))})")
