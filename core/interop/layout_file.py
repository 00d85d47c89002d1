"""The file `hf/layout.json` of a converted run: which tensor of its source was in which file and number format.

It may come from somebody else, and it names files that `to-hf` writes, so each value is checked as it is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.contracts.errors import UserError
from core.interop.format_lookup import read_json
from core.interop.shards import FORMATS, is_file_name

NUMBER_FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in FORMATS.values()}
"""The number formats that the file may name, as torch calls them."""


@dataclass(frozen=True)
class LayoutFile:
    """The content of the file.

    Args:
        format: name of the checkpoint format.
        plain: the number format of the weights that were not in FP8 blocks.
        model: the section `model` of the recipe that the run was converted to.
        files: names of tensors by file.
        formats: number format by tensor.
    """

    format: str
    plain: torch.dtype
    model: dict[str, Any]
    files: dict[str, list[str]]
    formats: dict[str, torch.dtype]


def read_layout(file: Path) -> LayoutFile:
    """Reads the file.

    Raises:
        UserError: a value is missing or not allowed, such as the name of a file outside of the target folder.
    """
    content = read_json(file)
    for key, kind in (("format", str), ("model", dict), ("files", dict), ("formats", dict)):
        if not isinstance(content.get(key), kind):
            raise UserError(f"{file}: {key} is missing or damaged")
    for name, tensors in content["files"].items():
        if not is_file_name(name):
            allowed = "must be the name of a .safetensors file, without a folder"
            raise UserError(f"{file}: files: {name!r}: {allowed}")
        if not isinstance(tensors, list) or not all(isinstance(n, str) for n in tensors):
            raise UserError(f"{file}: files: {name}: must list the names of tensors")
    formats: dict[str, torch.dtype] = {}
    for name, written in content["formats"].items():
        formats[name] = _number_format(file, f"formats: {name}", written)
    return LayoutFile(
        format=content["format"],
        plain=_number_format(file, "plain", content.get("plain")),
        model=content["model"],
        files=content["files"],
        formats=formats,
    )


def _number_format(file: Path, key: str, written: Any) -> torch.dtype:
    """The number format of a name."""
    if not isinstance(written, str) or written not in NUMBER_FORMATS:
        known = ", ".join(NUMBER_FORMATS)
        raise UserError(f"{file}: {key} = {written!r}: must be one of {known}")
    return NUMBER_FORMATS[written]
