"""Groups of tokens, and which choices are within an expert's capacity in each.

Integers throughout; padding uses no capacity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.counting import count


def within_capacity(
    expert_TK: Tensor, context: SequenceContext, *, experts: int, by_sequence: bool, factor: float
) -> Tensor:
    """Whether each choice is within its expert's capacity: bool T x K, False for padding.

    Within a group of S valid tokens an expert's capacity is ceil(factor x K S / E). It is filled in token order, all
    first choices before any second one, and a counter grows on overflow too.

    Args:
        expert_TK: int64, each token's choices in order.
        context: says which tokens are valid and where sequences begin.
        experts: how many there are, E.
        by_sequence: each sequence is a group, or each document's part of it where documents are kept apart; else all
            tokens are one group.
        factor: capacity factor, over the even share of the group's assignments.
    """
    tokens, choices = expert_TK.shape
    groups = token_groups(context, by_sequence=by_sequence)
    valid_T = context.valid().flatten()
    size_G = count(groups.group_T, groups.number, valid_T)
    places_G = even_share(choices * size_G, experts, factor)
    key_KT = groups.group_T * experts + expert_TK.T  # one counter for each group and expert
    rank_A = running_count(key_KT.flatten(), valid_T.repeat(choices), groups.number * experts)
    rank_TK = rank_A.view(choices, tokens).T
    places_T1 = places_G.index_select(0, groups.group_T)[:, None]
    return (places_T1 > rank_TK) & valid_T[:, None]


@dataclass(frozen=True)
class TokenGroups:
    """The division of the T tokens of a micro-batch into N groups.

    Args:
        group_T: int64, the group of each token; it never falls.
        number: N.
        even: whether all groups have the same number of tokens.
    """

    group_T: Tensor
    number: int
    even: bool

    def sums(self, column: Tensor) -> Tensor:
        """The sum of T x ... over each group's tokens, N x ..., in the column's own format."""
        if self.even:
            length = len(column) // max(self.number, 1)
            rows: Tensor = column.unflatten(0, (self.number, length))
            return rows.sum(dim=1)
        zeros: Tensor = column.new_zeros(self.number, *column.shape[1:])
        return zeros.index_add(0, self.group_T, column)


def sequence_groups(context: SequenceContext) -> TokenGroups:
    """The sequences as groups; where documents are kept apart, each document's part of a sequence is one."""
    batch, length = context.tokens_BL.shape
    row_BL = torch.arange(batch, device=context.tokens_BL.device)[:, None].expand(batch, length)
    if context.documents_BM is None or not row_BL.numel():
        return TokenGroups(row_BL.reshape(-1), batch, even=True)
    documents_BL = context.documents_BM[:, :length]
    begins_BL = torch.ones_like(documents_BL, dtype=torch.int64)
    begins_BL[:, 1:] = (documents_BL[:, 1:] != documents_BL[:, :-1]).to(torch.int64)
    group_T = begins_BL.flatten().cumsum(0) - 1
    return TokenGroups(group_T, int(group_T[-1]) + 1, even=False)


def token_groups(context: SequenceContext, *, by_sequence: bool) -> TokenGroups:
    """The groups of `sequence_groups`, or one group of all tokens."""
    if by_sequence:
        return sequence_groups(context)
    return TokenGroups(torch.zeros_like(context.tokens_BL).flatten(), 1, even=True)


def even_share(assigned: Tensor, parts: int, factor: float) -> Tensor:
    """ceil(factor * assigned / parts), int64: what one of several equal parts may take.

    Rounded up, so that a single token is within capacity; with a factor of 0 the result is 0.
    """
    share = factor * assigned.to(torch.float64) / parts
    rounded_up = (share - 1e-9).ceil()  # 1.1 * 10 is 11.000000000000002, and means 11
    return rounded_up.clamp(min=0).to(torch.int64)


def even_share_of(assigned: int, parts: int, factor: float) -> int:
    """`even_share` of a Python integer."""
    return max(0, math.ceil(factor * assigned / parts - 1e-9))


def running_count(key_A: Tensor, counted_A: Tensor, keys: int) -> Tensor:
    """The number of counted entries with the same key before each entry of a list: int64 A.

    Args:
        key_A: int64 in [0, keys).
        counted_A: bool; an entry with False is not counted, and its own result means nothing.
        keys: how many different keys there are.
    """
    key_A = key_A.masked_fill(~counted_A, keys)
    order_A = key_A.argsort(stable=True)
    size_K = count(key_A, keys + 1)
    start_K = size_K.cumsum(0) - size_K
    sorted_key_A = key_A.index_select(0, order_A)
    place_A = torch.arange(len(key_A), device=key_A.device)
    rank_A = place_A - start_K.index_select(0, sorted_key_A)
    return torch.empty_like(rank_A).scatter(0, order_A, rank_A)
