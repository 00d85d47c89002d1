"""The installed components and their keys, as dictionaries and lists."""

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
from core.extension.loader import STRICT, load_plugins, registry_for, strict, surveyed_registry
from core.extension.registry import SLOTS, Entry

SECTIONS = {"one": "{} section", "list": "list of {} sections", "mapping": "mapping of {} sections"}
"""The type of a key that other components fill, by how many they are."""


def catalog_rows(named: Iterable[str] = ()) -> list[dict[str, Any]]:
    """One object for each offer: slot, name, distribution, version, module, status, notice, schema.

    A plugin that could not be read, or was not read because it is disabled, is one object with the slot "?".

    Args:
        named: modules and plugin files to list beside the installed plugins.

    Raises:
        UserError: one of these cannot be read.
    """
    registry = surveyed_registry()
    registry.absorb(load_plugins([], named))
    found = []
    for _, offers in sorted(registry.entries.items()):
        found += [_row(entry) for entry in offers]
    for broken in registry.broken:
        found.append(_unread(broken.owner, f"broken: {broken.why}"))
    for owner in registry.disabled:
        found.append(_unread(owner, "disabled"))
    return found


def shared_names(found: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """The distributions that offer the same (slot, name), for each one in a list of `rows` that several offer."""
    offers: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row["slot"] != "?":
            offers.setdefault((row["slot"], row["name"]), []).append(row["distribution"])
    return {key: owners for key, owners in offers.items() if len(owners) > 1}


def check_strict(found: Iterable[Mapping[str, Any]]) -> None:
    """Raises an error for broken rows if `MOELOOM_STRICT_PLUGINS=1` is set.

    Args:
        found: a list of `rows`.

    Raises:
        UserError: some row is broken; all of them are named, and the rows say why.
    """
    broken = [row for row in found if row["status"].startswith("broken")]
    if not (strict() and broken):
        return
    names = []
    for row in broken:
        kind = row["slot"]
        if kind == "?":
            kind = "plugin"
        names.append(f"{kind} {row['name']!r} of {row['distribution']} {row['version']}")
    verb = "is" if len(names) == 1 else "are"
    raise UserError(f"{', '.join(names)} {verb} broken ({STRICT}=1)")


def _unread(owner: Provenance, status: str) -> dict[str, Any]:
    """The row of a plugin whose components are not known."""
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
    """The row of a component; one that cannot be imported has the error as its status."""
    row = _unread(entry.owner, "ok")
    row["slot"] = entry.slot
    row["name"] = entry.name
    row["module"] = entry.target.partition(":")[0]
    try:
        loaded, _ = entry.load()
        schema = schema_of(loaded.Config)
        row["notice"] = loaded.caveat
        row["schema"] = schema
    except UserError as error:
        row["status"] = f"broken: {error}"
    except Exception as error:
        message = " ".join(str(error).split())
        row["status"] = f"broken: {type(error).__name__}: {message}"
    return row


def component(slot: str, name: str, named: Iterable[str] = ()) -> dict[str, Any]:
    """All that is known of one component: its row, and doc, paper, capabilities, rejected keys, example, contract.

    Args:
        slot: the slot.
        name: the component's name.
        named: modules and plugin files that may offer it, beside the installed plugins.

    Raises:
        UserError: there is no such slot or name, or the component cannot be imported.
    """
    if slot not in SLOTS:
        raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
    entry = registry_for(named).find(slot, name)
    loaded, _ = entry.load()
    contract = contract_of(slot)
    return {
        **_row(entry),
        "doc": inspect.getdoc(loaded),
        "paper": loaded.paper,
        "capabilities": sorted(loaded.capabilities),
        "capability_docs": {word: meaning(slot, word) for word in sorted(loaded.capabilities)},
        "refuses": dict(loaded.rejected_keys),
        "example": plain(loaded.example),
        "contract": f"{contract.__module__}.{contract.__qualname__}",
        "contract_doc": inspect.getdoc(contract),
    }


def contract_of(slot: str) -> Any:
    """The class that states the contract of a slot."""
    module, _, name = SLOTS[slot].partition(":")
    return getattr(importlib.import_module(module), name)


def meaning(slot: str, word: str) -> str:
    """The meaning of a capability as the end of "a router that"; "" for a word that the contract does not list."""
    module = importlib.import_module(SLOTS[slot].partition(":")[0])
    words = getattr(module, "CAPABILITIES", {})
    return str(words.get(word, ""))


def schema_of(config: type) -> dict[str, dict[str, Any]]:
    """The keys of a section, each with type, default, whether it is required, its meaning and the slot of a child.

    A key that is a section of the plugin's own has `keys` in turn.
    """
    hints = get_type_hints(config)
    found = {}
    for field in fields(config):  # type: ignore[arg-type]
        slot = field.metadata.get("slot")
        keys = {}
        if slot:
            type_words = SECTIONS[field.metadata["many"]].format(slot)
        else:
            type_words = _type(hints[field.name])
            keys = _inner(hints[field.name])
        value = field.default
        if field.default_factory is not MISSING:
            value = field.default_factory()
        required = value is MISSING or value == REQUIRED
        default = None
        if not required:
            default = plain(value)
        found[field.name] = {
            "type": type_words,
            "default": default,
            "required": required,
            "doc": field.metadata.get("doc", ""),
            "slot": slot,
            "keys": keys,
        }
    return found


def _inner(hint: Any) -> dict[str, dict[str, Any]]:
    """The keys of a dataclass that a field holds, alone, in a list or in a mapping.

    {} for other types, and for a `Schedule`, whose keys are documented once for all components.
    """
    for kind in (hint, *get_args(hint)):
        if is_dataclass(kind) and isinstance(kind, type) and kind is not Schedule:
            return schema_of(kind)
    return {}


def plain(value: Any) -> Any:
    """The value in types that JSON has; everything else, also a number that is not finite, as its `repr`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return repr(value)


def _type(hint: Any) -> str:
    """A type as its author wrote it, without the names of modules."""
    if isinstance(hint, type) and not get_args(hint):
        text = hint.__qualname__
    else:
        text = str(hint)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text)
