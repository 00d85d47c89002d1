"""One exchange with fan-out, planned in integers: which row goes to which ranks, and what is done with it there."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core.numerics.exchange import Splits, exchange_counts, exchange_integers
from plugins.all_to_all.copies import Copies
from plugins.all_to_all.peers import Peers


@dataclass(frozen=True)
class Assignments:
    """Which row goes to which expert.

    Args:
        row_A: int64, the row.
        expert_A: int64, the expert, by its number in the layer.
        kept_A: bool, False for an assignment that is not carried out; None: all are.
        rows: how many rows there are.
        most: the most assignments of one row; 0 if it is not known.
    """

    row_A: Tensor
    expert_A: Tensor
    kept_A: Tensor | None
    rows: int
    most: int = 0


@dataclass(frozen=True)
class Stage:
    """One exchange: a row is sent once to each rank that needs it, with the list of its assignments there.

    Args:
        peers: the ranks.
        order_A: the sent assignments, sorted by rank and row.
        sent: the copies of rows that are sent, sorted in the same way.
        rows: how many of them go to each rank, and come from each.
        assignments: the same for the assignments.
        received: the assignments of the received rows.
    """

    peers: Peers
    order_A: Tensor
    sent: Copies
    rows: Splits
    assignments: Splits
    received: Assignments

    def rows_sent(self, *, remote: bool, back: bool) -> int:
        """How many rows this rank sends to other ranks.

        Args:
            remote: whether ranks on other nodes count, or those on this one.
            back: whether the way back counts, or the way out.
        """
        splits = self.rows.reversed() if back else self.rows
        total = 0
        for rank, rows in enumerate(splits.sent):
            if rank != self.peers.own and self.peers.remote_R[rank] == remote:
                total += rows
        return total


@dataclass(frozen=True)
class _Sorted:
    """Assignments sorted by rank and row; dropped ones come last.

    Args:
        order_A: which assignment each entry is.
        row_A, rank_A: its row and rank.
        copies_A: how many copies of rows there are up to each entry: one for each rank and row.
        ends_R: where each rank's entries end.
        longest: the most entries of one copy, a scalar.
        widest: the most copies of one row, a scalar.
    """

    order_A: Tensor
    row_A: Tensor
    rank_A: Tensor
    copies_A: Tensor
    ends_R: Tensor
    longest: Tensor
    widest: Tensor


def _sorted(peers: Peers, given: Assignments) -> _Sorted:
    rank_A = peers.ranks_of(given.expert_A)
    if given.kept_A is not None:
        rank_A = rank_A.masked_fill(~given.kept_A, peers.size)
    key_A, order_A = (rank_A * given.rows + given.row_A).sort(stable=True)
    rank_A = rank_A.index_select(0, order_A)
    row_A = given.row_A.index_select(0, order_A)
    place_A = torch.arange(len(key_A), device=key_A.device)
    first_A = torch.searchsorted(key_A, key_A)
    kept_A = rank_A < peers.size
    opens_A = ((first_A == place_A) & kept_A).to(torch.int64)
    number_A = (place_A - first_A + 1).masked_fill(~kept_A, 0)
    copies_P = row_A.new_zeros(given.rows).index_add(0, row_A, opens_A)
    ranks_R = torch.arange(peers.size, device=key_A.device)
    return _Sorted(
        order_A,
        row_A,
        rank_A,
        opens_A.cumsum(0),
        torch.searchsorted(rank_A, ranks_R, right=True),
        _largest(number_A),
        _largest(copies_P),
    )


def _largest(number_A: Tensor) -> Tensor:
    """The largest of some numbers, 0 if there are none."""
    return F.pad(number_A, (0, 1)).max()


@dataclass(frozen=True)
class _Counts:
    """How much goes where, on the device and on the host.

    Args:
        first_copy_R: how many copies are for ranks before each.
        received_R3: what each rank sends: copies, assignments, the most assignments of one copy.
        rows, assignments: what is sent and received, on the host.
        most_received: the most assignments of one received row.
        most_sent: the most copies of one row.
    """

    first_copy_R: Tensor
    received_R3: Tensor
    rows: Splits
    assignments: Splits
    most_received: int
    most_sent: int


def _counted(peers: Peers, entries: _Sorted) -> _Counts:
    """Exchanges the counts, and brings them to the host."""
    copy_ends_R = F.pad(entries.copies_A, (1, 0)).index_select(0, entries.ends_R)
    zero = copy_ends_R.new_zeros(1)
    copies_R = copy_ends_R.diff(prepend=zero)
    longest_R = entries.longest.expand(peers.size)
    sent_R3 = torch.stack([copies_R, entries.ends_R.diff(prepend=zero), longest_R], dim=1)
    received_R3 = exchange_counts(sent_R3, peers.group.group_name)
    columns = torch.cat([sent_R3, received_R3], dim=1).t().flatten()
    *host, most_sent = torch.cat([columns, entries.widest.view(1)]).tolist()
    parts = [tuple(host[at : at + peers.size]) for at in range(0, len(host), peers.size)]
    return _Counts(
        first_copy_R=copy_ends_R - copies_R,
        received_R3=received_R3,
        rows=Splits(parts[0], parts[3]),
        assignments=Splits(parts[1], parts[4]),
        most_received=max(parts[5]),
        most_sent=most_sent,
    )


def plan_stage(peers: Peers, given: Assignments, experts: int) -> Stage:
    """Exchanges how many rows and which assignments go where; all ranks of the group call it together.

    The counts are the only numbers that the host reads.

    Args:
        peers: the ranks.
        given: the assignments of this rank's rows.
        experts: how many experts the layer has.
    """
    entries = _sorted(peers, given)
    counts = _counted(peers, entries)
    total = sum(counts.assignments.sent)
    order_A = entries.order_A[:total]
    copies_A = entries.copies_A[:total]
    number_C = torch.arange(1, sum(counts.rows.sent) + 1, device=order_A.device)
    row_C = entries.row_A.index_select(0, torch.searchsorted(copies_A, number_C))
    place_A = copies_A - 1 - counts.first_copy_R.index_select(0, entries.rank_A[:total])
    message_A = place_A * experts + given.expert_A.index_select(0, order_A)
    return Stage(
        peers,
        order_A,
        Copies.of(row_C, given.rows, counts.most_sent),
        counts.rows,
        counts.assignments,
        _received(peers, counts, message_A, experts),
    )


def _received(peers: Peers, counts: _Counts, message_A: Tensor, experts: int) -> Assignments:
    """Exchanges assignments.

    Args:
        peers: the ranks.
        counts: how many go where.
        message_A: place x experts + expert, where the place is the row's among those for its rank.
        experts: how many experts the layer has.
    """
    splits = counts.assignments
    group = peers.group.group_name
    message_A = exchange_integers(message_A, splits.sent, splits.received, group)
    rows_R, assignments_R, _ = counts.received_R3.unbind(1)
    first_row_R = rows_R.cumsum(0) - rows_R
    first_row_A = first_row_R.repeat_interleave(assignments_R, output_size=len(message_A))
    return Assignments(
        row_A=message_A // experts + first_row_A,
        expert_A=message_A % experts,
        kept_A=None,
        rows=sum(counts.rows.received),
        most=counts.most_received,
    )
