"""python -m core.speed.probe: one side's start, memory and first runs, measured in a process of its own.

The request comes as JSON on standard input, and a row goes to standard output for each variant of the peer; our side
has one. Nothing heavy is imported before the clock runs.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from core.recipe.compose import Recipe

RUNS = 3
"""Runs that are taken, unless the first one takes longer than the request's `give_up` without compiling."""


def main() -> None:
    """Measures what standard input asks for."""
    request = json.loads(sys.stdin.read())
    if request["side"] == "theirs":
        _import_theirs(request["architecture"])
    else:
        _import_ours(request["work"])
    imported = time.time() - request["began"]
    from core.speed.resident import limit_memory

    if request["device"] == "cpu":
        limit_memory()
    for variant in request["variants"]:
        row = {"variant": variant, "import_seconds": imported, **_measured(request, variant)}
        print(json.dumps(row), flush=True)


def _import_theirs(architecture: str) -> None:
    """Imports transformers and the model's class."""
    import transformers

    getattr(transformers, architecture)


def _import_ours(work: str) -> None:
    """Imports what our side needs."""
    if work == "train":
        import core.speed.our_steps
        from core.training.host_memory import keep_freed_memory

        keep_freed_memory()  # as `core.fit` does
    else:
        import core.speed.our_decoding  # noqa: F401


def _measured(request: dict[str, Any], variant: str) -> dict[str, Any]:
    """The measurements of one side in one variant, or the error that it ends with."""
    from core.speed.errors import in_a_word

    try:
        return _runs_of(request, variant)
    except Exception as cause:  # whatever it raises is the answer
        return {"error": in_a_word(cause)}


def _runs_of(request: dict[str, Any], variant: str) -> dict[str, Any]:
    """Builds the model, runs it some times, and measures both."""
    import torch

    from core.recipe.compose import compose
    from core.speed.resident import PeakMemory
    from core.speed.task import COMPILED
    from core.speed.turns import seconds_of

    device = torch.device(request["device"])
    recipe = compose(request["recipe"], request["overrides"], trust=request["trust"])
    make = _side(request, recipe, device)
    peak = PeakMemory(device)
    began = time.perf_counter()
    side = make()
    if request["side"] == "theirs":
        side.use(variant)
    built = time.perf_counter() - began
    seconds = [seconds_of(side.run, device)]
    if seconds[0] <= request["give_up"] or variant.endswith(COMPILED):
        seconds += [seconds_of(side.run, device) for _ in range(RUNS - 1)]
    return {
        "build_seconds": built,
        "first_seconds": seconds[0],
        "seconds": min(seconds[1:] or seconds),
        "peak_bytes": peak.bytes(),
        "state_bytes": _held(side.weights, side.optimizers),
    }


def _side(request: dict[str, Any], recipe: "Recipe", device: "torch.device") -> Any:
    """What builds the model of one side; modules and tokens are there already."""
    import torch

    folder = None
    if request["side"] == "theirs":
        from core.speed.peer import PeerFolder

        dtype = getattr(torch, request["dtype"])
        folder = PeerFolder(Path(request["folder"]), dtype, request["architecture"])
    if request["work"] == "train":
        return _training(recipe, device, folder)
    return _decoding(recipe, device, folder, request["text"])


def _training(recipe: "Recipe", device: "torch.device", folder: Any) -> Any:
    """What builds a model that trains; without a folder ours."""
    from core.analysis.budget import plan_of
    from core.speed.batches import step_batches
    from core.speed.our_steps import OurSteps
    from core.speed.peer import PeerSteps

    batches = step_batches(recipe, device)
    if folder is not None:
        return lambda: PeerSteps(folder, recipe, batches, device)
    plan = plan_of(recipe)
    return lambda: OurSteps(recipe, batches, device, plan)


def _decoding(recipe: "Recipe", device: "torch.device", folder: Any, text: dict[str, Any]) -> Any:
    """What builds a model that decodes; without a folder ours."""
    from core.speed.our_decoding import OurDecoding
    from core.speed.peer_decoding import PeerDecoding
    from core.speed.task import Text

    if folder is not None:
        return lambda: PeerDecoding(folder, recipe, Text(**text), device)
    return lambda: OurDecoding(recipe, Text(**text), device)


def _held(weights: "list[torch.nn.Parameter]", optimizers: "list[torch.optim.Optimizer]") -> int:
    """The bytes of weights; in training also of gradients as large, and of the optimizers' states."""
    copies = 2 if optimizers else 1
    held = sum(copies * weight.numel() * weight.element_size() for weight in weights)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for tensor in state.values():
                held += tensor.numel() * tensor.element_size()
    return held


if __name__ == "__main__":
    main()
