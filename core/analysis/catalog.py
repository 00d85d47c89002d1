"""What is installed, as plain containers."""

import importlib
import inspect
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from core.contracts.errors import UserError, nearest
from core.contracts.schema import REQUIRED
from core.extension.loader import installed_registry
from core.extension.registry import SLOTS, Entry


def rows() -> list[dict[str, Any]]:
    """One object for each offer, and one for each broken plugin: slot, name, owner, module, status, schema."""
    registry = installed_registry()
    found = [_row(entry) for key in sorted(registry.entries) for entry in registry.entries[key]]
    for broken in registry.broken:
        owner = broken.owner
        found.append(
            {
                "slot": "?",
                "name": owner.entry_point,
                "distribution": owner.distribution,
                "version": owner.version,
                "module": owner.module,
                "status": f"broken: {broken.why}",
                "notice": "",
                "schema": {},
            }
        )
    return found


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "slot": entry.slot,
        "name": entry.name,
        "distribution": entry.owner.distribution,
        "version": entry.owner.version,
        "module": entry.target.partition(":")[0],
        "status": "ok",
        "notice": "",
        "schema": {},
    }
    try:
        loaded, _ = entry.load()
        row["notice"], row["schema"] = loaded.notice, schema_of(loaded.Config)
    except UserError as error:
        row["status"] = f"broken: {error}"
    return row


def component(slot: str, name: str) -> dict[str, Any]:
    """One component in full.

    Raises:
        UserError: no such slot or name, or it cannot be imported.
    """
    if slot not in SLOTS:
        raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
    entry = installed_registry().find(slot, name)
    loaded, _ = entry.load()
    module, _, contract = SLOTS[slot].partition(":")
    contract_class = getattr(importlib.import_module(module), contract)
    return {
        **_row(entry),
        "doc": inspect.getdoc(loaded),
        "paper": loaded.paper,
        "capabilities": sorted(loaded.capabilities),
        "example": loaded.example,
        "contract": f"{module}.{contract}",
        "contract_doc": inspect.getdoc(contract_class),
    }


def schema_of(config: type) -> dict[str, dict[str, Any]]:
    """The keys of a section: type, default, whether required, what it means, and the slot of a child."""
    hints = get_type_hints(config)
    found = {}
    for f in fields(config):  # type: ignore[arg-type]
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        required = default is MISSING or default == REQUIRED
        slot = f.metadata.get("slot")
        found[f.name] = {
            "type": f"{slot} section" if slot else _type(hints[f.name]),
            "default": None if required else default,
            "required": required,
            "doc": f.metadata.get("doc", ""),
            "slot": slot,
        }
    return found


def _type(hint: Any) -> str:
    text = getattr(hint, "__name__", None) if isinstance(hint, type) and not getattr(hint, "__args__", None) else None
    return (text or str(hint)).replace("core.contracts.schedule.", "").replace("typing.", "")
