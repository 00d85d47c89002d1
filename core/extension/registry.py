"""What every plugin offers, keyed (slot, name), and the one place where a name becomes a class."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from core.contracts.errors import UserError, nearest
from core.contracts.schema import Provenance
from core.extension.checks import Mistake, NoSlot, check_component, told
from core.extension.hookspec import Registrar
from core.extension.trace import traced

SLOTS = {
    "attention": "core.contracts.attention:Attention",
    "ffn": "core.contracts.ffn:FeedForward",
    "residual": "core.contracts.residual:Residual",
    "router": "core.contracts.router:Router",
    "balancer": "core.contracts.balancer:Balancer",
    "loss_head": "core.contracts.loss_head:LossHead",
    "precision": "core.contracts.precision:Precision",
    "dispatcher": "core.contracts.dispatcher:Dispatcher",
    "checkpoint_format": "core.contracts.checkpoint_format:CheckpointFormat",
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
            UserError: the module cannot be imported, the class is missing or not of the slot's kind, or its `Config`
                is no schema.
        """
        who = f"{self.slot} {self.name!r} of {self.owner.distribution} ({self.target})"
        module_name, _, attribute = self.target.partition(":")
        with traced(f"{self.slot} {self.name!r}", self.owner, self.target):
            try:
                module = importlib.import_module(module_name)
            except (Exception, SystemExit) as cause:
                raise UserError(f"{who} cannot be imported: {told(cause)}") from cause
            component = getattr(module, attribute, None)
            if component is None:
                raise UserError(f"{who}: module {module_name} has no class {attribute}")
            contract_module, _, contract_name = SLOTS[self.slot].partition(":")
            contract = getattr(importlib.import_module(contract_module), contract_name)
            if not (isinstance(component, type) and issubclass(component, contract)):
                raise UserError(f"{who} is not a subclass of {contract_module}.{contract_name}")
            try:
                check_component(component, SLOTS)
            except Mistake as cause:
                raise UserError(f"{who}: {cause}") from cause
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
        self.disabled: list[Provenance] = []

    def owned_by(self, owner: Provenance) -> Registrar:
        """The view through which one plugin registers."""
        return OwnedRegistrar(self, owner)

    def add(self, entry: Entry) -> None:
        """Keep an offer; two owners of one name are kept side by side and refused when the name is used."""
        offers = self.entries.setdefault((entry.slot, entry.name), [])
        if not any((e.owner.distribution, e.target) == (entry.owner.distribution, entry.target) for e in offers):
            offers.append(entry)

    def absorb(self, other: "Registry") -> None:
        """Keep all that another registry knows."""
        self.broken += other.broken
        self.disabled += other.disabled
        for entries in other.entries.values():
            for entry in entries:
                self.add(entry)

    def names(self, slot: str) -> list[str]:
        """The names that a slot knows."""
        return sorted(name for known, name in self.entries if known == slot)

    def find(self, slot: str, name: str) -> Entry:
        """The one offer for a name, written as `name` or as `distribution/name`.

        Raises:
            UserError: there is no such slot; nobody offers the name (the nearest ones are told, and which plugins are
                broken or disabled); or more than one does.
        """
        if slot not in SLOTS:
            raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        distribution, _, short = name.rpartition("/")
        offers = [e for e in self.entries.get((slot, short), []) if distribution in ("", e.owner.distribution)]
        if len(offers) == 1:
            return offers[0]
        if offers:
            raise UserError(f"{slot} {name!r} is offered by {_choice(offers, short)}")
        unread = "".join(f"; {broken}" for broken in self.broken) + _skipped(self.disabled)
        raise UserError(f"no {slot} is named {name!r}; {nearest(short, self.names(slot))}{unread}")


def _choice(offers: list[Entry], name: str) -> str:
    """Who offers one name, and what the user can do about it."""
    owners = " and ".join(sorted(f"{o.owner.distribution} ({o.target})" for o in offers))
    if len({o.target for o in offers}) == 1:
        module = offers[0].target.partition(":")[0]
        return f"{owners}; Python finds only one module {module}, so uninstall one of them"
    if len({o.owner.distribution for o in offers}) < len(offers):
        return f"{owners}; one distribution may offer a name only once"
    return f"{owners}; write distribution/{name} to choose"


def _skipped(disabled: Iterable[Provenance]) -> str:
    """What was not asked because the user said so, told by distribution."""
    points: dict[str, list[str]] = {}
    for owner in disabled:
        points.setdefault(f"{owner.distribution} {owner.version}", []).append(owner.entry_point)
    told = "; ".join(f"{', '.join(names)} of {distribution}" for distribution, names in points.items())
    return f"; disabled by MOELOOM_DISABLE_PLUGINS, whatever they may offer: {told}" if told else ""


class OwnedRegistrar(Registrar):
    """The registrar of one plugin, which keeps what it offers under that plugin's name.

    Args:
        registry: takes the offers.
        owner: the plugin.
    """

    def __init__(self, registry: Registry, owner: Provenance) -> None:
        self._registry, self._owner = registry, owner

    def add(self, slot: str, name: str, target: str) -> None:
        """Keeps an offer of this plugin; see `Registrar.add`."""
        if slot not in SLOTS:
            raise NoSlot(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        if not isinstance(name, str) or not isinstance(target, str):
            wrong = target if isinstance(name, str) else name
            told = f"the class {wrong.__qualname__} itself" if isinstance(wrong, type) else repr(wrong)
            raise Mistake(f'{slot} {name!r}: name and target are texts, "name" and "module:Class", not {told}')
        if not name or "/" in name or target.count(":") != 1:
            raise Mistake(f"{slot} {name!r}: a name has no '/', and a target reads 'module:Class', not {target!r}")
        entry = Entry(slot, name, target, self._owner)
        for other in self._registry.entries.get((slot, name), []):
            if other.owner == self._owner and other.target != target:
                raise Mistake(f"{slot} {name!r} is registered twice, as {other.target} and as {target}")
        self._registry.add(entry)

    def __getattr__(self, slot: str) -> NoReturn:
        """Raises `NoSlot` for a method that is no slot's: a misspelt one, with the nearest."""
        raise NoSlot(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
