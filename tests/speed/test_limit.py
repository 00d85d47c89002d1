"""The limit counts the matrix products of the real step: their FLOPs are those that torch counts in it."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.analysis.budget import plan_of
from core.speed.batches import step_batches
from core.speed.limit import Limit
from core.speed.our_steps import OurSteps
from core.speed.product_shapes import AttentionShape, ExpertsShape, ProductShape, product_shapes
from core.speed.shapes import QUICK, Shape, comparable

CPU = torch.device("cpu")


@pytest.fixture(params=[(), ("batch.accumulate=2", "model.tied_embedding=true")])
def ours(request: pytest.FixtureRequest) -> OurSteps:
    """Steps of the tiny model; with two micro-batches and one weight for both ends, too."""
    shape = Shape("quick", QUICK.recipe, (*QUICK.overrides, *request.param))
    recipe = comparable(shape).recipe
    steps = OurSteps(recipe, step_batches(recipe, CPU), CPU, plan_of(recipe))
    steps.recipe = recipe  # type: ignore[attr-defined]
    return steps


def counted(steps: OurSteps) -> tuple[int, int]:
    """FLOPs of a forward and backward by torch's counter: of attention by plain products, and of all other products.

    Outside attention torch counts the sum over a token's experts as batched products; it is none with a weight.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, depth=9) as counter:
        steps.backward()
    attention = 0
    for path, counts in counter.get_flop_counts().items():
        if path.endswith(".attention"):
            attention += sum(count for op, count in counts.items() if "bmm" in str(op))
    whole = counter.get_flop_counts()["Global"]
    return attention, sum(count for op, count in whole.items() if "bmm" not in str(op))


def test_flops_of_the_limit_are_those_of_the_step(ours: OurSteps) -> None:
    """The kernel forms scores and outputs of the causal half; plain products form all of them."""
    attention, others = counted(ours)
    recipe = ours.recipe  # type: ignore[attr-defined]
    shapes = product_shapes(recipe, ours.loads)
    in_attention = sum(shape.flops for shape in shapes if isinstance(shape, AttentionShape))
    assert 2 * in_attention == attention > 0
    assert sum(shape.flops for shape in shapes) - in_attention == others


def test_the_limit_computes_the_products_that_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts one by one, whose products torch counts; an expert without rows has none."""

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(F, "grouped_mm", missing)
    attention = AttentionShape(2, 8, 4, 2, 12, 8, torch.float32)
    experts = ExpertsShape((3, 0, 5), 8, 16, torch.float32)
    shapes: list[ProductShape] = [experts, attention]
    limit = Limit(shapes, CPU)
    assert limit.ways == {"grouped": 0, "one by one": 3}
    with FlopCounterMode(display=False) as counter:
        limit.run()
    products = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert products.pop("aten.mm") == experts.flops == 6 * 8 * 8 * 16
    assert limit.flops == experts.flops + attention.flops


def test_the_products_of_grouped_experts_are_those_of_the_loop() -> None:
    """Both ways are given the same operands, and give the same numbers."""
    from core.speed import limit as module

    shape = ExpertsShape((3, 0, 5), 8, 16, torch.float32)
    x_AI, w_EOI, dy_AO = module.expert_operands(shape, CPU)
    forward, inputs, weights = (work() for work in module.grouped((x_AI, w_EOI, dy_AO), shape))
    begin = 0
    for expert, load in enumerate(shape.loads):
        rows = slice(begin, begin + load)
        torch.testing.assert_close(forward[rows], x_AI[rows] @ w_EOI[expert].T)
        torch.testing.assert_close(inputs[rows], dy_AO[rows] @ w_EOI[expert])
        torch.testing.assert_close(weights[expert], dy_AO[rows].T @ x_AI[rows])
        begin += load
