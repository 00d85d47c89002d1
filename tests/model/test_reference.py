"""The whole model against `tests/reference.py` in fp64: logits, every loss term, loads and all gradients."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from reference import Outcome, Reference
from torch import Tensor

from core.contracts.context import SequenceContext

from . import tiny

LENGTH = 7
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3, 4, 4]])
VALID = torch.tensor([[True] * 7, [False, True, True, False, True, True, False]])
PADDED_DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4, 4, 4]])
WIDE = (
    f"{tiny.FFN}.experts=12",
    f"{tiny.ROUTER}.groups=3",
    f"{tiny.ROUTER}.group_limit=2",
    f"{tiny.ROUTER}.top_k=4",
    f"{tiny.FFN}.shared_experts=0",
)
YARN = "model.rope.yarn={factor: 8, original_length: 16, beta_fast: 4, mscale: 0.7, mscale_all_dim: 1.3}"
ROPE = ("model.rope.max_length=128", "model.attention.rope_dim=8")


@dataclass(frozen=True)
class Case:
    """One model and one batch."""

    overrides: tuple[str, ...] = ()
    valid: Tensor | None = None
    documents: Tensor | None = None

    def context(self) -> SequenceContext:
        return tiny.context(2, LENGTH, valid_BL=self.valid, documents_BM=self.documents)


CASES = {
    "plain": Case(),
    "padding": Case(valid=VALID),
    "documents": Case(documents=DOCUMENTS),
    "documents and padding": Case(valid=VALID, documents=PADDED_DOCUMENTS),
    "no query latent, three groups of four": Case(
        overrides=("model.attention.q_rank=null", "model.attention.value_dim=14", *WIDE),
        valid=VALID,
    ),
    "yarn, one group": Case(
        overrides=(*ROPE, YARN, f"{tiny.ROUTER}.groups=1", f"{tiny.ROUTER}.group_limit=null")
    ),
}


@dataclass(frozen=True)
class Pair:
    """What the model gave and what the reference gives, with both gradients."""

    logits: Tensor
    seen: tiny.Observed
    gradients: dict[str, Tensor]
    expected: Outcome
    expected_gradients: dict[str, Tensor]


@cache
def both(name: str) -> Pair:
    """Runs a case once for all tests."""
    case = CASES[name]
    model, given = tiny.build(*tiny.MTP, *case.overrides), case.context()
    logits = model.output(model.hidden(given)[0]).detach()
    seen = tiny.see(model, given)
    own = tiny.backward(model, seen.total())
    reference = Reference(model.state_dict(), tiny.settings(tiny.compose(*case.overrides)))
    expected = reference.run(tiny.lines(given))
    tiny.weighted(
        {term: total / max(count, 1) for term, (total, count) in _all(expected).items()}
    ).backward()
    leaves = {n: w for n, w in reference.weights.items() if w.requires_grad}
    theirs = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in leaves.items()}
    return Pair(logits, seen, own, expected, theirs)


def _all(outcome: Outcome) -> dict[str, tuple[Tensor, int]]:
    return outcome.terms | {f"balance/{path}": value for path, value in outcome.balance.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    pair = both(case)
    expected = torch.stack([torch.stack(line) for line in pair.expected.logits]).detach()
    torch.testing.assert_close(pair.logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_loss_terms_and_their_counts(case: str) -> None:
    """A12 with padding and documents, eq. 17-20 per sequence or document, eq. 24: every sum to 1e-10."""
    pair, expected = both(case), _all(both(case).expected)
    assert pair.seen.terms.keys() == expected.keys()
    assert len(expected) == 3 + 4
    for name, (total, count) in expected.items():
        term = pair.seen.terms[name]
        assert term.sum.item() == pytest.approx(total.item(), rel=1e-10), name
        assert int(term.count) == count, name


@pytest.mark.parametrize("case", CASES)
def test_loads(case: str) -> None:
    """P1, P6: int64 counts of valid tokens, in the multi-token modules too."""
    pair = both(case)
    assert {
        path: load_E.tolist() for path, load_E in pair.seen.loads.items()
    } == pair.expected.loads
    assert all(load_E.dtype == torch.int64 for load_E in pair.seen.loads.values())


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """Every parameter's gradient of all terms together, to 1e-9 of its largest element."""
    pair = both(case)
    tiny.assert_close(pair.gradients, pair.expected_gradients, 1e-9)
    assert sum(bool(g.any()) for g in pair.gradients.values()) > 0.9 * len(pair.gradients)


def test_model_logits_are_those_of_the_hidden_states() -> None:
    """`logits(tokens)` is the case without documents, in training and in evaluation."""
    model, given = tiny.build(*tiny.MTP), CASES["plain"].context()
    torch.testing.assert_close(model.logits(given.tokens_BL), both("plain").logits, rtol=0, atol=0)
    torch.testing.assert_close(
        model.eval().logits(given.tokens_BL), both("plain").logits, rtol=0, atol=0
    )


def test_cases_exercise_what_they_name() -> None:
    """The reference's own guard: groups and biases change choices, and some experts stay empty."""
    given = CASES["plain"].context()
    settings = tiny.settings(tiny.compose())
    state = tiny.build(*tiny.MTP).state_dict()
    unbiased = {
        name: torch.zeros_like(w) if name.endswith(".bias") else w for name, w in state.items()
    }
    ungrouped = Reference(
        state, settings.__class__(**{**vars(settings), "groups": 1, "group_limit": 1})
    )
    loads = Reference(state, settings).run(tiny.lines(given)).loads
    assert Reference(unbiased, settings).run(tiny.lines(given)).loads != loads
    assert ungrouped.run(tiny.lines(given)).loads != loads
    assert any(0 in load for load in loads.values())
