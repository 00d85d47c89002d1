"""Capacity: who comes first where an expert takes only so many tokens. Integers throughout; padding takes no place."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.counting import count


def has_place(expert_TK: Tensor, context: SequenceContext, *, experts: int, by_sequence: bool, factor: float) -> Tensor:
    """Whether a choice finds a place at its expert: bool T x K, False for padding.

    Within a group of S valid tokens an expert has ceil(factor x K S / E) places. They are taken in token order, all
    first choices before any second one, and a counter grows on overflow too.

    Args:
        expert_TK: int64, each token's choices in order.
        context: says which tokens are valid and where sequences begin.
        experts: how many there are, E.
        by_sequence: each sequence is a group, or each document's piece of it where they are kept apart; else all
            tokens are one.
        factor: capacity factor, over the even share of the group's assignments.
    """
    tokens, choices = expert_TK.shape
    pieces = groups_of(context, by_sequence=by_sequence)
    group_T, groups = pieces.of_T, pieces.number
    valid_T = context.valid().flatten()
    size_G = count(group_T, groups, valid_T)
    places_G = even_share(choices * size_G, experts, factor)
    key_KT = group_T * experts + expert_TK.T
    rank_A = running_count(key_KT.flatten(), valid_T.repeat(choices), groups * experts)
    return (places_G.index_select(0, group_T)[:, None] > rank_A.view(choices, tokens).T) & valid_T[:, None]


@dataclass(frozen=True)
class Pieces:
    """How the T tokens of a micro-batch are divided.

    Args:
        of_T: int64, the piece of each token; it never falls.
        number: how many there are.
        even: whether they are equally long.
    """

    of_T: Tensor
    number: int
    even: bool

    def sums(self, column: Tensor) -> Tensor:
        """The sum of T x ... over each piece's tokens, N x ..., in the column's own format."""
        if self.even:
            rows: Tensor = column.unflatten(0, (self.number, len(column) // max(self.number, 1)))
            return rows.sum(dim=1)
        zeros: Tensor = column.new_zeros(self.number, *column.shape[1:])
        return zeros.index_add(0, self.of_T, column)


def pieces_of(context: SequenceContext) -> Pieces:
    """The sequence, or the document's part of it, that each of the T tokens belongs to."""
    batch, length = context.tokens_BL.shape
    row_BL = torch.arange(batch, device=context.tokens_BL.device)[:, None].expand(batch, length)
    if context.documents_BM is None or not row_BL.numel():
        return Pieces(row_BL.reshape(-1), batch, even=True)
    documents_BL = context.documents_BM[:, :length]
    begins_BL = torch.ones_like(documents_BL, dtype=torch.int64)
    begins_BL[:, 1:] = (documents_BL[:, 1:] != documents_BL[:, :-1]).to(torch.int64)
    piece_T = begins_BL.flatten().cumsum(0) - 1
    return Pieces(piece_T, int(piece_T[-1]) + 1, even=False)


def groups_of(context: SequenceContext, *, by_sequence: bool) -> Pieces:
    """One piece for all tokens, or those of `pieces_of`."""
    if by_sequence:
        return pieces_of(context)
    return Pieces(torch.zeros_like(context.tokens_BL).flatten(), 1, even=True)


def even_share(assigned: Tensor, parts: int, factor: float) -> Tensor:
    """ceil(factor * assigned / parts), int64: what one of several equal parts may take.

    Rounded up, so that a group of one token has a place; a factor of 0 leaves none.
    """
    share = factor * assigned.to(torch.float64) / parts
    return (share - 1e-9).ceil().clamp(min=0).to(torch.int64)  # 1.1 * 10 is 11.000000000000002, and means 11


def even_share_of(assigned: int, parts: int, factor: float) -> int:
    """The same of a number that is known beforehand."""
    return max(0, math.ceil(factor * assigned / parts - 1e-9))


def running_count(key_A: Tensor, counted_A: Tensor, keys: int) -> Tensor:
    """For each entry of a list, how many counted entries with the same key stand before it: int64 A.

    Args:
        key_A: int64 in [0, keys).
        counted_A: bool; where False the entry itself is worth nothing and its result means nothing.
        keys: how many different keys there are.
    """
    key_A = key_A.masked_fill(~counted_A, keys)
    order_A = key_A.argsort(stable=True)
    size_K = count(key_A, keys + 1)
    start_K = size_K.cumsum(0) - size_K
    rank_A = torch.arange(len(key_A), device=key_A.device) - start_K.index_select(0, key_A.index_select(0, order_A))
    return torch.empty_like(rank_A).scatter(0, order_A, rank_A)
