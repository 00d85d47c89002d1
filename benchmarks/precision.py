"""python benchmarks/precision.py [RECIPE] [KEY=VALUE ...]: time and memory of a training step in each precision.

Time: every precision takes one step (forward, backward, AdamW) on the same batch in each round, in an order that
changes from round to round. The result is the ratio to the first precision's time *in the same round*, so that other
work of the machine affects both. Memory: bytes that a forward keeps for its backward, without weights; a storage counts
once.
"""

import argparse
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import core
from core.assemble import make
from core.command import print_json, run_command
from core.contracts.component import Environment
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.precision import HIGH
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from core.numerics.linear import ProductLayer
from core.recipe.compose import Recipe
from core.training.window import step_loss

PRECISIONS = (
    "{name: fp32}",
    "{name: bf16_emulated}",
    "{name: fp8_emulated}",
    "{name: fp8_emulated, e5m6: []}",
    "{name: fp8_emulated, weight_gradient: te}",
    "{name: fp8_emulated, gradients: e5m2}",
    "{name: fp8_emulated, scaling: tensor}",
    "{name: fp8_emulated, scaling: delayed}",
    "{name: fp8_emulated, scaling: mxfp8}",
)
SHARES = ("inputs of low layers", "weights of low layers", "everything else")
"""The groups in which saved bytes are counted. Low layers are those that FP8 precisions compute in low precision by
default; what other layers keep as well would stay without them, and belongs to the last group."""


def parser() -> argparse.ArgumentParser:
    """The command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/precision.py", description="What precisions cost."
    )
    p.add_argument(
        "recipe", nargs="?", default="dsv3_small", metavar="RECIPE", help="default: dsv3_small"
    )
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides for all, but for precision"
    )
    help_text = "a section of a recipe, '{name: fp8_native}'; may be repeated; the others are compared with the first"
    p.add_argument("--precision", action="append", metavar="SECTION", help=help_text)
    p.add_argument(
        "--rounds",
        type=int,
        default=9,
        metavar="N",
        help="steps of each that are timed (default: 9)",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Measures, then prints.

    Raises:
        UserError: a recipe or precision is invalid, or cannot run on this machine.
    """
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: must be at least 1")
    found = measure(
        arguments.recipe,
        arguments.overrides,
        arguments.precision or PRECISIONS,
        rounds=arguments.rounds,
        device=arguments.device,
    )
    if arguments.json:
        print_json(found)
    else:
        show(found)


def measure(
    recipe: str,
    overrides: list[str],
    precisions: tuple[str, ...] | list[str],
    *,
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """Seconds of each round, ratios to the first precision with median and range, and saved bytes by share."""
    recipes = {text: core.compose(recipe, [*overrides, f"precision={text}"]) for text in precisions}
    for text, own in recipes.items():
        if obstacle := own.precision.component.requires(own.precision.config, _environment(device)):
            raise UserError(f"precision {text}: {obstacle}")
    kept = {text: saved_bytes(own, device) for text, own in recipes.items()}
    seconds = step_seconds(recipes, rounds, device)
    first = next(iter(recipes))
    rows = {}
    for text in recipes:
        ratios = [own / base for own, base in zip(seconds[text], seconds[first], strict=True)]
        rows[text] = {
            "seconds": seconds[text],
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_most": max(ratios),
            "saved_bytes": kept[text],
            "saved_bytes_total": sum(kept[text].values()),
        }
    one = recipes[first]
    shape = {"sequences": one.batch.sequences, "length": one.data.sequence_length}
    about = {
        "torch": torch.__version__,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }
    return {
        "recipe": recipe,
        "overrides": overrides,
        **shape,
        **about,
        "rounds": rounds,
        "precisions": rows,
    }


def _environment(device: str) -> Environment:
    if device == "cpu":
        return Environment("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU that torch can use")
    return Environment("cuda", torch.cuda.get_device_capability(), torch.version.cuda)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def batch_of(recipe: Recipe, device: str) -> SequenceContext:
    """One micro-batch of random tokens, which routers balance no better than real ones."""
    size = (recipe.batch.sequences, recipe.data.sequence_length + 1)
    tokens_BM = torch.randint(
        recipe.data.tokenizer.vocab, size, generator=torch.Generator().manual_seed(0)
    ).to(device)
    return SequenceContext.of(tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:])


# ---- time


def step_seconds(recipes: dict[str, Recipe], rounds: int, device: str) -> dict[str, list[float]]:
    """The seconds of every precision in each round, after one round that is not counted."""
    steps = {text: stepper(recipe, device) for text, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {text: [] for text in recipes}
    names = list(recipes)
    for turn in range(rounds + 1):
        for text in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            began = _now(device)
            steps[text]()
            if turn:
                seconds[text].append(_now(device) - began)
    return seconds


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def stepper(recipe: Recipe, device: str) -> Callable[[], None]:
    """A function that takes one optimizer step of a new model."""
    model, context = core.build(recipe).to(device).train(), batch_of(recipe, device)
    factory = make(recipe.optimizer)
    optimizer = factory.make(named_parameters(model))

    def step() -> None:
        loss_of(model, context).backward()
        optimizer.step()
        optimizer.zero_grad()
        for state in model.step_states().values():
            state.end_step(done=True)

    return step


def loss_of(model: LanguageModel, context: SequenceContext) -> Tensor:
    """The training loss: every loss term and balance loss, at the beginning of a run."""
    progress = Progress(step=1, tokens=context.tokens_BL.numel(), total_steps=100, total_tokens=0)
    return step_loss(model, context, progress)


# ---- memory


def saved_bytes(recipe: Recipe, device: str) -> dict[str, int]:
    """Bytes that one micro-batch's forward keeps for the backward, by `SHARES`."""
    model, context = core.build(recipe).to(device).train(), batch_of(recipe, device)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[str, int]] = {}
    holding: list[Tensor] = []  # a storage that is freed would give its address to another
    with _inside_low_layers(model) as share_of:

        def pack(tensor: Tensor) -> Tensor:
            holding.append(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                share, before = share_of(tensor), kept.get(storage.data_ptr())
                kept[storage.data_ptr()] = (
                    SHARES[2] if before and before[0] != share else share,
                    storage.nbytes(),
                )
            return tensor

        plain = patch("core.numerics.compiling.is_eager_on_cpu", return_value=False)
        with plain, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, context)
    total = Counter(dict.fromkeys(SHARES, 0))
    for share, size in kept.values():
        total[share] += size
    return dict(total)


@contextmanager
def _inside_low_layers(model: LanguageModel) -> Iterator[Callable[[Tensor], str]]:
    """A function that gives the group of `SHARES` of a tensor that is being saved."""
    rows: list[int] = []

    def enter(_: Any, arguments: tuple[Tensor, ...]) -> None:
        rows.append(arguments[0].shape[:-1].numel())

    def leave(*_: Any) -> None:
        rows.pop()

    handles = []
    for layer in model.modules():
        if isinstance(layer, ProductLayer) and layer.role not in HIGH:
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    def share_of(tensor: Tensor) -> str:
        if not rows or tensor.ndim < 2:
            return SHARES[2]
        return SHARES[0] if tensor.shape[:-1].numel() == rows[-1] else SHARES[1]

    try:
        yield share_of
    finally:
        for handle in handles:
            handle.remove()


def show(found: dict[str, Any]) -> None:
    """Prints the table of docs/precision.md."""
    print(
        f"{found['recipe']}, {found['sequences']} x {found['length']} tokens, {found['device']}, "
        f"{found['threads']} threads, torch {found['torch']}, {found['rounds']} rounds; MB = 10^6 bytes"
    )
    heads = ("precision", "ratio", "range", "inputs MB", "weights MB", "all MB", "of the first")
    first = next(iter(found["precisions"].values()))["saved_bytes_total"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for text, row in found["precisions"].items():
        inputs, weights = (f"{row['saved_bytes'][share] / 1e6:.1f}" for share in SHARES[:2])
        spread = f"{row['ratio_least']:.2f}-{row['ratio_most']:.2f}"
        total = row["saved_bytes_total"]
        cells = (f"`{text}`", f"{row['ratio']:.2f}", spread, inputs, weights, f"{total / 1e6:.1f}")
        print(f"| {' | '.join(cells)} | {total / first:.0%} |")


if __name__ == "__main__":
    run_command(main, parser())
