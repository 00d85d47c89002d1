"""A component under test: its `example` section, validated, and ways to build it in the kit's small model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from core.contracts.build import BuildContext, Rope
from core.contracts.component import Environment
from core.contracts.errors import UserError
from core.contracts.precision import Precision
from core.contracts.schema import Section
from core.extension.loader import installed_registry, registry_for
from core.extension.registry import Entry, Registry
from core.model.initialise import initialise
from core.recipe.resolve import Resolver
from core.testing import bench
from core.testing.clauses import MODULES

M = TypeVar("M", bound=nn.Module)


def entries_of(package: str) -> list[Entry]:
    """What a package registers: an installed plugin, or a module that Python finds.

    Args:
        package: the module that an entry point names, or a package around it.

    Raises:
        UserError: it cannot be read, or registers nothing.
    """
    found = list(_of(installed_registry(), package))
    if not found:
        try:
            found = list(_of(registry_for([package]), package))
        except UserError as told:
            raise UserError(str(told).replace(", which the recipe names,", "")) from told
    if not found:
        raise UserError(f"plugin {package!r} registers nothing")
    return found


def _of(registry: Registry, package: str) -> Iterator[Entry]:
    for _, offers in sorted(registry.entries.items()):
        yield from (e for e in offers if e.owner.module == package or e.owner.module.startswith(f"{package}."))


@dataclass(frozen=True)
class Subject:
    """One offer and the registry that it stands in."""

    entry: Entry
    registry: Registry

    @cached_property
    def component(self) -> Any:
        """The class."""
        return self.entry.load()[0]

    @cached_property
    def section(self) -> Section:
        """The class's `example`, as a recipe would give it."""
        resolver = Resolver(self.registry, lambda path: f"the example of {self.entry.name}", {})
        example = {**self.component.example, "name": f"{self.entry.owner.distribution}/{self.entry.name}"}
        found = resolver.component(self.entry.slot, example, self.entry.slot, surroundings(self.entry.slot))
        return Section(found.slot, self.entry.name, found.component, found.config, found.provenance)

    @property
    def config(self) -> Any:
        """The example's settings."""
        return self.section.config

    @cached_property
    def capabilities(self) -> frozenset[str]:
        """Under the example's settings."""
        found: frozenset[str] = self.component.capabilities_of(self.config)
        return found

    def obstacle(self) -> str | None:
        """Why the component cannot run on this machine."""
        told: str | None = self.component.requires(self.config, Environment("cpu"))
        return told

    def made(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = 0,
        meta: bool = False,
        experts: int = bench.EXPERTS,
        ropes: Mapping[str, Rope] | None = None,
    ) -> Any:
        """The component by itself, with initial weights; on the meta device without.

        Args:
            dtype: of its weights and products.
            seed: of the weights.
            meta: whether it is built on the meta device.
            experts: of the layer that a router or a balancer belongs to.
            ropes: further rotary positions, in the place of the kit's.
        """
        build = self._context(dtype, seed)
        if ropes is not None:
            build = replace(build, ropes=ropes)
        return self._initialised(lambda: self._make(build, experts), seed, meta=meta)

    @cached_property
    def fault(self) -> str | None:
        """Why the component cannot be loaded, validated and built; None where it can."""
        try:
            if self.obstacle() is None:
                self.precision() if self.entry.slot == "precision" else self._any()
        except Exception as cause:
            return f"{type(cause).__name__}: {cause}"
        return None

    def _any(self) -> None:
        """Make one, whatever its slot."""
        if self.entry.slot in (*MODULES, "dispatcher"):
            self.made()
        else:
            self.factory()

    def model(self, dtype: torch.dtype = torch.float64, *, recompute: bool = False, meta: bool = False) -> Any:
        """A language model with the component in it; on the meta device without weights."""
        build = self._context(dtype)
        make = partial(bench.language_model, build, self._layer(), recompute=recompute)
        return self._initialised(make, 0, meta=meta)

    def layer(self, dtype: torch.dtype = torch.float64) -> Any:
        """The layer with experts that the component is part of."""
        build = self._context(dtype)
        return self._initialised(lambda: build.make(self._layer()), 0)

    def _context(self, dtype: torch.dtype, seed: int = 0) -> BuildContext:
        """The kit's small model around the component, with its roles, and a rope for each text in its settings."""
        build = bench.build_context(bench.KitPrecision(dtype), seed=seed)
        ropes = dict.fromkeys(self.texts(), Rope(500.0, build.rope.max_length))
        return replace(build, roles={*build.roles, *self.component.roles}, ropes=ropes)

    def texts(self) -> list[str]:
        """The texts among the example's settings."""
        return [value for value in vars(self.config).values() if isinstance(value, str)]

    def _layer(self) -> Section:
        if self.entry.slot == "ffn":
            return self.section
        router = self.section if self.entry.slot == "router" else bench.section("router", bench.KitRouter)
        balance = [self.section] if self.entry.slot == "balancer" else []
        return bench.section("ffn", bench.KitExperts, router=router, balance=balance)

    def _make(self, build: BuildContext, experts: int) -> Any:
        if self.entry.slot == "residual":
            return bench.Streams(replace(build, residual=self.section))
        shared: dict[str, Any] = {}
        if self.entry.slot in ("router", "balancer", "dispatcher"):
            shared["experts"] = experts
        if self.entry.slot == "balancer":
            shared["top_k"] = 2
        return build.make(self.section, **shared)

    @staticmethod
    def _initialised(make: Callable[[], M], seed: int, *, meta: bool = False) -> M:
        with torch.device("meta" if meta else "cpu"):
            module = make()
        if isinstance(module, nn.Module) and not meta:
            initialise(module, seed)
        return module

    def precision(self) -> Precision:
        """The component as a precision."""
        made: Precision = self.component(self.config)
        return made

    def factory(self) -> Any:
        """The component of a slot that needs nothing but its settings."""
        return self.component(self.config)


def surroundings(slot: str) -> Any:
    """What an example's `check(parent)` sees around it: the kit's own layer, model or recipe."""
    if slot in ("router", "balancer", "dispatcher"):
        router = bench.section("router", bench.KitRouter)
        return SimpleNamespace(experts=bench.EXPERTS, router=router, balance=[])
    if slot == "attention":
        return SimpleNamespace(dim=bench.WIDTH)
    return SimpleNamespace(dim=bench.WIDTH, model=SimpleNamespace(dim=bench.WIDTH), count=1)


def perturbed(module: M) -> M:
    """The same module with every floating weight moved a little, so that a forgotten one shows."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor.dtype) * 0.1)
    return module


_OWN = frozenset(vars(nn.Module()))


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that a module holds: parameters, every buffer, and tensors and plain values kept as attributes."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        held = {**part._parameters, **part._buffers, **{k: v for k, v in vars(part).items() if k not in _OWN}}
        for name, value in held.items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = value.detach().clone()
            elif value is None or isinstance(value, int | float | str):
                found[f"{path}.{name}"] = value
    return found


def written(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Names of what is no longer as it was, or was not there."""
    now = snapshot(module)
    return [
        name
        for name in {**before, **now}
        if name not in before or name not in now or not _same(now[name], before[name])
    ]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a module."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are no longer what they were, bit by bit."""
    now = module.state_dict()
    return [name for name, tensor in before.items() if not torch.equal(now[name], tensor)]


def distance(one: Tensor, two: Tensor) -> float:
    """The largest difference, over the largest value of the second; 0 for empty tensors."""
    if one.shape != two.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    one, two = one.detach(), two.detach()
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-6))
