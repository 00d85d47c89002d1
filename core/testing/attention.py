"""Checks of attention: causality, decoding with a cache, and declared costs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from core.contracts.context import SequenceContext
from core.testing import bench
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import (
    Subject,
    all_finite,
    distance,
    perturbed,
    require_close,
    require_flops,
    require_gradients,
    vector_elements,
)

CONTRACT = "core/contracts/attention.py, Attention"
CACHE = "core/contracts/attention.py, Cache"


def output(module: Any, x_BLD: Tensor, context: SequenceContext, cache: Any = None) -> Tensor:
    """Calls an attention; returns its result without its record."""
    found = module(x_BLD, context, cache)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


@check(
    "attention",
    clause="(x_BLD, context) -> x_BLD, for any number of sequences and tokens",
    where=CONTRACT,
)
def attention_keeps_the_shape(subject: Subject) -> None:
    """Tries several numbers of sequences and of tokens, the least being one of each."""
    module = subject.made()
    for batch, length in ((1, 1), (3, 8), (2, bench.LENGTH)):
        context = bench.tokens(batch, length)
        y_BLD = output(module, bench.states(context), context)
        keeps = y_BLD.shape == (batch, length, bench.WIDTH)
        require(keeps, f"{batch} x {length} tokens give {tuple(y_BLD.shape)}")
        require(all_finite([y_BLD]), "a result is not finite")


@check("attention", clause="row i depends on rows up to i only", where=CONTRACT)
def attention_is_causal(subject: Subject) -> None:
    """Replaces the rows from position 5 on; the rows before must stay."""
    module = perturbed(subject.made())
    context = bench.tokens()
    x_BLD = bench.states(context)
    other = torch.cat([x_BLD[:, :5], 3 * x_BLD[:, 5:].flip(0) + 1], dim=1)
    before = output(module, x_BLD, context)
    after = output(module, other, context)
    require_close(after[:, :5], before[:, :5], "an earlier row changed with a later one")
    require(distance(after[:, 5:], before[:, 5:]) > 1e-6, "no row depends on its own input")


@check(
    "attention",
    clause="where documents are given, a row depends on rows of its own document only",
    where=CONTRACT,
)
def attention_keeps_documents_apart(subject: Subject) -> None:
    """Replaces the first of two documents in a sequence; the second must stay."""
    module = perturbed(subject.made())
    documents_BM = torch.tensor([[0] * 4 + [1] * 5] * 3)
    context = bench.tokens(documents_BM=documents_BM)
    x_BLD = bench.states(context)
    other = torch.cat([x_BLD[:, :4] + 1, x_BLD[:, 4:]], dim=1)
    before = output(module, x_BLD, context)
    after = output(module, other, context)
    found = "a row of the second document changed with the first"
    require_close(after[:, 4:], before[:, 4:], found)


@check(
    "attention",
    clause="with a cache the result equals the full forward over all tokens",
    where=CONTRACT,
)
def decoding_equals_the_full_forward(subject: Subject) -> None:
    """Decodes five tokens at once and then one by one, while another cache is used in between."""
    module = perturbed(subject.made()).eval()
    context = bench.tokens()
    x_BLD = bench.states(context)
    other = bench.states(context, seed=1)
    cache = module.new_cache(3, 8)
    beside = module.new_cache(3, 9)
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
        parts.append(_decode(module, x_BLD, context, cache, start, end))
        _decode(module, other, context, beside, start, end)
    found = "cached rows differ from the full forward's"
    full = output(module, x_BLD, context)
    require_close(torch.cat(parts, dim=1), full, found, tolerance=1e-9)
    lengths = cache.lengths.tolist()
    require(cache.longest == 8 and lengths == [8] * 3, f"the cache holds {lengths} of 8")


@check(
    "attention",
    clause="under `constant_shapes` every decoding step has the same shapes, and the same results",
    where=CACHE,
)
def decoding_can_have_constant_shapes(subject: Subject) -> None:
    """Decodes one by one, records the shapes that the cache returns, and compares with the full forward."""
    module = perturbed(subject.made()).eval()
    context = bench.tokens()
    x_BLD = bench.states(context)
    cache = module.new_cache(3, 12)
    cache.constant_shapes = True
    append = cache.append
    shapes = set()

    def recorded(*parts: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = append(*parts)
        shapes.add(tuple(part.shape for part in found))
        return found

    cache.append = recorded
    steps = [_decode(module, x_BLD, context, cache, i, i + 1) for i in range(x_BLD.shape[1])]
    require(len(shapes) == 1, f"the cache returned parts of {len(shapes)} shapes")
    found = "decoded rows differ from the full forward's"
    full = output(module, x_BLD, context)
    require_close(torch.cat(steps, dim=1), full, found, tolerance=1e-9)


@check(
    "attention",
    clause="`truncate` forgets tokens row by row, or raises NotImplementedError",
    where=CACHE,
)
def truncated_rows_go_on_from_their_own_lengths(subject: Subject) -> None:
    """Cuts rows to 5, 3 and 8 tokens, decodes others, and compares with the full forward of each row alone."""
    module = perturbed(subject.made()).eval()
    context = bench.tokens()
    x_BLD = bench.states(context)
    other = bench.states(context, seed=1)
    cache = module.new_cache(3, 12)
    _decode(module, x_BLD, context, cache, 0, 8)
    keep = [5, 3, 8]
    if not cache.truncates:
        try:
            cache.truncate(torch.tensor(keep))
        except NotImplementedError:
            return
        require(False, "truncate is declared not to work, but works")
    cache.truncate(torch.tensor(keep))
    left = cache.lengths.tolist()
    require(left == keep, f"truncate({keep}) leaves {left} tokens")
    positions_BL = torch.tensor(keep)[:, None] + torch.arange(4)
    tokens_BL = context.tokens_BL[:, :4]
    part = replace(context, tokens_BL=tokens_BL, positions_BL=positions_BL, targets_BL=None)
    again = output(module, other[:, :4], part, cache)
    for row, length in enumerate(keep):
        whole = torch.cat([x_BLD[row, :length], other[row, :4]])[None]
        alone = SequenceContext.of(context.tokens_BL[:1, :1].expand(1, length + 4))
        expected = output(module, whole, alone)[0, length:]
        found = f"row {row} differs from the same row alone"
        require_close(again[row], expected, found, tolerance=1e-9)


def _decode(
    module: Any, x_BLD: Tensor, context: SequenceContext, cache: Any, start: int, end: int
) -> Tensor:
    """Decodes the tokens from `start` to `end` with a cache; returns their results."""
    positions_BL = context.positions_BL[:, start:end]
    tokens_BL = context.tokens_BL[:, start:end]
    part = replace(context, tokens_BL=tokens_BL, positions_BL=positions_BL, targets_BL=None)
    return output(module, x_BLD[:, start:end], part, cache)


@check("attention", clause="gradients are those of the forward", where=CONTRACT)
def attention_gradients_are_right(subject: Subject) -> None:
    """Compares with finite differences in fp64, for the input and every weight."""
    module = perturbed(subject.made())
    context = bench.tokens(1, 3)
    require_gradients(lambda x: output(module, x, context), module, bench.states(context))


@check(
    "attention",
    clause="`costs().cache` is what a token keeps, in elements",
    where="core/contracts/component.py, Costs",
)
def declared_cache_is_real(subject: Subject) -> None:
    """Compares with the bytes of a filled cache and of its tensors, lengths and places in int64 excepted."""
    module = subject.made().eval()
    context = bench.tokens()
    cache = module.new_cache(*context.tokens_BL.shape)
    output(module, bench.states(context), context, cache)
    itemsize = torch.float64.itemsize
    declared = module.costs().cache
    real = cache.bytes / (context.tokens_BL.numel() * itemsize)
    require(declared == real, f"declared {declared} elements a token, kept {real:g}")
    held = 0
    for tensor in _tensors(cache, set()):
        if tensor.dtype != torch.int64:
            held += tensor.numel() * tensor.element_size()
    require(held <= cache.bytes, f"the cache says {cache.bytes} bytes and holds tensors of {held}")


def _tensors(value: Any, visited: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, visited)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), visited)


@check("attention", clause="positions come from the context, never from the shape", where=CONTRACT)
def positions_come_from_the_context(subject: Subject) -> None:
    """Permutes the rows before the last together with their positions; the last row attends to the same set."""
    free = "rows_in_order" not in subject.capabilities
    skip_unless(free, "declared to depend on the order of rows")
    module = perturbed(subject.made())
    context = bench.tokens()
    x_BLD = bench.states(context)
    order_L = torch.tensor([3, 0, 6, 2, 5, 1, 4, 7])
    moved = replace(
        context,
        positions_BL=context.positions_BL[:, order_L],
        tokens_BL=context.tokens_BL[:, order_L],
    )
    before = output(module, x_BLD, context)[:, -1]
    after = output(module, x_BLD[:, order_L], moved)[:, -1]
    require_close(
        after, before, "a row depends on the order of the others, not only on their positions"
    )


@check(
    "attention",
    clause="`costs()` states active weights and the causal half of the mixing, within 2% of a counted run",
    where="core/contracts/component.py, Costs",
)
def declared_flops_are_real(subject: Subject) -> None:
    """Counts FLOPs on the meta device, which computes the whole square: twice the causal half that is declared."""
    module = subject.made(meta=True)
    context = bench.tokens(2, bench.LENGTH)
    tokens_BL = context.tokens_BL.to("meta")
    positions_BL = context.positions_BL.to("meta")
    context = replace(context, tokens_BL=tokens_BL, positions_BL=positions_BL, targets_BL=None)
    x_BLD = torch.empty(2, bench.LENGTH, bench.WIDTH, dtype=torch.float64, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y_BLD = output(module, x_BLD, context)
    require(y_BLD.is_meta, f"from the meta device to {y_BLD.device}")
    costs = module.costs()
    product_flops = 2 * (costs.active - vector_elements(module))
    attention_flops = module.computed_mixing()
    if attention_flops is None:
        attention_flops = costs.attention_flops
        if "exact_mixing" not in subject.capabilities:
            attention_flops *= 2
    computes_all = attention_flops >= costs.attention_flops
    require(computes_all, "less is computed than `costs()` counts")
    declared = context.tokens_BL.numel() * (product_flops + attention_flops)
    require_flops(declared, counter.get_total_flops())


@check(
    "attention",
    "ffn",
    clause="a record's terms are those of `counts`, its tallies are int64, and padding counts in none of them",
    where="core/contracts/record.py, Record",
)
def records_count_what_is_there(subject: Subject) -> None:
    """Changes the states at padded places, which must change no part of the record; padding alone has no loss."""
    module = perturbed(subject.made())
    context = bench.padded([8, 3, 0])
    x_BLD = bench.states(context)
    found = module(x_BLD, context)
    counts = module.counts(context)
    has_record = isinstance(found, tuple) and found[1] is not None
    require(has_record or not counts, "counts without a record that holds the losses")
    skip_unless(has_record, "no record")
    record = found[1]
    require(set(record.terms) == set(counts), "terms and counts have other names")
    for tally in record.tallies.values():
        require(tally.dtype == torch.int64, "a tally is not int64")
    again = module(bench.change_padding(x_BLD, context), context)[1]
    for one, two in zip(tree_leaves(record), tree_leaves(again), strict=True):
        if isinstance(one, Tensor):
            require_close(two.double(), one.double(), "padding changes the record")
    nothing = bench.padded([0, 0])
    empty = module(bench.states(nothing), nothing)[1]
    for value in (*empty.terms.values(), *empty.tallies.values()):
        require(not value.any(), "padding is counted")
    coefficient = module.coefficient(bench.START)
    require(0 <= coefficient < float("inf"), f"the coefficient is {coefficient!r}")
