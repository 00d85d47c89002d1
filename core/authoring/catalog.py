"""What is installed, as plain containers."""

import importlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from core.contracts.errors import UserError, nearest
from core.contracts.schedule import Schedule
from core.contracts.schema import REQUIRED, Provenance
from core.extension.loader import STRICT, installed_registry, strict, surveyed_registry
from core.extension.registry import SLOTS, Entry

SECTIONS = {"one": "{} section", "list": "list of {} sections", "mapping": "mapping of {} sections"}
"""What a key holds where other components fill it."""


def rows() -> list[dict[str, Any]]:
    """One object for each offer: slot, name, distribution, version, module, status, notice, schema.

    A plugin that could not be read, or was not because it is disabled, is one object with the slot "?".
    """
    registry = surveyed_registry()
    found = [_row(entry) for key in sorted(registry.entries) for entry in registry.entries[key]]
    found += [_unread(broken.owner, f"broken: {broken.why}") for broken in registry.broken]
    return found + [_unread(owner, "disabled") for owner in registry.disabled]


def shared_names(found: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """The distributions that offer one (slot, name), where there are several in a list of `rows`."""
    offers: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row["slot"] != "?":
            offers.setdefault((row["slot"], row["name"]), []).append(row["distribution"])
    return {key: owners for key, owners in offers.items() if len(owners) > 1}


def check_strict(found: Iterable[Mapping[str, Any]]) -> None:
    """Under `MOELOOM_STRICT_PLUGINS=1` nothing in a list of `rows` is broken.

    Raises:
        UserError: it is; all of them are named, and the list says why.
    """
    broken = [row for row in found if row["status"].startswith("broken")]
    if not (strict() and broken):
        return
    kinds = [f"{'plugin' if row['slot'] == '?' else row['slot']} {row['name']!r}" for row in broken]
    names = [f"{kind} of {row['distribution']} {row['version']}" for kind, row in zip(kinds, broken, strict=True)]
    raise UserError(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} broken ({STRICT}=1)")


def _unread(owner: Provenance, status: str) -> dict[str, Any]:
    return {
        "slot": "?",
        "name": owner.entry_point,
        "distribution": owner.distribution,
        "version": owner.version,
        "module": owner.module,
        "status": status,
        "notice": "",
        "schema": {},
    }


def _row(entry: Entry) -> dict[str, Any]:
    row = {**_unread(entry.owner, "ok"), "slot": entry.slot, "name": entry.name}
    row["module"] = entry.target.partition(":")[0]
    try:
        loaded, _ = entry.load()
        row["notice"], row["schema"] = loaded.notice, schema_of(loaded.Config)
    except UserError as error:
        row["status"] = f"broken: {error}"
    except Exception as error:
        row["status"] = f"broken: {type(error).__name__}: {' '.join(str(error).split())}"
    return row


def component(slot: str, name: str) -> dict[str, Any]:
    """One component in full: its row, and doc, paper, capabilities and their meaning, refusals, example, contract.

    Raises:
        UserError: no such slot or name, or it cannot be imported.
    """
    if slot not in SLOTS:
        raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
    entry = installed_registry().find(slot, name)
    loaded, _ = entry.load()
    contract = contract_of(slot)
    return {
        **_row(entry),
        "doc": inspect.getdoc(loaded),
        "paper": loaded.paper,
        "capabilities": sorted(loaded.capabilities),
        "capability_docs": {word: meaning(slot, word) for word in sorted(loaded.capabilities)},
        "refuses": dict(loaded.refuses),
        "example": plain(loaded.example),
        "contract": f"{contract.__module__}.{contract.__qualname__}",
        "contract_doc": inspect.getdoc(contract),
    }


def contract_of(slot: str) -> Any:
    """The class that states a slot's contract."""
    module, _, name = SLOTS[slot].partition(":")
    return getattr(importlib.import_module(module), name)


def meaning(slot: str, word: str) -> str:
    """What a capability says, as the end of "a router that"; "" for a word that the slot's contract does not list."""
    words = getattr(importlib.import_module(SLOTS[slot].partition(":")[0]), "CAPABILITIES", {})
    return str(words.get(word, ""))


def schema_of(config: type) -> dict[str, dict[str, Any]]:
    """The keys of a section: type, default, whether required, what it means, the slot of a child.

    A key that is a section of the plugin's own has `keys` in turn.
    """
    hints = get_type_hints(config)
    found = {}
    for f in fields(config):  # type: ignore[arg-type]
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        required = default is MISSING or default == REQUIRED
        slot = f.metadata.get("slot")
        found[f.name] = {
            "type": SECTIONS[f.metadata["many"]].format(slot) if slot else _type(hints[f.name]),
            "default": None if required else plain(default),
            "required": required,
            "doc": f.metadata.get("doc", ""),
            "slot": slot,
            "keys": {} if slot else _inner(hints[f.name]),
        }
    return found


def _inner(hint: Any) -> dict[str, dict[str, Any]]:
    """The keys of a dataclass that a field holds, alone, in a list or in a mapping; a schedule's are known."""
    for kind in (hint, *get_args(hint)):
        if is_dataclass(kind) and isinstance(kind, type) and kind is not Schedule:
            return schema_of(kind)
    return {}


def plain(value: Any) -> Any:
    """The same in what JSON has; anything else as Python writes it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def _type(hint: Any) -> str:
    """A type as its author wrote it, without the modules."""
    text = hint.__qualname__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text)
