"""Whole models under every precision: one set of names, one set of masters, the same bits however they are run."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from saved_tensors import saved_bytes
from tiers import first_by_default
from torch import Tensor

import core
from core.contracts.component import Environment
from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger

from .layers import REGISTRY

RECOMPUTED = "recompute.blocks=[dense, moe]"
MEASURED = {
    "fp32": "{name: fp32}",
    "te": "{name: fp8_emulated, weight_gradient: te}",
    "paper": "{name: fp8_emulated}",
}


def names() -> Iterator[str]:
    """Every precision that can be used on this machine."""
    for name in REGISTRY.names("precision"):
        component, _ = REGISTRY.find("precision", name).load()
        if component.requires(component.Config(), Environment("cpu")) is None:
            yield name


HERE = sorted(names())


def model(lab: Lab, precision: str, *overrides: str) -> LanguageModel:
    return core.build(lab.recipe(f"precision={precision}", *overrides))


def context(batch: int = 4, length: int = 16) -> SequenceContext:
    tokens_BM = torch.randint(300, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return SequenceContext.of(tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:])


def backward(of: LanguageModel, given: SequenceContext) -> dict[str, Tensor]:
    """The loss and every gradient."""
    of.zero_grad()
    losses, terms = of(given), Ledger.of(of).heads
    total = torch.stack([term.sum_in(losses) / term.count(given, {}) for term in terms]).sum()
    total.backward()
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    return {"loss": total.detach(), **found}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []


def test_the_precisions_that_are_compared_are_there() -> None:
    assert {"fp32", "fp64", "bf16", "bf16_emulated", "fp8_emulated"} <= set(HERE)


@pytest.mark.parametrize("name", HERE)
def test_names_layout_and_initial_weights_are_those_of_fp32(lab: Lab, name: str) -> None:
    """Keys, order and shapes; masters bit by bit, in fp64 those of fp32."""
    own, plain = (
        model(lab, f"{{name: {name}}}").state_dict(),
        model(lab, "{name: fp32}").state_dict(),
    )
    assert list(own) == list(plain)
    assert_same(
        {k: v.float() if name == "fp64" and v.is_floating_point() else v for k, v in own.items()},
        dict(plain),
    )
    if name != "fp64":
        assert {k: v.dtype for k, v in own.items()} == {k: v.dtype for k, v in plain.items()}


@pytest.mark.parametrize("name", [n for n in HERE if n not in ("fp32", "fp64")])
def test_masters_go_from_precision_to_precision_bit_by_bit(lab: Lab, name: str) -> None:
    """Saved under one, loaded under the other, and back; the products are then those of the other."""
    plain, other = model(lab, "{name: fp32}"), model(lab, f"{{name: {name}}}", "seed=9")
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(dict(other.state_dict()), dict(plain.state_dict()))
    fresh = model(lab, "{name: fp32}", "seed=9")
    fresh.load_state_dict(other.state_dict())
    assert_same(backward(fresh, context()), backward(plain, context()))
    losses = [float(backward(m, context())["loss"]) for m in (plain, other)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.full
def test_a_run_can_begin_with_the_weights_of_one_in_another_precision(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    lab.fit(
        run,
        "precision={name: fp8_emulated}",
        f"initial_weights={finished}",
        "budget.steps=1",
        "optimizer.lr=0.0",
    )
    before, after = core.load(finished).state_dict(), core.load(run).state_dict()
    assert_same(
        {n: v for n, v in before.items() if ".bias" not in n},
        {n: v for n, v in after.items() if ".bias" not in n},
    )


@pytest.mark.parametrize(
    "precision",
    first_by_default(
        [
            "{name: fp8_emulated}",
            "{name: fp8_emulated, scaling: delayed}",
            "{name: bf16_emulated}",
            "{name: fp8_emulated, weight_gradient: te, gradients: e5m2}",
            "{name: fp8_emulated, stream: bf16, scales: ue8m0}",
            "{name: fp8_emulated, scaling: mxfp8}",
            "{name: fp8_emulated, accumulator_bits: 14}",
        ],
        keep=2,
    ),
)
def test_P2_recomputation_changes_no_bit(lab: Lab, precision: str) -> None:
    assert_same(
        *(backward(model(lab, precision, *more), context()) for more in ((), (RECOMPUTED,)))
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "precision", ["{name: fp8_emulated}", "{name: fp8_emulated, scaling: delayed}"]
)
def test_a_block_compiles_as_one_graph_to_the_same_bits(
    lab: Lab, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maxima of delayed scaling, and what ran, included; both with the plain operations that a compiler sees."""
    monkeypatch.setattr("core.numerics.compiling.is_eager_on_cpu", lambda _: False)
    results = []
    for compiled in (False, True):
        whole = model(lab, precision)
        torch._dynamo.reset()
        if compiled:
            whole.blocks[1].compile(backend="aot_eager", fullgraph=True)
        results.append(
            (backward(whole, context()), dict(whole.named_buffers()), whole.kernels_used().table())
        )
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_the_loss_does_not_depend_on_how_rows_are_split() -> None:
    """1x128 tiles belong to one row: a batch gives every row what it gets alone, forward and input gradient.

    A sum of n terms differs between two orders by at most n 2^-23 times the sum of their absolute values.
    """
    from .layers import drawn, precision, through, with_weight

    layer = with_weight(precision().linear(140, 33, "ffn.down", std=0.1))
    x, dy = drawn(40, 140, seed=2), drawn(40, 33, seed=3)
    whole = through(layer, x, dy)
    for row in range(0, 40, 7):
        y, dx, _ = through(layer, x[row : row + 1], dy[row : row + 1])
        most_y = 140 * 2**-23 * (x[row].abs() @ layer.weight.abs().T)
        most_dx = 33 * 2**-23 * (dy[row].abs() @ layer.weight.abs())
        assert bool(((y[0] - whole[0][row]).abs() <= most_y).all())
        assert bool(((dx[0] - whole[1][row]).abs() <= most_dx).all())


# ---- what is saved until the backward pass


def test_fp8_saves_a_quarter_of_every_input_and_e5m6_three_eighths() -> None:
    """Codes, and 4 bytes of scale for 128 of them, instead of 4 bytes each."""
    from .layers import drawn, precision

    x, sizes = drawn(256, 256), {}
    for role, keys in (
        ("ffn.down", {}),
        ("attention.output", {}),
        ("ffn.down", {"weight_gradient": "te"}),
    ):
        layer = precision(**keys).linear(256, 8, role, std=0.1)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        ):
            layer(x.requires_grad_())
        sizes[role, len(keys)] = sum(t.numel() * t.element_size() for t in kept) - (
            8 * 256 + 4 * 2
        )  # the weight's
    assert sizes == {
        ("ffn.down", 0): 256 * 256 + 256 * 2 * 4,
        ("attention.output", 0): 256 * 256 * 3 // 2 + 256 * 2 * 4,
        ("ffn.down", 1): 256 * 256 * 4,
    }


def forward_bytes(whole: LanguageModel) -> int:
    """The bytes that the forward of a batch saves for the backward."""
    return saved_bytes(lambda: whole(context(8, 16)), whole)


def test_a_model_saves_less_under_the_papers_scheme(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention, SwiGLU and norms keep what they keep in fp32; docs/precision.md has the main recipe's figure.

    With the operations of a GPU: a CPU's own functions keep less in fp32.
    """
    monkeypatch.setattr("core.numerics.compiling.is_eager_on_cpu", lambda x: False)
    sizes = {name: forward_bytes(model(lab, precision)) for name, precision in MEASURED.items()}
    assert sizes["paper"] < sizes["fp32"] < sizes["te"]
