"""The exceptions that a command prints as one sentence instead of a traceback.

Every command prints a `UserError` and exits with code 2. `ConfigError` is what a component raises from
`Config.check`: it knows its own key and what is allowed, not the place of its section; `core.recipe` adds the
file, the path and the value.
"""

import signal
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave; the message is one sentence that names it and what is allowed."""


class NotFiniteError(UserError):
    """A number that must be finite and is NaN or infinite: of a weight, a prediction or a score."""


class ConfigError(Exception):
    """A value of one key of a component's `Config` that is not allowed.

    Args:
        key: the field of the `Config` that is at fault.
        why: what is allowed, as the end of a sentence ("must divide experts = 16").
    """

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key
        self.why = why


class SectionError(UserError):
    """A key that a component's constructor does not accept; `core.assemble` adds the path of its section.

    Args:
        section: the component's section of the recipe.
        error: what the constructor raised.
    """

    def __init__(self, section: Any, error: ConfigError) -> None:
        super().__init__(f"{section.slot} {section.name}: {error}")
        self.section = section
        self.error = error


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the closest known names, then all of them."""
    names = sorted(known)
    if not names:
        return "nothing is allowed here"
    close = get_close_matches(name, names, n=2, cutoff=0.6)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{guess}known: {', '.join(names)}"


class RunFailed(Exception):  # noqa: N818
    """A run that cannot go on; the message is one sentence, and what it saved stays as it is (exit code 1)."""


class StoppedBySignal(SystemExit):
    """A signal ended a command before there was anything to save (exit code 128 + the signal's number).

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Interrupted(Exception):  # noqa: N818 - not an error: the run ended as requested
    """A signal stopped the run, which has saved its state (exit code 128 + the signal's number).

    Args:
        signum: the signal.
        step: the last step that is done.
        folder: the run folder.
        saved: whether the step is saved; a run without checkpoints saves none.
    """

    def __init__(self, signum: int, step: int, folder: Path, *, saved: bool = True) -> None:
        name = signal.Signals(signum).name
        end = f"which is saved; continue with --resume {folder}"
        if not saved:
            end = f"and nothing is saved, as checkpoint.every_steps is null; {folder} has its log"
        super().__init__(f"stopped by {name} after step {step}, {end}")
        self.signum = signum
