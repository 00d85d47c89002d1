"""The contract of residual streams: shapes, positions that do not see each other, gradients."""

import torch

from core.testing import bench
from core.testing.clauses import check, hold
from core.testing.subject import Subject, distance, perturbed

CONTRACT = "core/contracts/residual.py, Residual"


@check("residual", clause="`read` and `collapse` give B x L x D, and `write` keeps the stream's shape", where=CONTRACT)
def streams_keep_their_shapes(subject: Subject) -> None:
    """Several numbers of sequences and of tokens, from one of each."""
    module = perturbed(subject.made())
    for batch, length in ((1, 1), (3, 8), (2, bench.LENGTH)):
        x_BLD = bench.states(bench.tokens(batch, length))
        stream = module.model.expand(x_BLD)
        hold(stream.shape[:2] == (batch, length), f"a stream of {batch} x {length} tokens is {tuple(stream.shape)}")
        for layer in (module.attention, module.ffn):
            read_BLD = layer.read(stream)
            hold(read_BLD.shape == x_BLD.shape, f"read gives {tuple(read_BLD.shape)}")
            written = layer.write(stream, read_BLD)
            hold(written.shape == stream.shape, f"write turns {tuple(stream.shape)} into {tuple(written.shape)}")
            stream = written
        collapsed = module.model.collapse(stream)
        hold(collapsed.shape == x_BLD.shape, f"collapse gives {tuple(collapsed.shape)}")
        hold(bool(collapsed.isfinite().all()), "states are not finite")


@check("residual", clause="no position sees another one's stream", where=CONTRACT)
def positions_stay_apart(subject: Subject) -> None:
    """The states of position 3 are replaced; every other position's stay."""
    module, given = perturbed(subject.made()), bench.tokens()
    x_BLD = bench.states(given)
    other_BLD = x_BLD.clone()
    other_BLD[:, 3] = 3 * x_BLD[:, 3].flip(0) + 1
    before, after = module(x_BLD, given)[0], module(other_BLD, given)[0]
    apart = torch.arange(x_BLD.shape[1]) != 3
    hold(distance(after[:, apart], before[:, apart]) < 1e-10, "a position changed with another one's states")
    hold(distance(after[:, 3], before[:, 3]) > 1e-6, "a position does not depend on its own states")


@check("residual", clause="the backward is the forward's, and both the stream and the output carry it", where=CONTRACT)
def stream_gradients_are_right(subject: Subject) -> None:
    """Against finite differences in fp64, for the input and every weight."""
    module, given = perturbed(subject.made()), bench.tokens(1, 3)
    x_BLD = bench.states(given).requires_grad_()
    weights = [p for p in module.parameters() if p.requires_grad]
    right = torch.autograd.gradcheck(
        lambda x, *_: module(x, given)[0], (x_BLD, *weights), raise_exception=False, fast_mode=True
    )
    hold(right, "a gradient differs from finite differences")
    stream = module.model.expand(bench.states(given)).requires_grad_()
    output_BLD = bench.states(given, seed=1).requires_grad_()
    slopes = torch.autograd.grad(module.attention.write(stream, output_BLD).square().sum(), (stream, output_BLD))
    hold(all(bool(slope.any()) for slope in slopes), "write passes no gradient to the stream or to the output")
