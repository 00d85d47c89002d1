"""Log-likelihoods of the last tokens of many sequences, in batches of similar length.

This module is independent of the harness. Requests whose inputs are the same tokens share one forward: the choices
A, B, C and D of one question differ in the last token only, and that is never an input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel
from core.model.loss import ROWS
from core.numerics.promotion import at_least_fp32


@dataclass(frozen=True)
class Request:
    """A sequence of which the last tokens are scored.

    Args:
        ids: context and continuation: at least one token of context, and at most one token more than the model's
            longest input.
        scored: number of tokens of the continuation, which is the end of `ids`.
    """

    ids: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        assert 0 <= self.scored < len(self.ids), (
            "the first token cannot be scored: no token precedes it"
        )


@dataclass(frozen=True)
class Score:
    """The model's score of a continuation.

    Args:
        log_likelihood: sum over its tokens of log p(token | all before it), in nats.
        greedy: whether each of them is the most probable token at its position.
    """

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[Score]:
    """Scores every request, the longest inputs first.

    Args:
        model: the model in evaluation mode.
        requests: the requests in any order.
        batch_size: sequences in a forward; it changes scores by rounding only.
        done: called with the number of requests that were scored since its last call.

    Returns:
        One score for each request, in their order.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    found: dict[int, Score] = {}
    for number, request in enumerate(requests):
        if request.scored:
            sharing.setdefault(request.ids[:-1], []).append(number)
        else:
            found[number] = Score(0.0, greedy=True)
    done(len(found))
    inputs = sorted(sharing, key=lambda ids: (-len(ids), ids))
    for first in range(0, len(inputs), batch_size):
        batch = inputs[first : first + batch_size]
        numbers: list[int] = []
        placed: list[tuple[int, Request]] = []
        for row, ids in enumerate(batch):
            for number in sharing[ids]:
                numbers.append(number)
                placed.append((row, requests[number]))
        scores = _score_batch(model, batch, placed, first)
        found.update(zip(numbers, scores, strict=True))
        done(len(numbers))
    return [found[number] for number in range(len(requests))]


def _score_batch(
    model: LanguageModel,
    batch: Sequence[tuple[int, ...]],
    placed: Sequence[tuple[int, Request]],
    first: int,
) -> list[Score]:
    """Returns the scores of the requests.

    Args:
        model: the model in evaluation mode.
        batch: the inputs of the forward.
        placed: each request with the row of its input in the batch.
        first: the number of the batch's first sequence among all sequences.
    """
    device = model.embedding.weight.device
    hidden_BLD = _hidden(model, batch, first, device)
    length = hidden_BLD.shape[1]
    places = []
    targets = []
    members = []
    for member, (row, request) in enumerate(placed):
        for position in range(len(request.ids) - request.scored, len(request.ids)):
            places.append(
                row * length + position - 1
            )  # a token is predicted at the position before it
            targets.append(request.ids[position])
            members.append(member)
    place_R, row_P = torch.tensor(places, device=device).unique(return_inverse=True)
    hidden_RD = hidden_BLD.flatten(0, 1).index_select(0, place_R)
    log_p_P, best_P = _predictions(model, hidden_RD, row_P, torch.tensor(targets, device=device))
    member_P = torch.tensor(members)
    missed_P = (~best_P).to(torch.int64)
    sums = torch.zeros(len(placed), dtype=torch.float64)
    sums = sums.index_add(0, member_P, log_p_P.double().cpu())
    misses = torch.zeros(len(placed), dtype=torch.int64)
    misses = misses.index_add(0, member_P, missed_P.cpu())
    pairs = zip(sums.tolist(), misses.tolist(), strict=True)
    return [Score(value, missed == 0) for value, missed in pairs]


def _hidden(
    model: LanguageModel, batch: Sequence[tuple[int, ...]], first: int, device: torch.device
) -> Tensor:
    """Returns hidden states [B, L, D]; sequences are padded at their end, which no earlier position reads."""
    length = max(map(len, batch))
    padded = [[*ids, *[0] * (length - len(ids))] for ids in batch]
    tokens_BL = torch.tensor(padded, device=device)
    lengths_B = torch.tensor(list(map(len, batch)), device=device)
    valid_BL = torch.arange(length, device=device) < lengths_B[:, None]
    context = SequenceContext.of(tokens_BL, valid_BL=valid_BL, first_sequence=first)
    hidden_BLD, _ = model.hidden(context)
    return hidden_BLD


def _predictions(
    model: LanguageModel, hidden_RD: Tensor, row_P: Tensor, target_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns log p of each target in fp32 or wider, and whether it is the most probable token.

    Logits are computed for `ROWS` rows at a time, so that they never exist for all rows at once.

    Args:
        model: the model in evaluation mode.
        hidden_RD: hidden states.
        row_P: the row that predicts each target.
        target_P: the ids of the targets.
    """
    log_p_P = at_least_fp32(hidden_RD[:0, :1]).new_zeros(len(row_P))
    best_P = torch.zeros(len(row_P), dtype=torch.bool, device=row_P.device)
    for start in range(0, len(hidden_RD), ROWS):
        log_p_RV = at_least_fp32(model.output(hidden_RD[start : start + ROWS])).log_softmax(dim=-1)
        here = ((row_P >= start) & (row_P < start + ROWS)).nonzero()[:, 0]
        row_H = row_P[here] - start
        target_H = target_P[here]
        log_p_P[here] = log_p_RV[row_H, target_H].to(log_p_P.dtype)
        best_P[here] = log_p_RV.argmax(dim=-1)[row_H] == target_H
    return log_p_P, best_P
