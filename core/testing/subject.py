"""A component under test: its `example` section, validated, and ways to build it in the kit's small model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.contracts.build import BuildContext, Rope
from core.contracts.component import Environment
from core.contracts.errors import UserError
from core.contracts.precision import Precision
from core.contracts.schema import Section
from core.extension.loader import installed_registry, registry_for
from core.extension.registry import Entry, Registry
from core.model.initialise import initialise
from core.recipe.key_paths import to_dict
from core.recipe.resolve import Resolver
from core.testing import bench
from core.testing.clauses import MODULES, require

M = TypeVar("M", bound=nn.Module)


def entries_of(package: str) -> list[Entry]:
    """The components that a package registers: an installed plugin, or a module that Python finds.

    Args:
        package: the module that an entry point names, or a package around it; or the path of a plugin file.

    Raises:
        UserError: it cannot be read, or registers nothing.
    """
    found = list(_registered_by(package, installed_registry()))
    if not found:
        try:
            found = list(_registered_by(package, registry_for([package])))
        except UserError as error:
            raise UserError(str(error).replace(", which the recipe names,", "")) from error
    if not found:
        raise UserError(f"plugin {package!r} registers nothing")
    return found


def _registered_by(package: str, registry: Registry) -> Iterator[Entry]:
    for _, entries in sorted(registry.entries.items()):
        for entry in entries:
            module = entry.owner.module
            file = entry.owner.file
            is_of_file = file is not None and str(file) == package
            if is_of_file or module == package or module.startswith(f"{package}."):
                yield entry


@dataclass(frozen=True)
class Subject:
    """A component under test and the registry that holds it."""

    entry: Entry
    registry: Registry

    @cached_property
    def component(self) -> Any:
        """The component's class."""
        return self.entry.load()[0]

    @cached_property
    def section(self) -> Section:
        """The class's `example`, validated as a section of a recipe."""
        slot = self.entry.slot
        resolver = Resolver(self.registry, lambda path: f"the example of {self.entry.name}", {})
        example = dict(self.component.example)
        example["name"] = f"{self.entry.owner.distribution}/{self.entry.name}"
        found = resolver.component(slot, example, slot, surroundings(slot))
        return Section(found.slot, self.entry.name, found.component, found.config, found.provenance)

    @property
    def config(self) -> Any:
        """The settings of the example."""
        return self.section.config

    @cached_property
    def capabilities(self) -> frozenset[str]:
        """The component's capabilities with the settings of the example."""
        found: frozenset[str] = self.component.capabilities_of(self.config)
        return found

    def unmet_requirement(self) -> str | None:
        """The reason why the component cannot run on this machine; None if it can."""
        message: str | None = self.component.requires(self.config, Environment("cpu"))
        return message

    def made(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = 0,
        meta: bool = False,
        experts: int = bench.EXPERTS,
        ropes: Mapping[str, Rope] | None = None,
    ) -> Any:
        """Builds the component by itself, with initial weights; on the meta device without.

        Args:
            dtype: the format of its weights and products.
            seed: the seed of the weights.
            meta: whether it is built on the meta device.
            experts: the number of experts of the layer that a router or a balancer belongs to.
            ropes: further rotary positions, in place of the kit's.
        """
        build = self._context(dtype, seed)
        if ropes is not None:
            build = replace(build, ropes=ropes)
        return self._initialised(lambda: self._make(build, experts), seed, meta=meta)

    @cached_property
    def fault(self) -> str | None:
        """The reason why the component cannot be loaded, validated and built; None if it can."""
        try:
            if self.unmet_requirement() is None:
                self._make_any()
        except Exception as cause:
            return f"{type(cause).__name__}: {cause}"
        return None

    def _make_any(self) -> None:
        """Builds one component, whatever its slot."""
        if self.entry.slot == "precision":
            self.precision()
        elif self.entry.slot in (*MODULES, "dispatcher"):
            self.made()
        else:
            self.factory()

    def model(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        recompute: bool = False,
        meta: bool = False,
        dispatcher: Section | None = None,
    ) -> Any:
        """Builds a language model with the component in it; on the meta device without weights.

        Args:
            dtype: format of weights and products.
            recompute: whether the block's activations are computed again in the backward.
            meta: whether it is built on the meta device.
            dispatcher: replaces the dispatcher of the layer with experts; None: it keeps its own.
        """
        build = replace(self._context(dtype), dispatcher=dispatcher)
        make = partial(bench.language_model, build, self._layer(), recompute=recompute)
        return self._initialised(make, 0, meta=meta)

    def layer(self, dtype: torch.dtype = torch.float64) -> Any:
        """Builds the layer with experts that the component is part of."""
        build = self._context(dtype)
        return self._initialised(lambda: build.make(self._layer()), 0)

    def _context(self, dtype: torch.dtype, seed: int = 0) -> BuildContext:
        """The kit's small model around the component, with its roles, and a rope for each text in its settings."""
        build = bench.build_context(bench.KitPrecision(dtype), seed=seed)
        ropes = dict.fromkeys(self.texts(), Rope(500.0, build.rope.max_length))
        return replace(build, roles={*build.roles, *self.component.roles}, ropes=ropes)

    def texts(self) -> list[str]:
        """The texts among the example's settings, those in lists, mappings and child sections included."""
        return [value for value in tree_leaves(to_dict(self.config)) if isinstance(value, str)]

    def _layer(self) -> Section:
        if self.entry.slot == "ffn":
            return self.section
        router = bench.section("router", bench.KitRouter)
        if self.entry.slot == "router":
            router = self.section
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
        device = "meta" if meta else "cpu"
        with torch.device(device):
            module = make()
        if isinstance(module, nn.Module) and not meta:
            initialise(module, seed)
        return module

    def precision(self) -> Precision:
        """Makes the component of the slot `precision`."""
        made: Precision = self.component(self.config)
        return made

    def factory(self) -> Any:
        """Makes the component of a slot that needs nothing but its settings."""
        return self.component(self.config)


def surroundings(slot: str) -> Any:
    """A stand-in for the parent that an example's `check(parent)` receives: the kit's layer, model or recipe."""
    if slot in ("router", "balancer", "dispatcher"):
        router = bench.section("router", bench.KitRouter)
        return SimpleNamespace(experts=bench.EXPERTS, router=router, balance=[])
    if slot == "attention":
        return SimpleNamespace(dim=bench.WIDTH)
    return SimpleNamespace(dim=bench.WIDTH, model=SimpleNamespace(dim=bench.WIDTH), count=1)


def perturbed(module: M) -> M:
    """Changes every floating-point weight of a module a little, in place, so that a forgotten one shows."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
                tensor.add_(noise.to(tensor.dtype) * 0.1)
    return module


_OWN = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has."""


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that a module holds: parameters, every buffer, and tensors and plain values kept as attributes."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        attributes = {name: value for name, value in vars(part).items() if name not in _OWN}
        held = {**part._parameters, **part._buffers, **attributes}
        for name, value in held.items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = value.detach().clone()
            elif value is None or isinstance(value, int | float | str):
                found[f"{path}.{name}"] = value
    return found


def written(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Names in a snapshot that were added, removed or changed since an earlier one."""
    now = snapshot(module)
    different = []
    for name in {**before, **now}:
        if name not in before or name not in now or not _same(now[name], before[name]):
            different.append(name)
    return different


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a module."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of tensors whose bits differ from an earlier copy."""
    now = module.state_dict()
    return [name for name, tensor in before.items() if not torch.equal(now[name], tensor)]


def require_close(own: Tensor, expected: Tensor, found: str, *, tolerance: float = 1e-10) -> None:
    """Raises `BrokenClauseError` with `found` unless the `distance` of two tensors is below a tolerance."""
    require(distance(own, expected) < tolerance, found)


def require_flops(declared: float, counted: float) -> None:
    """Raises `BrokenClauseError` unless declared FLOPs are within 2% of those that were counted."""
    found = f"declared {declared:g} FLOPs, counted {counted:g}"
    require(abs(declared - counted) <= 0.02 * counted, found)


def require_gradients(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> None:
    """Raises `BrokenClauseError` unless gradients of an input and of every weight agree with finite differences.

    Args:
        run: computes the module's result from the input.
        x: the input, fp64.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    inputs = (x.requires_grad_(), *weights)
    right = torch.autograd.gradcheck(
        lambda x, *_: run(x), inputs, raise_exception=False, fast_mode=True
    )
    require(right, "a gradient differs from finite differences")


def vector_elements(module: nn.Module) -> int:
    """The number of weights in vectors, which take part in no matrix product."""
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 1)


def equal_bits(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two lists of as many tensors have the same shapes and values, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an infinity or a NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def distance(one: Tensor, two: Tensor) -> float:
    """The largest difference, over the largest value of the second; 0 for empty tensors."""
    if one.shape != two.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    one = one.detach()
    two = two.detach()
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-6))
