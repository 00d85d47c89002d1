"""Dispatch between ranks: a token is sent once to each node and once to each rank that holds experts of its choice.

With one node there is one exchange, to the ranks of the experts. With several there are two: first between nodes, to
the rank of the same place in the node, and then inside the node. Results return the same way and are added up where
they meet. Until it is bound to ranks, the dispatcher works as on one device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from core.contracts.build import BuildContext
from core.contracts.counting import ends_of
from core.contracts.dispatcher import Dispatcher, Handle, Placement
from core.contracts.router import Routing
from core.numerics.compiling import mark_rows_dynamic
from core.numerics.exchange import Transfer, finish_transfer, start_transfer
from core.routing.rows import Done, gated_sums, sort_by_expert
from plugins.all_to_all.copies import Copies, copy_rows, sum_copies, sum_gated_copies
from plugins.all_to_all.peers import Layout, layout
from plugins.all_to_all.stage import Assignments, Stage, plan_stage


class AllToAllDispatcher(Dispatcher):
    """Sends tokens to the ranks that hold their experts, across to another node at most once."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 3.2.2"
    example = {"name": "all_to_all"}
    capabilities = frozenset({"between_ranks"})
    traceable = False

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.layout: Layout | None = None

    def bind(self, mesh: DeviceMesh, placement: Placement) -> None:
        """Spreads the experts over ranks; every rank of the mesh calls it, for its layers in the same order.

        Raises:
            ValueError: an expert has no place or several, or the ranks do not fill whole nodes.
        """
        self.layout = layout(mesh, placement, self.experts)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def start(self, x_TD: Tensor, routing: Routing) -> Handle:
        """Exchanges counts and assignments, and starts the first exchange of rows."""
        if self.layout is None:
            return Done(sort_by_expert(x_TD, routing, self.experts))
        route = _plan(self.layout, routing, x_TD.shape[0], self.experts)
        finish_first = _send(route.stages[0], x_TD, routing.gate_A)

        def finish() -> tuple[Tensor, Tensor, _State]:
            x_PD, gate_A = finish_first()
            for stage in route.stages[1:]:
                x_PD, gate_A = _send(stage, x_PD, gate_A)()
            row_bytes = x_TD.shape[1] * x_TD.element_size()
            state = _State(route, gate_A.index_select(0, route.order_A), row_bytes)
            x_AD = copy_rows(x_PD, route.expanded)
            mark_rows_dynamic(x_AD)  # each call receives another number of rows
            return x_AD, route.ends_E, state

        return _Later(finish)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def start_combine(self, y_AD: Tensor, state: Any) -> Handle:
        """Adds up the gated outputs of each received row, and starts to send the sums back."""
        if self.layout is None:
            return Done(gated_sums(y_AD, state))
        state.count_bytes(y_AD.shape[1] * y_AD.element_size())
        y_PD = sum_gated_copies(y_AD, state.gate_A, state.route.expanded)
        finish_first = _return(state.route.stages[-1], y_PD)

        def finish() -> Tensor:
            y_PD = finish_first()
            for stage in reversed(state.route.stages[:-1]):
                y_PD = _return(stage, y_PD)()
            return y_PD

        return _Later(finish)

    def tallies(self, state: Any) -> dict[str, Tensor]:
        """The bytes of rows that this rank sent to others, and how many other nodes its tokens were sent to."""
        if self.layout is None:
            return {}
        sent: dict[str, Tensor] = state.sent
        return sent


class _Later(Handle):
    """A transfer whose rest is done when it is waited for."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish = finish

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wait(self) -> Any:
        """Finishes the transfer and returns what was transferred."""
        return self._finish()


@dataclass(frozen=True)
class _Route:
    """The way of a micro-batch's tokens to their experts.

    Args:
        stages: the exchanges, in order.
        order_A: the assignments of the last one's received rows, sorted by expert.
        expanded: the received row of each of them.
        ends_E: int32, where each expert's assignments end.
    """

    stages: tuple[Stage, ...]
    order_A: Tensor
    expanded: Copies
    ends_E: Tensor


@dataclass
class _State:
    """What combining needs after dispatching.

    Args:
        route: the way of the tokens.
        gate_A: the gates of this rank's assignments, sorted by expert.
        out_bytes: bytes of a row on the way out.
        sent: what the dispatcher reports, by name; filled when the way back begins. It holds tensors, because a graph
            that reads integers holds for these integers alone.
    """

    route: _Route
    gate_A: Tensor
    out_bytes: int
    sent: dict[str, Tensor] = field(default_factory=dict)

    def count_bytes(self, back_bytes: int) -> None:
        """Fills `sent`.

        Args:
            back_bytes: bytes of a row on the way back.
        """
        counts = {
            "bytes_between_nodes": self._bytes_sent(back_bytes, remote=True),
            "bytes_inside_nodes": self._bytes_sent(back_bytes, remote=False),
            "remote_nodes": self.route.stages[0].rows_sent(remote=True, back=False),
        }
        for name, value in counts.items():
            self.sent[name] = torch.full((), value, dtype=torch.int64, device=self.gate_A.device)

    def _bytes_sent(self, back_bytes: int, *, remote: bool) -> int:
        """Bytes of rows that this rank sent to others out and back, on other nodes or on this one."""
        total = 0
        for stage in self.route.stages:
            total += stage.rows_sent(remote=remote, back=False) * self.out_bytes
            total += stage.rows_sent(remote=remote, back=True) * back_bytes
        return total


def _plan(layout: Layout, routing: Routing, tokens: int, experts: int) -> _Route:
    """Plans all exchanges, so that afterwards rows travel without waiting for the host."""
    with record_function("dispatch.counts"):
        given = Assignments(routing.token_A, routing.expert_A, routing.kept_A, tokens)
        stages = []
        for peers in layout.exchanges:
            stages.append(plan_stage(peers, given, experts))
            given = stages[-1].received
        sorted_A, order_A = layout.index_of(given.expert_A).sort(stable=True)
        expanded = Copies.of(given.row_A.index_select(0, order_A), given.rows, given.most)
        ends_E = ends_of(sorted_A, layout.own_experts).to(torch.int32)
        return _Route(tuple(stages), order_A, expanded, ends_E)


def _send(stage: Stage, x_PD: Tensor, gate_A: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Starts to send rows and gates to the ranks of a stage; the result waits and returns those received."""
    name = f"dispatch.{stage.peers.name}"
    transfer = Transfer(name, stage.peers.group, (stage.rows, stage.assignments))
    gate_A = gate_A.index_select(0, stage.order_A)
    link = start_transfer(transfer, copy_rows(x_PD, stage.sent), gate_A)
    return lambda: finish_transfer(transfer, link)


def _return(stage: Stage, y_PD: Tensor) -> Callable[[], Tensor]:
    """Starts to send rows back along a stage; the result waits and returns the sum of each row's copies."""
    name = f"combine.{stage.peers.name}"
    transfer = Transfer(name, stage.peers.group, (stage.rows.reversed(),))
    link = start_transfer(transfer, y_PD)

    def finish() -> Tensor:
        (y_CD,) = finish_transfer(transfer, link)
        return sum_copies(y_CD, stage.sent)

    return finish
