"""Checks of residual streams: shapes, independent positions, gradients."""

import torch

from core.testing import bench
from core.testing.clauses import check, require
from core.testing.subject import (
    Subject,
    all_finite,
    distance,
    perturbed,
    require_close,
    require_gradients,
)

CONTRACT = "core/contracts/residual.py, Residual"


@check(
    "residual",
    clause="a stream is B x L x ... x D with as many states as `streams` says, which `write` keeps; `read` and "
    "`collapse` give B x L x D",
    where=CONTRACT,
)
def streams_keep_their_shapes(subject: Subject) -> None:
    """Tries several numbers of sequences and of tokens, the least being one of each."""
    module = perturbed(subject.made())
    for batch, length in ((1, 1), (3, 8), (2, bench.LENGTH)):
        x_BLD = bench.states(bench.tokens(batch, length))
        stream = module.model.expand(x_BLD)
        found = f"a stream of {batch} x {length} tokens is {tuple(stream.shape)}"
        require(stream.shape[:2] == (batch, length), found)
        require(stream.shape[-1] == bench.WIDTH, f"{found}, whose last axis is not the width")
        states = module.model.streams
        holds = stream.numel() == x_BLD.numel() * states
        require(holds, f"{found}, but it is declared to hold {states} states")
        for layer in (module.attention, module.ffn):
            read_BLD = layer.read(stream)
            require(read_BLD.shape == x_BLD.shape, f"read gives {tuple(read_BLD.shape)}")
            written = layer.write(stream, read_BLD)
            found = f"write turns {tuple(stream.shape)} into {tuple(written.shape)}"
            require(written.shape == stream.shape, found)
            stream = written
        collapsed = module.model.collapse(stream)
        require(collapsed.shape == x_BLD.shape, f"collapse gives {tuple(collapsed.shape)}")
        require(all_finite([collapsed]), "states are not finite")


@check("residual", clause="no position depends on another one's stream", where=CONTRACT)
def positions_stay_apart(subject: Subject) -> None:
    """Replaces the states of position 3; those of every other position must stay."""
    module = perturbed(subject.made())
    context = bench.tokens()
    x_BLD = bench.states(context)
    other_BLD = x_BLD.clone()
    other_BLD[:, 3] = 3 * x_BLD[:, 3].flip(0) + 1
    before = module(x_BLD, context)[0]
    after = module(other_BLD, context)[0]
    apart = torch.arange(x_BLD.shape[1]) != 3
    require_close(after[:, apart], before[:, apart], "a position changed with another one's states")
    depends = distance(after[:, 3], before[:, 3]) > 1e-6
    require(depends, "a position does not depend on its own states")


@check(
    "residual",
    clause="gradients are those of the forward, and reach both the stream and the output",
    where=CONTRACT,
)
def stream_gradients_are_right(subject: Subject) -> None:
    """Compares with finite differences in fp64, for the input and every weight; `write` must pass both gradients."""
    module = perturbed(subject.made())
    context = bench.tokens(1, 3)
    require_gradients(lambda x: module(x, context)[0], module, bench.states(context))
    stream = module.model.expand(bench.states(context)).requires_grad_()
    output_BLD = bench.states(context, seed=1).requires_grad_()
    total = module.attention.write(stream, output_BLD).square().sum()
    for gradient in torch.autograd.grad(total, (stream, output_BLD)):
        require(bool(gradient.any()), "write passes no gradient to the stream or to the output")
