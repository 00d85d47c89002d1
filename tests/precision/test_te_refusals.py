"""Errors of te_fp8, and when: those of the recipe at validation, those that only the device shows before any work."""

import builtins
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import CommandResult, Lab

from core.contracts.component import Environment
from core.contracts.errors import UserError
from plugins.te_fp8 import engine
from plugins.te_fp8.precision import TransformerEngineFP8

from . import te_standin
from .test_te_wiring import SIXTEENS, TE

HOPPER, BLACKWELL = (9, 0), (10, 0)


def needs(scaling: str, environment: Environment) -> str | None:
    return TransformerEngineFP8.requires(TransformerEngineFP8.Config(scaling=scaling), environment)


@pytest.mark.parametrize(
    ("scaling", "capability", "cuda", "sentence"),
    [
        ("block", (8, 9), "13.0", "scaling block needs compute capability 9.0 or higher, and this GPU has 8.9"),
        ("block", HOPPER, "12.8", "scaling block needs CUDA 12.9 or higher, and torch was built with 12.8"),
        ("mxfp8", HOPPER, "13.0", "scaling mxfp8 needs compute capability 10.0 or higher, and this GPU has 9.0; "
         "scaling block runs there"),
        ("mxfp8", (12, 0), "13.0", "scaling mxfp8 has no kernels for compute capability 12.0 and higher"),
        ("current", (8, 0), "13.0", "this GPU has 8.0; it has no FP8 at all, but bf16 runs there"),
        ("delayed", (8, 6), "13.0", "scaling delayed needs compute capability 8.9 or higher"),
        ("block", HOPPER, None, "scaling block needs CUDA 12.9 or higher, and torch was built with none"),
        ("block", HOPPER, "13.0", None),
        ("block", HOPPER, "12.9", None),
        ("block", BLACKWELL, "12.10", None),
        ("mxfp8", BLACKWELL, "12.9", None),
        ("mxfp8", (10, 3), "13.0", None),
        ("current", HOPPER, "12.4", None),
        ("delayed", (8, 9), "12.1", None),
    ],
)  # fmt: skip
def test_what_a_device_must_have(
    monkeypatch: pytest.MonkeyPatch,
    scaling: str,
    capability: tuple[int, int],
    cuda: str | None,
    sentence: str | None,
) -> None:
    te_standin.install(monkeypatch)
    reason = needs(scaling, Environment("cuda", capability, cuda))
    assert (reason is None) if sentence is None else (reason is not None and sentence in reason), (
        reason
    )


@pytest.mark.parametrize("scaling", engine.SCALINGS)
def test_a_cpu_is_refused_before_transformer_engine_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, scaling: str
) -> None:
    monkeypatch.setattr(engine, "pytorch", lambda: pytest.fail("looked for"))
    reason = needs(scaling, Environment("cpu"))
    assert reason is not None
    assert "needs an NVIDIA GPU, and there is none; precision fp8_emulated" in reason


NO_LIBRARY = "Could not find shared object file for Transformer Engine core lib"
BROKEN: dict[str, tuple[Callable[[], Exception], str]] = {
    "absent": (
        lambda: ModuleNotFoundError("No module", name="transformer_engine"),
        "is not installed: install it",
    ),
    "RuntimeError": (
        lambda: RuntimeError("Found empty `transformer-engine` meta package\nand more"),
        "no compiled",
    ),
    "FileNotFoundError": (lambda: FileNotFoundError(NO_LIBRARY), NO_LIBRARY),
    "OSError": (
        lambda: OSError("libcublasLt.so.13: cannot open shared object file"),
        "(libcublasLt.so.13: cannot",
    ),
    "ImportError": (
        lambda: ImportError("undefined symbol: _ZN3c10"),
        "(undefined symbol: _ZN3c10)",
    ),
    "AssertionError": (lambda: AssertionError(), "(AssertionError)"),
    "its own needs": (
        lambda: ModuleNotFoundError("No module", name="pydantic"),
        "lacks the package pydantic",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_absent_or_broken_transformer_engine_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    make, sentence = BROKEN[broken]

    def failing(name: str) -> Any:
        assert name.startswith("transformer_engine")
        raise make()

    monkeypatch.setattr(importlib, "import_module", failing)
    reason = needs("block", Environment("cuda", HOPPER, "13.0"))
    assert reason is not None
    assert sentence in reason
    assert "\n" not in reason
    assert broken == "its own needs" or "pip install" in reason
    with pytest.raises(UserError, match=re.escape(sentence)):
        engine.recipes()


def test_nothing_else_asks_for_transformer_engine(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """te_fp8 is described and other precisions train while every import of it raises."""
    real = builtins.__import__

    def importing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("transformer_engine"):
            raise RuntimeError("no compiled part")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    result = lab.command("describe", lab.file, *TE, "--json")
    assert result.code == 0, result.err
    assert '"path": "Transformer Engine, Float8BlockScaling"' in result.out
    assert "needs an NVIDIA GPU" in result.out  # under runnable_here
    lab.fit(tmp_path / "run", "budget.steps=1")


# Through the commands


def failed_command(
    lab: Lab, command: str, *overrides: str, out: Path | None = None
) -> CommandResult:
    result = lab.command(command, lab.file, *overrides, *(["--out", str(out)] if out else []))
    assert result.code == 2, result.err
    assert out is None or not out.exists()
    return result


def test_fit_on_a_cpu_is_refused_before_any_work(lab: Lab, tmp_path: Path) -> None:
    result = failed_command(lab, "fit", *TE, out=tmp_path / "run")
    assert (
        "cannot run here: precision te_fp8: Transformer Engine needs an NVIDIA GPU"
        in result.sentence
    )


@pytest.mark.parametrize("command", ["fit", "describe"])
def test_widths_that_transformer_engine_cannot_take_are_refused(
    lab: Lab, command: str, tmp_path: Path
) -> None:
    """The small recipe's rotated key makes 20 outputs of 16 + 4."""
    out = tmp_path / "run" if command == "fit" else None
    result = failed_command(lab, command, "precision.name=te_fp8", out=out)
    expected = "attention.q_up has 24 outputs, and Transformer Engine takes multiples of 16 under scaling block"
    assert expected in result.sentence
    assert "name attention.q_up in precision.high" in result.sentence


def test_the_advice_helps(lab: Lab) -> None:
    high = "precision.high=[head, attention.q_up, attention.kv_down]"
    assert lab.command("describe", lab.file, "precision.name=te_fp8", high).code == 0


def test_mxfp8_takes_multiples_of_thirty_two(lab: Lab) -> None:
    result = failed_command(lab, "describe", *SIXTEENS, "precision={name: te_fp8, scaling: mxfp8}")
    assert (
        "attention.q_down has 16 outputs, and Transformer Engine takes multiples of 32"
        in result.sentence
    )


@pytest.mark.parametrize(
    ("overrides", "key", "sentence"),
    [
        (
            ("precision.high=[experts.upp]",),
            "precision.high.0",
            "is not a role; did you mean experts",
        ),
        (
            ("precision.scaling=delayed", "recompute.blocks=[moe]"),
            "recompute.blocks",
            "must be empty under precision te_fp8",
        ),
        (
            ("precision.scaling=current", "precision.scales=fp32"),
            "precision.scales",
            "must be ue8m0 unless scaling is block",
        ),
        (("precision.history=0",), "precision.history", "must be at least 1"),
        (
            ("strategy={name: single, accelerator: cpu}",),
            "strategy.accelerator = 'cpu'",
            "must not be cpu",
        ),
        (("precision.scaling=tile",), "precision.scaling", "block"),
    ],
)
def test_what_the_recipe_alone_shows_is_refused_at_validation(
    lab: Lab, overrides: tuple[str, ...], key: str, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        lab.recipe(*TE, *overrides)
    assert key in str(caught.value)
    assert sentence in str(caught.value)
