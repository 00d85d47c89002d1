"""python -m core.speed.probe: one side's start, memory and first steps, measured in a process of its own.

The request comes as JSON on standard input, and a row goes to standard output for each implementation of experts; ours
has one. Nothing heavy is imported before the clock runs.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STEPS = 3
"""Steps that are taken, unless the first one takes longer than the request's `give_up`; the others are timed."""


def main() -> None:
    """Measures what standard input asks for."""
    request = json.loads(sys.stdin.read())
    if request["side"] == "theirs":
        _import_theirs(request["architecture"])
    else:
        _import_ours()
    imported = time.time() - request["began"]
    from core.speed.resident import limit_memory

    if request["device"] == "cpu":
        limit_memory()
    for experts in request["experts"]:
        row = {"experts": experts, "import_seconds": imported, **_measured(request, experts)}
        print(json.dumps(row), flush=True)


def _import_theirs(architecture: str) -> None:
    """Imports transformers and the model's class."""
    import transformers

    getattr(transformers, architecture)


def _import_ours() -> None:
    """Imports what our training step needs."""
    import core.speed.our_steps  # noqa: F401


def _measured(request: dict[str, Any], experts: str) -> dict[str, Any]:
    """The measurements of one side with one implementation of experts, or the error that it ends with."""
    from core.speed.errors import in_a_word

    try:
        return _steps_of(request, experts)
    except Exception as cause:  # whatever it raises is the answer
        return {"error": in_a_word(cause)}


def _steps_of(request: dict[str, Any], experts: str) -> dict[str, Any]:
    """Builds the model, takes some steps, and measures both."""
    import torch

    from core.analysis.budget import plan_of
    from core.recipe.compose import compose
    from core.speed.batches import step_batches
    from core.speed.resident import PeakMemory
    from core.speed.turns import seconds_of

    device = torch.device(request["device"])
    recipe = compose(request["recipe"], request["overrides"], trust=request["trust"])
    batches = step_batches(recipe, device)
    side: Any
    if request["side"] == "ours":
        from core.speed.our_steps import OurSteps

        peak = PeakMemory(device)
        began = time.perf_counter()
        side = OurSteps(recipe, batches, device, plan_of(recipe))
    else:
        from core.speed.peer import PeerFolder, PeerSteps

        dtype = getattr(torch, request["dtype"])
        folder = PeerFolder(Path(request["folder"]), dtype, request["architecture"])
        peak = PeakMemory(device)
        began = time.perf_counter()
        side = PeerSteps(folder, recipe, batches, device)
        side.use(experts)
    built = time.perf_counter() - began
    seconds = [seconds_of(side.step, device)]
    if seconds[0] <= request["give_up"]:
        seconds += [seconds_of(side.step, device) for _ in range(STEPS - 1)]
    bytes_of = _held(side.weights, side.optimizers)
    return {
        "build_seconds": built,
        "first_step_seconds": seconds[0],
        "step_seconds": min(seconds[1:] or seconds),
        "peak_bytes": peak.bytes(),
        "state_bytes": bytes_of,
    }


def _held(weights: "list[torch.nn.Parameter]", optimizers: "list[torch.optim.Optimizer]") -> int:
    """The bytes of weights, of gradients as large, and of the optimizers' states."""
    held = sum(2 * weight.numel() * weight.element_size() for weight in weights)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for tensor in state.values():
                held += tensor.numel() * tensor.element_size()
    return held


if __name__ == "__main__":
    main()
