"""Generation with a model of a billion parameters: equality with the full forward, and speed beside transformers.

A call reads a prompt and writes tokens, at batch 1 and 16. transformers is timed with its usual cache, and with its
static cache, which it compiles; each with the implementation of experts that is faster in a short call. The times of
`first` are those of the very first call in this process: libraries, kernels, recording or compiling included.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import core
from benchmarks.on_gpu.compare import calc_diff
from benchmarks.on_gpu.measure import Lab, attempt, failed, in_turns, ratio, wait
from benchmarks.on_gpu.shapes import SHAPES, Stepper, share
from benchmarks.on_gpu.theirs import export, implementations
from core.generation.completion import complete
from core.generation.decoder import Decoder
from core.model.language_model import LanguageModel

SHAPE = "1b_mla"
BATCHES = (1, 16)
STATIC = ("grouped_mm", "batched_mm")
"""The implementations of experts that are tried with the static cache: the plain loop cannot be compiled whole."""


@dataclass(frozen=True)
class Call:
    """What is asked for.

    Args:
        prompt: tokens of each prompt.
        tokens: tokens that are written after it.
    """

    prompt: int
    tokens: int

    @classmethod
    def of(cls, lab: Lab) -> "Call":
        """The call of issue 22, or a short one."""
        return cls(24, 5) if lab.quick else cls(1000, 65)

    def prompts(self, rows: int, vocabulary: int, device: str) -> Tensor:
        """Random prompts."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(vocabulary, (rows, self.prompt), generator=generator).to(device)


@torch.no_grad()
def run(lab: Lab) -> dict[str, Any]:
    """First calls, then equality with the full forward, then calls in turns."""
    call = Call.of(lab)
    precision = "{name: bf16}" if lab.device == "cuda" else "{name: fp32}"
    recipe = SHAPES[SHAPE].compose(precision, quick=lab.quick)
    stepper = Stepper.of(recipe, lab.device, compiled=False)
    model = stepper.model.eval()
    found: dict[str, Any] = {"call": vars(call)}
    vocabulary = recipe.data.tokenizer.vocab
    found["first"] = _first_call(lab, model, call.prompts(1, vocabulary, lab.device))
    lab.keep(found)
    exact = core.build(SHAPES[SHAPE].compose("{name: fp32}", quick=lab.quick), device="meta")
    share(exact, model)
    prompts_BL = call.prompts(3, vocabulary, lab.device)
    found["equality"] = attempt(_equality, exact.eval(), model, prompts_BL)
    lab.keep(found)
    with TemporaryDirectory() as scratch:
        export(recipe, stepper, Path(scratch))
        for rows in BATCHES:
            prompts_BL = call.prompts(rows, vocabulary, lab.device)
            found[f"batch_{rows}"] = attempt(_beside, lab, call, model, prompts_BL, Path(scratch))
            lab.keep(found)
    return found


def _ours(model: LanguageModel, prompts_BL: Tensor, tokens: int) -> list[list[int]]:
    """The tokens that our model writes."""
    prompts = prompts_BL.tolist()
    completions = complete(model, prompts, tokens=tokens, batch=len(prompts))
    return [completion.tokens for completion in completions]


def _first_call(lab: Lab, model: LanguageModel, prompts_BL: Tensor) -> dict[str, float]:
    """Seconds of the first call for one token, of the first for several, and of the next one for one token."""
    seconds = {}
    for label, tokens in {"token": 1, "call": 5, "next_token": 1}.items():
        begin = time.perf_counter()
        _ours(model, prompts_BL, tokens)
        wait(lab.device)
        seconds[label] = round(time.perf_counter() - begin, 4)
    return seconds


def _equality(exact: LanguageModel, model: LanguageModel, prompts_BL: Tensor) -> dict[str, Any]:
    """Decoded logits beside the full forward's: the largest difference in fp32, and the calc_diff in bf16."""
    found: dict[str, Any] = {}
    for label, one in {"fp32": exact, "compute format": model}.items():
        decoded, full = _decoded(one, prompts_BL), one.logits(prompts_BL)
        last = decoded.shape[1]
        full = full[:, -last:].double()
        largest = float(full.abs().max())
        found[label] = {
            "difference": float((decoded.double() - full).abs().max()) / largest,
            "calc_diff": calc_diff(decoded, full),
        }
    return found


def _decoded(model: LanguageModel, tokens_BL: Tensor) -> Tensor:
    """The logits of the last tokens, which come one by one, then three at once, from rows of different lengths so far.

    Rows are cut and filled again, so that they had different lengths; the logits are those of the last 5 tokens.
    """
    rows, length = tokens_BL.shape
    decoder = Decoder(model, rows, length + 16, tokens_BL.device)
    before = length - 8
    decoder.prefill(tokens_BL[:, :before].tolist())
    decoder.truncate([before - row for row in range(rows)])
    refilled = torch.stack([tokens_BL[row, before - row : before - row + 3] for row in range(rows)])
    decoder.step(refilled, list(range(rows)))
    for place in range(before, before + 3):
        decoder.step(tokens_BL[:, place : place + 1])
    ones = [decoder.step(tokens_BL[:, place : place + 1]) for place in (length - 5, length - 4)]
    three = decoder.step(tokens_BL[:, length - 3 :])
    return torch.cat([one.logits_BLV for one in (*ones, three)], dim=1)


# ---- beside transformers


def _beside(
    lab: Lab, call: Call, model: LanguageModel, prompts_BL: Tensor, folder: Path
) -> dict[str, Any]:
    """Seconds of whole calls, in turns, and how often each of theirs writes our tokens."""
    found: dict[str, Any] = {"left_out": {}, "first": {}}
    versions: dict[str, Callable[[], Any]] = {"ours": lambda: _ours(model, prompts_BL, call.tokens)}
    written = _ours(model, prompts_BL, call.tokens)
    plain = _fastest(lab, folder, implementations(), prompts_BL, {}, found)
    static = _fastest(lab, folder, STATIC, prompts_BL, {"cache_implementation": "static"}, found)
    for label, chosen in {"transformers": plain, "transformers static": static}.items():
        if chosen is None:
            continue
        begin = time.perf_counter()
        theirs = _continue(chosen, prompts_BL, call.tokens)
        found["first"][label] = round(time.perf_counter() - begin, 3)
        found.setdefault("same_tokens", {})[label] = _share_of_equal(written, theirs)
        versions[label] = lambda chosen=chosen: _continue(chosen, prompts_BL, call.tokens)
    rounds = {"rounds": 2, "warm": 1} if lab.quick else {"rounds": 7, "warm": 2}
    seconds = in_turns(versions, lab.device, **rounds)
    found["seconds"] = seconds
    found["ratios"] = {name: ratio(seconds[name], seconds["ours"]) for name in seconds}
    return found


@dataclass(frozen=True)
class _Theirs:
    """A model of transformers and the options of `generate`."""

    model: Any
    options: dict[str, Any]


def _fastest(
    lab: Lab,
    folder: Path,
    experts: Any,
    prompts_BL: Tensor,
    options: dict[str, Any],
    found: dict[str, Any],
) -> _Theirs | None:
    """Their model with the implementation of experts whose second call for a few tokens is the shortest."""
    best: tuple[float, _Theirs] | None = None
    for name in experts:
        tried = attempt(_tried, lab, folder, name, prompts_BL, options)
        if isinstance(tried, dict):
            found["left_out"][" ".join([name, *options.values()])] = failed(tried)
        elif best is None or tried[0] < best[0]:
            best = tried
    return None if best is None else best[1]


def _tried(
    lab: Lab, folder: Path, experts: str, prompts_BL: Tensor, options: dict[str, Any]
) -> tuple[float, _Theirs]:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if lab.device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=experts, attn_implementation="sdpa"
    )
    made = _Theirs(model.to(lab.device).eval(), options)
    for _ in range(2):
        wait(lab.device)
        begin = time.perf_counter()
        _continue(made, prompts_BL, 9)
        wait(lab.device)
        seconds = time.perf_counter() - begin
    return seconds, made


def _continue(theirs: _Theirs, prompts_BL: Tensor, tokens: int) -> list[list[int]]:
    """The tokens that their model writes, greedily; no token ends the text."""
    written = theirs.model.generate(
        prompts_BL,
        attention_mask=torch.ones_like(prompts_BL),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **theirs.options,
    )
    result: list[list[int]] = written[:, prompts_BL.shape[1] :].tolist()
    return result


def _share_of_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens before the first difference, over all rows."""
    same = 0
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            if a != b:
                break
            same += 1
    return same / sum(len(one) for one in ours)


# ---- the table


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table."""
    first = found["first"]
    table = [("first token after start-up", f"{first['token']:.2f} s")]
    table += [("first call of 5 tokens", f"{first['call']:.2f} s")]
    table += [("next first token", f"{first['next_token'] * 1e3:.0f} ms")]
    if sentence := failed(found["equality"]):
        table += [("equality", f"failed: {sentence}")]
    else:
        for label, figures in found["equality"].items():
            table += [(f"equality with the full forward, {label}", f"{figures['difference']:.1e}")]
    for batch in BATCHES:
        part = found[f"batch_{batch}"]
        if sentence := failed(part):
            table += [(f"batch {batch}", f"failed: {sentence}")]
            continue
        for label, seconds in part["seconds"].items():
            tokens = batch * found["call"]["tokens"] / seconds["median"]
            over = part["ratios"][label]
            figure = f"{seconds['median']:.3f} s, {tokens:,.0f} tokens/s; ours is {over['median']:.2f}x as fast"
            table += [
                (f"batch {batch}: {label}", f"{figure} ({over['least']:.2f}-{over['most']:.2f})")
            ]
    return table
