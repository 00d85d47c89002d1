"""Checks of dispatchers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from core.contracts.dispatcher import Dispatcher, Placement
from core.contracts.router import Routing
from core.testing import bench
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import Subject, require_close

DISPATCHER = "core/contracts/dispatcher.py, Dispatcher"
TALLIES = ("bytes_between_nodes", "bytes_inside_nodes", "remote_nodes")
"""What a dispatcher between ranks reports."""


def assignments(drops: bool, token_major: bool) -> tuple[Routing, Tensor]:
    """Builds a routing of six tokens to two experts each, with empty experts, and the states of the tokens."""
    draw = torch.Generator().manual_seed(0)
    expert_TK = torch.tensor([[3, 1], [1, 0], [7, 3], [1, 3], [0, 7], [3, 0]])
    gate_TK = torch.rand(6, 2, dtype=torch.float64, generator=draw)
    scores_TE = torch.rand(6, bench.EXPERTS, dtype=torch.float64, generator=draw)
    kept_TK = None
    if drops:
        kept_TK = torch.tensor([[True, False], [True, True], [False, False]] * 2)
    routing = Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE, kept_TK)
    if not token_major:
        order_A = torch.randperm(12, generator=draw)
        moved: dict[str, Any] = {}
        for name in ("token_A", "expert_A", "gate_A", "choice_A", "kept_A"):
            column_A = getattr(routing, name)
            moved[name] = None if column_A is None else column_A[order_A]
        routing = Routing(**moved, scores_TE=scores_TE, logits_TE=scores_TE)
    return routing, torch.randn(6, bench.WIDTH, dtype=torch.float64, generator=draw)


@check(
    "dispatcher",
    clause="rows come sorted by expert; combining gives each token the gated sum of its experts' outputs",
    where=DISPATCHER,
)
def dispatch_equals_a_loop(subject: Subject) -> None:
    """Compares results and gradients for token-major lists and others, with drops and without."""
    _require_as_looped(subject.made())


@check(
    "dispatcher",
    clause="bound to ranks, it gives the results of one device and reports what it sent to others",
    where=f"{DISPATCHER}: `between_ranks`",
)
def bound_dispatch_equals_a_loop(subject: Subject) -> None:
    """Binds it to one rank, compares results and gradients with a loop's, and looks for bytes sent to others."""
    skip_unless("between_ranks" in subject.capabilities, "it works on one device")
    skip_unless(not dist.is_initialized(), "this process is already part of a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        dispatcher = subject.made()
        placement = Placement.even(bench.EXPERTS, ranks=1, ranks_per_node=1)
        dispatcher.bind(init_device_mesh("cpu", (1,)), placement)
        _require_as_looped(dispatcher)
        _require_no_bytes(dispatcher)
    finally:
        dist.destroy_process_group()


def _require_no_bytes(dispatcher: Dispatcher) -> None:
    """Requires each tally, and that a rank that is alone has sent nothing."""
    routing, x_TD = assignments(drops=False, token_major=True)
    x_AD, _, state = dispatcher.start(x_TD, routing).wait()
    dispatcher.start_combine(x_AD, state).wait()
    tallies = dispatcher.tallies(state)
    for name in TALLIES:
        require(name in tallies, f"no tally {name}")
        exact = tallies[name].dtype == torch.int64 and tallies[name].ndim == 0
        require(exact, f"the tally {name} is no int64 scalar")
        value = int(tallies[name])
        require(value == 0, f"{name} is {value} although there is no other rank")


def _require_as_looped(dispatcher: Dispatcher) -> None:
    """Compares results and gradients with those of a loop."""
    for drops in (False, True):
        for token_major in (True, False):
            routing, x_TD = assignments(drops, token_major)
            results = []
            for run in (_dispatched, _looped):
                gate_A = routing.gate_A.detach().requires_grad_()
                x = x_TD.detach().requires_grad_()
                with_gate = Routing(**{**vars(routing), "gate_A": gate_A})
                y_TD = run(dispatcher, x, with_gate)
                (y_TD * torch.linspace(1, 2, y_TD.numel()).view_as(y_TD)).sum().backward()
                results.append((y_TD, x.grad, gate_A.grad))
            names = ("results", "gradients of tokens", "gradients of gates")
            case = f"(drops: {drops}, token-major: {token_major})"
            for name, own, exact in zip(names, *results, strict=True):
                require_close(own, exact, f"{name} differ from a loop's {case}")


def _dispatched(dispatcher: Dispatcher, x_TD: Tensor, routing: Routing) -> Tensor:
    """Sends the tokens to experts with the dispatcher; expert e computes (e + 1) x^2."""
    x_AD, ends_E, state = dispatcher.start(x_TD, routing).wait()
    fits = ends_E.dtype == torch.int32 and len(ends_E) == bench.EXPERTS
    require(fits, "ends_E is not an int32 for each expert")
    factor_A = torch.zeros(len(x_AD), 1, dtype=torch.float64)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        factor_A[start:end] = expert + 1.0
        start = end
    result: Tensor = dispatcher.start_combine(x_AD.square() * factor_A, state).wait()
    return result


def _looped(dispatcher: Dispatcher, x_TD: Tensor, routing: Routing) -> Tensor:
    """The same results from a loop over the assignments."""
    y_TD = torch.zeros_like(x_TD)
    pairs = zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)
    for a, (token, expert) in enumerate(pairs):
        if routing.kept_A is None or routing.kept_A[a]:
            row = routing.gate_A[a] * x_TD[token].square() * (expert + 1)
            y_TD = y_TD.index_add(0, torch.tensor([token]), row[None])
    return y_TD
