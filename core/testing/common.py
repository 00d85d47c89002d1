"""Clauses that every component keeps, whichever slot it fills."""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from core.contracts.build import Rope
from core.contracts.context import SequenceContext
from core.contracts.loss_head import HeadOutput, LossHead, Shared
from core.contracts.precision import ROLES
from core.contracts.record import Record, StepTotals
from core.contracts.schema import REQUIRED
from core.extension.registry import SLOTS
from core.model.initialise import initialise
from core.testing import bench
from core.testing.clauses import MODULES, BrokenClauseError, check, hold, spare
from core.testing.subject import Subject, changed, distance, perturbed, snapshot, state, written

ALL = tuple(SLOTS)


@check(
    *ALL,
    clause="a component can be loaded, its `example` validated, and one of it made",
    where="core/contracts/component.py, Component: `example`",
)
def component_can_be_built(subject: Subject) -> None:
    """If not, no other check is run."""
    hold(subject.fault is None, str(subject.fault))


@check(
    *ALL,
    clause="every key of `Config` is keyword-only, has a line of documentation, and is read somewhere in the package",
    where="core/contracts/component.py, Component: `Config`",
)
def config_is_honest(subject: Subject) -> None:
    """Reading is looked for in the source, outside of `check` and of `example`."""
    config = subject.component.Config
    hold(config.__doc__ and not config.__doc__.startswith(f"{config.__name__}("), "Config has no docstring")
    used = set(_names_read(subject.component))
    for f in fields(config):
        hold(f.kw_only, f"{f.name} can be given by position: make the dataclass kw_only")
        hold(len(f.metadata.get("doc", "")) >= 5, f"{f.name} has no doc: write setting(..., doc=...)")
    unread = [f.name for f in fields(config) if f.name not in used]
    where = subject.component.__module__.partition(".")[0]
    hold(not unread, f"{', '.join(unread)}: read nowhere in {where} but in check")


def _names_read(component: Any) -> Iterator[str]:
    """What the modules of the component's classes, and those beside them, read of something like a `Config`."""
    files = set()
    for cls in component.__mro__:
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file and cls.__module__.partition(".")[0] != "torch":
            files.add(Path(file))
    own = Path(str(sys.modules[component.__module__].__file__))
    if (own.parent / "__init__.py").exists():
        files.update(own.parent.glob("*.py"))
    for file in files:
        yield from _read_in(ast.parse(file.read_text(encoding="utf-8")), in_config=False)


def _read_in(node: ast.AST, *, in_config: bool) -> Iterator[str]:
    """Attributes that are read, of anything but `self`, or of `self` in a dataclass; and names given to getattr."""
    if isinstance(node, ast.FunctionDef) and node.name == "check":
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if in_config or not of_self:
            yield node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "vars"):
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
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
    """Validated as a recipe's section is, in a layer of 8 experts and a model of width 32."""
    example = subject.component.example
    hold(example.get("name") == subject.entry.name, f"its name is {example.get('name')!r}, not {subject.entry.name!r}")
    required = {f.name for f in fields(subject.component.Config) if _required(f)}
    hold(required <= set(example), f"missing: {', '.join(sorted(required - set(example)))}")
    assert subject.section


def _required(f: Any) -> bool:
    return f.default == REQUIRED or (f.default is MISSING and f.default_factory is MISSING)


@check(
    *MODULES,
    clause="every role that the component declares is new, and its example has a matrix product of that role",
    where="core/contracts/component.py, Component: `roles`",
)
def declared_roles_have_products(subject: Subject) -> None:
    """A product of a role that is not declared makes `component_can_be_built` fail."""
    declared = set(subject.component.roles)
    spare(declared, "it declares no role")
    usual = sorted(declared & set(ROLES))
    hold(not usual, f"roles that exist already: {', '.join(usual)}")
    used = {getattr(module, "role", None) for module in subject.made().modules()}
    unused = sorted(declared - used)
    hold(not unused, f"roles without a product: {', '.join(unused)}")


@check(
    *MODULES,
    clause="further rotary positions are named by the component's settings, and its results depend on them",
    where="core/contracts/build.py, BuildContext: `rope_named`",
)
def named_ropes_are_used(subject: Subject) -> None:
    """Two frequencies give two results; a name that is not in the settings makes `component_can_be_built` fail."""
    ropes = _RecordedRopes(subject.texts(), theta=50.0)
    one = results(subject, perturbed(subject.made(ropes=ropes)))
    spare(ropes.asked, "it uses the model's own rotary positions only")
    other = results(subject, perturbed(subject.made(ropes=_RecordedRopes(subject.texts(), theta=5000.0))))
    same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    hold(not same, f"{', '.join(sorted(ropes.asked))}: another frequency changes no result")


class _RecordedRopes(dict[str, Rope]):
    """Rotary positions of one frequency under several names; records which names were asked for."""

    def __init__(self, names: Iterable[str], *, theta: float) -> None:
        super().__init__(dict.fromkeys(names, Rope(theta, 4 * bench.LENGTH)))
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Rope:
        self.asked.add(name)
        return super().__getitem__(name)


@check(
    *MODULES,
    clause="weights do not depend on how a module was built: `reset_parameters` gives them to one from the meta device",
    where="core/model/initialise.py, initialise",
)
def built_on_meta_it_gets_the_same_weights(subject: Subject) -> None:
    """Built on meta, moved, initialised by address: bit by bit what building it directly gives."""
    direct, later = subject.made(), subject.made(meta=True)
    hold(all(t.is_meta for t in (*later.parameters(), *later.buffers())), "a tensor was not made on the meta device")
    moved = later.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            tensor.fill_(7)
    initialise(moved, 0)
    different = changed(moved, state(direct))
    hold(not different, f"other values in {', '.join(different)}")
    pairs = zip(results(subject, direct), results(subject, moved), strict=True)
    hold(all(torch.equal(one, two) for one, two in pairs), "a buffer that is not saved is not reset")


@check(
    *MODULES,
    clause="the state dict is all of a module's state",
    where="core/contracts/component.py, Component",
)
def state_round_trips(subject: Subject) -> None:
    """Another instance that loads it gives the same results, bit by bit; a balancer also after the next step."""
    one, other = perturbed(subject.made()).eval(), subject.made().eval()
    slot = subject.entry.slot
    end_step(slot, one, [80, 3, 10, 10, 10, 10, 10, 10])
    other.load_state_dict(state(one))
    for load in (None, [1, 40, 10, 10, 10, 10, 10, 10]):
        if load is not None:
            end_step(slot, one, load)
            end_step(slot, other, load)
        hold(not changed(other, state(one)), "a tensor was not loaded")
        for expected, got in zip(results(subject, one), results(subject, other), strict=True):
            hold(torch.equal(expected, got), "results differ after loading the same state")


@torch.no_grad()
def end_step(slot: str, module: Any, load: list[int]) -> None:
    """The end of a step with this load, and with what the module tallies and measures in one micro-batch."""
    if not hasattr(module, "on_step_end"):
        return
    training, load_E = module.training, torch.tensor(load)
    arguments = call_arguments(slot, module, bench.padded([8, 5, 8]), torch.float64)
    if slot == "balancer":
        totals = StepTotals(load_E, module.tally(*arguments))
    else:
        found = module.train()(*arguments)
        said = found[1] if isinstance(found, tuple) else found
        own = (said.tallies, said.metrics) if isinstance(said, Record | HeadOutput) else ()
        totals = StepTotals(load_E if getattr(module, "experts", 0) else None, *own)
    module.train(training).on_step_end(totals, bench.START)


@check(
    *MODULES,
    clause="a forward writes nothing but a cache that it was handed",
    where="docs/architecture.md, Purity and records",
)
def forward_writes_nothing(subject: Subject) -> None:
    """In training and in evaluation."""
    module = perturbed(subject.made())
    for training in (True, False):
        before = snapshot(module.train(training))
        results(subject, module)
        different = written(module, before)
        hold(not different, f"{', '.join(different)} changed in {'training' if training else 'evaluation'}")


@check(*MODULES, clause="equal arguments give equal bits", where="docs/architecture.md, Randomness has addresses")
def forward_is_deterministic(subject: Subject) -> None:
    """Twice the same, with torch's generator moved in between."""
    module = perturbed(subject.made())
    first = results(subject, module)
    torch.rand(3)
    hold(
        all(torch.equal(a, b) for a, b in zip(first, results(subject, module), strict=True)),
        "a second forward gives other bits; draw random numbers from core.routing.chance",
    )


@check(
    *MODULES,
    clause="results follow the number format of the model, in fp32 or wider where the contract asks for it",
    where="docs/architecture.md, Numbers",
)
def formats_are_followed(subject: Subject) -> None:
    """A model in fp64 is fp64 throughout: its results are not those of fp32."""
    wide, narrow = subject.made(torch.float64), subject.made(torch.float32)
    narrow.load_state_dict({n: t.clone() for n, t in wide.state_dict().items()})
    for exact, rounded in zip(results(subject, wide), results(subject, narrow, torch.float32), strict=True):
        if exact.is_floating_point():
            hold(exact.dtype == torch.float64, f"an fp64 model gives {exact.dtype}")
            hold(rounded.dtype == torch.float32, f"an fp32 model gives {rounded.dtype}")
            hold(distance(rounded.double(), exact) < 1e-3, "fp32 and fp64 disagree by more than rounding")
    slot = subject.entry.slot
    nudged = call(slot, wide, *call_arguments(slot, wide, bench.padded([8, 5, 8]), torch.float64, nudge=1e-11))
    floating = [(a, b) for a, b in zip(results(subject, wide), nudged, strict=True) if a.is_floating_point()]
    moved = not floating or any(not torch.equal(a, b) for a, b in floating)
    fixed = slot == "router" and "learned" not in subject.capabilities
    hold(moved or fixed, "an fp64 model does not notice 1e-11: something in it is computed in fp32")


@check(
    *MODULES,
    clause="torch.compile takes the forward as one graph, or `traceable_of` says that it does not",
    where="core/contracts/component.py, Component: `traceable`",
)
def compiles_as_declared(subject: Subject) -> None:
    """With the eager backend: what is traced, not what is generated."""
    spare(subject.component.traceable_of(subject.config), "declared not to be traceable")
    module = perturbed(subject.made())
    arguments = call_arguments(subject.entry.slot, module, bench.padded([8, 5, 8]), torch.float64)
    expected = call(subject.entry.slot, module, *arguments)
    torch._dynamo.reset()
    compiled = torch.compile(partial(call, subject.entry.slot, module), backend="eager", fullgraph=True)
    try:
        got = compiled(*arguments)
    except Exception as cause:
        raise BrokenClauseError(f"{type(cause).__name__}: {str(cause).splitlines()[0]}") from cause
    close = all(distance(a.double(), b.double()) < 1e-10 for a, b in zip(got, expected, strict=True))
    hold(close, "the compiled forward gives other results")


def results(subject: Subject, module: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Every tensor that a forward of the slot's kind returns, for one fixed micro-batch."""
    slot = subject.entry.slot
    return call(slot, module, *call_arguments(slot, module, bench.padded([8, 5, 8]), dtype))


def call_arguments(
    slot: str, module: Any, given: SequenceContext, dtype: torch.dtype, nudge: float = 0.0
) -> tuple[Any, ...]:
    """What a forward of the slot's kind is called with."""
    x_BLD = bench.states(given, dtype) + nudge * bench.states(given, dtype, seed=5)
    if slot == "router":
        return x_BLD.flatten(0, 1), given
    if slot == "loss_head":
        return x_BLD, given, shared(module, x_BLD)
    return (plain_routing(x_BLD, given), given) if slot == "balancer" else (x_BLD, given)


def call(slot: str, module: Any, *arguments: Any) -> list[Tensor]:
    """Every tensor that comes back."""
    if slot == "router":
        x_TD, given = arguments
        found = module(x_TD, _as_it_is, given)
    elif slot == "balancer":
        routing, given = arguments
        found = [module.adjust(routing.scores_TE), module.observe(routing, given)]
    else:
        found = module(*arguments)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _as_it_is(scores_TE: Tensor) -> Tensor:
    return scores_TE


def plain_routing(x_BLD: Tensor, given: SequenceContext) -> Any:
    """The kit router's routing of random states."""
    build = bench.build_context(bench.KitPrecision(x_BLD.dtype))
    torch.manual_seed(0)
    router: Any = build.make(bench.section("router", bench.KitRouter), experts=bench.EXPERTS)
    return router(x_BLD.flatten(0, 1), _as_it_is, given)


def shared(head: LossHead, x_BLD: Tensor, *, tied: bool = False) -> Shared:
    """An embedding and an output to predict with, and states and a stream where the head reads them.

    Args:
        head: says what it reads.
        x_BLD: stands for the states after every block, and for the stream.
        tied: the output is the embedding.
    """
    dtype = x_BLD.dtype
    draw = torch.Generator().manual_seed(2)
    embedding_VD = torch.randn(bench.VOCABULARY, bench.WIDTH, dtype=torch.float64, generator=draw).to(dtype)
    output_VD = torch.randn(bench.VOCABULARY, bench.WIDTH, dtype=torch.float64, generator=draw).to(dtype) * 0.1
    output_VD = embedding_VD if tied else output_VD
    states = dict.fromkeys(head.reads_blocks, x_BLD)
    stream = x_BLD if head.reads_streams else None
    return Shared(lambda tokens: embedding_VD[tokens], lambda hidden: hidden @ output_VD.T, states, stream)
