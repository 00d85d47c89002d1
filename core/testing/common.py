"""Checks of clauses that every component keeps, whichever slot it fills."""

import ast
import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.contracts.build import Rope
from core.contracts.precision import ROLES
from core.contracts.schema import REQUIRED
from core.extension.registry import SLOTS
from core.model.initialise import initialise
from core.testing import bench
from core.testing.calls import call, call_arguments, end_step, results
from core.testing.clauses import MODULES, BrokenClauseError, check, require, skip_unless
from core.testing.subject import (
    Subject,
    changed,
    equal_bits,
    perturbed,
    require_close,
    snapshot,
    state,
    written,
)

ALL = tuple(SLOTS)


@check(
    *ALL,
    clause="a component can be loaded, its `example` validated, and an instance built from it",
    where="core/contracts/component.py, Component: `example`",
)
def component_can_be_built(subject: Subject) -> None:
    """Fails if the component cannot be built; no other check is run then."""
    require(subject.fault is None, str(subject.fault))


@check(
    *ALL,
    clause="every key of `Config` is keyword-only, has a line of documentation, and is read somewhere in the package",
    where="core/contracts/component.py, Component: `Config`",
)
def config_is_honest(subject: Subject) -> None:
    """Searches the source for code that reads each key, outside of `check` and of `example`."""
    config = subject.component.Config
    # A dataclass without a docstring gets one that begins with its name and its arguments.
    has_docstring = config.__doc__ and not config.__doc__.startswith(f"{config.__name__}(")
    require(has_docstring, "Config has no docstring")
    used = set(_names_read(subject.component))
    for key in fields(config):
        require(key.kw_only, f"{key.name} can be given by position: make the dataclass kw_only")
        documented = len(key.metadata.get("doc", "")) >= 5
        require(documented, f"{key.name} has no doc: write setting(..., doc=...)")
    unread = [key.name for key in fields(config) if key.name not in used]
    package = subject.component.__module__.partition(".")[0]
    require(not unread, f"{', '.join(unread)}: read nowhere in {package} but in check")


def _names_read(component: Any) -> Iterator[str]:
    """Names that are read like keys of a `Config` in its package, or where its and its `Config`'s classes are."""
    files = set()
    for cls in (*component.__mro__, *component.Config.__mro__):
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file and cls.__module__.partition(".")[0] != "torch":
            files.add(Path(file))
    own = Path(str(sys.modules[component.__module__].__file__))
    if (own.parent / "__init__.py").exists():
        files.update(own.parent.glob("*.py"))
    for file in files:
        yield from _read_in(ast.parse(file.read_text(encoding="utf-8")), in_config=False)


def _read_in(node: ast.AST, *, in_config: bool) -> Iterator[str]:
    """Names of attributes that are read from anything but `self`, or from `self` in a dataclass, or by `getattr`."""
    if isinstance(node, ast.FunctionDef) and node.name == "check":
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        from_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if in_config or not from_self:
            yield node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "vars"):
        for argument in node.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value
    if isinstance(node, ast.ClassDef):
        in_config = any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list)
    for inner in ast.iter_child_nodes(node):
        yield from _read_in(inner, in_config=in_config)


@check(
    *ALL,
    clause="`example` is a section that the component accepts, with every required key",
    where="core/contracts/component.py, Component: `example`",
)
def example_is_complete(subject: Subject) -> None:
    """Validates it like a recipe's section, in a layer of 8 experts and a model of width 32."""
    example = subject.component.example
    name = example.get("name")
    require(name == subject.entry.name, f"its name is {name!r}, not {subject.entry.name!r}")
    required = {key.name for key in fields(subject.component.Config) if _is_required(key)}
    missing = sorted(required - set(example))
    require(not missing, f"missing: {', '.join(missing)}")
    assert subject.section


def _is_required(key: Any) -> bool:
    return key.default == REQUIRED or (key.default is MISSING and key.default_factory is MISSING)


@check(
    *MODULES,
    clause="every role that the component declares is new, and its example has a layer of that role",
    where="core/contracts/component.py, Component: `roles`, `weight_roles`",
)
def declared_roles_have_products(subject: Subject) -> None:
    """Looks for a layer of each declared role; a product of another new role makes `component_can_be_built` fail."""
    declared = {*subject.component.roles, *subject.component.weight_roles}
    skip_unless(declared, "it declares no role")
    usual = sorted(declared & set(ROLES))
    require(not usual, f"roles that exist already: {', '.join(usual)}")
    used = {getattr(module, "role", None) for module in subject.made().modules()}
    unused = sorted(declared - used)
    require(not unused, f"roles without a layer: {', '.join(unused)}")


@check(
    *MODULES,
    clause="further rotary positions are named by the component's settings, and its results depend on them",
    where="core/contracts/build.py, BuildContext: `rope_named`",
)
def named_ropes_are_used(subject: Subject) -> None:
    """Changes one frequency at a time; a name outside the settings makes `component_can_be_built` fail."""
    ropes = _RecordedRopes(subject.texts())
    one = results(subject, perturbed(subject.made(ropes=ropes)))
    skip_unless(ropes.used, "it uses the model's own rotary positions only")
    for name in sorted(ropes.used):
        slower = _RecordedRopes(subject.texts())
        slower[name] = Rope(5000.0, 4 * bench.LENGTH)
        other = results(subject, perturbed(subject.made(ropes=slower)))
        require(not equal_bits(one, other), f"{name}: another frequency changes no result")


class _RecordedRopes(dict[str, Rope]):
    """Rotary positions of one frequency under several names, which records the names that are read."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(dict.fromkeys(names, Rope(50.0, 4 * bench.LENGTH)))
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Rope:
        self.used.add(name)
        return super().__getitem__(name)


@check(
    *MODULES,
    clause="weights do not depend on how a module was built: `reset_parameters` sets them after the meta device too",
    where="core/model/initialise.py, initialise",
)
def built_on_meta_it_gets_the_same_weights(subject: Subject) -> None:
    """Compares a module built on meta, moved and initialised by address with one built directly, bit by bit."""
    direct = subject.made()
    later = subject.made(meta=True)
    on_meta = all(tensor.is_meta for tensor in (*later.parameters(), *later.buffers()))
    require(on_meta, "a tensor was not made on the meta device")
    moved = later.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            tensor.fill_(7)
    initialise(moved, 0)
    different = changed(moved, state(direct))
    require(not different, f"other values in {', '.join(different)}")
    same = equal_bits(results(subject, direct), results(subject, moved))
    require(same, "a buffer that is not saved is not reset")


@check(
    *MODULES,
    clause="the state dict is all of a module's state",
    where="core/contracts/component.py, Component",
)
def state_round_trips(subject: Subject) -> None:
    """Compares results, bit by bit, with those of another instance that loads it, also after a further step."""
    one = perturbed(subject.made()).eval()
    other = subject.made().eval()
    slot = subject.entry.slot
    end_step(slot, one, [80, 3, 10, 10, 10, 10, 10, 10])
    other.load_state_dict(state(one))
    for load in (None, [1, 40, 10, 10, 10, 10, 10, 10]):
        if load is not None:
            end_step(slot, one, load)
            end_step(slot, other, load)
        require(not changed(other, state(one)), "a tensor was not loaded")
        same = equal_bits(results(subject, one), results(subject, other))
        require(same, "results differ after loading the same state")


@check(
    *MODULES,
    clause="a module can be deep-copied, without the data of the run, and the copy gives the same bits",
    where="core/contracts/component.py, Component",
)
def copies_are_equal(subject: Subject) -> None:
    """Copies it as an average of the weights does; the copy shares no tensor with it."""
    module = perturbed(subject.made())
    expected = results(subject, module)
    try:
        copied = deepcopy(module)
    except (TypeError, AttributeError) as cause:
        raise BrokenClauseError(f"{type(cause).__name__}: {cause}") from cause
    require(equal_bits(expected, results(subject, copied)), "a deep copy gives other results")
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    shared = [name for name, tensor in copied.state_dict().items() if tensor.data_ptr() in own]
    require(not shared, f"a deep copy shares {', '.join(shared)}")


@check(
    *MODULES,
    clause="a forward changes nothing but the cache that it is given",
    where="docs/architecture.md, Purity and records",
)
def forward_writes_nothing(subject: Subject) -> None:
    """Compares all that the module holds before and after a forward, in training and in evaluation."""
    module = perturbed(subject.made())
    for training in (True, False):
        before = snapshot(module.train(training))
        results(subject, module)
        different = written(module, before)
        mode = "training" if training else "evaluation"
        require(not different, f"{', '.join(different)} changed in {mode}")


@check(
    *MODULES,
    clause="equal arguments give equal bits",
    where="docs/architecture.md, Randomness has addresses",
)
def forward_is_deterministic(subject: Subject) -> None:
    """Calls it twice with the same arguments and draws from torch's generator in between."""
    module = perturbed(subject.made())
    first = results(subject, module)
    torch.rand(3)
    same = equal_bits(first, results(subject, module))
    advice = "draw random numbers from core.routing.chance"
    require(same, f"a second forward gives other bits; {advice}")


@check(
    *MODULES,
    clause="results follow the number format of the model, in fp32 or wider where the contract requires it",
    where="docs/architecture.md, Numbers",
)
def formats_are_followed(subject: Subject) -> None:
    """Compares models in fp64 and fp32; the fp64 one must also react to a change that fp32 cannot hold."""
    slot = subject.entry.slot
    wide = subject.made(torch.float64)
    narrow = subject.made(torch.float32)
    narrow.load_state_dict(state(wide))
    exact = results(subject, wide)
    rounded = results(subject, narrow, torch.float32)
    context = bench.padded([8, 5, 8])
    nudged = call(slot, wide, *call_arguments(slot, wide, context, torch.float64, nudge=1e-11))
    floating = False
    moved = False
    for one, other, changed_a_little in zip(exact, rounded, nudged, strict=True):
        if one.is_floating_point():
            require(one.dtype == torch.float64, f"an fp64 model gives {one.dtype}")
            require(other.dtype == torch.float32, f"an fp32 model gives {other.dtype}")
            found = "fp32 and fp64 disagree by more than rounding"
            require_close(other.double(), one, found, tolerance=1e-3)
            floating = True
            moved = moved or not torch.equal(one, changed_a_little)
    fixed = slot == "router" and not list(wide.parameters())
    found = "an fp64 model does not react to 1e-11: something in it is computed in fp32"
    require(moved or fixed or not floating, found)


@check(
    *MODULES,
    clause="torch.compile takes the forward as one graph, or `traceable_of` says that it does not",
    where="core/contracts/component.py, Component: `traceable`",
)
def compiles_as_declared(subject: Subject) -> None:
    """Compiles with the eager backend, which checks what is traced and not what is generated."""
    skip_unless(subject.component.traceable_of(subject.config), "declared not to be traceable")
    slot = subject.entry.slot
    module = perturbed(subject.made())
    arguments = call_arguments(slot, module, bench.padded([8, 5, 8]), torch.float64)
    expected = call(slot, module, *arguments)
    torch._dynamo.reset()
    compiled = torch.compile(partial(call, slot, module), backend="eager", fullgraph=True)
    try:
        got = compiled(*arguments)
    except Exception as cause:
        raise BrokenClauseError(f"{type(cause).__name__}: {str(cause).splitlines()[0]}") from cause
    for own, exact in zip(got, expected, strict=True):
        require_close(own.double(), exact.double(), "the compiled forward gives other results")
