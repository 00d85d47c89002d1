"""What must change nothing: later tokens, other documents, padding, how a batch is split, running twice."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel

from . import tiny

LENGTH = 7
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2)
every_attention = pytest.mark.parametrize("name", tiny.ATTENTIONS)


def logits(model: LanguageModel, tokens_BL: Tensor, documents_BM: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        hidden_BLD, _ = model.hidden(SequenceContext.of(tokens_BL, documents_BM=documents_BM))
        result: Tensor = model.output(hidden_BLD)
    return result


def moved(model: LanguageModel, position: int, documents_BM: Tensor | None = None) -> list[int]:
    """The rows whose logits another token at `position` changes."""
    tokens_BL = tiny.context(length=LENGTH).tokens_BL
    other_BL = tokens_BL.clone()
    other_BL[:, position] = (other_BL[:, position] + 1) % tiny.VOCABULARY
    difference = logits(model, other_BL, documents_BM) - logits(model, tokens_BL, documents_BM)
    return (difference.abs().amax(dim=(0, 2)) > 1e-11).nonzero().flatten().tolist()


@every_attention
def test_no_logit_depends_on_a_later_token(name: str) -> None:
    """The whole model, experts and their balance included; each row from j on does depend on token j."""
    model = tiny.build(*tiny.ATTENTIONS[name])
    for position in range(LENGTH):
        assert moved(model, position) == list(range(position, LENGTH))


@every_attention
def test_no_logit_depends_on_another_document(name: str) -> None:
    model = tiny.build(*tiny.ATTENTIONS[name])
    ends = [3, 3, 3, 6, 6, 6, 7]
    for position in range(LENGTH):
        assert moved(model, position, DOCUMENTS) == list(range(position, ends[position]))


def test_no_logit_depends_on_another_sequence() -> None:
    """The router sees the batch as one list of tokens, and must not care."""
    model, tokens_BL = tiny.build(), tiny.context(4).tokens_BL
    alone = torch.cat([logits(model, row) for row in tokens_BL.split(1)])
    torch.testing.assert_close(alone, logits(model, tokens_BL), rtol=1e-12, atol=1e-12)


def padded(context: SequenceContext, positions: int, rows: int) -> SequenceContext:
    """The same sequences with padding of random tokens behind each, and rows of padding alone."""
    batch, length = context.tokens_BL.shape
    shape = (batch + rows, length + positions)
    generator = torch.Generator().manual_seed(9)
    columns = [torch.randint(tiny.VOCABULARY, shape, generator=generator) for _ in range(2)]
    valid_BL = torch.zeros(shape, dtype=torch.bool)
    for column, own in zip(
        (*columns, valid_BL), (context.tokens_BL, context.targets_BL, True), strict=True
    ):
        column[:batch, :length] = own
    documents_BM = None
    if context.documents_BM is not None:
        documents_BM = torch.full((shape[0], shape[1] + 1), 99)
        documents_BM[:batch, : length + 1] = context.documents_BM
    return SequenceContext.of(
        columns[0], targets_BL=columns[1], valid_BL=valid_BL, documents_BM=documents_BM
    )


@pytest.mark.parametrize(("positions", "rows"), [(3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_P6_padding_changes_no_loss_no_load_and_no_gradient(
    positions: int, rows: int, documents: Tensor | None
) -> None:
    model, context = tiny.build(*tiny.MTP), tiny.context(length=LENGTH, documents_BM=documents)
    one, two = tiny.see(model, context), tiny.see(model, padded(context, positions, rows))
    tiny.assert_equal(two.loads, one.loads)
    for name, term in one.terms.items():
        torch.testing.assert_close(two.terms[name].sum, term.sum, rtol=1e-12, atol=0)
        assert torch.equal(two.terms[name].count, term.count), name
    tiny.assert_close(tiny.backward(model, two.total()), tiny.backward(model, one.total()))


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]])
@pytest.mark.parametrize("kind", ["plain", "padding", "documents"])
def test_P9_gradients_of_sums_do_not_depend_on_the_split(sizes: list[int], kind: str) -> None:
    """1 x N and N x 1: next_token, mtp and sequence terms, loads and counts, each alone and all together."""
    given: dict[str, Tensor] = {}
    if kind == "padding":
        given["valid_BL"] = torch.arange(LENGTH)[None] < torch.tensor([[7], [3], [5], [1]])
    if kind == "documents":
        given["documents_BM"] = torch.tensor(
            [[0, 0, 0, 1, 1, 1, 2, 2], [3] * 8, [4] + [5] * 7, [6] * 7 + [7]]
        )
    model, whole = tiny.build(*tiny.MTP), tiny.context(4, LENGTH, **given)
    one = tiny.see(model, whole)
    expected = tiny.backward(model, one.summed())
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [
        tiny.see(model, tiny.part(whole, slice(b, b + s)))
        for b, s in zip(begins, sizes, strict=True)
    ]
    model.zero_grad()
    for seen in parts:
        seen.summed().backward()
    tiny.assert_close(tiny.gradients(model), expected, 1e-9)
    for name, term in one.terms.items():
        assert sum(p.terms[name].sum.item() for p in parts) == pytest.approx(
            term.sum.item(), rel=1e-11
        ), name
        assert sum(int(p.terms[name].count) for p in parts) == int(term.count), name
    tiny.assert_equal({path: sum(p.loads[path] for p in parts) for path in one.loads}, one.loads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_P44_two_backward_passes_give_the_same_bits() -> None:
    """Large enough for every kernel to use both threads; with one, nothing could differ."""
    assert torch.get_num_threads() == 2
    model, context = tiny.build(*tiny.MTP, *tiny.FP32), tiny.context(16, 128)
    first, second = (tiny.backward(model, tiny.see(model, context).total()) for _ in range(2))
    tiny.assert_equal(first, second)


def test_the_forward_is_pure() -> None:
    """Nothing of the model changes in training or evaluation: only the training step commits what was seen."""
    model, context = tiny.build(*tiny.MTP), tiny.context()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        tiny.see(model, context).total().backward()
    tiny.assert_equal(model.state_dict(), before)


def test_evaluation_and_training_give_the_same_losses() -> None:
    model, context = tiny.build(*tiny.MTP), tiny.context()
    trained, evaluated = tiny.see(model.train(), context), tiny.see(model.eval(), context)
    tiny.assert_equal(
        {name: term.sum for name, term in evaluated.terms.items()},
        {name: term.sum for name, term in trained.terms.items()},
    )
    tiny.assert_equal(evaluated.loads, trained.loads)
