"""The contract of attention: causal, faithful under a cache, and as expensive as it says."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.testing import bench
from core.testing.clauses import check, hold
from core.testing.subject import Subject, distance, perturbed

CONTRACT = "core/contracts/attention.py, Attention"


@check("attention", clause="(x_BLD, context) -> x_BLD, for any number of sequences and tokens", where=CONTRACT)
def attention_keeps_the_shape(subject: Subject) -> None:
    """From one token of one sequence on."""
    module = subject.made()
    for batch, length in ((1, 1), (3, 8), (2, bench.LENGTH)):
        given = bench.tokens(batch, length)
        y_BLD = module(bench.states(given), given)
        hold(y_BLD.shape == (batch, length, bench.WIDTH), f"{batch} x {length} tokens give {tuple(y_BLD.shape)}")
        hold(bool(y_BLD.isfinite().all()), "a result is not finite")


@check("attention", clause="row i depends on rows up to i only", where=CONTRACT)
def attention_is_causal(subject: Subject) -> None:
    """Rows from position 5 on are replaced; the rows before stay."""
    module, given = perturbed(subject.made()), bench.tokens()
    x_BLD = bench.states(given)
    other = torch.cat([x_BLD[:, :5], 3 * x_BLD[:, 5:].flip(0) + 1], dim=1)
    before, after = module(x_BLD, given), module(other, given)
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
    before, after = module(x_BLD, given), module(other, given)
    hold(distance(after[:, 4:], before[:, 4:]) < 1e-10, "a row of the second document changed with the first")


@check("attention", clause="with a cache the result equals the full forward over all tokens", where=CONTRACT)
def decoding_equals_the_full_forward(subject: Subject) -> None:
    """Five tokens at once, then one by one; then three are forgotten and read again."""
    module, given = perturbed(subject.made()).eval(), bench.tokens()
    x_BLD = bench.states(given)
    full, cache = module(x_BLD, given), module.new_cache()
    parts = [_decode(module, x_BLD, given, cache, start, end) for start, end in ((0, 5), (5, 6), (6, 7), (7, 8))]
    hold(distance(torch.cat(parts, dim=1), full) < 1e-9, "cached rows differ from the full forward's")
    hold(cache.length == 8, f"the cache holds {cache.length} tokens after 8")
    cache.truncate(5)
    hold(cache.length == 5, "truncate(5) does not leave 5 tokens")
    again = _decode(module, x_BLD, given, cache, 5, 8)
    hold(distance(again, full[:, 5:]) < 1e-9, "rows read after truncate differ from the full forward's")


def _decode(module: object, x_BLD: Tensor, given: object, cache: object, start: int, end: int) -> Tensor:
    positions_L = torch.arange(start, end)
    tokens_BL = given.tokens_BL[:, start:end]  # type: ignore[attr-defined]
    part = replace(given, tokens_BL=tokens_BL, positions_L=positions_L, targets_BL=None)  # type: ignore[type-var]
    result: Tensor = module(x_BLD[:, start:end], part, cache)  # type: ignore[operator]
    return result


@check("attention", clause="the backward is the forward's", where=CONTRACT)
def attention_gradients_are_right(subject: Subject) -> None:
    """Against finite differences in fp64, for the input and every weight."""
    module, given = perturbed(subject.made()), bench.tokens(1, 3)
    x_BLD = bench.states(given).requires_grad_()
    weights = [p for p in module.parameters() if p.requires_grad]
    ok = torch.autograd.gradcheck(
        lambda x, *_: module(x, given), (x_BLD, *weights), raise_exception=False, fast_mode=True
    )
    hold(ok, "a gradient differs from finite differences")


@check(
    "attention", clause="`costs().cache` is what a token keeps, in elements", where="core/contracts/component.py, Costs"
)
def declared_cache_is_real(subject: Subject) -> None:
    """Against the bytes of a filled cache."""
    module, given = subject.made().eval(), bench.tokens()
    cache = module.new_cache()
    module(bench.states(given), given, cache)
    itemsize, declared = torch.float64.itemsize, module.costs().cache
    real = cache.bytes / (given.tokens_BL.numel() * itemsize)
    hold(declared == real, f"declared {declared} elements a token, kept {real:g}")


@check(
    "attention",
    clause="`costs()` states active weights and the causal half of the mixing, within 2% of a counted run",
    where="core/contracts/component.py, Costs",
)
def declared_flops_are_real(subject: Subject) -> None:
    """Counted on the meta device, which follows the shapes alone, over the whole square: twice the declared mixing."""
    module, given = subject.made(meta=True), bench.tokens(2, bench.LENGTH)
    positions_L = given.positions_L.to("meta")
    given = replace(given, tokens_BL=given.tokens_BL.to("meta"), positions_L=positions_L, targets_BL=None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y_BLD = module(torch.empty(2, bench.LENGTH, bench.WIDTH, dtype=torch.float64, device="meta"), given)
    hold(y_BLD.is_meta, f"from the meta device to {y_BLD.device}")
    costs, vectors = module.costs(), sum(p.numel() for p in module.parameters() if p.dim() == 1)
    declared = given.tokens_BL.numel() * (2 * (costs.active - vectors) + 2 * costs.mixing)
    counted = counter.get_total_flops()
    hold(abs(declared - counted) <= 0.02 * counted, f"declared {declared:g} FLOPs, counted {counted:g}")
