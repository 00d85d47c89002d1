"""The modules of Transformer Engine that this package uses, and the reason if one cannot be used.

Nothing of it is imported before a product runs on a GPU, or `fit` checks whether one could: describing, loading and
sampling need no Transformer Engine. Written against its 2.13 to 2.20.
"""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

from core.contracts.component import Environment
from core.contracts.errors import UserError

INSTALL = (
    "install it with `pip install --no-build-isolation 'moeloom[fp8]'` where nvcc and cuDNN are"
)


@dataclass(frozen=True)
class Scaling:
    """One way to scale, as Transformer Engine offers it.

    Args:
        recipe: name of the class in `transformer_engine.common.recipe`.
        tile: number of which rows and widths are multiples.
        capability: lowest compute capability.
        cuda: lowest CUDA version of torch.
    """

    recipe: str
    tile: int
    capability: tuple[int, int]
    cuda: tuple[int, int]


SCALINGS = {
    "block": Scaling("Float8BlockScaling", 16, (9, 0), (12, 9)),
    "current": Scaling("Float8CurrentScaling", 16, (8, 9), (12, 1)),
    "delayed": Scaling("DelayedScaling", 16, (8, 9), (12, 1)),
    "mxfp8": Scaling("MXFP8BlockScaling", 32, (10, 0), (12, 8)),
}


def pytorch() -> Any:
    """The module `transformer_engine.pytorch`.

    Raises:
        UserError: it is not installed, or has no compiled part that works here.
    """
    return _module("transformer_engine.pytorch")


def recipes() -> Any:
    """The module `transformer_engine.common.recipe`; raises as `pytorch` does."""
    return _module("transformer_engine.common.recipe")


def present() -> bool:
    """Whether Transformer Engine is installed and works; without it layers take plain products."""
    try:
        pytorch()
    except UserError:
        return False
    return True


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of a missing compiled part, and then raises
            return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if (cause.name or "").partition(".")[0] == "transformer_engine":
            raise UserError(f"Transformer Engine is not installed: {INSTALL}") from cause
        raise UserError(
            f"Transformer Engine lacks the package {cause.name}: install that too"
        ) from cause
    except (
        Exception
    ) as cause:  # RuntimeError, FileNotFoundError, OSError and others, by version and problem
        message = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise UserError(
            f"Transformer Engine has no compiled part that works here ({message}): {INSTALL}"
        ) from cause


def unmet_requirement(name: str, environment: Environment) -> str | None:
    """Why a way to scale cannot run in an environment, as one sentence; None if it can."""
    scaling = SCALINGS[name]
    if environment.device != "cuda" or environment.capability is None:
        return (
            "Transformer Engine needs an NVIDIA GPU, and there is none; "
            "precision fp8_emulated multiplies in the same formats on any machine"
        )
    if environment.capability < scaling.capability:
        return (
            f"scaling {name} needs compute capability {_dotted(scaling.capability)} or higher, and this GPU has "
            f"{_dotted(environment.capability)}; {_alternative(environment.capability)}"
        )
    if name == "mxfp8" and environment.capability >= (12, 0):
        return (
            "scaling mxfp8 has no kernels for compute capability 12.0 and higher, and this GPU has "
            f"{_dotted(environment.capability)}; scaling current runs there"
        )
    if environment.cuda is None or _version(environment.cuda) < scaling.cuda:
        return (
            f"scaling {name} needs CUDA {_dotted(scaling.cuda)} or higher, and torch was built with "
            f"{environment.cuda or 'none'}"
        )
    try:
        pytorch()
    except UserError as absent:
        return str(absent)
    return None


def _alternative(capability: tuple[int, int]) -> str:
    """The scaling or format that a GPU of this compute capability can run, as the end of a sentence."""
    fitting = [name for name, scaling in SCALINGS.items() if scaling.capability <= capability]
    if fitting:
        return f"scaling {fitting[0]} runs there"
    return "it has no FP8 at all, but bf16 runs there"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
