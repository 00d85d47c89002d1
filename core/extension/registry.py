"""What every plugin offers, keyed (slot, name), and the one place where a name becomes a class."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError, nearest
from core.contracts.schema import Provenance

SLOTS = {
    "attention": "core.contracts.attention:Attention",
    "ffn": "core.contracts.ffn:FeedForward",
    "router": "core.contracts.router:Router",
    "balancer": "core.contracts.balancer:Balancer",
    "loss_head": "core.contracts.loss_head:LossHead",
    "precision": "core.contracts.precision:Precision",
    "dispatcher": "core.contracts.dispatcher:Dispatcher",
    "checkpoint_format": "core.contracts.component:Component",
    "optimizer": "core.contracts.training:OptimizerFactory",
    "corpus": "core.contracts.corpus:Corpus",
    "strategy": "core.contracts.training:StrategyFactory",
    "callback": "core.contracts.training:CallbackFactory",
    "logger": "core.contracts.training:LoggerFactory",
}
"""Every extension point and the class that states its contract."""


@dataclass(frozen=True)
class Entry:
    """One offer: who says that (slot, name) is the class at `target`."""

    slot: str
    name: str
    target: str
    owner: Provenance

    def load(self) -> tuple[Any, Provenance]:
        """The class and its provenance, now with the file it came from.

        Raises:
            UserError: the module cannot be imported, the class is missing, or it is not of the slot's kind.
        """
        who = f"{self.slot} {self.name!r} of {self.owner.distribution} ({self.target})"
        module_name, _, attribute = self.target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as cause:
            raise UserError(f"{who} cannot be imported: {type(cause).__name__}: {cause}") from cause
        component = getattr(module, attribute, None)
        if component is None:
            raise UserError(f"{who}: module {module_name} has no class {attribute}")
        contract_module, _, contract_name = SLOTS[self.slot].partition(":")
        contract = getattr(importlib.import_module(contract_module), contract_name)
        if not (isinstance(component, type) and issubclass(component, contract)):
            raise UserError(f"{who} is not a subclass of {contract_module}.{contract_name}")
        config = getattr(component, "Config", None)
        if not (isinstance(config, type) and is_dataclass(config)):
            raise UserError(f"{who} has no nested dataclass Config")
        file = getattr(module, "__file__", None)
        return component, replace(self.owner, module=module_name, file=Path(file) if file else None)


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be read: it matters only if somebody asks for what it might have offered."""

    owner: Provenance
    why: str

    def __str__(self) -> str:
        who = f"{self.owner.entry_point!r} of {self.owner.distribution} {self.owner.version}"
        return f"plugin {who} is broken: {self.why}"


class Registry:
    """All offers. Filled once by the loader; asked by the recipe room and the catalog."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], list[Entry]] = {}
        self.broken: list[Broken] = []

    def owned_by(self, owner: Provenance) -> "Registrar":
        """The view through which one plugin registers."""
        return Registrar(self, owner)

    def add(self, entry: Entry) -> None:
        """Keep an offer; two owners of one name are kept side by side and refused when the name is used."""
        self.entries.setdefault((entry.slot, entry.name), []).append(entry)

    def names(self, slot: str) -> list[str]:
        """The names that a slot knows."""
        return sorted(name for known, name in self.entries if known == slot)

    def find(self, slot: str, name: str) -> Entry:
        """The one offer for a name, written as `name` or as `distribution/name`.

        Raises:
            UserError: there is no such slot; nobody offers the name (the nearest ones and broken plugins are told);
                or more than one does.
        """
        if slot not in SLOTS:
            raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        distribution, _, short = name.rpartition("/")
        offers = [e for e in self.entries.get((slot, short), []) if distribution in ("", e.owner.distribution)]
        if len(offers) == 1:
            return offers[0]
        if offers:
            owners = " and ".join(sorted(f"{o.owner.distribution} ({o.target})" for o in offers))
            raise UserError(f"{slot} {name!r} is offered by {owners}; write distribution/{short} to choose")
        told = "".join(f"; {broken}" for broken in self.broken)
        raise UserError(f"no {slot} is named {name!r}; {nearest(short, self.names(slot))}{told}")


class Registrar:
    """What a plugin's `register(registry)` receives: one method for each slot.

    `registry.router("name", "module:Class")`; likewise for every key of `SLOTS`.
    """

    def __init__(self, registry: Registry, owner: Provenance) -> None:
        self._registry, self._owner = registry, owner

    def add(self, slot: str, name: str, target: str) -> None:
        """Offer the class at `target` ("module:Class") as `name` in `slot`.

        Raises:
            ValueError: no such slot, or a target without a class.
        """
        if slot not in SLOTS:
            raise ValueError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        if not name or "/" in name or target.count(":") != 1:
            raise ValueError(f"{slot} {name!r}: a name has no '/', and a target reads 'module:Class', not {target!r}")
        self._registry.add(Entry(slot, name, target, self._owner))

    def __getattr__(self, slot: str) -> Callable[[str, str], None]:
        if slot not in SLOTS:
            raise AttributeError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        return lambda name, target: self.add(slot, name, target)
