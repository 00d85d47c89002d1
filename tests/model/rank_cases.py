"""Cases of dispatch between ranks, and the same results from a loop over assignments on one rank."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from core.contracts.dispatcher import Placement
from core.contracts.router import Routing
from core.routing.gating import best_experts
from plugins.all_to_all.dispatcher import AllToAllDispatcher

WIDTH = 6
SCATTERED = {
    2: ((5, 0, 3), (7, 1, 2, 6, 4)),
    4: ((5, 0, 3), (7,), (1, 2), (6, 4)),
}
"""Experts of each rank, unevenly and out of order, by the number of ranks."""


@dataclass(frozen=True)
class Case:
    """Tokens and routings of all ranks.

    Args:
        tokens_R: tokens of each rank.
        per_node: ranks per node.
        placed: the experts of each rank; None: equally many in order.
        experts: how many experts there are.
        top_k: experts per token.
        groups: groups of neighbouring experts, of which a token reaches `group_limit`.
        idle: experts that no token chooses.
        drops: whether a third of the assignments is dropped.
        token_major: whether the list has K choices for every token in order.
        dtype, gate_dtype: formats of rows and gates.
    """

    tokens_R: tuple[int, ...]
    per_node: int
    placed: tuple[tuple[int, ...], ...] | None = None
    experts: int = 8
    top_k: int = 3
    groups: int = 1
    group_limit: int = 1
    idle: tuple[int, ...] = ()
    drops: bool = False
    token_major: bool = True
    dtype: torch.dtype = torch.float64
    gate_dtype: torch.dtype = torch.float64

    @property
    def placement(self) -> Placement:
        """Where the experts are."""
        ranks = len(self.tokens_R)
        if self.placed is None:
            return Placement.even(self.experts, ranks, self.per_node)
        return Placement(self.placed, self.per_node)

    def tokens(self, rank: int) -> Tensor:
        """The tokens of a rank, a leaf."""
        draw = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(self.tokens_R[rank], WIDTH, generator=draw)
        return self._rounded(x_TD).requires_grad_()

    def _rounded(self, values: Tensor) -> Tensor:
        """Values that are the same in every format of rows."""
        return values.to(torch.bfloat16).to(self.dtype)

    def routing(self, rank: int) -> Routing:
        """The routing of a rank's tokens; its gates are a leaf."""
        draw = torch.Generator().manual_seed(100 + rank)
        shape = (self.tokens_R[rank], self.experts)
        scores_TE = torch.rand(shape, generator=draw, dtype=torch.float64)
        scores_TE[:, list(self.idle)] = -1
        expert_TK = best_experts(
            scores_TE, self.top_k, groups=self.groups, group_limit=self.group_limit
        )
        gate_TK = scores_TE.gather(1, expert_TK).to(self.gate_dtype)
        kept_TK = None
        if self.drops:
            kept_TK = torch.rand(expert_TK.shape, generator=draw) > 1 / 3
        routing = Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE, kept_TK)
        if not self.token_major:
            order_A = torch.randperm(expert_TK.numel(), generator=draw)[1:]
            moved: dict[str, Any] = {}
            for name in ("token_A", "expert_A", "gate_A", "choice_A", "kept_A"):
                column_A = getattr(routing, name)
                moved[name] = None if column_A is None else column_A[order_A]
            routing = Routing(**moved, scores_TE=scores_TE, logits_TE=scores_TE)
        return replace(routing, gate_A=routing.gate_A.detach().requires_grad_())

    def weights(self) -> Tensor:
        """A matrix for each expert, a leaf."""
        draw = torch.Generator().manual_seed(7)
        weight_EDD = torch.randn(self.experts, WIDTH, WIDTH, generator=draw)
        return self._rounded(weight_EDD).requires_grad_()

    def slopes(self, rank: int) -> Tensor:
        """The gradient of a rank's output."""
        draw = torch.Generator().manual_seed(200 + rank)
        return self._rounded(torch.randn(self.tokens_R[rank], WIDTH, generator=draw))


@dataclass(frozen=True)
class Sent:
    """One exchange that a rank started.

    Args:
        ranks: the size of its group.
        rows: whether rows or gates are sent, else integers.
        counts: how much goes to each rank; None for the counts themselves.
    """

    ranks: int
    rows: bool
    counts: list[int] | None


@dataclass
class Outcome:
    """What a rank computed and sent.

    Args:
        output: its tokens' outputs.
        tokens, gates: their gradients.
        weights: the gradients of its experts, by number.
        tallies: what the dispatcher reported.
        sent: each exchange that it started.
    """

    output: Tensor
    tokens: Tensor
    gates: Tensor
    weights: dict[int, Tensor]
    tallies: dict[str, Tensor] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)


class Exchanges:
    """Notes every exchange of the process from now on: in `sent` what is sent, in `events` also what is waited for."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.events: list[str] = []
        original = dist.all_to_all_single

        def noted(output: Any, given: Any, *splits: Any, group: Any, **options: Any) -> Any:
            sent = list(splits[1]) if splits else None
            self.sent.append(Sent(group.size(), given.dtype.is_floating_point, sent))
            work = original(output, given, *splits, group=group, **options)
            if not options.get("async_op"):
                self.events.append("integers")
                return work
            self.events.append("launch")
            return _NotedWork(work, self.events)

        dist.all_to_all_single = noted


@dataclass
class _NotedWork:
    """A transfer under way that notes when it is waited for."""

    work: Any
    events: list[str]

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def experts_of(x_AD: Tensor, ends_E: Tensor, weight_EDD: Tensor) -> Tensor:
    """Each row times the matrix of its expert, squared: not linear, so that rows must come one by one."""
    pieces = [x_AD[:0] + 0 * weight_EDD.sum()]
    begin = 0
    for end, weight_DD in zip(ends_E.tolist(), weight_EDD.unbind(0), strict=True):
        pieces.append((x_AD[begin:end] @ weight_DD).square())
        begin = end
    assert begin == len(x_AD)
    return torch.cat(pieces)


def on_this_rank(
    case: Case, mesh: DeviceMesh, exchanges: Exchanges, device: str = "cpu"
) -> Outcome:
    """Dispatches the tokens of this rank and computes the gradients, on a device."""
    rank = mesh.get_local_rank()
    dispatcher = AllToAllDispatcher(None, None, experts=case.experts)  # type: ignore[arg-type]
    dispatcher.bind(mesh, case.placement)
    exchanges.sent.clear()
    own = list(case.placement.experts_RS[rank])
    weight_EDD = moved(case.weights()[own], device)
    x_TD = moved(case.tokens(rank), device)
    routing = tree_map_only(Tensor, lambda tensor: moved(tensor, device), case.routing(rank))
    x_AD, ends_E, state = dispatcher.start(x_TD, routing).wait()
    assert ends_E.dtype == torch.int32
    y_AD = experts_of(x_AD, ends_E, weight_EDD)
    y_TD = dispatcher.start_combine(y_AD, state).wait()
    y_TD.backward(case.slopes(rank).to(device))
    assert x_TD.grad is not None
    assert routing.gate_A.grad is not None
    assert weight_EDD.grad is not None
    return Outcome(
        y_TD.detach().cpu(),
        x_TD.grad.cpu(),
        routing.gate_A.grad.cpu(),
        dict(zip(own, weight_EDD.grad.cpu(), strict=True)),
        dispatcher.tallies(state),
        list(exchanges.sent),
    )


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy on a device; a leaf if the tensor has a gradient."""
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def alone(case: Case) -> list[Outcome]:
    """What all ranks should have computed, from one assignment after the other."""
    weight_EDD = case.weights()
    ranks = range(len(case.tokens_R))
    made = []
    for rank in ranks:
        x_TD = case.tokens(rank)
        routing = case.routing(rank)
        y_TD = 0 * (x_TD + weight_EDD.sum())
        for a in kept(routing):
            token = int(routing.token_A[a])
            y_D = (x_TD[token] @ weight_EDD[routing.expert_A[a]]).square()
            y_TD = y_TD.index_add(0, torch.tensor([token]), (routing.gate_A[a] * y_D)[None])
        (y_TD * case.slopes(rank)).sum().backward()
        made.append((y_TD.detach(), x_TD.grad, routing.gate_A.grad))
    assert weight_EDD.grad is not None
    outcomes = []
    for rank in ranks:
        own = case.placement.experts_RS[rank]
        weights = {expert: weight_EDD.grad[expert] for expert in own}
        y_TD, x_grad, gate_grad = made[rank]
        tokens = torch.zeros_like(y_TD) if x_grad is None else x_grad
        gates = torch.zeros_like(case.routing(rank).gate_A) if gate_grad is None else gate_grad
        outcomes.append(Outcome(y_TD, tokens, gates, weights))
    return outcomes


def kept(routing: Routing) -> list[int]:
    """The assignments that are carried out."""
    if routing.kept_A is None:
        return list(range(len(routing.token_A)))
    return routing.kept_A.nonzero().flatten().tolist()


def reached(case: Case, rank: int) -> list[set[int]]:
    """The ranks that hold the experts of each token of a rank."""
    holder = {}
    for other, experts in enumerate(case.placement.experts_RS):
        holder |= dict.fromkeys(experts, other)
    routing = case.routing(rank)
    ranks: list[set[int]] = [set() for _ in range(case.tokens_R[rank])]
    for a in kept(routing):
        ranks[int(routing.token_A[a])].add(holder[int(routing.expert_A[a])])
    return ranks


def tallies_by_hand(case: Case) -> list[dict[str, int]]:
    """What each rank's dispatcher should report: every hop of every token, one after the other."""
    ranks = len(case.tokens_R)
    found = [
        {"bytes_between_nodes": 0, "bytes_inside_nodes": 0, "remote_nodes": 0} for _ in range(ranks)
    ]
    row = WIDTH * torch.finfo(case.dtype).bits // 8

    def node(rank: int) -> int:
        return rank // case.per_node

    def hop(start: int, end: int) -> None:
        if start != end:
            kind = "inside_nodes" if node(start) == node(end) else "between_nodes"
            found[start][f"bytes_{kind}"] += row  # out
            found[end][f"bytes_{kind}"] += row  # and back

    for rank in range(ranks):
        for ends in reached(case, rank):
            found[rank]["remote_nodes"] += len({node(end) for end in ends} - {node(rank)})
            relays = {node(end) * case.per_node + rank % case.per_node for end in ends}
            for relay in relays:
                hop(rank, relay)
                for end in ends:
                    if node(end) == node(relay):
                        hop(relay, end)
    return found
