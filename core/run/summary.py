"""The summary of a finished run: its results under the names that `summary.json` promises."""

import math
from typing import Any

import torch

from core.analysis.size import Size
from core.data.module import TextData
from core.model.by_source import SOURCE
from core.run.divergence import DIVERGED
from core.training.host_memory import resident
from core.training.module import TrainingModule
from core.training.setup import RunCallbacks

AVERAGED = ("/val_loss", "/val_bits_per_byte")
"""How the names of those values of averaged weights end that a summary has; they begin with the average's name."""


def summarise(
    module: TrainingModule, data: TextData, size: Size, callbacks: RunCallbacks, notices: list[str]
) -> dict[str, Any]:
    """The run's results under the names that `summary.json` promises; null where something was not measured.

    Averaged weights that a callback keeps add `<average>/val_loss` and `<average>/val_bits_per_byte`.
    """
    values = module.validated
    acceptances = [value for name, value in values.items() if name.endswith("acceptance_1")]
    if not math.isfinite(values.get("val_loss", 0.0)):
        acceptances = []  # tokens were compared that no prediction had chosen
    tokens = module.plan.progress(module.windows_done - 1).tokens
    rate = tokens / module.seconds if module.seconds else None
    peak = callbacks.throughput.available_flops
    mfu = None
    if rate and peak:
        mfu = rate * size.flops_per_token / (peak * module.trainer.world_size)
    recent = callbacks.loads.recent
    results = {
        "steps": module.windows_done,
        "tokens": tokens,
        "epochs": data.epochs() * tokens / max(module.plan.tokens, 1),
        "sources": _by_source(data, values, tokens),
        "wall_seconds": module.wall_seconds,
        "train_seconds": module.seconds,
        "tokens_per_second": rate,
        "mfu": mfu,
        "peak_flops": peak,
        "peak_flops_source": callbacks.throughput.peak_source,
        "val_loss": values.get("val_loss"),
        "val_bits_per_byte": values.get("val_bits_per_byte"),
        "max_vio_global": values.get("val_max_vio_global"),
        "max_vio_batch": sum(recent) / len(recent) if recent else None,
        "dropped_fraction": module.dropped_fraction(),
        "mtp_acceptance": acceptances[0] if acceptances else None,
        "params_total": size.params_total,
        "params_mtp": size.params_heads,
        "params_active": size.params_active,
        "flops_per_token": size.flops_per_token,
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped_steps": module.skipped_steps,
        "validation_bytes": data.validation_bytes,
        "threads": torch.get_num_threads(),
        "precision_paths": module.model.kernels_used().table(),
        "notices": notices,
    }
    for name, value in values.items():
        if name.endswith(AVERAGED):
            results[name] = value
    return finite(results)


def _by_source(data: TextData, values: dict[str, float], tokens: int) -> dict[str, Any] | None:
    """The weight, epochs and validation of each part of a mixture; None for one corpus."""
    epochs = data.source_epochs(tokens)
    found = {}
    for name, weight in data.source_weights().items():
        losses = [value for key, value in values.items() if key.endswith(f"/{SOURCE}{name}")]
        found[name] = finite(
            {
                "weight": weight,
                "epochs": epochs[name],
                "val_loss": losses[0] if losses and data.source_bytes[name] else None,
                "val_bits_per_byte": values.get(f"val_bits_per_byte/{name}"),
            }
        )
    return found or None


def divergence(module: TrainingModule, sample_error: str | None, weight: str | None) -> str | None:
    """The notice that a run diverged: what is not finite, since which step, and what to try; None if it did not.

    A loss that was NaN in the last step alone is not a divergence if the validation after it is finite.

    Args:
        module: the module after its last step.
        sample_error: why no text could be sampled; None: it could.
        weight: a sentence about a weight that is not finite; None: all are.
    """
    found: list[str] = []
    if weight:
        found.append(weight)
    validated = _validated_losses(module)
    for name, value in validated.items():
        if not math.isfinite(value):
            found.append(f"{name} = {value}")
            break
    if sample_error:
        found.append(sample_error)
    loss = module.step_values.get("loss/total")
    if loss is not None and not math.isfinite(loss) and (found or not validated):
        since = module.not_finite_since
        found.insert(0, f"the training loss is {float(loss)} since step {since}")
    if not found:
        return None
    return f"{DIVERGED}{', '.join(found)}; try a lower optimizer.lr or a longer warm-up"


def _validated_losses(module: TrainingModule) -> dict[str, float]:
    """The losses of the last validation; a component's metrics are left out, since they may be infinite."""
    names = ["val_loss", *(f"val/{term.label}" for term in module.ledger.heads)]
    return {name: module.validated[name] for name in names if name in module.validated}


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same values with None in place of infinities and NaN, which JSON cannot hold."""
    found = {}
    for name, value in values.items():
        unwritable = isinstance(value, float) and not math.isfinite(value)
        found[name] = None if unwritable else value
    return found


def peak_memory_bytes() -> int:
    """The peak memory of this process in bytes: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident()[1]
