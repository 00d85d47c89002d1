"""What all doors share: one sentence and exit code 2 for a user's mistake, 130 after an interrupt.

This module and every door import nothing heavy before their arguments are read, so that `--help` is quick.
"""

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from core.contracts.errors import Interrupted, RunFailed, UserError


def run_door(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse, run, and leave with the exit code that the public surface promises."""
    arguments = _parsed(parser)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        with _told_warnings():
            main(arguments)
    except UserError as error:
        leave(2, str(error))
    except RunFailed as error:
        leave(1, str(error))
    except KeyboardInterrupt:
        leave(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141, "")
    except Interrupted as stopped:
        leave(128 + stopped.signum, str(stopped))
    except Exception:
        traceback.print_exc()
        leave(1, "")
    finally:
        signal.signal(signal.SIGTERM, before)


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; options may stand among the overrides, where the parser has no commands of its own."""
    try:
        return parser.parse_intermixed_args()
    except TypeError:
        return parser.parse_args()


@contextmanager
def _told_warnings() -> Iterator[None]:
    """Our own warnings are one line, and never an error: they are about what nobody asked for."""
    theirs = warnings.formatwarning

    def ours(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if category.__module__.partition(".")[0] == "core":
            return f"moeloom: warning: {' '.join(str(message).split())}\n"
        return theirs(message, category, *where, **line)

    warnings.formatwarning = ours
    try:
        with warnings.catch_warnings():
            if any(action == "error" for action, *_ in warnings.filters):
                warnings.filterwarnings("default", module=r"core\.extension\.")
            yield
    finally:
        if warnings.formatwarning is ours:
            warnings.formatwarning = theirs


def _terminated(signum: int, frame: FrameType | None) -> None:
    """Before a run has begun there is nothing to save."""
    raise SystemExit(128 + signum)


def leave(code: int, sentence: str) -> None:
    """Print one sentence on stderr and exit."""
    if sentence:
        print(f"moeloom: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(code)


def print_json(document: Any) -> None:
    """The one JSON document of a `--json` run."""
    print(json.dumps(document, indent=2, allow_nan=False))


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, e.g. optimizer.lr=0.002")
