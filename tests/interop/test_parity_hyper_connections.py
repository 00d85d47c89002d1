"""Hyper-connections against transformers' DeepSeek-V4: maps, mixing and collapse, with their gradients."""

from typing import Any

import pytest
import torch
from model import tiny
from torch import Tensor, nn

from core.assemble import build

from .hf_models import transformers_or_skip

STREAMS = 4
WIDTH = 32


def theirs(kind: str) -> Any:
    """One of transformers' modules at the tiny model's width."""
    transformers = transformers_or_skip()
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = transformers.DeepseekV4Config(hidden_size=WIDTH, hc_mult=STREAMS, rms_norm_eps=1e-6)
    return getattr(module, kind)(config)


@torch.no_grad()
def copy(own: Any, other: nn.Module, prefix: str = "") -> None:
    """Copies our weights into theirs."""
    for name, value in (("fn", own.projection), ("base", own.base), ("scale", own.scale)):
        getattr(other, prefix + name).copy_(value)


def streams(seed: int) -> Tensor:
    """Random streams, of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    sizes_N1 = torch.tensor([0.3, 1.0, 3.0, 10.0])[:, None]
    return torch.randn(2, 5, STREAMS, WIDTH, generator=draw) * sizes_N1


def gradients(result: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The gradients of a weighted sum of a result."""
    weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
    return list(torch.autograd.grad((result * weights).sum(), tensors, retain_graph=True))


def assert_same(ours: list[Tensor], other: list[Tensor]) -> None:
    """Equal to rounding in fp32."""
    for one, two in zip(ours, other, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-5 * float(two.detach().abs().max()))


@pytest.mark.parametrize("place", ["attention_residual", "ffn_residual"])
def test_reading_and_writing_are_transformers(place: str) -> None:
    """Both compute in fp32, so that their modules, which cast to it, are no less exact than ours."""
    model = tiny.build("model.residual={name: hyper_connections}", "precision.name=fp32")
    own: Any = getattr(model.blocks[1], place)
    other = theirs("DeepseekV4HyperConnection")
    copy(own, other)
    stream = streams(0).requires_grad_()
    output_BLD = streams(1)[:, :, 1].requires_grad_()

    post, comb, read_BLD = other(stream)
    added = post.unsqueeze(-1) * output_BLD.unsqueeze(-2)
    written = added + torch.matmul(comb.transpose(-1, -2), stream)

    own_read_BLD = own.read(stream)
    own_written = own.write(stream, output_BLD)
    assert_same([own_read_BLD, own_written], [read_BLD, written])
    ours = [stream, own.projection, own.base, own.scale]
    other_weights = [stream, other.fn, other.base, other.scale]
    assert_same(gradients(own_read_BLD, ours), gradients(read_BLD, other_weights))
    assert_same(
        gradients(own_written, [*ours, output_BLD]),
        gradients(written, [*other_weights, output_BLD]),
    )


def test_the_collapse_is_transformers() -> None:
    model = tiny.build("model.residual={name: hyper_connections}", "precision.name=fp32")
    own: Any = model.residual
    other = theirs("DeepseekV4HyperHead")
    copy(own, other, "hc_")
    stream = streams(0).requires_grad_()
    ours, collapsed_BLD = own.collapse(stream), other(stream)
    assert_same([ours], [collapsed_BLD])
    assert_same(
        gradients(ours, [stream, own.projection, own.base, own.scale]),
        gradients(collapsed_BLD, [stream, other.hc_fn, other.hc_base, other.hc_scale]),
    )


def test_the_start_zeros_is_transformers() -> None:
    """Their initial maps on the same projection: biases of zero, and scales of one."""
    settings = "{name: hyper_connections, start: zeros, scale: 1.0}"
    model = build(tiny.compose(f"model.residual={settings}", "precision.name=fp32"))
    own: Any = model.blocks[0].ffn_residual
    assert not own.base.any()
    assert torch.equal(own.scale, torch.ones(3))
