"""Recomputation, compilation and records: the same bits, the same choices, every tensor found."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.loss_head import HeadOutput
from core.contracts.record import MaxMetric, MeanMetric, Record
from core.contracts.router import Routing
from core.contracts.schema import Section
from core.model.block import Block
from core.model.language_model import LanguageModel, Losses
from plugins.plain_precision.precision import FP64

from . import tiny

RECOMPUTE = "recompute.blocks=[dense, moe]"
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3] * 9])


class Ops(TorchDispatchMode):
    """Counts the operators that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_P2_recomputation_changes_no_bit(precision: str, documents: Tensor | None) -> None:
    """Losses, loads and gradients."""
    name, given = f"precision.name={precision}", tiny.context(documents_BM=documents)
    results = []
    for overrides in ((name,), (name, RECOMPUTE)):
        model = tiny.build(*tiny.MTP, *overrides)
        seen = tiny.see(model, given)
        sums = {term: loss.sum.detach() for term, loss in seen.terms.items()}
        results.append((sums, seen.loads, tiny.backward(model, seen.total())))
    for plain, recomputed in zip(*results, strict=True):
        tiny.assert_equal(recomputed, plain)


def test_P2_loads_are_exactly_tokens_times_top_k() -> None:
    """Counted once, although the forward runs twice; nothing is written anywhere in between."""
    model, given = tiny.build(RECOMPUTE), tiny.context(4, 8)
    seen = tiny.see(model, given)
    seen.total().backward()
    loads = [int(load_E.sum()) for path, load_E in seen.loads.items() if path.startswith("blocks")]
    assert loads == [4 * 8 * 2] * 2


def test_the_named_blocks_are_recomputed_and_no_others() -> None:
    def forwards(*overrides: str) -> list[int]:
        model, calls = tiny.build(*overrides), [0, 0, 0]

        def count(index: int) -> Any:
            def hook(*_: Any) -> None:
                calls[index] += 1

            return hook

        for index, block in enumerate(model.blocks):
            block.attention.register_forward_hook(count(index))
        tiny.see(model, tiny.context()).total().backward()
        return calls

    assert forwards() == [1, 1, 1]
    assert forwards("recompute.blocks=[moe]") == [1, 2, 2]
    assert forwards(RECOMPUTE) == [2, 2, 2]


def test_P3_topk_is_saved_and_everything_else_recomputed() -> None:
    """No `topk` runs in the backward pass: neither the router's two (groups, experts) nor the balance loss's."""
    model, given = tiny.build(RECOMPUTE), tiny.context()
    with Ops() as forward:
        total = tiny.see(model, given).total()
    with Ops() as backward:
        total.backward()
    assert forward.counts["topk"] == 2 * 3
    assert "topk" not in backward.counts
    assert backward.counts["sigmoid"] == 2
    assert backward.counts["grouped_product"] == 2 * (2 + 2)


def test_P3_a_choice_that_would_now_fall_otherwise_is_kept() -> None:
    """The biases change between forward and backward, as a tie may: the gradients are those of the first choice."""
    results = []
    for overrides in ((), (RECOMPUTE,)):
        model = tiny.build(*overrides)
        total = tiny.see(model, tiny.context()).total()
        for bias in tiny.biases(model).values():
            bias.neg_().add_(torch.arange(8.0))
        results.append(tiny.backward(model, total))
    tiny.assert_equal(*results)


def test_P3_ties_broken_at_random_are_broken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All centroids equal, and a `select` whose ties fall differently at every call: choices still come from one."""
    model = tiny.build(RECOMPUTE)
    rolls = itertools.count()
    for path in model.expert_layers():
        router = tiny.moe(model, path).router
        torch.nn.init.zeros_(router.centroids.weight)
        select = router.select
        monkeypatch.setattr(
            router,
            "select",
            lambda biased_TE, select=select: select(
                biased_TE + 9e-9 * _noise(biased_TE, next(rolls))
            ),
        )
        tiny.moe(model, path).balancers[0].reset_parameters()
    seen = tiny.see(model, tiny.context(4, 8))
    seen.summed().backward()
    assert next(rolls) == 4
    for path, load_E in seen.loads.items():
        touched = tiny.moe(model, path).routed.down.weight.grad.flatten(1).any(dim=1)
        assert torch.equal(touched, load_E > 0)


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.rand(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


class Spy(FP64):
    """Knows whether its context is open, and how often it was entered."""

    def __init__(self) -> None:
        super().__init__(FP64.Config())
        self.open, self.entered = False, 0

    @contextmanager
    def context(self) -> Iterator[None]:
        self.entered += 1
        self.open = True
        try:
            yield
        finally:
            self.open = False


@pytest.mark.parametrize(("overrides", "times"), [((), 1), ((RECOMPUTE,), 2)])
def test_P40_the_precisions_context_is_open_inside_recomputation(
    overrides: tuple[str, ...], times: int
) -> None:
    """Every block enters it in the forward, and again where it is recomputed; attention and experts run inside."""
    model, spy, inside = tiny.build(*overrides), Spy(), []
    for block in model.blocks:
        block.precision = spy
        for module in block.modules():
            module.register_forward_hook(
                lambda *_: inside.append(spy.open) if _[0] is not None else None
            )
    blocks = set(model.blocks)
    tiny.see(model, tiny.context()).total().backward()
    assert spy.entered == times * len(blocks)
    assert inside.count(False) == len(
        blocks
    )  # a block's own hook runs after its context; recomputation stops before
    assert inside.count(True) > times * 10 * len(blocks)


def test_no_recomputation_without_gradients() -> None:
    model = tiny.build(RECOMPUTE)
    with torch.no_grad(), Ops() as ops:
        model(tiny.context())
    assert ops.counts["sigmoid"] == 2


# ---- records


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of nested dataclasses and containers, found field by field."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type | Section):
        value = [getattr(value, f.name) for f in fields(value)]
    items = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else []
    )
    return [tensor for item in items for tensor in tensors(item)]


def outputs() -> dict[str, Any]:
    """One of everything that crosses a module's boundary in a forward."""
    model, given, found = tiny.build(*tiny.MTP), tiny.context(), {}
    router = tiny.moe(model).router
    router.register_forward_hook(lambda _, __, output: found.update(routing=output))
    model.blocks[1].register_forward_hook(lambda _, __, output: found.update(block=output))
    model.heads["mtp"].register_forward_hook(lambda _, __, output: found.update(head=output))
    found["losses"] = model(given)
    found["record"] = found["block"][1]["ffn"]
    model.eval()(given)
    found["metric"] = found["head"].metrics["acceptance_1"]
    return found


@pytest.mark.parametrize("name", ["routing", "record", "metric", "head", "block", "losses"])
def test_P36_what_modules_return_is_a_pytree(name: str) -> None:
    """FSDP finds a module's output tensors by flattening: each one, with its graph."""
    value = outputs()[name]
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    assert {id(leaf) for leaf in leaves} == {id(tensor) for tensor in tensors(value)}
    assert len(leaves) > 1


def test_P36_types_survive_a_round_trip() -> None:
    found = outputs()
    found["maximum"] = MaxMetric(torch.ones(()))
    kinds = {
        "routing": Routing,
        "record": Record,
        "metric": MeanMetric,
        "maximum": MaxMetric,
        "head": HeadOutput,
    }
    for name, kind in {**kinds, "losses": Losses}.items():
        leaves, spec = tree_flatten(found[name])
        assert type(torch.utils._pytree.tree_unflatten(leaves, spec)) is kind


# ---- compilation


@pytest.mark.full
def test_P42_compiling_in_place_keeps_names_and_values() -> None:
    """`block.compile()` renames no parameter and returns the records; recomputed or not."""
    given = tiny.context()
    expected = tiny.build()
    keys, losses = list(expected.state_dict()), tiny.see(expected, given)
    grads = tiny.backward(expected, losses.total())
    torch._dynamo.reset()
    for overrides in ((), (RECOMPUTE,)):
        model = tiny.build(*overrides)
        for block in model.blocks:
            block.compile(backend="eager")
        seen = tiny.see(model, given)
        assert list(model.state_dict()) == keys
        tiny.assert_equal(seen.loads, losses.loads)
        tiny.assert_close(tiny.backward(model, seen.total()), grads, 1e-11)


@pytest.mark.full
def test_P42_a_block_with_experts_compiles_as_one_graph() -> None:
    """The conformance kit compiles the layer of experts and each router as one graph too, by default."""
    model: LanguageModel = tiny.build()
    given, x_BLD = tiny.context(), torch.randn(2, 8, 32, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model.blocks[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x_BLD, given)[0], model.blocks[1](x_BLD, given)[0], rtol=1e-12, atol=1e-12
    )


def test_a_copy_of_a_block_with_compiled_layers_computes_with_its_own_weights() -> None:
    block = tiny.build(RECOMPUTE).blocks[1]
    assert isinstance(block, Block)
    block.compile_layers(backend="eager")
    copied = copy.deepcopy(block)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
        x_BLD = torch.randn(1, 3, block.attention_norm.dim, dtype=torch.float64)
        context = SequenceContext.of(torch.zeros(1, 3, dtype=torch.int64))
        assert torch.equal(copied(x_BLD, context)[0], x_BLD), "all that it adds is 0"
        assert not torch.equal(block(x_BLD, context)[0], x_BLD)
    assert "_layers" not in block.__getstate__()


def test_the_block_of_a_head_is_recomputed_too() -> None:
    """The multi-token block is of the recipe's last kind, and does as that kind does."""
    plain, recomputed = tiny.build(*tiny.MTP), tiny.build(*tiny.MTP, "recompute.blocks=[moe]")
    flags = [
        {
            name: module.recompute
            for name, module in model.named_modules()
            if isinstance(module, Block)
        }
        for model in (plain, recomputed)
    ]
    assert not any(flags[0].values())
    assert flags[1] == {name: name != "blocks.0" for name in flags[0]}


def test_more_positions_than_the_table_holds_are_refused() -> None:
    model = tiny.build("model.rope.max_length=12", "data.sequence_length=12")
    model.logits(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(UserError, match=r"13 tokens are more than model.rope.max_length = 12"):
        model.logits(torch.zeros(1, 13, dtype=torch.int64))
    caches = model.new_caches(1, 13)
    model.decode(torch.zeros(1, 12, dtype=torch.int64), caches)
    with pytest.raises(UserError, match=r"13 tokens"):
        model.decode(torch.zeros(1, 1, dtype=torch.int64), caches)
