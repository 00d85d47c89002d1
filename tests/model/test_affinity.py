"""Affinities: values and gradients over the whole range of logits, and balance losses that divide by their sum."""

import math

import pytest
import routing_reference as reference
import torch
from torch import Tensor

from core.contracts.router import Routing
from core.routing.affinity import affinities, chosen_gates, sqrt_softplus
from core.testing import bench
from plugins.share_balance.balancer import SequenceLoss
from plugins.z_loss.balancer import ZLoss

LOGITS = [*range(-100, 101, 4), -40.0, -40.000001, -39.999999, 40.0, 40.000001, 1e-9, 1e4]


def exact(x: float) -> tuple[float, float]:
    """sqrt(log(1 + exp(x))) and its derivative in fp64, from the logarithm where the number itself would be rounded."""
    if x < -30:  # log(1 + z) is z - z^2 / 2 + ...; z is below 1e-13
        value = math.exp(x / 2) * (1 - math.exp(x) / 4)
        return value, value / 2 * (1 - math.exp(x) / 2)
    softplus = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
    value = math.sqrt(softplus)
    sigmoid = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    return value, sigmoid / (2 * value)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"]
)
def test_the_root_of_the_softplus_is_exact_with_its_gradient(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Relative to the value itself, which is 1.9e-22 at -100, where the softplus has almost no digit in fp32."""
    x = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    value = sqrt_softplus(x)
    value.sum().backward()
    expected = [exact(number) for number in x.tolist()]
    assert x.grad is not None
    assert value.tolist() == pytest.approx([one for one, _ in expected], rel=tolerance, abs=0)
    assert x.grad.tolist() == pytest.approx([slope for _, slope in expected], rel=tolerance, abs=0)


def test_no_logit_has_a_gradient_that_is_not_finite() -> None:
    """Where the affinity itself is too small for the format, its gradient is 0; a NaN stays one."""
    x = torch.tensor([-1e30, -1e4, -250.0, -180.0, 0.0, 1e4, 1e30], requires_grad=True)
    value = sqrt_softplus(x)
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert value[0] == 0 == x.grad[0]
    assert sqrt_softplus(torch.tensor(math.nan)).isnan()


def test_the_gradient_is_that_of_differences() -> None:
    x = torch.linspace(-60, 60, 25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sqrt_softplus, (x,), eps=1e-5)


def test_gates_of_far_logits_are_still_shares_of_the_scale() -> None:
    """Down to -80 for all experts of a token, in fp32; below it the 1e-20 of the released code takes a part."""
    for far in (-80.0, -30.0, 0.0, 100.0):
        logits_TE = (torch.tensor([[0.0, 1.0, 2.0, -1.0]]) + far).requires_grad_()
        scores_TE = affinities(logits_TE, "sqrt_softplus")
        gate_TK = chosen_gates(scores_TE, torch.tensor([[2, 0]]), scale=1.5)
        assert float(gate_TK.detach().sum()) == pytest.approx(1.5, rel=1e-2)
        gate_TK[0, 0].backward()
        assert logits_TE.grad is not None
        assert logits_TE.grad.isfinite().all()
        assert logits_TE.grad[0, 0] < 0 < logits_TE.grad[0, 2]


@pytest.mark.parametrize("kind", list(reference.AFFINITIES))
def test_the_share_of_an_affinity_is_a_share_whatever_its_range(kind: str) -> None:
    """The sequence-wise loss and its gradient are the reference's, which divides affinities by their sum."""
    draw = torch.Generator().manual_seed(0)
    logits_TE = 3 * torch.randn(8, 6, dtype=torch.float64, generator=draw)
    loss = _made(SequenceLoss)
    own = logits_TE.clone().requires_grad_()
    value = loss.loss(loss.observe(_routing(own, kind), bench.tokens(1, 8)))
    value.backward()
    plain = logits_TE.clone().requires_grad_()
    expected = reference.share_loss([reference.AFFINITIES[kind](row) for row in plain], 2)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-11, atol=1e-13)


def test_even_choices_have_a_loss_of_one_for_affinities_above_one() -> None:
    """Each of 6 experts is the best of one token; all others have equal affinities."""
    logits_TE = 50 + 0 * torch.eye(6, dtype=torch.float64)
    logits_TE = logits_TE + 1e-3 * (torch.eye(6) + torch.eye(6).roll(1, 0))
    loss = _made(SequenceLoss)
    value = loss.loss(loss.observe(_routing(logits_TE, "sqrt_softplus"), bench.tokens(1, 6)))
    assert float(value) == pytest.approx(1, rel=1e-12)


def test_the_z_loss_reads_logits_and_no_affinity() -> None:
    logits_TE = torch.linspace(-9, 9, 12, dtype=torch.float64).view(2, 6)
    context = bench.tokens(1, 2)
    found = [
        float(_made(ZLoss).observe(_routing(logits_TE, kind), context)["squared"])
        for kind in reference.AFFINITIES
    ]
    assert found == [pytest.approx(float(reference.z_loss(list(logits_TE))), rel=1e-12)] * 3


def _made(cls: type) -> SequenceLoss:
    """A balancer of two out of six experts."""
    build = bench.build_context(bench.KitPrecision(torch.float64))
    made: SequenceLoss = cls(cls.Config(), build, experts=6, top_k=2)  # type: ignore[attr-defined]
    return made


def _routing(logits_TE: Tensor, kind: str) -> Routing:
    scores_TE = affinities(logits_TE, kind)  # type: ignore[arg-type]
    expert_TK = scores_TE.detach().topk(2, dim=1).indices
    return Routing.top_k(expert_TK, chosen_gates(scores_TE, expert_TK), scores_TE, logits_TE)
