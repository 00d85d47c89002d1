"""The ledger of loss terms, a window's denominators, and layers' and balancers' own losses and counts (P2, P4, P9)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import pytest
import torch
from lab import MOE, Lab
from own_parts import BINS, RESIDUES
from test_guard import Poison
from test_window import FP64, assert_close, cut, padded
from tiers import first_by_default
from torch import Tensor

from core.analysis.budget import plan_of
from core.analysis.describe import coefficients
from core.assemble import build
from core.contracts.context import SequenceContext
from core.contracts.record import StepTotals
from core.contracts.schedule import Progress
from core.data.batch import Batch
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.model.ledger import BalanceTerm, HeadTerm, LayerTerm, Ledger
from core.training.totals import WindowTotals, call_on_step_end
from core.training.validation import ValidationTotals
from core.training.window import Window, objective

START = Progress(step=1, tokens=32, total_steps=100, total_tokens=3200)
BALANCE = "model.blocks.moe.ffn.balance"
DEPTHS = ("heads.mtp.depths.0.block", "heads.mtp.depths.1.block")
DEEP = (*FP64, "model.heads.mtp={name: mtp, depth: 2, weight: 0.3}")
COEFFICIENTS = {"attention": 0.7, "ffn": 0.4}
OWN = (
    *FP64,
    "plugins=[own_parts]",
    "model.attention={name: watched, heads: 4, alpha: 0.7}",
    "model.blocks.dense.ffn={name: watched, hidden: 48, alpha: 0.4}",
    f"{BALANCE}=[{{name: bias, rate: 0.01}}, {{name: histogram}}, {{name: sequence, alpha: 0.01}}]",
)
WITHOUT = ("model.attention.alpha=0.0", "model.blocks.dense.ffn.alpha=0.0")
WATCHED = [
    ("blocks.0", "attention"),
    ("blocks.0", "ffn"),
    ("blocks.1", "attention"),
    (MOE[1], "attention"),
]
"""The small model's layers with something of their own; the last is of the first depth of multi-token prediction."""

LENGTHS = [16, 3, 9, 0, 1, 12, 5, 16]
SPLITS = [(8,), (4, 4), (2, 2, 2, 2)]


# ---- what the ledger lists


def listed(model: LanguageModel) -> list[tuple[type, str, str | None, float, str]]:
    """Every term's kind, label, layer, coefficient and scope, in the ledger's order."""
    return [(type(t), t.label, t.layer, t.coefficient(START), t.scope) for t in Ledger.of(model)]


def test_the_ledger_lists_heads_then_balancers_by_layer(lab: Lab) -> None:
    balance = "[{name: bias, rate: 0.01}, {name: sequence, alpha: 0.02}, {name: batch, alpha: 0.04}, {name: z_loss}]"
    model = build(lab.recipe(*DEEP, f"{BALANCE}={balance}", "model.blocks.moe.count=2"))
    expected: list[tuple[type, str, str | None, float, str]] = [
        (HeadTerm, "next_token", None, 1.0, "token"),
        (HeadTerm, "mtp/depth_1", None, 0.15, "token"),
        (HeadTerm, "mtp/depth_2", None, 0.15, "token"),
    ]
    for layer in ("blocks.1", "blocks.2", "heads.mtp.depths.0.block", "heads.mtp.depths.1.block"):
        expected += [
            (BalanceTerm, "balance/bias", layer, 0.0, "none"),
            (BalanceTerm, "balance/sequence", layer, 0.02, "sequence"),
            (BalanceTerm, "balance/batch", layer, 0.04, "batch"),
            (BalanceTerm, "balance/z_loss", layer, 0.001, "token"),
        ]
    assert listed(model) == expected


def test_what_layers_have_of_their_own_comes_last(lab: Lab) -> None:
    """Tries attentions and a dense layer, the head's own block included; `describe` reports their coefficients too."""
    model = build(lab.recipe(*OWN))
    expected: list[tuple[type, str, str | None, float, str]] = [
        (HeadTerm, "next_token", None, 1.0, "token"),
        (HeadTerm, "mtp/depth_1", None, 0.3, "token"),
    ]
    for layer in ("blocks.1", "heads.mtp.depths.0.block"):
        expected += [
            (BalanceTerm, "balance/bias", layer, 0.0, "none"),
            (BalanceTerm, "balance/histogram", layer, 0.0, "none"),
            (BalanceTerm, "balance/sequence", layer, 0.01, "sequence"),
        ]
    expected += [
        (LayerTerm, "attention/energy", "blocks.0", 0.7, "token"),
        (LayerTerm, "ffn/energy", "blocks.0", 0.4, "token"),
        (LayerTerm, "attention/energy", "blocks.1", 0.7, "token"),
        (LayerTerm, "attention/energy", "heads.mtp.depths.0.block", 0.7, "token"),
    ]
    assert listed(model) == expected
    reported = coefficients(model, plan_of(lab.recipe(*OWN)))
    assert {name: ends for name, ends in reported.items() if "energy" in name} == {
        f"{path} {part}/energy": {"first": COEFFICIENTS[part], "last": COEFFICIENTS[part]}
        for path, part in WATCHED
    }


def test_the_ledger_is_the_same_on_the_meta_device(lab: Lab) -> None:
    recipe = lab.recipe(*OWN)
    assert listed(build(recipe, device="meta")) == listed(build(recipe))


# ---- denominators


def context_of(batch: Batch, *, documents: bool = False) -> SequenceContext:
    """The context that the training step makes from a batch."""
    return SequenceContext.of(
        batch.tokens_BL,
        targets_BL=batch.targets_BL,
        valid_BL=batch.valid_BL,
        documents_BM=batch.documents_BM if documents else None,
    )


def by_hand(contexts: Sequence[SequenceContext]) -> dict[tuple[str, str | None], int]:
    """Every denominator of a window, one token at a time: main block, and both depths' blocks."""
    found: dict[tuple[str, str | None], int] = defaultdict(int)
    for context in contexts:
        reached = set()
        for row, valid in enumerate(context.valid().tolist()):
            length = len(valid)
            documents = (
                [0] * (length + 1)
                if context.documents_BM is None
                else context.documents_BM[row].tolist()
            )
            predicted = sum(valid[i] and documents[i] == documents[i + 1] for i in range(length))
            for name in ("next_token", "mtp/depth_1", "mtp/depth_2"):
                found[name, None] += predicted
            for k, path in enumerate(("blocks.1", *DEPTHS)):
                rows = list(range(length - k))
                if k == 0:
                    seen = [i for i in rows if valid[i]]
                else:
                    seen = [
                        i
                        for i in rows
                        if valid[i] and valid[i + k] and documents[i] == documents[i + k + 1]
                    ]
                found["balance/sequence", path] += len({documents[i] for i in seen})
                found["balance/z_loss", path] += len(seen)
                reached |= {path} if seen else set()
        for path in ("blocks.1", *DEPTHS):
            found["balance/micro_batch", path] += path in reached
            found["balance/batch", path] |= path in reached
    return found


def documents_within(batch: Batch) -> Batch:
    """The same sequences with a new document after every fifth token."""
    places_M = torch.arange(batch.documents_BM.shape[1]) // 5
    return batch._replace(documents_BM=100 * batch.documents_BM + places_M)


@pytest.mark.parametrize("lengths", [([16, 3, 1], [0, 9, 2]), ([16, 2], [0, 0]), ([1, 0], [2, 1])])
@pytest.mark.parametrize("documents", [False, True])
def test_P9_the_counts_of_a_window_are_those_of_a_slow_loop(
    lab: Lab, lengths: tuple[list[int], list[int]], documents: bool
) -> None:
    """Tries two micro-batches with unequal padding and balancers of every scope, in the model and both depths."""
    balance = "[{name: bias}, {name: sequence}, {name: z_loss}, {name: batch}, {name: micro_batch}]"
    model = build(lab.recipe(*DEEP, f"{BALANCE}={balance}"))
    batches = [documents_within(padded(rows, seed)) for seed, rows in enumerate(lengths)]
    contexts = [context_of(batch, documents=documents) for batch in batches]
    window = Window.of(model, Ledger.of(model), contexts)
    counts = {(term.label, term.layer): count for term, count in window.counts.items()}
    assert {key: int(count) for key, count in counts.items()} == by_hand(contexts)
    assert all(count.dtype == torch.int64 for count in counts.values())
    assert len(counts) == 3 + 3 * 4
    assert window.micro_batches == 2
    assert [(term.label, term.layer) for term in window.whole] == [
        ("balance/batch", path) for path in ("blocks.1", *DEPTHS)
    ]


# ---- layers with a loss, a tally and metrics of their own


@dataclass(frozen=True)
class Stepped:
    """The result of one step: the objective, gradients, and the totals that each component was handed."""

    objective: float
    gradients: dict[str, Tensor]
    layers: dict[tuple[str, str], StepTotals]
    balancer: dict[str, StepTotals]
    totals: WindowTotals


def step(model: LanguageModel, sizes: Sequence[int] = (8,), *, recompute: bool = False) -> Stepped:
    """One step over the same eight sequences, as the training step makes it."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
    contexts = [context_of(batch) for batch in cut(padded(LENGTHS), sizes)]
    ledger, totals = Ledger.of(model), WindowTotals()
    window, value = Window.of(model, ledger, contexts), 0.0
    model.zero_grad()
    for context in contexts:
        loss = objective(model, ledger, model(context), window, START, totals)
        loss.backward()
        value += loss.item()
    totals = totals.over_ranks()
    owners = [*watched(model).values(), *(histogram(model, path) for path in MOE)]
    assert not any(owner.ended for owner in owners)
    call_on_step_end(model, totals, START)
    assert all(len(owner.ended) == 1 for owner in owners)
    assert all(progress is START for owner in owners for _, progress in owner.ended)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Stepped(
        value,
        gradients,
        {place: layer.ended[0][0] for place, layer in watched(model).items()},
        {path: histogram(model, path).ended[0][0] for path in MOE},
        totals,
    )


def watched(model: LanguageModel) -> dict[tuple[str, str], Any]:
    """The layers with a loss and tallies of their own, by the path of their block and their name in it."""
    return {(path, part): model.get_submodule(f"{path}.{part}") for path, part in WATCHED}


def histogram(model: LanguageModel, path: str) -> Any:
    """The balancer that has a tally."""
    return model.get_submodule(f"{path}.ffn").balancers[1]  # type: ignore[union-attr,index]


def seen_tokens(batch: Batch, path: str) -> list[list[int | None]]:
    """The rows that a block sees, as tokens and None for padding; read one token at a time."""
    k = 1 if path.startswith("heads.") else 0
    rows = []
    for tokens, valid in zip(batch.tokens_BL.tolist(), batch.valid_BL.tolist(), strict=True):
        length = len(tokens) - k
        rows.append([tokens[i + k] if valid[i] and valid[i + k] else None for i in range(length)])
    return rows


def given_by(model: LanguageModel) -> dict[tuple[str, str], list[Tensor]]:
    """Every watched layer's output for each valid token of the eight sequences, in one forward, with its graph."""
    outputs: dict[tuple[str, str], Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, place=place: outputs.update({place: output[0]})
        )
        for place, module in watched(model).items()
    ]
    batch = padded(LENGTHS)
    model(context_of(batch))
    for hook in hooks:
        hook.remove()
    found: dict[tuple[str, str], list[Tensor]] = {}
    for place, y_BLD in outputs.items():
        for row, tokens in enumerate(seen_tokens(batch, place[0])):
            found.setdefault(place, []).extend(
                y_BLD[row, i] for i, token in enumerate(tokens) if token is not None
            )
    return found


def energies(model: LanguageModel) -> dict[tuple[str, str], Tensor]:
    """The layers' losses, computed from their outputs: alpha x mean over the tokens of each."""
    return {
        (path, part): COEFFICIENTS[part] * torch.stack([(y_D * y_D).mean() for y_D in rows]).mean()
        for (path, part), rows in given_by(model).items()
    }


@pytest.mark.parametrize("sizes", first_by_default(SPLITS, keep=2))
def test_P9_a_layers_own_loss_is_in_the_objective_over_the_windows_count(
    lab: Lab, sizes: tuple[int, ...]
) -> None:
    """The objective and every gradient differ from those with a coefficient of 0 by exactly that loss."""
    with_loss = step(build(lab.recipe(*OWN)), sizes)
    without = step(build(lab.recipe(*OWN, *WITHOUT)), sizes)
    model = build(lab.recipe(*OWN))
    expected = torch.stack(list(energies(model).values())).sum()
    expected.backward()
    assert with_loss.objective - without.objective == pytest.approx(expected.item(), rel=1e-9)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for path, part in WATCHED:
        assert any(
            g.abs().max() > 1e-4 for name, g in own.items() if name.startswith(f"{path}.{part}.")
        )
    for name, gradient in with_loss.gradients.items():
        difference = gradient - without.gradients[name]
        torch.testing.assert_close(
            difference, own.get(name, torch.zeros_like(gradient)), rtol=1e-8, atol=1e-11
        )


@pytest.mark.parametrize("recompute", first_by_default([True, False]))
@pytest.mark.parametrize("sizes", first_by_default(SPLITS, keep=2))
def test_P9_its_gradient_does_not_depend_on_splits_or_recomputation(
    lab: Lab, sizes: tuple[int, ...], recompute: bool
) -> None:
    expected, found = (
        step(build(lab.recipe(*OWN))),
        step(build(lab.recipe(*OWN)), sizes, recompute=recompute),
    )
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    assert_close(found.gradients, expected.gradients)
    if recompute:
        plain = step(build(lab.recipe(*OWN)), sizes)
        assert all(
            torch.equal(gradient, plain.gradients[name])
            for name, gradient in found.gradients.items()
        )


@pytest.mark.parametrize("recompute", first_by_default([True, False]))
@pytest.mark.parametrize("sizes", first_by_default(SPLITS, keep=2))
def test_P2_its_tally_and_metrics_arrive_as_totals_of_the_window_once(
    lab: Lab, sizes: tuple[int, ...], recompute: bool
) -> None:
    """Compares with loops over tokens and over the attentions' outputs; a recomputed forward counts nothing twice."""
    found = step(build(lab.recipe(*OWN)), sizes, recompute=recompute)
    outputs, batch = given_by(build(lab.recipe(*OWN))), padded(LENGTHS)
    for (path, part), totals in found.layers.items():
        residues = [0] * RESIDUES
        for token in (
            token for row in seen_tokens(batch, path) for token in row if token is not None
        ):
            residues[token % RESIDUES] += 1
        assert totals.load_E is None
        assert set(totals.tallies) == {"residues"}
        assert totals.tallies["residues"].dtype == torch.int64
        assert totals.tallies["residues"].tolist() == residues
        sizes_T = [float(y_D.detach().abs().max()) for y_D in outputs[path, part]]
        assert set(totals.metrics) == {"size", "largest"}
        size, largest = totals.metrics["size"], totals.metrics["largest"]
        assert int(size.count) == len(sizes_T) == sum(residues)
        assert float(size.sum) == pytest.approx(sum(sizes_T), rel=1e-12)
        assert float(size.value()) == pytest.approx(sum(sizes_T) / len(sizes_T), rel=1e-12)
        assert float(largest.value()) == pytest.approx(max(sizes_T), rel=1e-12)
        assert not size.sum.requires_grad
        assert not largest.maximum.requires_grad


@pytest.mark.parametrize("sizes", [(8,), (6, 2)])
def test_validation_reports_the_metrics_of_layers_over_the_whole_split(
    lab: Lab, sizes: tuple[int, ...]
) -> None:
    """Compares with a loop over the layers' outputs for every token, for several sizes of batches."""
    model = build(lab.recipe(*OWN))
    validation = ValidationTotals(model, Ledger.of(model), 100)
    with torch.no_grad():
        for batch in cut(padded(LENGTHS), sizes):
            validation.update(model(context_of(batch)), context_of(batch))
        outputs = given_by(model)
    values = validation.compute()
    for kind in ("attention", "ffn"):
        largest = [
            float(y_D.abs().max())
            for (_, part), rows in outputs.items()
            if part == kind
            for y_D in rows
        ]
        assert values[f"val/{kind}/size"] == pytest.approx(sum(largest) / len(largest), rel=1e-12)
        assert values[f"val/{kind}/largest"] == pytest.approx(max(largest), rel=1e-12)


def test_a_training_step_hands_it_over_and_logs_it(lab: Lab) -> None:
    """Trains two steps of two micro-batches and validates, which ends no step; the log has what was handed over."""
    module = lab.train(*OWN, "budget.steps=2")
    assert module.validated
    values = {name: float(value) for name, value in module.step_values.items()}
    ended = {place: layer.ended for place, layer in watched(module.model).items()}
    positions = [module.plan.progress(step) for step in range(2)]
    assert all([progress for _, progress in steps] == positions for steps in ended.values())
    # micro-batches x sequences x tokens
    tokens = {path: 2 * 4 * 16 for path, _ in WATCHED} | {MOE[1]: 2 * 4 * 15}
    for (path, part), steps in ended.items():
        assert [int(totals.tallies["residues"].sum()) for totals, _ in steps] == [tokens[path]] * 2
        counted = steps[0][0].tallies["residues"] + steps[1][0].tallies["residues"]
        assert torch.equal(watched(module.model)[path, part].residues_R, counted)
    for kind, layers in (("attention", 3), ("ffn", 1)):
        last = [steps[-1][0].metrics for (_, part), steps in ended.items() if part == kind]
        assert len(last) == layers
        total, count = (
            sum(float(m["size"].sum) for m in last),
            sum(int(m["size"].count) for m in last),
        )
        assert count == sum(tokens[path] for path, part in WATCHED if part == kind)
        assert values[f"{kind}/size"] == pytest.approx(total / count, rel=1e-12)
        assert values[f"{kind}/largest"] == max(float(m["largest"].maximum) for m in last)
        assert values[f"loss/{kind}/energy"] > 0
        assert module.validated[f"val/{kind}/largest"] >= module.validated[f"val/{kind}/size"] > 0
    heads = values["loss/next_token"] + 0.3 * values["loss/mtp/depth_1"]
    own = 3 * values["loss/attention/energy"] + values["loss/ffn/energy"]
    balance = len(MOE) * values["loss/balance/sequence"]
    assert values["loss/total"] == pytest.approx(heads + balance + own, rel=1e-12)
    for path in MOE:
        (one, _), (two, _) = histogram(module.model, path).ended
        assert torch.equal(two.load_E, module.step_load[path])
        assert int(two.tallies["affinities_EN"].sum()) == tokens[path] * 8
        counted = one.tallies["affinities_EN"] + two.tallies["affinities_EN"]
        assert torch.equal(histogram(module.model, path).counted_EN, counted)


def test_the_logged_loss_of_layers_is_the_mean_over_layers_with_its_coefficient(lab: Lab) -> None:
    """Compares the log of the first step with the losses computed by hand over the same window."""
    module = lab.train(*OWN, windows=[cut(padded(LENGTHS), (2, 6))])
    expected = energies(build(lab.recipe(*OWN)))
    for kind in ("attention", "ffn"):
        values = [float(value.detach()) for (_, part), value in expected.items() if part == kind]
        assert float(module.step_values[f"loss/{kind}/energy"]) == pytest.approx(
            sum(values) / len(values), rel=1e-9
        )


def test_P4_a_skipped_step_hands_nothing_over(lab: Lab) -> None:
    kept: list[int] = []

    class Ended(L.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            owners = [
                *watched(pl_module.model).values(),
                *(histogram(pl_module.model, path) for path in MOE),
            ]
            (times,) = {len(owner.ended) for owner in owners}
            kept.append(times)

    lab.train(*OWN, "budget.steps=3", callbacks=[Poison({1}, float("nan")), Ended()])
    assert kept == [1, 1, 2]


# ---- a balancer with a tally


@pytest.fixture(scope="module")
def affinities(lab: Lab) -> dict[str, list[list[int]]]:
    """The number of valid tokens' affinities in each bin of each layer's experts, counted one token at a time."""
    model, batch, found = build(lab.recipe(*OWN)), padded(LENGTHS), {}
    for path in MOE:
        router = model.get_submodule(f"{path}.ffn.router")
        router.register_forward_hook(
            lambda _, __, routing, path=path: found.update({path: routing.scores_TE})
        )
    with torch.no_grad():
        model(context_of(batch))
    counted = {}
    for path, scores_TE in found.items():
        rows = [[0] * BINS for _ in range(8)]
        tokens = [token for row in seen_tokens(batch, path) for token in row]
        for token, scores in zip(tokens, scores_TE.tolist(), strict=True):
            for expert, score in enumerate(scores if token is not None else ()):
                rows[expert][min(int(score * BINS), BINS - 1)] += 1
        counted[path] = rows
    return counted


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", first_by_default(SPLITS, keep=2))
def test_P2_a_balancers_tally_is_the_same_integers_however_a_window_is_read(
    lab: Lab, affinities: dict[str, list[list[int]]], sizes: tuple[int, ...], recompute: bool
) -> None:
    found = step(build(lab.recipe(*OWN)), sizes, recompute=recompute)
    for path, totals in found.balancer.items():
        assert set(totals.tallies) == {"affinities_EN"}
        assert totals.tallies["affinities_EN"].dtype == torch.int64
        assert totals.tallies["affinities_EN"].tolist() == affinities[path]
        assert torch.equal(totals.load_E, found.totals.loads[path])
        assert not totals.metrics
    assert sum(map(sum, affinities[MOE[0]])) == 8 * sum(LENGTHS)


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_P1_tallies_must_be_int64(lab: Lab, dtype: str) -> None:
    model = build(lab.recipe(*OWN, f"{BALANCE}.1.dtype={dtype}"))
    with pytest.raises(
        TypeError, match=f"the tally 'affinities_EN' is torch.{dtype}; tallies are int64"
    ):
        step(model)


def test_P1_a_layers_tallies_must_be_int64(lab: Lab) -> None:
    model = build(lab.recipe(*OWN))
    losses = model(context_of(padded(LENGTHS)))
    record = losses.records["blocks.0"]["attention"]
    wrong = replace(record, tallies={"residues": record.tallies["residues"].double()})
    losses.records["blocks.0"]["attention"] = wrong
    with pytest.raises(
        TypeError, match=r"the tally 'residues' is torch.float64; tallies are int64"
    ):
        WindowTotals().add_records(losses)
