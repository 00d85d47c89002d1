"""Plugins that are a single file, `plugins: [./my_router.py]`, instead of a package that Python finds.

Such a file is known by its path, and its code by its hash: the module's name holds the hash, so that two files with the
same name, or two versions of one, are two modules.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from core.contracts.schema import Provenance
from core.extension.checks import PluginError

ENDING = ".py"
DISTRIBUTION = "file"
"""What stands in place of a distribution in the provenance of a single file."""


def is_plugin_file(name: str) -> bool:
    """Whether an entry of `plugins` is a file and not the name of a module."""
    return name.endswith(ENDING)


def owner_of(path: str) -> Provenance:
    """Returns the provenance of a plugin file; its version is the beginning of the file's SHA-256.

    Raises:
        PluginError: the file cannot be read.
    """
    file = Path(path)
    digest = digest_of_code(file)[:12]
    stem = "".join(letter if letter.isalnum() else "_" for letter in file.stem)
    module = f"moeloom_file_{stem}_{digest}"
    return Provenance(DISTRIBUTION, f"sha256:{digest}", file.name, module, file)


def digest_of_code(file: Path) -> str:
    """Returns the SHA-256 of a plugin file.

    Raises:
        PluginError: it cannot be read.
    """
    if not file.is_file():
        raise PluginError(f"there is no file {file}")
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as cause:
        raise PluginError(f"{file} cannot be read: {cause.strerror or cause}") from cause


def import_file(owner: Provenance) -> ModuleType:
    """Imports a plugin file once under the module name of its owner.

    Raises:
        Exception: whatever the file raises.
    """
    known = sys.modules.get(owner.module)
    if known is not None:
        return known
    assert owner.file is not None
    spec = importlib.util.spec_from_file_location(owner.module, owner.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[owner.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[owner.module]
        raise
    return module


def target_in(owner: Provenance, target: str) -> str:
    """Returns a target with the module name of a plugin file where the file calls itself by its own name."""
    if owner.distribution != DISTRIBUTION or owner.file is None:
        return target
    module, colon, name = target.partition(":")
    return f"{owner.module}{colon}{name}" if module == owner.file.stem else target
