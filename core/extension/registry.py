"""The components that plugins offer, keyed (slot, name); only this module turns a name into a class."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from core.contracts.errors import StoppedBySignal, UserError, nearest
from core.contracts.schema import Provenance
from core.extension.checks import PluginError, UnknownSlotError, check_component, format_error
from core.extension.hookspec import Registrar
from core.extension.plugin_file import target_in
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
    "strategy": "core.contracts.strategy:StrategyFactory",
    "callback": "core.contracts.training:CallbackFactory",
    "logger": "core.contracts.training:LoggerFactory",
}
"""The extension points, each with the class that states its contract."""

NO_FP16 = (
    "its smallest number is 6e-8 and its largest 65504, so gradients need loss scaling, which does not exist here; "
    "use bf16, which has the range of fp32, or fp32"
)
MISSED = {
    ("precision", name): NO_FP16 for name in ("fp16", "float16", "half", "16-mixed", "16-true")
}
"""Names that people expect, each with the reason why there is no such component, unless a plugin offers one."""


@dataclass(frozen=True)
class Entry:
    """One offer of a component: `owner` registered the class at `target` as (slot, name)."""

    slot: str
    name: str
    target: str
    owner: Provenance

    def load(self) -> tuple[Any, Provenance]:
        """Imports the class; returns it and its provenance, now with the file that it came from.

        Raises:
            UserError: the module cannot be imported, the class is missing or not of the slot's kind, or its `Config`
                is not a schema.
        """
        who = f"{self.slot} {self.name!r} of {self.owner.distribution} ({self.target})"
        module_name, _, attribute = self.target.partition(":")
        with traced(f"{self.slot} {self.name!r}", self.owner, self.target):
            try:
                module = importlib.import_module(module_name)
            except StoppedBySignal:
                raise
            except (Exception, SystemExit) as cause:
                raise UserError(f"{who} cannot be imported: {format_error(cause)}") from cause
            component = getattr(module, attribute, None)
            if component is None:
                raise UserError(f"{who}: module {module_name} has no class {attribute}")
            contract_module, _, contract_name = SLOTS[self.slot].partition(":")
            contract = getattr(importlib.import_module(contract_module), contract_name)
            if not (isinstance(component, type) and issubclass(component, contract)):
                raise UserError(f"{who} is not a subclass of {contract_module}.{contract_name}")
            try:
                check_component(component, SLOTS)
            except PluginError as cause:
                raise UserError(f"{who}: {cause}") from cause
        file = getattr(module, "__file__", None)
        path = Path(file) if file else None
        return component, replace(self.owner, module=module_name, file=path)


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded; this is an error only if a recipe names a component that no plugin offers."""

    owner: Provenance
    why: str

    def __str__(self) -> str:
        who = f"{self.owner.entry_point!r} of {self.owner.distribution} {self.owner.version}"
        return f"plugin {who} is broken: {self.why}"


class Registry:
    """All offers of components. The loader fills it once; `core.recipe` and the catalog read it."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], list[Entry]] = {}
        self.broken: list[Broken] = []
        self.disabled: list[Provenance] = []

    def owned_by(self, owner: Provenance) -> Registrar:
        """Returns the registrar that adds offers under one plugin's name."""
        return OwnedRegistrar(self, owner)

    def add(self, entry: Entry) -> None:
        """Keeps an offer, unless it is known; two owners of one name are both kept, and using the name is an error."""
        offers = self.entries.setdefault((entry.slot, entry.name), [])
        for other in offers:
            if (
                other.owner.distribution == entry.owner.distribution
                and other.target == entry.target
            ):
                return
        offers.append(entry)

    def absorb(self, other: "Registry") -> None:
        """Adds everything that another registry holds."""
        self.broken += other.broken
        self.disabled += other.disabled
        for entries in other.entries.values():
            for entry in entries:
                self.add(entry)

    def modules(self) -> set[str]:
        """The modules of all plugins that offer something."""
        return {entry.owner.module for entries in self.entries.values() for entry in entries}

    def names(self, slot: str) -> list[str]:
        """The names that are offered in a slot, sorted."""
        return sorted(name for known, name in self.entries if known == slot)

    def find(self, slot: str, name: str) -> Entry:
        """Returns the one offer for a name, written as `name` or as `distribution/name`.

        Raises:
            UserError: there is no such slot; no plugin offers the name (the message has the nearest names and the
                plugins that are broken or disabled); or more than one plugin does.
        """
        if slot not in SLOTS:
            raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        distribution, _, short = name.rpartition("/")
        offers = self.entries.get((slot, short), [])
        if distribution:
            offers = [offer for offer in offers if offer.owner.distribution == distribution]
        if len(offers) == 1:
            return offers[0]
        if offers:
            raise UserError(f"{slot} {name!r} is offered by {_choice(offers, short)}")
        why = f"no {slot} is named {name!r}; {nearest(short, self.names(slot))}"
        if (slot, short) in MISSED:
            why = f"no {slot} is named {name!r}: {MISSED[slot, short]}"
        for broken in self.broken:
            why += f"; {broken}"
        raise UserError(f"{why}{_skipped(self.disabled)}")


def _choice(offers: list[Entry], name: str) -> str:
    """The owners of one name, and how the user can choose between them."""
    owners = " and ".join(sorted(f"{o.owner.distribution} ({o.target})" for o in offers))
    if len({o.target for o in offers}) == 1:
        module = offers[0].target.partition(":")[0]
        return f"{owners}; Python finds only one module {module}, so uninstall one of them"
    if len({o.owner.distribution for o in offers}) < len(offers):
        return f"{owners}; one distribution may offer a name only once"
    return f"{owners}; write distribution/{name} to choose"


def _skipped(disabled: Iterable[Provenance]) -> str:
    """The end of an error message that names the disabled plugins by distribution; empty without any."""
    points: dict[str, list[str]] = {}
    for owner in disabled:
        points.setdefault(f"{owner.distribution} {owner.version}", []).append(owner.entry_point)
    if not points:
        return ""
    skipped = [f"{', '.join(names)} of {distribution}" for distribution, names in points.items()]
    return f"; disabled by MOELOOM_DISABLE_PLUGINS, whatever they may offer: {'; '.join(skipped)}"


class OwnedRegistrar(Registrar):
    """The registrar of one plugin, which keeps what it offers under that plugin's name.

    Args:
        registry: collects the offers.
        owner: the plugin.
    """

    def __init__(self, registry: Registry, owner: Provenance) -> None:
        self._registry = registry
        self._owner = owner

    def add(self, slot: str, name: str, target: str) -> None:
        """Keeps an offer of this plugin; see `Registrar.add`."""
        if slot not in SLOTS:
            raise UnknownSlotError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
        if not isinstance(name, str) or not isinstance(target, str):
            wrong = target if isinstance(name, str) else name
            given = repr(wrong)
            if isinstance(wrong, type):
                given = f"the class {wrong.__qualname__} itself"
            allowed = 'name and target must be strings, "name" and "module:Class"'
            raise PluginError(f"{slot} {name!r}: {allowed}, not {given}")
        if not name or "/" in name or target.count(":") != 1:
            allowed = "a name has no '/', and a target reads 'module:Class'"
            raise PluginError(f"{slot} {name!r}: {allowed}, not {target!r}")
        target = target_in(self._owner, target)
        entry = Entry(slot, name, target, self._owner)
        for other in self._registry.entries.get((slot, name), []):
            if other.owner == self._owner and other.target != target:
                raise PluginError(
                    f"{slot} {name!r} is registered twice, as {other.target} and as {target}"
                )
        self._registry.add(entry)

    def __getattr__(self, slot: str) -> NoReturn:
        """Raises `UnknownSlotError` for a misspelt method; the message names the nearest slot."""
        raise UnknownSlotError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
