"""How fast texts are continued: our whole call beside transformers' `generate`, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from core.contracts.errors import UserError
from core.speed.our_decoding import OurDecoding
from core.speed.peer_decoding import PeerDecoding, decoding_variants
from core.speed.profiling import profiled
from core.speed.sides import Sides
from core.speed.task import OURS, Task, Text, size_of
from core.speed.turns import in_turns
from core.speed.variants import Variants, against_peer, choose, exported, measured_apart

CONTEXT = 1000
NEW = 64
"""Tokens of each prompt, and tokens that are written after it, unless the options say otherwise."""

TIE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of the two best logits at which both sides may choose different tokens, by format."""


def text_of(task: Task, rows: int, context: int | None, new: int) -> Text:
    """The text that a model continues.

    Args:
        task: the model.
        rows: sequences that are decoded together.
        context: tokens of each prompt; None: `CONTEXT`, or as many as the model reads before the new ones.
        new: tokens that are written.

    Raises:
        UserError: the model does not read so many.
    """
    most = task.measured.recipe.model.rope.max_length - new
    if context is None:
        context = min(CONTEXT, most)
    if not 1 <= context <= most:
        name = task.measured.shape.name
        raise UserError(
            f"--context {context} with --new-tokens {new}: {name} reads model.rope.max_length = {most + new} "
            "tokens, and one of them at least is the prompt"
        )
    return Text(rows, context, new)


def decoding_row(task: Task, text: Text, *, prefill: bool) -> dict[str, Any]:
    """One row of `core.bench`: whole calls that continue prompts.

    Args:
        task: the model.
        text: what is continued.
        prefill: measure the first token alone.
    """
    recipe = task.measured.recipe
    if prefill:
        text = replace(text, new=1)
    ours = OurDecoding(recipe, text, task.device)
    tokens = text.rows * (text.context if prefill else text.new)
    with tempfile.TemporaryDirectory(prefix="moeloom-bench-") as folder:
        variants = exported(task, ours.model, Path(folder))
        sides = Sides(task, variants.folder, {"work": "decode", "text": asdict(text)})
        own = sides.ours()
        written: dict[str, Any] = {}
        if variants.folder is not None:
            theirs = PeerDecoding(variants.folder, recipe, text, task.device)
            choose(task, variants, decoding_variants(prefill=prefill), theirs, sides, own)
            _drop_others(variants, ours, written)
        versions: dict[str, Callable[[], Any]] = {OURS: ours.run, **variants.timed}
        turns = in_turns(versions, task.device, seconds=task.seconds, fewest=task.fewest)
        row = {
            "what": "prefill" if prefill else "decode",
            "name": f"{task.measured.shape.name}, {text.rows} x ({text.context} + {text.new})",
            "size": {
                **size_of(task.measured, ours.model),
                "batch": text.rows,
                "length": text.context,
                "new_tokens": text.new,
            },
            "tokens_per_second": tokens / turns.median(OURS),
            "seconds": turns.median(OURS),
            **against_peer(turns, variants, tokens),
            "texts": written,
            "fraction_of_limit": None,
            "rounds": len(turns.seconds[OURS]),
            "notes": list(task.measured.notes),
        }
        row |= measured_apart(row, variants, sides, own)
    if task.profile is not None:
        name = f"{row['what']} {row['name']}"
        row["profile"] = profiled(ours.run, task.device, task.profile, name)
    return row


def _drop_others(variants: Variants, ours: OurDecoding, written: dict[str, Any]) -> None:
    """Leaves out the variants that write another text; notes how far each text is the same.

    Args:
        variants: what would be timed.
        ours: our model.
        written: receives, for each variant, the tokens that are equal and the smallest gap at a difference.
    """
    assert variants.folder is not None
    own = ours.run()
    allowed = TIE[variants.folder.dtype]
    for name, run in list(variants.timed.items()):
        same, gap = compare_texts(own, run(), ours.gap)
        written[name] = {"equal_tokens": same, "gap_at_difference": gap}
        if gap is not None and gap > allowed:
            del variants.timed[name]
            variants.left_out[name] = (
                f"another text: the two best logits differ by {gap:.1e}, more than {allowed:.0e}"
            )
    if not variants.timed and variants.why_not is None:
        variants.why_not = "no variant of the peer runs here and writes the same text"


def compare_texts(
    own: list[list[int]], other: list[list[int]], gap: Callable[[int, list[int]], float]
) -> tuple[int, float | None]:
    """How many tokens are equal before each row's first difference, and the largest gap at such a difference.

    Args:
        own, other: token ids of each row.
        gap: the difference of the two largest logits after a row's prompt and some tokens.

    Returns:
        The number over all rows; the gap, None if all texts are equal.
    """
    equal = 0
    gaps = []
    for row, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        first = len(mine)
        for index, (one, two) in enumerate(zip(mine, theirs, strict=True)):
            if one != two:
                first = index
                gaps.append(gap(row, mine[:index]))
                break
        equal += first
    return equal, max(gaps, default=None)
