"""The contract of attention: causal, faithful under a cache, and as expensive as it says."""

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
from core.testing.clauses import check, hold, spare
from core.testing.subject import Subject, distance, perturbed

CONTRACT = "core/contracts/attention.py, Attention"
CACHE = "core/contracts/attention.py, Cache"


def output(module: Any, x_BLD: Tensor, given: SequenceContext, cache: Any = None) -> Tensor:
    """What an attention gives, without its record."""
    found = module(x_BLD, given, cache)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


@check("attention", clause="(x_BLD, context) -> x_BLD, for any number of sequences and tokens", where=CONTRACT)
def attention_keeps_the_shape(subject: Subject) -> None:
    """Several numbers of sequences and of tokens, from one of each."""
    module = subject.made()
    for batch, length in ((1, 1), (3, 8), (2, bench.LENGTH)):
        given = bench.tokens(batch, length)
        y_BLD = output(module, bench.states(given), given)
        hold(y_BLD.shape == (batch, length, bench.WIDTH), f"{batch} x {length} tokens give {tuple(y_BLD.shape)}")
        hold(bool(y_BLD.isfinite().all()), "a result is not finite")


@check("attention", clause="row i depends on rows up to i only", where=CONTRACT)
def attention_is_causal(subject: Subject) -> None:
    """Rows from position 5 on are replaced; the rows before stay."""
    module, given = perturbed(subject.made()), bench.tokens()
    x_BLD = bench.states(given)
    other = torch.cat([x_BLD[:, :5], 3 * x_BLD[:, 5:].flip(0) + 1], dim=1)
    before, after = output(module, x_BLD, given), output(module, other, given)
    hold(distance(after[:, :5], before[:, :5]) < 1e-10, "an earlier row changed with a later one")
    hold(distance(after[:, 5:], before[:, 5:]) > 1e-6, "no row depends on its own input")


@check("attention", clause="where documents are given, a row depends on rows of its own document only", where=CONTRACT)
def attention_keeps_documents_apart(subject: Subject) -> None:
    """Two documents in a row: the second is what it would be if the first were another."""
    module = perturbed(subject.made())
    documents_BM = torch.tensor([[0] * 4 + [1] * 5] * 3)
    given = bench.tokens(documents_BM=documents_BM)
    x_BLD = bench.states(given)
    other = torch.cat([x_BLD[:, :4] + 1, x_BLD[:, 4:]], dim=1)
    before, after = output(module, x_BLD, given), output(module, other, given)
    hold(distance(after[:, 4:], before[:, 4:]) < 1e-10, "a row of the second document changed with the first")


@check("attention", clause="with a cache the result equals the full forward over all tokens", where=CONTRACT)
def decoding_equals_the_full_forward(subject: Subject) -> None:
    """Five tokens at once, then one by one, beside another cache."""
    module, given = perturbed(subject.made()).eval(), bench.tokens()
    x_BLD, other = bench.states(given), bench.states(given, seed=1)
    cache, beside = module.new_cache(3, 8), module.new_cache(3, 9)
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
        parts.append(_decode(module, x_BLD, given, cache, start, end))
        _decode(module, other, given, beside, start, end)
    hold(
        distance(torch.cat(parts, dim=1), output(module, x_BLD, given)) < 1e-9,
        "cached rows differ from the full forward's",
    )
    hold(cache.longest == 8 and cache.lengths.tolist() == [8] * 3, f"the cache holds {cache.lengths.tolist()} of 8")


@check("attention", clause="`truncate` forgets tokens row by row, or raises NotImplementedError", where=CACHE)
def truncated_rows_go_on_from_their_own_lengths(subject: Subject) -> None:
    """Rows are cut to 5, 3 and 8 tokens, go on with other tokens, and equal the full forward of each row alone."""
    module, given = perturbed(subject.made()).eval(), bench.tokens()
    x_BLD, other = bench.states(given), bench.states(given, seed=1)
    cache = module.new_cache(3, 12)
    _decode(module, x_BLD, given, cache, 0, 8)
    keep = [5, 3, 8]
    if not cache.truncates:
        try:
            cache.truncate(torch.tensor(keep))
        except NotImplementedError:
            return
        hold(False, "truncate is declared not to work, and works")
    cache.truncate(torch.tensor(keep))
    hold(cache.lengths.tolist() == keep, f"truncate({keep}) leaves {cache.lengths.tolist()} tokens")
    positions_BL = torch.tensor(keep)[:, None] + torch.arange(4)
    part = replace(given, tokens_BL=given.tokens_BL[:, :4], positions_BL=positions_BL, targets_BL=None)
    again = output(module, other[:, :4], part, cache)
    for row, length in enumerate(keep):
        whole = torch.cat([x_BLD[row, :length], other[row, :4]])[None]
        alone = SequenceContext.of(given.tokens_BL[:1, :1].expand(1, length + 4))
        expected = output(module, whole, alone)[0, length:]
        hold(distance(again[row], expected) < 1e-9, f"row {row} differs from the same row alone")


def _decode(module: Any, x_BLD: Tensor, given: SequenceContext, cache: Any, start: int, end: int) -> Tensor:
    positions_BL = given.positions_BL[:, start:end]
    tokens_BL = given.tokens_BL[:, start:end]
    part = replace(given, tokens_BL=tokens_BL, positions_BL=positions_BL, targets_BL=None)
    return output(module, x_BLD[:, start:end], part, cache)


@check("attention", clause="the backward is the forward's", where=CONTRACT)
def attention_gradients_are_right(subject: Subject) -> None:
    """Against finite differences in fp64, for the input and every weight."""
    module, given = perturbed(subject.made()), bench.tokens(1, 3)
    x_BLD = bench.states(given).requires_grad_()
    weights = [p for p in module.parameters() if p.requires_grad]
    ok = torch.autograd.gradcheck(
        lambda x, *_: output(module, x, given), (x_BLD, *weights), raise_exception=False, fast_mode=True
    )
    hold(ok, "a gradient differs from finite differences")


@check(
    "attention", clause="`costs().cache` is what a token keeps, in elements", where="core/contracts/component.py, Costs"
)
def declared_cache_is_real(subject: Subject) -> None:
    """Against the bytes of a filled cache."""
    module, given = subject.made().eval(), bench.tokens()
    cache = module.new_cache(*given.tokens_BL.shape)
    output(module, bench.states(given), given, cache)
    itemsize, declared = torch.float64.itemsize, module.costs().cache
    real = cache.bytes / (given.tokens_BL.numel() * itemsize)
    hold(declared == real, f"declared {declared} elements a token, kept {real:g}")
    held = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache, set()))
    hold(held <= cache.bytes, f"the cache says {cache.bytes} bytes and holds tensors of {held}")


def _tensors(value: Any, met: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    if id(value) in met:
        return
    met.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, met)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), met)


@check("attention", clause="positions come from the context, never from the shape", where=CONTRACT)
def positions_come_from_the_context(subject: Subject) -> None:
    """Rows before the last change places together with their positions: the last row sees the same set."""
    spare("rows_in_order" not in subject.capabilities, "declared to depend on the order of rows")
    module, given = perturbed(subject.made()), bench.tokens()
    x_BLD, order_L = bench.states(given), torch.tensor([3, 0, 6, 2, 5, 1, 4, 7])
    moved = replace(given, positions_BL=given.positions_BL[:, order_L], tokens_BL=given.tokens_BL[:, order_L])
    before, after = output(module, x_BLD, given)[:, -1], output(module, x_BLD[:, order_L], moved)[:, -1]
    hold(distance(after, before) < 1e-10, "a row depends on where others stand, not on their positions")


@check(
    "attention",
    clause="`costs()` states active weights and the causal half of the mixing, within 2% of a counted run",
    where="core/contracts/component.py, Costs",
)
def declared_flops_are_real(subject: Subject) -> None:
    """Counted on the meta device, which follows the shapes alone, over the whole square: twice the declared mixing."""
    module, given = subject.made(meta=True), bench.tokens(2, bench.LENGTH)
    positions_BL = given.positions_BL.to("meta")
    given = replace(given, tokens_BL=given.tokens_BL.to("meta"), positions_BL=positions_BL, targets_BL=None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y_BLD = output(module, torch.empty(2, bench.LENGTH, bench.WIDTH, dtype=torch.float64, device="meta"), given)
    hold(y_BLD.is_meta, f"from the meta device to {y_BLD.device}")
    costs, vectors = module.costs(), sum(p.numel() for p in module.parameters() if p.dim() == 1)
    mixing = costs.mixing * (1 if "exact_mixing" in subject.capabilities else 2)
    declared = given.tokens_BL.numel() * (2 * (costs.active - vectors) + mixing)
    counted = counter.get_total_flops()
    hold(abs(declared - counted) <= 0.02 * counted, f"declared {declared:g} FLOPs, counted {counted:g}")


@check(
    "attention",
    clause="a record's terms are those of `counts`, its tallies are int64, and padding counts in none of them",
    where="core/contracts/record.py, Record",
)
def records_count_what_is_there(subject: Subject) -> None:
    """Other states at padded places change no term, tally or metric, and a batch of nothing but padding has none."""
    module, given = perturbed(subject.made()), bench.padded([8, 3, 0])
    x_BLD = bench.states(given)
    found = module(x_BLD, given)
    hold(isinstance(found, tuple) or not module.counts(given), "counts without a record that holds the losses")
    spare(isinstance(found, tuple), "no record")
    hold(set(found[1].terms) == set(module.counts(given)), "terms and counts have other names")
    hold(all(t.dtype == torch.int64 for t in found[1].tallies.values()), "a tally is not int64")
    other = torch.where(given.valid()[:, :, None], x_BLD, 5 * x_BLD.flip(2))
    again = module(other, given)[1]
    for one, two in zip(tree_leaves(found[1]), tree_leaves(again), strict=True):
        hold(not isinstance(one, Tensor) or distance(two.double(), one.double()) < 1e-10, "padding changes the record")
    nothing = bench.padded([0, 0])
    empty = module(bench.states(nothing), nothing)[1]
    hold(not any(t.any() for t in (*empty.terms.values(), *empty.tallies.values())), "padding is counted")
    hold(0 <= module.coefficient(bench.START) < float("inf"), f"the coefficient is {module.coefficient(bench.START)!r}")
